"""A real Orthanc that the node watches: what it fetches, what it leaves there, and what survives which death."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from node.config import Config
from node.index import Index
from node.peers import HttpAuth, OrthancSource
from node.receive.store import Store
from node.watch.describe import describe
from node.watch.orthanc import OrthancWatch
from orthanc.client import Instance, Orthanc
from tests.factories import make_ct_series, make_localizer, make_report, make_screen_save
from tests.killed_fetch import fetched_with_a_kill
from tests.orthanc_server import STABLE_AGE_S, OrthancServer
from tests.ports import free_port
from tests.serving import Quiet, serving
from tests.waiting import wait_until

Watch = Callable[..., OrthancWatch]


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[OrthancServer]:
    """An Orthanc that sends nothing by itself."""
    server = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port(), routes_by="")
    yield server
    server.stop()


@pytest.fixture
def watch(make_config: Callable[..., Config], index: Index) -> Iterator[Watch]:
    """Makes a watch of the Orthanc at a URL, from its oldest change on."""
    stores: list[Store] = []

    def make(url: str, **settings: Any) -> OrthancWatch:
        config = make_config()
        stores.append(Store(config, index, f"watch{len(stores)}"))
        source = OrthancSource(name="orthanc", url=url, **{"begin": "oldest", **settings})
        return OrthancWatch(config, source, index, stores[-1])

    yield make
    for store in stores:
        store.close()


def wait_until_stable(orthanc: OrthancServer, num_series: int) -> None:
    wait_until(lambda: orthanc.num_stable() >= num_series, orthanc.log)


def held(index: Index) -> dict[str, int]:
    """How many Instances are here, by Series."""
    return {case.series_instance_uid: case.num_instances for case in index.cases()}


def test_new_ct_series_are_fetched_once_and_all_else_is_left_there(
    orthanc: OrthancServer, watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = [make_ct_series(tmp_path / f"in/{number:02d}", num_slices=4 + number % 3) for number in range(20)]
    make_screen_save(tmp_path / "in/00/dose.dcm", like=series[0][0])  # in the CT Series, and no CT Image
    make_report(tmp_path / "in/report.dcm")
    make_localizer(tmp_path / "in/scout.dcm")  # the rules pass it over
    orthanc.upload(tmp_path / "in")
    wait_until_stable(orthanc, 22)
    source = watch(orthanc.url)
    monkeypatch.setattr("node.watch.following.retry_wait_s", lambda *_: 0.0)
    for _ in range(3):  # a busy Orthanc breaks a connection now and then: the next look goes on from there
        source.look()
        if not index.watched_source("orthanc").is_failing and not index.troubled_series("orthanc"):
            break
    expected = {dcmread(paths[0]).SeriesInstanceUID: len(paths) for paths in series}
    assert held(index) == expected
    assert {case.calling_ae_title for case in index.cases()} == {"ORTHANC"}
    assert {carrier.released for uid in expected for carrier in index.stored_series(uid).carriers} == {True}
    known = index.watched_source("orthanc")
    assert (known.num_series, known.is_failing, known.error) == (20, False, "")
    assert known.position == orthanc.client.get_json("changes?last")["Last"]

    # The node is restarted, and a Series grows.
    uid = dcmread(series[1][0]).SeriesInstanceUID
    make_ct_series(tmp_path / "late", num_slices=1, series_instance_uid=uid)
    orthanc.upload(tmp_path / "late")
    wait_until_stable(orthanc, 23)
    watch(orthanc.url).look()
    assert held(index) == expected | {uid: len(series[1]) + 1}


def test_what_was_there_before_the_first_look_is_left_there_unless_asked_for(
    orthanc: OrthancServer, watch: Watch, index: Index, tmp_path: Path
) -> None:
    make_ct_series(tmp_path / "old")
    orthanc.upload(tmp_path / "old")
    wait_until_stable(orthanc, 1)
    new = watch(orthanc.url, begin="now")
    new.look()
    assert held(index) == {}
    (first, *_) = make_ct_series(tmp_path / "new")
    orthanc.upload(tmp_path / "new")
    wait_until_stable(orthanc, 2)
    new.look()
    assert list(held(index)) == [dcmread(first).SeriesInstanceUID]
    # As of a DICOMweb archive that was watched under this name.
    index.note_position("orthanc", 20260101)
    new.look()
    assert len(held(index)) == 1
    # As after a change of Orthanc's database: numbers that it has not reached.
    index.note_position("orthanc", 10**6)
    new.look()
    assert len(held(index)) == 2


def test_an_orthanc_in_which_the_latest_patient_is_deleted_is_not_taken_for_one_made_anew(
    orthanc: OrthancServer, watch: Watch, index: Index, tmp_path: Path
) -> None:
    """His changes go with him, so the number of the latest one falls."""

    def upload(name: str) -> str:
        (first, *_) = make_ct_series(tmp_path / name, edit=lambda _, ds: setattr(ds, "PatientID", name))
        orthanc.upload(tmp_path / name)
        wait_until_stable(orthanc, 2 if name != "old" else 1)
        return str(dcmread(first).SeriesInstanceUID)

    source = watch(orthanc.url, begin="now")
    upload("old")
    source.look()
    deleted = upload("deleted")
    source.look()
    (series,) = orthanc.client.lookup(deleted)
    orthanc.client.delete(f"patients/{orthanc.client.get_json(f'series/{series}/patient')['ID']}")
    assert orthanc.client.get_json("changes?last")["Last"] < (index.watched_source("orthanc").position or 0)
    source.look()
    assert held(index) == {deleted: 8}
    new = upload("new")
    source.look()
    assert held(index) == {deleted: 8, new: 8}


def test_ct_that_lacks_its_modality_is_fetched(
    orthanc: OrthancServer, watch: Watch, index: Index, tmp_path: Path
) -> None:
    def edit(_i: int, ds: Dataset) -> None:
        del ds.Modality

    (first, *_) = make_ct_series(tmp_path / "in/ct", num_slices=4, edit=edit)
    other = dcmread(make_report(tmp_path / "in/report.dcm"))
    del other.Modality
    other.save_as(tmp_path / "in/report.dcm")
    orthanc.upload(tmp_path / "in")
    wait_until_stable(orthanc, 2)
    watch(orthanc.url).look()
    assert held(index) == {dcmread(first).SeriesInstanceUID: 4}
    assert index.troubled_series("orthanc") == {}


def test_a_database_that_was_made_anew_is_noted_while_it_is_empty(
    orthanc: OrthancServer, watch: Watch, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index.note_position("orthanc", 12)
    source = watch(orthanc.url, begin="now")
    for _ in range(3):
        source.look()
    assert caplog.text.count("action=source-anew") == 1
    for number in range(2):  # before the next look more changes than there were, and a stable Series among the first
        make_ct_series(tmp_path / f"{number}", num_slices=4)
        orthanc.upload(tmp_path / f"{number}")
        wait_until_stable(orthanc, number + 1)
    assert orthanc.client.get_json("changes?last")["Last"] > 12
    source.look()
    assert list(held(index).values()) == [4, 4]


def test_a_series_of_which_orthanc_never_says_that_it_is_stable_is_fetched_once(
    watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is restarted before it would say so: as the Series comes, and again as it grows."""
    ports = {"port": free_port(), "node_port": free_port(), "http_port": free_port()}
    ahead_s = 0.0
    monkeypatch.setattr(index, "now", lambda: time.time() + ahead_s)
    series = [make_ct_series(tmp_path / f"0/{name}") for name in ("kept", "deleted")]
    make_report(tmp_path / "0/report.dcm")
    kept, deleted = (str(dcmread(paths[0]).SeriesInstanceUID) for paths in series)
    make_ct_series(tmp_path / "1", num_slices=1, series_instance_uid=kept)
    for number, num_slices in enumerate((8, 9)):
        orthanc = OrthancServer(tmp_path / "orthanc", routes_by="", stable_age_s=1000, **ports)
        try:
            orthanc.upload(tmp_path / f"{number}")
            watch(orthanc.url).look()
            assert len(index.pending_series("orthanc")) == 2 - number
            ahead_s += 100
            watch(orthanc.url).look()  # it is asked, and has them not stable
            assert held(index) == ({kept: 8} if number else {})
            orthanc.end()
            orthanc = OrthancServer(tmp_path / "orthanc", routes_by="", stable_age_s=1000, **ports)
            if number == 0:
                orthanc.client.delete(f"series/{orthanc.client.lookup(deleted)[0]}")
            watch(orthanc.url).look()
            assert held(index) == ({kept: 8} if number else {})
            ahead_s += 100
            watch(orthanc.url).look()
            assert held(index) == {kept: num_slices}
            assert orthanc.num_stable() == 0
            assert index.pending_series("orthanc") == {}
        finally:
            orthanc.stop()
    known = index.watched_source("orthanc")
    assert (known.num_series, known.is_failing, index.troubled_series("orthanc")) == (2, False, {})


