"""QIDO-RS: attributes that stand in sequences, fields that are asked for, and what a query may say of matching."""

from collections.abc import Iterator

import pytest
from pydicom import Dataset

from node.config import Config
from node.index import Index
from tests.factories import make_ct_series
from tests.node.test_web import values
from tests.web_server import WebServer, hold


def _request(step: str, procedure: str) -> Dataset:
    item = Dataset()
    item.ScheduledProcedureStepID, item.RequestedProcedureID = step, procedure
    return item


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    """Holds three Series of a Study each: of one request, of two, and of none."""
    index = Index(tmp_path_factory.mktemp("search"))
    requests = {"A": [_request("SPS1", "RP1")], "B": [_request("SPS1", "RP2"), _request("SPS2", "RP1")], "C": []}

    for name, items in requests.items():

        def edit(_i: int, ds: Dataset, name: str = name, items: list[Dataset] = items) -> None:
            ds.PatientID, ds.SeriesNumber, ds.TimezoneOffsetFromUTC = name, ord(name), "+0100"
            ds.StudyDescription = "" if name == "C" else f"Neck {name}"
            if items:
                ds.RequestAttributesSequence = items

        hold(index, make_ct_series(index.data_dir / "instances" / name, num_slices=2, edit=edit))
    server = WebServer(Config(), index)
    yield server
    server.stop()
    index.close()


@pytest.mark.parametrize(
    ("query", "patients"),
    [
        ("00400275.00401001=RP1", "AB"),
        ("RequestAttributesSequence.RequestedProcedureID=RP2", "B"),
        ("00400275.00400009=SPS1", "AB"),
        ("00400275.00400009=SPS*&00400275.00401001=RP?", "AB"),
        ("00400275.00400009=SPS1&00400275.00401001=RP1", "A"),  # of one and the same item
        ("00400275.00401001=rp1", ""),
        ("00400275.00401001=", "ABC"),
        ("00400275.00401001=RP1&PatientID=B", "B"),
        ("TimezoneOffsetFromUTC=%2B0100", "ABC"),
        ("TimezoneOffsetFromUTC=-0500", ""),
    ],
)
@pytest.mark.parametrize(("level", "num_each"), [("series", 1), ("instances", 2)])
def test_a_series_is_found_by_what_was_requested(
    web: WebServer, level: str, num_each: int, query: str, patients: str
) -> None:
    answer = web.get(f"/{level}?{query}")
    assert answer.status_code == 200, answer.text
    assert sorted(values(answer.json(), "00100020")) == sorted(list(patients) * num_each)


def test_a_series_says_what_was_requested_and_in_which_timezone(web: WebServer) -> None:
    (series,) = web.get("/series?PatientID=B&includefield=00400275.00401001").json()
    found = [(item["00400009"]["Value"], item["00401001"]["Value"]) for item in series["00400275"]["Value"]]
    assert found == [(["SPS1"], ["RP2"]), (["SPS2"], ["RP1"])]
    assert series["00080201"]["Value"] == ["+0100"]
    (series,) = web.get("/series?PatientID=C").json()
    assert "00400275" not in series


@pytest.mark.parametrize(
    "query",
    [
        "/studies?00400275.00401001=RP1",
        "/series?00400275.00080060=CT",
        "/series?00400275=RP1",
        "/series?00400275.nothing=1",
        "/series?.=1",
    ],
)
def test_what_cannot_be_matched_in_a_sequence_says_so(web: WebServer, query: str) -> None:
    assert web.get(query).status_code == 400
