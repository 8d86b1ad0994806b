"""QIDO-RS: attributes that stand in sequences, fields that are asked for, and what a query may say of matching."""

from collections.abc import Iterator

import pytest
from pydicom import Dataset, dcmread

from node.config import Config
from node.index import Index
from node.web import qido
from tests.factories import make_ct_series
from tests.node.test_web import values
from tests.web_server import WebServer, found_in, hold

# Date and time of each Study, and of the step that its Series are of.
MOMENTS = {"A": ("20260101", "1530"), "B": ("20260102", "093000.25"), "C": ("20260103", "")}


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
            ds.PatientAge = "050Y"
            ds.StudyDescription = "" if name == "C" else f"Neck {name}"
            ds.StudyDate, ds.StudyTime = MOMENTS[name]
            ds.PerformedProcedureStepStartDate, ds.PerformedProcedureStepStartTime = MOMENTS[name]
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
    ],
)
@pytest.mark.parametrize(("level", "num_each"), [("series", 1), ("instances", 2)])
def test_a_series_is_found_by_what_was_requested(
    web: WebServer, level: str, num_each: int, query: str, patients: str
) -> None:
    found = found_in(web.get(f"/{level}?{query}"))
    assert sorted(values(found, "00100020")) == sorted(list(patients) * num_each)


@pytest.mark.parametrize(
    ("date", "time", "patients"),
    [
        ("20260101-20260102", "1500-1000", "AB"),  # from the first day at 15:00 to the second at 10:00
        ("20260101-20260102", "1531-1000", "B"),
        ("20260101-20260102", "153000.000-093000", "AB"),
        ("20260101-20260102", "1500-0929", "A"),
        ("20260101-20260103", "1600-0000", "BC"),  # of C only the day is known
        ("20260101-", "1600-", "BC"),
        ("-20260102", "-0900", "A"),
        ("-20260102", "-0930", "AB"),
        ("20260101-20260102", "1500-", "A"),  # not of the same form: of each day from 15:00 on
        ("20260101-20260102", "1530", "A"),
        ("20260101", "1500-1600", "A"),
        ("", "0900-1000", "B"),
        ("", "1530", "A"),
        ("", "153000-", "A"),
    ],
)
@pytest.mark.parametrize("of", ["Study", "PerformedProcedureStepStart"])
def test_ranges_of_date_and_time_are_one_of_moments(
    web: WebServer, of: str, date: str, time: str, patients: str
) -> None:
    found = found_in(web.get(f"/series?{of}Date={date}&{of}Time={time}"))
    assert sorted(values(found, "00100020")) == list(patients)
    assert found_in(web.get(f"/series?{of}Time={time}&{of}Date={date}")) == found


def test_a_range_of_moments_that_is_none_is_refused(web: WebServer) -> None:
    assert web.get("/series?StudyDate=-&StudyTime=-").status_code == 400
    assert web.get("/series?StudyDate=2026-01-01&StudyTime=10-11").status_code == 400
    assert web.get("/series?StudyDate=yesterday-yesterda2&StudyTime=10-11").status_code == 400


@pytest.mark.parametrize("zone", ["TimezoneOffsetFromUTC=-0500", "00080201=%2B0100"])
def test_a_timezone_is_that_of_the_query_and_no_key(web: WebServer, zone: str) -> None:
    answer = web.get(f"/studies?{zone}")
    assert len(found_in(answer)) == 3
    assert "Warning" not in answer.headers
    answer = web.get(f"/studies?{zone}&StudyDate=20260102")
    assert values(found_in(answer), "00100020") == ["B"]
    assert "TimezoneOffsetFromUTC is not taken into account" in answer.headers["Warning"]


def test_what_is_no_attribute_is_ignored_and_said(web: WebServer) -> None:
    answer = web.get('/studies?orderby=PatientID&PatientID=A&_=1&a"%0D%0AX: y=1&00090010=ACME')
    assert values(found_in(answer), "00100020") == ["A"]
    assert answer.headers["Warning"] == (
        '299 cspine: "These parameters are not supported and were ignored: orderby, _, a%22%0D%0AX%3A%20y, 00090010"'
    )
    for query in ("accept=application/dicom%2Bjson", "charset=utf-8", "includefield=00091001,KVP&PatientName="):
        answer = web.get(f"/studies?{query}")
        assert len(found_in(answer)) == 3
        assert "Warning" not in answer.headers


