"""The case list over HTTP: what it says, what it keeps to itself, and whom it answers."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from pydicom import dcmread

from node.case import Case
from node.config import Config
from node.index import Index
from node.remove import delete_case
from node.web import case_list
from node.web.settings import WebConfig
from tests.factories import make_ct_series, make_report
from tests.web_server import WebServer, found_in, hold

LEVELS = ["C1", "C2", "C3", "C4", "C5", "C6", "C7"]
Receive = Callable[[], Case]


class Read(HTMLParser):
    """A page as a screen reader takes it: headings of columns, cells by row, links by what they are called."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.columns: list[str] = []
        self.rows: list[list[str]] = []
        self.links: dict[str, str] = {}
        self.tags: list[str] = []
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            assert tag == "td" or given["scope"] in ("col", "row")
            assert given["role"] in ("columnheader", "rowheader", "cell")
            self._cell = []
        if tag == "a":
            self.links[given.get("aria-label") or given.get("rel") or ""] = str(given["href"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td") and self._cell is not None:
            self.rows[-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture
def server(index: Index) -> Iterator[WebServer]:
    served = WebServer(Config(), index)
    yield served
    served.stop()


@pytest.fixture
def receive(index: Index) -> Receive:
    """Receives a CT Series."""

    def one() -> Case:
        folder = index.data_dir / "instances" / str(len(index.cases()))
        paths = make_ct_series(folder, num_slices=3)
        hold(index, paths)
        case = index.case(str(dcmread(paths[0]).SeriesInstanceUID))
        assert case is not None
        return case

    return one


def analyse(
    index: Index,
    case: Case,
    probability: float | None,
    levels: list[str],
    unjudged: Sequence[str] = (),
    patient: str = "",
) -> str:
    """Notes results with a Segmentation, whose Series Instance UID it gives. patient: its finding, if another."""
    index.queue(case)
    claimed = index.claim_next()
    assert claimed is not None
    folder = index.data_dir / "cases" / case.series_instance_uid / "1"
    folder.mkdir(parents=True)
    finding = {True: "present", False: "absent"}
    findings = {
        "model": {"name": "phantom", "version": "1.2", "trained_on": "phantoms <only>, never a patient"},
        "patient_overall": {
            "probability": probability,
            "finding": patient or ("undetermined" if probability is None else finding[bool(levels)]),
        },
        "levels": {
            level: {"finding": "undetermined" if level in unjudged else finding[level in levels]} for level in LEVELS
        },
    }
    (folder / "findings.json").write_text(json.dumps(findings), encoding="utf-8")
    seg = dcmread(make_report(folder / "vertebrae.seg.dcm"))
    seg.Modality, seg.StudyInstanceUID = "SEG", case.study_instance_uid
    seg.save_as(folder / "vertebrae.seg.dcm")
    index.finish(claimed, folder, summary="", sop_instance_uids=(), destinations=())
    return str(seg.SeriesInstanceUID)


def get(server: WebServer, path: str = "/", **more: Any) -> requests.Response:
    return requests.get(server.root + path, timeout=20, **more)


def test_cases_are_listed_the_newest_first_with_what_was_found(
    server: WebServer, index: Index, receive: Receive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case_list, "find_viewer", lambda: Path("/somewhere"))
    first, second, third, fourth = receive(), receive(), receive(), receive()
    segmentation = analyse(index, first, 0.934, ["C5", "C6"])
    analyse(index, second, 0.021, [])
    analyse(index, third, None, [])
    page = Read(get(server).text)
    assert page.rows[0] == list(case_list._COLUMNS)
    assert [row[3:] for row in page.rows[1:]] == [
        ["receiving", "–", "–", "CT"],
        ["done", "–", "could not be judged", "CT with vertebrae"],
        ["done", "2.1 %", "none", "CT with vertebrae"],
        ["done", "93.4 %", "C5, C6", "CT with vertebrae"],
    ]
    assert [row[2] for row in page.rows[1:]] == [
        "…" + case.series_instance_uid[-15:] for case in (fourth, third, second, first)
    ]
    link = urlsplit(page.links[f"Open case {first.case_id}: CT with vertebrae"])
    assert link.path == "/viewer/viewer"
    assert parse_qs(link.query) == {
        "StudyInstanceUIDs": [first.study_instance_uid],
        "initialSeriesInstanceUID": [segmentation],
    }
    text = get(server).text
    assert "Model phantom 1.2: phantoms &lt;only&gt;, never a patient" in text
    assert "Research software, not a medical device." in text
    assert not {"Test^Neck", "TEST", "19700101"} & set(re.findall(r"[\w^]+", text))


@pytest.mark.parametrize(
    ("levels", "patient", "said"),
    [
        ([], "", "none; C1, C7 not judged"),
        (["C5"], "", "C5; C1, C7 not judged"),
        ([], "undetermined", "none; C1, C7 not judged"),
    ],
)
def test_levels_that_were_not_judged_are_not_among_those_that_are_fine(
    server: WebServer, index: Index, receive: Receive, levels: list[str], patient: str, said: str
) -> None:
    analyse(index, receive(), 0.36, levels, ["C1", "C7"], patient)
    assert Read(get(server).text).rows[1][4:6] == ["36.0 %", said]


def test_the_time_of_a_case_is_not_broken_at_its_dashes() -> None:
    assert "time{white-space:nowrap}" in case_list._STYLE


@pytest.mark.parametrize("how", ["refused", "skipped"])
def test_results_of_before_a_case_was_refused_or_skipped_are_shown_to_nobody(
    server: WebServer, index: Index, receive: Receive, how: str
) -> None:
    analyse(index, receive(), 0.934, ["C5"])

    def shown() -> tuple[list[str], int]:
        found = found_in(server.get("/series?Modality=SEG"))
        return Read(get(server).text).rows[1][3:6], len(found)

    assert shown() == (["done", "93.4 %", "C5"], 1)

    def now() -> Case:
        return index.cases()[0]

    before = now().result_dir
    assert index.retry(now())  # as if an Instance had come late
    assert shown() == (["receiving", "93.4 %", "C5"], 1)
    assert index.refuse(now(), "gaps") if how == "refused" else index.skip(now(), "gaps")
    assert shown() == ([how + "gaps", "–", "–"], 0)
    assert now().result_dir == before  # a later report names the one that it replaces
    assert index.retry(now())
    assert shown() == (["receiving", "–", "–"], 0)
    folder = before.with_name("2") if before else None
    assert folder is not None
    index.queue(now())
    claimed = index.claim_next()
    assert claimed is not None
    folder.mkdir()
    for name in ("findings.json", "vertebrae.seg.dcm"):
        shutil.copy((before or folder) / name, folder / name)
    assert index.finish(claimed, folder, summary="", sop_instance_uids=(), destinations=())
    assert shown() == (["done", "93.4 %", "C5"], 1)


def test_reasons_are_text_and_nothing_but_the_style_may_run(server: WebServer, index: Index, receive: Receive) -> None:
    index.refuse(receive(), 'odd <script>alert(1)</script> & "quoted"')
    answer = get(server)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page = Read(answer.text)
    assert "script" not in page.tags
    assert page.rows[1][3] == 'refusedodd <script>alert(1)</script> & "quoted"'
    policy = answer.headers["Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert re.findall(r"(?:https?:)?//", answer.text) == []


def test_refused_conflicts_stand_beside_the_state(server: WebServer, index: Index, receive: Receive) -> None:
    case = receive()
    assert "refused" not in get(server).text
    for _ in range(2):
        index.note_conflict(case.series_instance_uid, "<b>CT1")
    state = Read(get(server).text).rows[1][3]
    assert re.fullmatch(
        "receiving2 Instances refused: an Instance with the same UID is here, with other content or in another "
        r"transfer syntax. Last [0-9]{4}-[0-9: -]{14}, from <b>CT1",
        state,
    )


def test_many_cases_come_in_pages(server: WebServer, receive: Receive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_list, "_NUM_ON_PAGE", 2)
    monkeypatch.setattr(case_list, "find_viewer", lambda: None)
    uids = ["…" + receive().series_instance_uid[-15:] for _ in range(3)][::-1]
    newest, oldest = Read(get(server).text), Read(get(server, "/?page=2").text)
    assert [row[2] for row in newest.rows[1:] + oldest.rows[1:]] == uids
    assert (newest.links, oldest.links) == ({"next": "/?page=2"}, {"prev": "/?page=1"})
    assert newest.rows[1][-1] == "not installed: make viewer"
    assert "No case here" in get(server, "/?page=3").text
    for page in ("0", "-1", "x", "1e3", "99999999999", "²"):
        assert get(server, f"/?page={page}").status_code == 400


def test_a_list_without_cases_says_what_to_do(server: WebServer) -> None:
    assert "Send a CT Series" in get(server).text


def test_results_that_are_gone_leave_the_case_in_the_list(server: WebServer, index: Index, receive: Receive) -> None:
    case = receive()
    analyse(index, case, 0.9, ["C1"])
    (index.data_dir / "cases" / case.series_instance_uid / "1" / "findings.json").write_text("{")
    assert Read(get(server).text).rows[1][4:6] == ["–", "–"]


def test_names_of_patients_are_read_by_the_node_alone_and_leave_with_the_case(
    server: WebServer, index: Index, receive: Receive
) -> None:
    case, kept = receive(), receive()
    get(server)
    files = [index.data_dir / f"catalog.sqlite{more}" for more in ("", "-wal", "-shm")]
    assert [oct(path.stat().st_mode & 0o777) for path in files] == ["0o640"] * 3
    assert any(case.series_instance_uid.encode() in path.read_bytes() for path in files)
    assert delete_case(index, case)
    get(server)
    assert not any(case.series_instance_uid.encode() in path.read_bytes() for path in files)
    assert any(kept.series_instance_uid.encode() in path.read_bytes() for path in files)


def test_it_wants_a_token_where_all_else_does(index: Index, receive: Receive) -> None:
    receive()
    server = WebServer(Config(web=WebConfig(allow="tokens")), index)
    try:
        refused = get(server)
        assert (refused.status_code, "Basic" in refused.headers["WWW-Authenticate"]) == (401, True)
        assert "receiving" not in refused.text
        assert get(server, auth=("any", server.tokens.make("me", ("read",)))).status_code == 200
    finally:
        server.stop()