def test_an_orthanc_that_is_restarted_in_the_middle_gives_the_rest(
    watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"port": free_port(), "node_port": free_port(), "http_port": free_port()}
    folder = tmp_path / "orthanc"
    orthanc = OrthancServer(folder, password="hunter2", routes_by="", **ports)
    auth = HttpAuth(type="basic", user="cspine", secret_env="ORTHANC_PASSWORD")
    series = [make_ct_series(tmp_path / f"in/{number}", num_slices=8) for number in range(2)]
    uids = [dcmread(paths[0]).SeriesInstanceUID for paths in series]
    orthanc.upload(tmp_path / "in")
    wait_until_stable(orthanc, 2)
    try:
        monkeypatch.setenv("ORTHANC_PASSWORD", "wrong")
        watch(orthanc.url, auth=auth).look()
        known = index.watched_source("orthanc")
        assert known.is_failing
        assert "answered 401" in known.error
        assert "check auth" in known.error
        monkeypatch.setenv("ORTHANC_PASSWORD", "hunter2")
        read, fetched = Orthanc.read, list[str]()

        def stop_after_three(self: Orthanc, instance: Instance) -> Generator[bytes, None, None]:
            if len(fetched) == 3:
                orthanc.stop()
            fetched.append(instance.sop_instance_uid)
            return read(self, instance)

        with monkeypatch.context() as patch:
            patch.setattr(Orthanc, "read", stop_after_three)
            watch(orthanc.url, auth=auth, connections=1).look()
        assert list(held(index).values()) == [3]
        assert "cannot be reached: connection refused" in index.watched_source("orthanc").error
        orthanc = OrthancServer(folder, password="hunter2", routes_by="", **ports)
        asked = list[str]()
        with monkeypatch.context() as patch:
            patch.setattr(Orthanc, "read", lambda self, one: (asked.append(one.sop_instance_uid), read(self, one))[1])
            watch(orthanc.url, auth=auth).look()
        assert held(index) == dict.fromkeys(uids, 8)
        assert len(asked) == 13
        known = index.watched_source("orthanc")
        assert (known.num_series, known.is_failing) == (2, False)
        assert known.succeeded_at is not None
    finally:
        orthanc.stop()


