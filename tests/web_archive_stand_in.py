"""A small DICOMweb archive for tests, which answers in the shapes that the archives of several makers do.

Each shape is from its maker's conformance statement or source, as the comments say; the real Orthanc and the node's own
DICOMweb server are tested beside it.
"""

import json
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydicom import Dataset, dcmread

from tests.serving import Quiet, serving

STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
PLAIN = 'multipart/related; type="application/dicom"'


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How an archive differs. max_limit: the most it gives; refuses_more: 400 for who asks for more, else it is cut.

    says_there_is_more: by a Warning header. boundary, type_parameter: as in its Content-Type. accepts: the values of
    Accept that it takes for files, others are answered by 406. gives_series: else only Instances, one by one.
    """

    none_found: int = 200
    counts: Literal["always", "asked", "never"] = "always"
    names_study: bool = True
    knows_includefield: bool = True
    max_limit: int = 1000
    refuses_more: bool = False
    knows_offset: bool = True
    says_there_is_more: bool = False
    boundary: str = 'boundary="----=_Part_7_1"'
    type_parameter: str = 'type="application/dicom"'
    preamble: bytes = b""
    accepts: tuple[str, ...] = (STORED, PLAIN)
    gives_series: int = 200
    gives_metadata: bool = True
    gives_single_part: bool = False


# https://cloud.google.com/healthcare-api/docs/dicom and .../quotas: 5,000 Series at most; what is asked for without a
# transfer syntax is transcoded to 1.2.840.10008.1.2.1.
GOOGLE = Shape(max_limit=5000, boundary="boundary=3b9a1c", accepts=(STORED, PLAIN))
# microsoft/dicom-server, docs/resources/v2-conformance-statement.md: limit from 1 to 200, 204 for none, counts on
# request, one value of Accept only.
AZURE = Shape(none_found=204, counts="asked", max_limit=200, refuses_more=True, boundary='boundary="a1-b2"')
# dcm4chee-arc-light, QidoRS.java and issues 477 (204), 1715 (406 for a transfer syntax), 2367 (the Warning header).
DCM4CHEE = Shape(
    none_found=204,
    max_limit=2,
    says_there_is_more=True,
    boundary="boundary=----=_Part_12_1.2",
    accepts=(PLAIN,),
    preamble=b"\r\n",
)
# Older ones: no includefield, no count, no Study in a Series (UMEssen/DICOM-RST issue 18), type without quotes.
SPARE = Shape(
    counts="never",
    names_study=False,
    knows_includefield=False,
    max_limit=3,
    boundary="boundary=x",
    type_parameter="type=application/dicom",
    gives_metadata=False,
)
ONE_BY_ONE = Shape(gives_series=501, gives_single_part=True)


@dataclass
class StandIn:
    """The archive: what it holds, and what it was asked.

    faults: statuses that answer next, by a part of the path; 0 closes the connection.
    """

    shape: Shape = field(default_factory=Shape)
    files: dict[str, Path] = field(default_factory=dict)  # by SOP Instance UID
    asked: list[str] = field(default_factory=list)  # paths, with their query strings
    headers: list[dict[str, str]] = field(default_factory=list)
    faults: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    cut_after: int | None = None  # bytes of the next answer with a Series
    url: str = ""

    def hold(self, paths: list[Path]) -> None:
        self.files |= {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in paths}

    def asked_for_files(self) -> list[str]:
        """Of what files were given, since the last call."""
        found = [path for path in self.asked if "?" not in path and not path.endswith("/metadata")]
        self.asked.clear()
        return found

    @contextmanager
    def serving(self, tls: ssl.SSLContext | None = None) -> Iterator["StandIn"]:
        with serving(_handler(self), tls) as port:
            self.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/rs"
            yield self

    # ---- what it answers ----

    def answer(self, path: str, accept: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        for index, (part, status, headers) in enumerate(self.faults):
            if part in path:
                del self.faults[index]
                return status, headers, b""
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        place = parts.path.removeprefix("/rs/")
        if place == "series":
            return self._list(self._series(query), query, accept)
        if found := re.fullmatch(r"studies/([^/]+)/series/([^/]+)/instances", place):
            listed = [{"00080018": _ui(uid)} for uid, ds in self._datasets() if ds.SeriesInstanceUID == found[2]]
            return self._list(listed, query, accept)
        if found := re.fullmatch(r"studies/([^/]+)/series/([^/]+)/instances/([^/]+)/metadata", place):
            if not self.shape.gives_metadata:
                return 404, {}, b""
            ds = dcmread(self.files[found[3]], stop_before_pixels=True)
            return 200, {"Content-Type": "application/dicom+json"}, json.dumps([ds.to_json_dict()]).encode()
        if found := re.fullmatch(r"studies/([^/]+)/series/([^/]+)(/instances/([^/]+))?", place):
            return self._give(found[2], found[4], accept)
        return 404, {}, b""

    def _datasets(self) -> list[tuple[str, Dataset]]:
        return [(uid, dcmread(path, stop_before_pixels=True)) for uid, path in self.files.items()]

    def _series(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        first = query.get("StudyDate", ["-"])[0].removesuffix("-")
        counts: dict[str, int] = {}
        one_of: dict[str, Dataset] = {}
        for _, ds in self._datasets():
            if ds.Modality in query.get("Modality", [ds.Modality]) and ds.StudyDate >= first:
                counts[ds.SeriesInstanceUID] = counts.get(ds.SeriesInstanceUID, 0) + 1
                one_of[ds.SeriesInstanceUID] = ds
        listed = []
        for uid, ds in one_of.items():
            url = f"http://elsewhere/rs/studies/{ds.StudyInstanceUID}/series/{uid}"
            item: dict[str, Any] = {
                "00080020": {"vr": "DA", "Value": [ds.StudyDate]},
                "00080060": {"vr": "CS", "Value": [ds.Modality]},
                "00081190": {"vr": "UR", "Value": [url]},
                "0020000E": _ui(uid),
            }
            if self.shape.names_study:
                item["0020000D"] = _ui(ds.StudyInstanceUID)
            else:
                del item["00080020"]
            if self.shape.counts == "always" or (self.shape.counts == "asked" and "includefield" in query):
                item["00201209"] = {"vr": "IS", "Value": [counts[uid]]}
            listed.append(item)
        return listed

    def _list(
        self, listed: list[dict[str, Any]], query: dict[str, list[str]], accept: str
    ) -> tuple[int, dict[str, str], bytes]:
        limit, offset = int(query.get("limit", ["100"])[0]), int(query.get("offset", ["0"])[0])
        if accept != "application/dicom+json":
            return 406, {}, b""
        if (limit > self.shape.max_limit and self.shape.refuses_more) or (
            "includefield" in query and not self.shape.knows_includefield
        ):
            return 400, {}, b"not supported"
        start = offset if self.shape.knows_offset else 0
        page = listed[start : start + min(limit, self.shape.max_limit)]
        if not page and self.shape.none_found == 204:
            return 204, {}, b""
        headers = {"Content-Type": "application/dicom+json"}
        if self.shape.says_there_is_more and (more := len(listed) - start - len(page)) > 0:
            headers["Warning"] = f'299 archive:8080 "There are {more} additional results that can be requested"'
        return 200, headers, json.dumps(page).encode()

    def _give(self, series: str, instance: str | None, accept: str) -> tuple[int, dict[str, str], bytes]:
        if accept not in self.shape.accepts:
            return 406, {}, b""
        if instance is None:
            if self.shape.gives_series != 200:
                return self.shape.gives_series, {}, b""
            paths = [self.files[uid] for uid, ds in self._datasets() if ds.SeriesInstanceUID == series]
        else:
            paths = [self.files[instance]] if instance in self.files else []
        if not paths:
            return 404, {}, b""
        if instance is not None and self.shape.gives_single_part:
            return 200, {"Content-Type": "application/dicom"}, paths[0].read_bytes()
        boundary = self.shape.boundary.partition("=")[2].strip('"').encode()
        parts = [b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (boundary, p.read_bytes()) for p in paths]
        body = self.shape.preamble + b"".join(parts) + b"--%s--" % boundary
        kind = f"multipart/related; {self.shape.type_parameter}; {self.shape.boundary}"
        if instance is None and self.cut_after is not None:
            body, self.cut_after = body[: self.cut_after], None
        return 200, {"Content-Type": kind}, body


def _ui(uid: str) -> dict[str, Any]:
    return {"vr": "UI", "Value": [str(uid)]}


def _handler(archive: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            archive.headers.append(dict(self.headers))
            status, headers, body = archive.answer(self.path, self.headers.get("Accept", ""))
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