def test_json_is_called_as_it_is_asked_for(web: WebServer) -> None:
    (found,) = web.get("/instances?limit=1").json()
    for path in ("/studies", found["00081190"]["Value"][0].removeprefix(web.url) + "/metadata"):
        for accept in ("application/json", "application/dicom+json"):
            assert web.get(path, accept).headers["Content-Type"] == accept
            assert web.get(f"{path}?accept={accept.replace('+', '%2B')}").headers["Content-Type"] == accept


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


def test_all_fields_are_those_of_the_file_without_bulk_data(web: WebServer) -> None:
    (found,) = web.get("/instances?includefield=all&PatientID=A&InstanceNumber=2").json()
    ds = dcmread(web.catalog.files(*(found[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018")))[0].path)
    del ds.PixelData
    assert found.pop("00081190")["Value"][0].endswith(ds.SOPInstanceUID)
    assert found.pop("00080056")["Value"] == ["ONLINE"]
    assert Dataset.from_json(found) == Dataset.from_json(ds.to_json_dict())


def test_all_fields_of_a_series_or_study_are_those_of_its_level(web: WebServer) -> None:
    """Not what its first Instance has for itself, such as KVP and where it lies (PS3.18 10.6.3.3)."""
    (series,) = web.get("/series?includefield=all&PatientID=A").json()
    assert series["00080070"]["Value"] == ["Factory"]
    assert series["00101010"]["Value"] == ["050Y"]
    assert not series.keys() & {"00080018", "00200013", "00180060", "00200032", "00280030"}
    (study,) = web.get("/studies?includefield=all&PatientID=A").json()
    assert study["00101010"]["Value"] == ["050Y"]
    assert not study.keys() & {"00080018", "00200013", "0020000E", "00200011", "00080070", "00200052"}


def test_a_page_of_all_fields_is_bounded(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qido, "DEFAULT_LIMIT", 2)
    answer = web.get("/instances?includefield=all&limit=5")
    assert len(answer.json()) == 2
    assert "4 additional results" in answer.headers["Warning"]
    assert len(web.get("/instances?limit=5").json()) == 5


@pytest.mark.parametrize(
    ("query", "patients"),
    [
        ('StudyDescription=""&emptyvaluematching=true', "C"),
        ('emptyvaluematching=true&StudyDescription=""', "C"),
        ('StudyDescription=""', ""),
        ('StudyDescription=""&emptyvaluematching=false', ""),
        ("PatientID=A%5CC&multiplevaluematching=true", "AC"),
        ("PatientID=%5CA%5C&multiplevaluematching=true", "A"),
        ("PatientID=%5C&multiplevaluematching=true", ""),
        ("PatientID=A%5CC", ""),
        ("StudyDescription=*A%5C*B&multiplevaluematching=true", "AB"),
    ],
)
def test_empty_values_and_lists_are_matched_where_that_is_asked_for(web: WebServer, query: str, patients: str) -> None:
    assert sorted(values(found_in(web.get(f"/studies?{query}")), "00100020")) == sorted(patients)


@pytest.mark.parametrize(
    "query",
    [
        "/series?multiplevaluematching=true&PatientID=" + "%5C".join(map(str, range(1500))),
        "/series?Modality=" + ",".join(f"M{number}" for number in range(1500)),
        "/series?" + "&".join(["PatientID=A"] * 1500),
        "/instances?PatientID=" + "*A" * 26_000,
        "/studies?limit=0&PatientID=" + "*A" * 26_000,
    ],
)
def test_a_query_that_asks_for_too_much_says_so(web: WebServer, query: str) -> None:
    answer = web.get(query)
    assert (answer.status_code, "ask for less" in answer.text) == (400, True)
