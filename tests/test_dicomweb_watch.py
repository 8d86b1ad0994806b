"""A DICOMweb archive that the node watches: of several makes, what is fetched, and what survives which death."""

import json
import ssl
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from node.config import Config
from node.index import Index
from node.peers import ClientTls, DicomWebSource, HttpAuth
from node.receive.store import Store
from node.watch.dicomweb import DicomWebWatch
from node.watch.web_archive import ListedSeries, WebArchive
from node.web.multipart import Event, PartBegins, PartData
from node.web.settings import WebConfig
from tests.certificates import Authority
from tests.factories import make_ct_series, make_localizer, make_report, make_screen_save
from tests.killed_fetch import fetched_with_a_kill
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.web_archive_stand_in import AZURE, DCM4CHEE, GOOGLE, ONE_BY_ONE, SPARE, STORED, Shape, StandIn
from tests.web_server import WebServer, hold

Watch = Callable[..., DicomWebWatch]
POLL_S = 0.02


@pytest.fixture(name="watch")
def make_watch(make_config: Callable[..., Config], index: Index, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Makes a watch of the archive at a URL, which begins with 2026, the day after the Studies of these tests."""
    monkeypatch.setattr("node.watch.dicomweb._today", lambda: date(2026, 1, 2))
    stores: list[Store] = []

    def make(url: str, **settings: Any) -> DicomWebWatch:
        config = make_config()
        stores.append(Store(config, index, f"watch{len(stores)}"))
        defaults = {"begin": date(2026, 1, 1), "poll_s": POLL_S, "max_requests_per_s": 1000}
        return DicomWebWatch(
            config, DicomWebSource(name="pacs", url=url, **{**defaults, **settings}), index, stores[-1]
        )

    yield make
    for store in stores:
        store.close()


def look(watch: DicomWebWatch, times: int = 2) -> None:
    """Looks as the scheduler has it look. Twice: what is new is fetched once it has not grown for a look."""
    for _ in range(times):
        watch.look()
        time.sleep(POLL_S)


def held(index: Index) -> dict[str, int]:
    """How many Instances are here, by Series."""
    return {case.series_instance_uid: case.num_instances for case in index.cases()}


def series_of(paths: list[Path]) -> str:
    return str(dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID)


def pixels_here(index: Index) -> set[bytes]:
    return {
        dcmread(path).PixelData for case in index.cases() for path in index.instance_paths(case.series_instance_uid)
    }


SHAPES = {"google": GOOGLE, "azure": AZURE, "dcm4chee": DCM4CHEE, "spare": SPARE, "one by one": ONE_BY_ONE}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_archives_of_any_make_give_all_new_ct_once(shape: Shape, watch: Watch, index: Index, tmp_path: Path) -> None:
    series = [make_ct_series(tmp_path / f"{number}", num_slices=4 + number) for number in range(5)]
    others = [make_report(tmp_path / "report.dcm"), make_screen_save(tmp_path / "dose.dcm", like=series[0][0])]
    with StandIn(shape).serving() as archive:
        for paths in (*series, others):
            archive.hold(paths)
        first = watch(archive.url)
        first.look()
        assert held(index) == {}  # it might still be arriving there
        time.sleep(POLL_S)
        first.look()
        assert held(index) == {series_of(paths): len(paths) for paths in series}
        assert pixels_here(index) == {dcmread(path).PixelData for paths in series for path in paths}
        assert {case.calling_ae_title for case in index.cases()} == {"DICOMWEB"}
        known = index.watched_source("pacs")
        assert (known.num_series, known.is_failing, known.error) == (5, False, "")
        assert archive.asked_for_files()
        in_vain = [
            headers
            for headers in archive.headers
            if headers["Accept"] not in ("application/dicom+json", *shape.accepts)
        ]
        assert len(in_vain) == (STORED not in shape.accepts)
        look(watch(archive.url))  # the node is restarted
        assert archive.asked_for_files() == []


def test_a_name_in_another_character_set_hides_no_series(watch: Watch, index: Index, tmp_path: Path) -> None:
    class Latin1(StandIn):
        def answer(self, path: str, accept: str) -> tuple[int, dict[str, str], bytes]:
            status, headers, body = super().answer(path, accept)
            return (
                status,
                headers,
                body.replace(b'[{"', '[{"00100010": {"vr": "PN", "Value": ["Né"]}, "'.encode("latin-1"), 1),
            )

    paths = make_ct_series(tmp_path / "ct")
    with Latin1().serving() as archive:
        archive.hold(paths)
        look(watch(archive.url))
    assert held(index) == {series_of(paths): 8}


def test_a_series_is_whole_at_the_archive_before_it_is_fetched(watch: Watch, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=9)
    with StandIn().serving() as archive:
        watched = watch(archive.url)
        for number in (3, 6, 9):
            archive.hold(paths[:number])
            watched.look()
            time.sleep(POLL_S)
            assert held(index) == {}
        watched.look()
        assert held(index) == {series_of(paths): 9}
        assert {carrier.released for carrier in index.stored_series(series_of(paths)).carriers} == {True}
        archive.asked_for_files()

        uid = series_of(paths)
        late = make_ct_series(tmp_path / "late", num_slices=2, series_instance_uid=uid)
        archive.files = dict(list(archive.files.items())[3:])  # three are deleted there, and then it grows after all
        look(watched)
        archive.hold(late)
        look(watched)
        assert held(index) == {uid: 11}
        assert len(archive.asked_for_files()) == 2


def test_a_restart_between_two_looks_does_not_pass_for_time(watch: Watch, index: Index, tmp_path: Path) -> None:
    with StandIn().serving() as archive:
        archive.hold(make_ct_series(tmp_path / "ct"))
        watch(archive.url, poll_s=60).look()
        watch(archive.url, poll_s=60).look()
    assert held(index) == {}


def test_what_was_there_before_the_first_look_is_left_there_unless_it_grows(
    watch: Watch, index: Index, tmp_path: Path
) -> None:
    old, growing, new = (make_ct_series(tmp_path / name) for name in ("old", "growing", "new"))
    with StandIn().serving() as archive:
        archive.hold(old)
        archive.hold(growing[:3])
        watched = watch(archive.url, begin="now")
        look(watched)
        assert held(index) == {}
        archive.hold(growing)
        archive.hold(new)
        look(watched)
    assert held(index) == {series_of(growing): 8, series_of(new): 8}


@pytest.mark.parametrize("position", [12345, 30712])
def test_the_position_of_an_orthanc_of_that_name_is_no_day(watch: Watch, index: Index, position: int) -> None:
    index.note_position("pacs", position)
    with StandIn().serving() as archive:
        watch(archive.url, begin="now").look()
        assert "StudyDate=20251231-" in archive.asked[0]
    assert index.watched_source("pacs").position == 20260102


def test_a_node_that_was_off_for_days_lists_those_days(
    watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = date(2026, 1, 10)
    monkeypatch.setattr("node.watch.dicomweb._today", lambda: today)

    def of(day: str) -> Callable[[int, Dataset], None]:
        return lambda _, ds: setattr(ds, "StudyDate", day)

    with StandIn().serving() as archive:
        look(watch(archive.url, begin="now"), 1)
        assert "StudyDate=20260108-" in archive.asked[0]
        assert index.watched_source("pacs").position == 20260110
        today = date(2026, 3, 1)
        missed = make_ct_series(tmp_path / "missed", edit=of("20260109"))
        archive.hold(missed)
        archive.hold(make_ct_series(tmp_path / "older", edit=of("20260107")))
        archive.asked.clear()
        watched = watch(archive.url, begin="now")
        watched.look()
        assert "StudyDate=20260108-" in archive.asked[0]
        time.sleep(POLL_S)
        watched.look()
        assert held(index) == {series_of(missed): 8}
        archive.asked.clear()
        watched.look()
        assert "StudyDate=20260227-" in archive.asked[0]
        look(watch(archive.url, overlap_days=None))
        assert "StudyDate" not in archive.asked[-1]
    assert len(held(index)) == 2


def test_the_rules_are_asked_before_anything_is_fetched(watch: Watch, index: Index, tmp_path: Path) -> None:
    with StandIn().serving() as archive:
        archive.hold([make_localizer(tmp_path / "scout.dcm")])
        look(watch(archive.url), 3)
        assert archive.asked_for_files() == []
    assert held(index) == {}
    assert index.watched_source("pacs").num_series == 0


def test_what_an_archive_breaks_off_is_fetched_one_by_one(watch: Watch, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct")
    size = paths[0].stat().st_size
    with StandIn().serving() as archive:
        archive.hold(paths)
        archive.cut_after = 3 * size
        look(watch(archive.url))
        assert held(index) == {series_of(paths): 8}
        asked = archive.asked_for_files()
    assert len(asked) == 1 + 6  # the Series, of which two came whole, and the others
    assert index.watched_source("pacs").is_failing is False


def test_a_busy_archive_is_left_alone_for_as_long_as_it_asks(
    watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_ct_series(tmp_path / "ct")
    monotonic = time.monotonic
    with StandIn().serving() as archive:
        archive.hold(paths)
        watched = watch(archive.url)
        look(watched, 1)
        archive.faults.append(("/series/", 429, {"Retry-After": "120"}))
        watched.look()
        known = index.watched_source("pacs")
        assert "answered 429" in known.error
        archive.asked.clear()
        monkeypatch.setattr("node.watch.following.time.monotonic", lambda: monotonic() + 110)
        watched.look()
        watch(archive.url).look()  # after a restart, 120 s by the wall clock before the pause ends
        assert archive.asked == []
        assert known.paused_until == pytest.approx(time.time() + 120, abs=10)
        monkeypatch.setattr("node.watch.following.time.monotonic", lambda: monotonic() + 125)
        monkeypatch.setattr(index, "now", lambda: time.time() + 125)
        watch(archive.url).look()  # after a restart: the pause is over by both clocks
        assert index.watched_source("pacs").paused_until is None
    assert held(index) == {series_of(paths): 8}


def test_requests_keep_to_their_rate(tmp_path: Path) -> None:
    with StandIn().serving() as archive:
        source = DicomWebSource(name="pacs", url=archive.url, max_requests_per_s=50)
        started = time.monotonic()
        asking = WebArchive(source)
        for _ in range(5):
            asking.check()
        asking.close()
    assert time.monotonic() - started > 4 / 50


@pytest.mark.parametrize("position", [5312, 20261399])
def test_a_position_that_another_kind_of_source_left_is_not_believed(
    position: int, watch: Watch, index: Index, tmp_path: Path
) -> None:
    index.note_position("pacs", position)
    paths = make_ct_series(tmp_path / "ct")
    with StandIn().serving() as archive:
        archive.hold(paths)
        look(watch(archive.url))
    assert held(index) == {series_of(paths): 8}


def test_what_is_no_archive_is_told(
    watch: Watch, index: Index, cspine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandIn().serving() as archive:
        watch(archive.url + "/deeper").look()
        assert "answered 404 (Not Found): check url" in index.watched_source("pacs").error
    config = tmp_path / "config.yaml"
    config.write_text(f"data_dir: {index.data_dir}\nsources:\n  dicomweb: [{{name: pacs, url: '{archive.url}'}}]\n")
    shown = cspine("sources", "--config", config, "--json")
    assert shown.exit_code == 1
    told = json.loads(shown.output)
    assert (told["state"], told["url"], told["num_series"]) == ("failing", archive.url, 0)
    index.note_position("pacs", 20260102)
    monkeypatch.setenv("COLUMNS", "200")
    assert "2026-01-02" in cspine("sources", "--config", config).output
    index.note_failure("pacs", "answered 429", pause_s=600)
    assert "It asked to be left alone until" in cspine("sources", "--config", config).output


HOSTILE = {
    "a page": (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
    "no list": (200, {}, b'{"0020000E": 7}'),
    "odd values": (
        200,
        {},
        b'[{"0020000E": {"Value": ["../../etc"]}}, {"0020000E": {"Value": [{}]}}, [], {"0020000E": []}]',
    ),
    "too deep": (200, {}, b"[" * 200_000),
    "elsewhere": (302, {"Location": "http://192.0.2.1/"}, b""),
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_odd_answers_fetch_nothing_and_break_nothing(
    answer: tuple[int, dict[str, str], bytes], watch: Watch, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "answer", lambda *_: answer)
    with StandIn().serving() as archive:
        look(watch(archive.url))
    assert held(index) == {}


def test_parts_that_are_no_ct_are_refused_and_the_others_taken(watch: Watch, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct")
    dose = make_screen_save(tmp_path / "dose.dcm", like=paths[0])
    ds = dcmread(dose)
    ds.SeriesInstanceUID, ds.Modality = series_of(paths), "CT"
    ds.save_as(dose)
    junk = tmp_path / "junk.dcm"
    junk.write_bytes(b"no DICOM" * 100)
    with StandIn().serving() as archive:
        archive.hold([*paths, dose])
        archive.files[str(ds.SOPInstanceUID)] = dose
        give = archive._give

        def give_junk_too(series: str, instance: str | None, accept: str) -> tuple[int, dict[str, str], bytes]:
            status, headers, body = give(series, instance, accept)
            part = b"------=_Part_7_1\r\nContent-Type: application/dicom\r\n\r\n" + junk.read_bytes() + b"\r\n"
            return status, headers, (part + body if instance is None else body)

        archive._give = give_junk_too  # type: ignore[method-assign]
        look(watch(archive.url), 3)
        assert len(archive.asked_for_files()) == 1
    assert held(index) == {series_of(paths): 8}


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 48 * 2**20
    head = b"--x\r\nContent-Type: application/dicom\r\n\r\n"
    body = head + bytes(size) + b"\r\n--x--"
    monkeypatch.setattr(StandIn, "answer", lambda *_: (200, {"Content-Type": "multipart/related; boundary=x"}, body))
    with StandIn().serving() as archive:
        asking = WebArchive(DicomWebSource(name="pacs", url=archive.url))
        series = ListedSeries(study_instance_uid="1.2", series_instance_uid="1.3", num_instances=1)
        tracemalloc.start()
        num_bytes = sum(len(event.data) for event in asking.read_series(series) if isinstance(event, PartData))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        asking.close()
    assert num_bytes == size
    assert peak < 8 * 2**20


# ---- real archives ----


def test_an_orthanc_that_is_restarted_in_the_middle_gives_the_rest(
    watch: Watch, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {"port": free_port(), "node_port": free_port(), "http_port": free_port()}
    orthanc = OrthancServer(tmp_path / "orthanc", password="hunter2", routes_by="", **ports)
    url = f"{orthanc.url}/dicom-web"
    auth = HttpAuth(type="basic", user="cspine", secret_env="ORTHANC_PASSWORD")
    series = [make_ct_series(tmp_path / f"in/{number}") for number in range(20)]
    make_report(tmp_path / "in/report.dcm")
    orthanc.upload(tmp_path / "in")
    try:
        monkeypatch.setenv("ORTHANC_PASSWORD", "wrong")
        look(watch(url, auth=auth), 1)
        assert "answered 401 (Unauthorized): check auth" in index.watched_source("pacs").error
        monkeypatch.setenv("ORTHANC_PASSWORD", "hunter2")
        look(watch(url, auth=auth), 1)
        read = WebArchive.read_series

        def stop_after_three(self: WebArchive, one: ListedSeries) -> Iterator[Event]:
            num_parts = 0
            for event in read(self, one):
                num_parts += isinstance(event, PartBegins)
                if num_parts == 4:
                    orthanc.stop()
                yield event

        with monkeypatch.context() as patch:
            patch.setattr(WebArchive, "read_series", stop_after_three)
            look(watch(url, auth=auth), 1)
        assert 3 <= sum(held(index).values()) < 160
        assert index.watched_source("pacs").is_failing
        orthanc = OrthancServer(tmp_path / "orthanc", password="hunter2", routes_by="", **ports)
        look(watch(url, auth=auth), 1)
        assert held(index) == {series_of(paths): 8 for paths in series}
        known = index.watched_source("pacs")
        assert (known.num_series, known.is_failing) == (20, False)
    finally:
        orthanc.stop()


def test_a_node_is_an_archive_for_another_one(
    watch: Watch, make_config: Callable[..., Config], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Index(tmp_path / "there")) as there:
        paths = make_ct_series(tmp_path / "there/ct", num_slices=12)
        hold(there, paths)
        web = WebConfig(allow="tokens")
        server = WebServer(Config(data_dir=tmp_path / "there", web=web), there)
        try:
            look(watch(server.url), 1)
            assert "answered 401" in index.watched_source("pacs").error
            secret = tmp_path / "token"
            secret.write_text(server.tokens.make("watch", ("read",)), encoding="utf-8")
            look(watch(server.url, auth=HttpAuth(type="bearer", secret_file=secret)))
        finally:
            server.stop()
    assert held(index) == {series_of(paths): 12}
    assert pixels_here(index) == {dcmread(path).PixelData for path in paths}


def test_under_tls_only_the_named_authority_is_trusted_and_our_certificate_shown(
    watch: Watch, index: Index, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ca")
    theirs, ours = authority.sign("archive"), authority.sign("node")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(theirs.certificate, theirs.key)
    context.load_verify_locations(authority.certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    paths = make_ct_series(tmp_path / "ct")
    with StandIn().serving(context) as archive:
        archive.hold(paths)
        look(watch(archive.url), 1)
        assert "its certificate cannot be trusted" in index.watched_source("pacs").error
        look(watch(archive.url, tls=ClientTls(ca=authority.certificate)), 1)
        # Which of the two depends on whether the archive's alert or its end of the connection is read first.
        error = index.watched_source("pacs").error
        assert "it wants a certificate of ours" in error or "not trust our certificate" in error
        tls = ClientTls(ca=authority.certificate, certificate=ours.certificate, key=ours.key)
        look(watch(archive.url, tls=tls))
    assert held(index) == {series_of(paths): 8}


def test_a_node_killed_while_it_fetches_goes_on_and_its_results_come_back_once(tmp_path: Path) -> None:
    def settings(url: str) -> dict[str, dict[str, Any]]:
        url += "/dicom-web"
        source = {"name": "pacs", "url": url, "poll_s": 1, "begin": "2026-01-01", "overlap_days": None}
        destination = {"name": "pacs", "type": "dicomweb", "url": url}
        return {"sources": {"dicomweb": [source]}, "deliver": {"destinations": [destination]}}

    with fetched_with_a_kill(tmp_path, settings) as (_, orthanc):
        # Nothing comes of the results, however often it looks.
        before = orthanc.instances()
        time.sleep(4)
        assert orthanc.instances() == before