def test_an_orthanc_that_is_not_there_is_looked_at_more_and_more_rarely(
    watch: Watch,
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cspine: Callable[..., Any],
    tmp_path: Path,
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    opened: list[float] = []
    now = 1000.0
    monkeypatch.setattr("node.watch.following.time.monotonic", lambda: now)
    last_change = Orthanc.last_change
    monkeypatch.setattr(Orthanc, "last_change", lambda self: (opened.append(now), last_change(self))[1])
    absent = watch(url)
    for _ in range(600):
        absent.look()
        now += 1
    pauses = [later - earlier for earlier, later in pairwise(opened)]
    assert 4 <= pauses[0] <= 6
    assert pauses == sorted(pauses)
    assert pauses[-1] > 100
    assert caplog.text.count("action=source-failed") == 1
    config = tmp_path / "config.yaml"
    config.write_text(f"data_dir: {index.data_dir}\nsources:\n  orthanc: [{{name: orthanc, url: '{url}'}}]\n")
    shown = cspine("sources", "--config", config, "--json")
    assert shown.exit_code == 1
    told = json.loads(shown.output)
    assert (told["state"], told["position"]) == ("failing", None)
    assert datetime.fromisoformat(told["failed_at"]).tzinfo is not None
    assert told["error"] == f"{url} cannot be reached: connection refused; check url, and that it runs"
    assert "failing" in cspine("sources", "--config", config).output


@pytest.mark.parametrize("content", [b"{}", b"[" * 200_000])
def test_a_token_is_shown_and_what_is_no_orthanc_is_told(
    watch: Watch, index: Index, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    shown: list[str | None] = []

    class Stranger(Quiet, BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

    monkeypatch.setenv("TOKEN", "s3cret")
    with serving(Stranger) as port:
        url = f"http://127.0.0.1:{port}/below"
        watch(url, auth=HttpAuth(type="bearer", secret_env="TOKEN")).look()
    assert shown == ["Bearer s3cret"]
    assert index.watched_source("orthanc").error == f"{url} does not answer like an Orthanc; check url"


def test_the_rules_can_ask_what_they_can_ask_of_a_series_that_is_here() -> None:
    tags = {
        "Modality": "CT",
        "ImageType": "ORIGINAL\\PRIMARY\\AXIAL",
        "ImageOrientationPatient": "1\\0\\0\\0\\1\\0",
        "SeriesDescription": "C-Spine 1.0 Br60 ",
        "ConvolutionKernel": "Br60s\\3",
        "SliceThickness": "1.0",
        "Rows": "512",
        "KVP": "",
        "PatientName": "Doe^Jane",
    }
    traits = describe(tags, "ORTHANC")
    assert traits.image_type == ("ORIGINAL", "PRIMARY", "AXIAL")
    assert (traits.plane, traits.series_description, traits.rows) == ("axial", "C-Spine 1.0 Br60", 512)
    assert (traits.slice_thickness_mm, traits.kvp, traits.calling_ae_title) == (1.0, None, "ORTHANC")
    assert traits.kernel == ("Br60s", "3")
    assert describe({"Modality": {"odd": 1}}, "X").modality == ""
    assert describe({"Rows": "inf"}, "X").rows is None


def test_a_node_killed_while_it_fetches_goes_on_and_its_results_come_back_once(tmp_path: Path) -> None:
    def settings(url: str) -> dict[str, dict[str, Any]]:
        source = {"name": "pacs", "url": url, "connections": 1, "poll_s": 1, "begin": "oldest"}
        destination = {"name": "pacs", "type": "orthanc", "url": url, "source_metadata": 4100}
        return {"sources": {"orthanc": [source]}, "deliver": {"destinations": [destination]}}

    with fetched_with_a_kill(tmp_path, settings) as (case, orthanc):
        found = orthanc.series()
        for series in found:
            if series.modality != "CT":
                linked = orthanc.client.get_binary(f"series/{series.orthanc_id}/metadata/4100")
                assert linked.decode() == case.series_instance_uid
        # The results become stable too, and nothing comes of it.
        before = orthanc.instances()
        wait_until_stable(orthanc, len(found))
        time.sleep(2 * STABLE_AGE_S)
        assert orthanc.instances() == before
