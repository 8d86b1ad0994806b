"""A DICOMweb archive as a source: the CT Series it lists, their Instances, and the files of these, as they come.

What archives make differently of the Standard is met here. Knows nothing of what is fetched, or where it goes.

Reference: PS3.18 10.4 (Retrieve), 10.6 (Search), 8.3.4.4 (paging).
"""

import re
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from http import HTTPStatus

import requests

from node.deliver.http import HttpPeer, failure
from node.dicom_json import datasets_in, first_value, texts_of
from node.peers import DicomWebSource
from node.receive.headers import is_uid
from node.send import SendError
from node.watch.following import busy_error
from node.watch.taking import StoppingError
from node.web.multipart import (
    Event,
    MultipartError,
    MultipartReader,
    PartBegins,
    PartData,
    PartEnds,
    boundary_of,
    parse_content_type,
)

_JSON = "application/dicom+json"  # alone: Azure refuses a list of choices
_DICOM = "application/dicom"
# Google and Azure would transcode to Explicit VR Little Endian what is asked for without a transfer syntax; others do
# not know the asterisk.
_AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_PLAIN = 'multipart/related; type="application/dicom"'
_LIMIT = 200  # the most that Azure gives at a time; it refuses to be asked for more
_MAX_PARTS = 100_000
_CHUNK_BYTES = 256 * 1024
_ERRORS = range(400, 600)
Query = Mapping[str, str | Sequence[str]]
_IN_URL = re.compile(r"/studies/([0-9.]+)/series/([0-9.]+)$")

_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00080018"
_STUDY_DATE, _MODALITY, _COUNT, _URL = "00080020", "00080060", "00201209", "00081190"


