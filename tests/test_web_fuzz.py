"""Odd requests of every kind at every address of the HTTP side: none is answered by a 500, and nothing of us leaks.

The addresses are those of the service's own OpenAPI schema. Its query strings, headers and bodies are DICOMweb's, which
the schema does not describe, so they are made here. `make fuzz-web` tries many more than a test run.
"""

import http.client
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from node.config import Config
from node.index import Index
from node.web.multipart import end_of, part_head
from tests.factories import make_ct_series, make_report
from tests.web_server import WebServer, hold

NUM_EXAMPLES = int(os.environ.get("CSPINE_FUZZ_EXAMPLES", "400"))


class Target:
    """A node that holds a CT Series and a report made of it, and what may be asked of it."""

    def __init__(self, folder: Path) -> None:
        self.index = Index(folder / "data")
        self.paths = make_ct_series(self.index.data_dir / "instances" / "1", num_slices=3)
        hold(self.index, self.paths)
        results = self.index.data_dir / "cases" / "1"
        results.mkdir(parents=True)
        report = dcmread(make_report(results / "report.sr.dcm"))
        one = dcmread(self.paths[0])
        report.StudyInstanceUID = one.StudyInstanceUID
        report.save_as(results / "report.sr.dcm")
        (case,) = self.index.cases()
        self.index.queue(case)
        claimed = self.index.claim_next()
        assert claimed is not None
        self.index.finish(claimed, results, summary="", sop_instance_uids=(), destinations=())
        self.server = WebServer(Config(data_dir=self.index.data_dir), self.index)
        self.uids = {
            "study": str(one.StudyInstanceUID),
            "series": str(one.SeriesInstanceUID),
            "instance": str(one.SOPInstanceUID),
        }
        schema = self.server.get("/../openapi.json").json()
        self.operations = [
            (method.upper(), path) for path, methods in schema["paths"].items() for method in sorted(methods)
        ]

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value.encode("latin-1"))
            if body is not None and "Content-Length" not in headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("fuzz"))
    yield made
    made.server.stop()
    made.index.close()


JUNK = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "",
            "..",
            "../..",
            "%2e%2e",
            "0",
            "-1",
            "1.2.3",
            "1." * 40,
            "9" * 200,
            "1,2",
            "1,,2",
            "a,b",
            "*",
            "?",
            "\\",
            "\0",
        ]
    ),
    st.integers(-(10**12), 10**12).map(str),
)
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)
MEDIA = st.one_of(
    HEADER,
    st.sampled_from(
        [
            "*/*",
            "application/dicom+json",
            'multipart/related; type="application/dicom"; transfer-syntax=*',
            'multipart/related; type="application/octet-stream"; transfer-syntax=1.2.840.10008.1.2.4.80',
            "application/dicom",
            "image/png",
            "image/jpeg;q=0.5, */*;q=x",
            "multipart/related; type=",
            ";;;q=,,",
        ]
    ),
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "PatientID",
            "PatientName",
            "StudyDate",
            "StudyTime",
            "Modality",
            "StudyInstanceUID",
            "InstanceNumber",
            "ModalitiesInStudy",
            "00100020",
            "FFFFFFFF",
            "NumberOfFrames",
            "limit",
            "offset",
            "includefield",
            "fuzzymatching",
            "emptyvaluematching",
            "multiplevaluematching",
            "00400275.00401001",
            "accept",
            "charset",
            "annotation",
            "iccprofile",
            "window",
            "viewport",
            "quality",
            "page",
        ]
    ),
    JUNK,
)
VALUES = st.one_of(
    JUNK,
    st.sampled_from(
        [
            "a\\b",
            '""',
            "5,5,,1,-1",
            "1,1,sigmoid",
            "20260101-",
            "-20260101",
            "-",
            "20260101-20260102-3",
            "20260101-20260102",
            "1000-",
            "patient,technique",
            "all",
            "true",
            "100,-1,linear",
            "0,0",
            "1e999,nan,x",
        ]
    ),
)


@st.composite
def requests(draw: st.DrawFn, target: Target) -> tuple[str, str, dict[str, str], bytes | None]:
    """Method, path with its query string, headers and body."""
    method, path = draw(st.sampled_from(target.operations))
    while "{" in path:
        name = path[path.index("{") + 1 : path.index("}")].partition(":")[0]
        known = target.uids.get(name)
        # What is here stays here: only what is not may be deleted.
        value = draw(JUNK if known is None or method == "DELETE" else st.one_of(st.just(known), st.just(known), JUNK))
        path = (
            path[: path.index("{")] + quote(value, safe=draw(st.sampled_from(["", "/."]))) + path[path.index("}") + 1 :]
        )
    query = draw(st.lists(st.tuples(NAMES, VALUES), max_size=4))
    if query:
        path += "?" + "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in query)
    headers = {"Accept": draw(MEDIA)} if draw(st.booleans()) else {}
    if draw(st.integers(0, 9)) == 0:
        headers[draw(st.sampled_from(["Authorization", "Range", "Origin", "If-None-Match", "X-Remote-User"]))] = draw(
            HEADER
        )
    return method, path, headers, draw(bodies(target, headers)) if method == "POST" else None


@st.composite
def bodies(draw: st.DrawFn, target: Target, headers: dict[str, str]) -> bytes:
    """A STOW-RS body, mostly broken; its Content-Type is put among the headers."""
    headers["Content-Type"] = draw(
        st.one_of(MEDIA, st.just('multipart/related; type="application/dicom"; boundary=xx'))
    )
    data = draw(st.one_of(st.binary(max_size=300), st.just(target.paths[0].read_bytes())))
    if draw(st.booleans()) and data:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + draw(st.integers(0, 50)) :]
    whole = part_head("xx", "application/dicom") + data + end_of("xx")
    return whole[: draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))]


def test_no_request_is_answered_by_a_500(target: Target) -> None:
    places = str(target.index.data_dir).encode()
    kept = {path: path.read_bytes() for path in target.paths}

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize="CSPINE_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(request=requests(target))
    def check(request: tuple[str, str, dict[str, str], bytes | None]) -> None:
        status, body = target.ask(*request)
        assert status < 500, (request, body)
        assert places not in body
        assert b"Traceback" not in body

    check()
    assert {path: path.read_bytes() for path in target.paths} == kept


def test_the_fuzzer_reaches_every_address(target: Target) -> None:
    """Guards the test above: it would also pass if it asked for nothing."""
    assert {("GET", "/"), ("POST", "/dicom-web/studies"), ("DELETE", "/dicom-web/studies/{study}")} <= set(
        target.operations
    )
    assert len(target.operations) > 20
    found: dict[str, Any] = {}
    for method, template in target.operations:
        if method == "GET" and template.startswith("/dicom-web"):
            path = template.replace("{numbers}", "1").replace("{tag}", "7FE00010")
            for name, uid in target.uids.items():
                path = path.replace(f"{{{name}}}", uid)
            found[template] = target.ask("GET", path, {}, None)[0]
    assert set(found.values()) == {200}, found