class NotGivenError(SendError):
    """The archive answers, but not with what was asked for; it may do so for something else."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class ListedSeries:
    """A CT Series in the archive. study_date, num_instances: None where it does not tell."""

    study_instance_uid: str
    series_instance_uid: str
    study_date: date | None = None
    num_instances: int | None = None

    @property
    def path(self) -> str:
        """Its address, below that of the service."""
        return f"studies/{self.study_instance_uid}/series/{self.series_instance_uid}"


class WebArchive:
    """One archive, while something is fetched from it; close it after use. Safe to use from several threads.

    stopping: once it is set, nothing more is asked.

    Every method raises:
        StoppingError: the node stops.
        SendError: it cannot be reached, or does not answer like a DICOMweb server.
        BusyError: it asks for a pause.
        NotGivenError: it answers with an error.
    """

    def __init__(self, source: DicomWebSource, stopping: threading.Event | None = None) -> None:
        self._peer = HttpPeer(source)
        self._stopping = stopping or threading.Event()
        self._timeout_s, self._pause_s = source.timeout_s, 1 / source.max_requests_per_s
        self._next_at = 0.0  # monotonic, s
        self._lock = threading.Lock()
        self._accepted = _AS_STORED

    def close(self) -> None:
        self._peer.close()

    def check(self) -> str:
        """What it answers with, in a word."""
        self._search("series", {"Modality": "CT", "limit": "1"})
        return "answers QIDO-RS"

    def series(self, since: date | None, series_instance_uid: str = "") -> Iterator[ListedSeries]:
        """The CT Series of Studies of that day and later, or all (None), each once; or the one with that UID."""
        query: dict[str, str | Sequence[str]] = {"Modality": "CT"}
        if series_instance_uid:
            query["SeriesInstanceUID"] = series_instance_uid
        if since is not None:
            query["StudyDate"] = f"{since:%Y%m%d}-"
        try:
            # Azure counts only for who asks it to.
            yield from self._list_series(query | {"includefield": "NumberOfSeriesRelatedInstances"})
        except NotGivenError as error:
            if error.status != HTTPStatus.BAD_REQUEST:
                raise
            yield from self._list_series(query)  # there are archives that know no includefield

    def _list_series(self, query: Query) -> Iterator[ListedSeries]:
        for item in self._pages("series", query, _SERIES):
            uid, study_uid = str(first_value(item, _SERIES)), str(first_value(item, _STUDY) or "")
            if not study_uid and (found := _IN_URL.search(str(first_value(item, _URL)))):
                study_uid = found[1]
            # Who does not know the condition lists all.
            if is_uid(uid) and is_uid(study_uid) and first_value(item, _MODALITY) in ("CT", None):
                count = str(first_value(item, _COUNT))
                yield ListedSeries(
                    study_instance_uid=study_uid,
                    series_instance_uid=uid,
                    study_date=_day(str(first_value(item, _STUDY_DATE))),
                    num_instances=int(count) if re.fullmatch("[0-9]{1,9}", count) else None,
                )

    def instances(self, series: ListedSeries) -> list[str]:
        """The SOP Instance UIDs of a Series."""
        found = self._pages(f"{series.path}/instances", {}, _INSTANCE)
        return [uid for item in found if is_uid(uid := str(first_value(item, _INSTANCE)))]

    def attributes(self, series: ListedSeries, sop_instance_uid: str) -> dict[str, str]:
        """Attributes of an Instance by keyword, several values joined by backslashes; none where it gives none."""
        try:
            found = self._search(f"{series.path}/instances/{sop_instance_uid}/metadata", {})
        except NotGivenError:
            return {}
        return texts_of(found[0]) if found else {}

    def read_series(self, series: ListedSeries) -> Iterator[Event]:
        """The files of all its Instances, piece by piece."""
        return self._read(series.path)

    def read_instance(self, series: ListedSeries, sop_instance_uid: str) -> Generator[bytes, None, None]:
        """The file of one Instance, piece by piece."""
        is_over = False  # read on to the end, which leaves the connection for the next one
        for event in self._read(f"{series.path}/instances/{sop_instance_uid}"):
            if isinstance(event, PartData) and not is_over:
                yield bytes(event.data)
            is_over = is_over or isinstance(event, PartEnds)

    # ---- one question ----

    def _pages(self, path: str, query: Query, key: str) -> Iterator[dict[str, object]]:
        """All that is found, each once, whatever the most that the archive gives at a time.

        How many that is it does not tell in any way that all do, so it is asked until nothing new comes.
        """
        seen, offset = set[str](), 0
        while True:
            try:
                found = self._search(path, {**query, "limit": str(_LIMIT), "offset": str(offset)})
            except NotGivenError as error:
                if offset and error.status == HTTPStatus.NOT_FOUND:
                    return
                raise
            new = {uid: item for item in found if (uid := str(first_value(item, key))) not in seen}
            if not new:
                return
            yield from new.values()
            seen |= new.keys()
            offset += len(found)

    def _search(self, path: str, query: Query) -> list[dict[str, object]]:
        """Datasets in the DICOM JSON Model."""
        response = self._ask(path, _JSON, query)
        if response.status_code == HTTPStatus.NO_CONTENT:
            return []
        found = datasets_in(response.content)
        if not found and response.content.strip() not in (b"", b"[]"):
            raise SendError(f"{self._peer.name} does not answer in DICOM JSON; check url")
        return found

    def _read(self, path: str) -> Iterator[Event]:
        """What an answer brings, whether in parts or as a single file."""
        with self._ask_for_files(path) as response:
            kind, _ = parse_content_type(content_type := response.headers.get("Content-Type", ""))
            try:
                pieces: Iterator[bytes] = response.iter_content(_CHUNK_BYTES)
                if kind == _DICOM:
                    yield PartBegins({})
                    yield from (PartData(piece) for piece in pieces)
                    yield PartEnds()
                    return
                reader = MultipartReader(boundary_of(content_type), _MAX_PARTS)
                for piece in pieces:
                    yield from reader.feed(piece)
                reader.close()
            except requests.RequestException as error:
                raise failure(self._peer.name, error, self._timeout_s) from error
            except MultipartError as error:
                raise NotGivenError(f"{self._peer.name} gives what cannot be read: {error}", 200) from error

    def _ask_for_files(self, path: str) -> requests.Response:
        try:
            return self._ask(path, self._accepted, stream=True)
        except NotGivenError as error:
            is_about_form = error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_ACCEPTABLE)
            if not is_about_form or self._accepted == _PLAIN:
                raise
        response = self._ask(path, _PLAIN, stream=True)
        self._accepted = _PLAIN
        return response

    def _ask(self, path: str, accept: str, query: Query | None = None, *, stream: bool = False) -> requests.Response:
        self._wait()
        headers = {"Accept": accept} | ({"Accept-Encoding": "identity"} if stream else {})
        response = self._peer.request("GET", path, headers=headers, query=query, also=_ERRORS, stream=stream)
        if response.status_code not in _ERRORS:
            return response
        refusal = self._peer.refusal(response)
        response.close()
        retry_after, said_at = (response.headers.get(name, "") for name in ("Retry-After", "Date"))
        if busy := busy_error(str(refusal), response.status_code, retry_after, said_at):
            raise busy
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise refusal
        raise NotGivenError(str(refusal), response.status_code)

    def _wait(self) -> None:
        """Keeps to the number of requests in a second."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next_at)
            self._next_at = at + self._pause_s
        if self._stopping.wait(at - now):
            raise StoppingError


def _day(text: str) -> date | None:
    """The day of a value of DA (PS3.5 6.2); None if it is none."""
    try:
        return datetime.strptime(text, "%Y%m%d").date()
    except ValueError:
        return None
