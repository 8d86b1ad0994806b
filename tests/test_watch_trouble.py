"""Series that a watched archive does not give out, faults and a stop in the middle of a look: what they hold up."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from node.config import Config
from node.index import Index
from node.peers import DicomWebSource, OrthancSource
from node.receive.store import Store
from node.watch.dicomweb import DicomWebWatch
from node.watch.following import _MAX_ATTEMPTS
from node.watch.orthanc import OrthancWatch
from node.watch.taking import StoppingError
from node.watch.web_archive import WebArchive
from tests.factories import make_ct_series
from tests.orthanc_stand_in import OrthancStandIn
from tests.test_dicomweb_watch import Watch, held, look, make_watch, series_of  # noqa: F401 - a fixture named watch
from tests.web_archive_stand_in import Shape, StandIn

_DAY_S = 86400.0


class Clock:
    """Real time, and what was added."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def ahead(index: Index, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(index, "now", clock)
    return clock


# ---- DICOMweb ----


@pytest.mark.parametrize("counts", ["always", "never"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "answered 500"),
        (503, "answered 503"),
        (410, "answered 410"),
        (403, "answered 403"),
        (0, "broke the connection"),
    ],
)
def test_a_series_that_an_archive_does_not_give_out_waits_alone_and_is_set_aside(
    fault: int,
    reason: str,
    counts: Any,
    watch: Watch,
    index: Index,
    ahead: Clock,
    cspine: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """0: the connection is closed without an answer."""
    broken, sound, new = (make_ct_series(tmp_path / name) for name in ("broken", "sound", "new"))
    uid, path = series_of(broken), f"{series_of(broken)}/instances?"
    with StandIn(Shape(counts=counts)).serving() as archive:
        archive.hold([*broken, *sound])
        archive.faults += [(path, fault, {})] * 100
        watched = watch(archive.url)
        look(watched)
        assert held(index) == {series_of(sound): 8}
        known, trouble = index.watched_source("pacs"), index.troubled_series("pacs")[uid]
        assert (known.is_failing, known.error, trouble.attempts) == (False, "", 1)
        assert reason in trouble.reason

        archive.asked.clear()
        archive.hold(new)
        look(watched)  # at once: the archive has no wait
        assert held(index) == {series_of(sound): 8, series_of(new): 8}
        assert not any(path in asked for asked in archive.asked)

        watched = watch(archive.url)  # the node is restarted
        for attempts in range(2, _MAX_ATTEMPTS + 1):
            ahead.ahead_s += 1800
            look(watched)
            assert index.troubled_series("pacs")[uid].attempts == attempts
        assert index.troubled_series("pacs")[uid].is_set_aside
        assert "action=series-set-aside" in caplog.text
        assert uid in caplog.text

        ahead.ahead_s += _DAY_S
        archive.asked.clear()
        look(watched)
        assert not any(path in asked for asked in archive.asked)

        config = tmp_path / "config.yaml"
        config.write_text(f"data_dir: {index.data_dir}\nsources:\n  dicomweb: [{{name: pacs, url: '{archive.url}'}}]\n")
        shown = cspine("sources", "--config", config)
        assert shown.exit_code == 0
        assert f"pacs did not give out Series {uid} in {_MAX_ATTEMPTS} attempts: {archive.url} {reason}" in shown.output
        assert "set aside" in shown.output
        (told,) = json.loads(cspine("sources", "--config", config, "--json").output)["series_not_given"]
        assert (told["series_id"], told["next_attempt_at"]) == (uid, None)

        if counts == "always":  # it grows, and can be given out
            archive.faults.clear()
            archive.hold(make_ct_series(tmp_path / "late", num_slices=1, series_instance_uid=uid))
            look(watched)
            assert held(index)[uid] == 9
            assert index.troubled_series("pacs") == {}


def test_a_series_that_can_be_given_out_later_is_fetched_then(
    watch: Watch,
    index: Index,
    ahead: Clock,
    tmp_path: Path,
) -> None:
    paths = make_ct_series(tmp_path / "ct")
    with StandIn().serving() as archive:
        archive.hold(paths)
        archive.faults.append(("/instances?", 500, {}))
        watched = watch(archive.url)
        look(watched)
        assert held(index) == {}
        ahead.ahead_s += 10
        look(watched, 1)
    assert held(index) == {series_of(paths): 8}
    assert index.troubled_series("pacs") == {}


@pytest.mark.parametrize("counts", ["always", "never"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_series_at_which_an_archive_always_asks_for_a_pause_holds_up_no_other_and_is_set_aside(
    status: int, counts: Any, watch: Watch, index: Index, ahead: Clock, tmp_path: Path
) -> None:
    large = make_ct_series(tmp_path / "large", num_slices=2)
    uid, path = series_of(large), f"{series_of(large)}/instances?"
    with StandIn(Shape(counts=counts)).serving() as archive:
        archive.hold(large)
        archive.faults += [(path, status, {"Retry-After": "0"})] * 100
        watched = watch(archive.url)
        look(watched)
        assert f"answered {status}" in index.watched_source("pacs").error

        for attempts in range(1, _MAX_ATTEMPTS + 1):
            assert index.troubled_series("pacs")[uid].attempts == attempts
            archive.asked.clear()
            archive.hold(sound := make_ct_series(tmp_path / f"{attempts}", num_slices=1))
            look(watched)
            assert held(index)[series_of(sound)] == 1
            assert not any(path in asked for asked in archive.asked)
            assert not index.watched_source("pacs").is_failing
            ahead.ahead_s += 1800
            look(watched, 1)
        assert index.troubled_series("pacs")[uid].is_set_aside


def test_a_pause_that_an_archive_asks_of_everybody_counts_for_no_series(
    watch: Watch, index: Index, ahead: Clock, tmp_path: Path
) -> None:
    with StandIn().serving() as archive:
        archive.hold(paths := make_ct_series(tmp_path / "ct"))
        archive.faults += [("/series/", 429, {"Retry-After": "0"})] * _MAX_ATTEMPTS
        watched = watch(archive.url)
        look(watched, 1)
        while archive.faults:
            ahead.ahead_s += 1800
            watched._not_before = 0.0
            look(watched, 1)
        assert index.troubled_series("pacs")[series_of(paths)].attempts == 1
        ahead.ahead_s += 1800
        watched._not_before = 0.0
        look(watched, 1)
    assert held(index) == {series_of(paths): 8}


def test_a_series_that_was_set_aside_is_asked_for_again_on_command_however_old(
    watch: Watch, index: Index, cspine: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    paths, gone = make_ct_series(tmp_path / "ct"), "1.2.3"
    with StandIn().serving() as archive:
        config.write_text(f"data_dir: {index.data_dir}\nsources:\n  dicomweb: [{{name: pacs, url: '{archive.url}'}}]\n")
        archive.hold(paths)
        watched = watch(archive.url, begin=date(2026, 1, 2))
        for uid in (series_of(paths), gone):
            index.note_trouble("pacs", uid, "answered 500", attempts=_MAX_ATTEMPTS, next_attempt_at=None)
        look(watched)
        assert held(index) == {}  # the Study is too old to be listed

        unknown = cspine("sources", "retry", "1.9", "--config", config)
        assert (unknown.exit_code, "1.9" in unknown.output) == (1, True)
        assert cspine("sources", "retry", "--config", config).exit_code == 2
        other = cspine("sources", "retry", "--all", "--source", "other", "--config", config)
        assert (other.exit_code, "No archive other is watched" in other.output) == (2, True)
        assert "2 Series are asked for again" in cspine("sources", "--config", config, "retry", "--all").output
        look(watched)
        assert held(index) == {series_of(paths): 8}
        trouble = index.troubled_series("pacs")
    assert list(trouble) == [gone]
    assert f"lists no CT Series {gone}" in trouble[gone].reason
    assert not trouble[gone].is_set_aside
    assert f"Series {gone} in 1 attempt:" in cspine("sources", "--config", config).output


def test_a_clock_that_is_set_back_holds_up_no_series(watch: Watch, index: Index, ahead: Clock, tmp_path: Path) -> None:
    broken, counted = make_ct_series(tmp_path / "broken"), make_ct_series(tmp_path / "counted")
    ahead.ahead_s = 7200.0
    with StandIn().serving() as archive:
        archive.hold(broken)
        archive.faults += [(f"{series_of(broken)}/instances?", 500, {})]
        watched = watch(archive.url)
        look(watched)
        archive.hold(counted)
        look(watched, 1)
        index.note_position("pacs", 20300101)
        ahead.ahead_s = 0.0
        look(watched, 1)
    assert held(index) == {series_of(broken): 8, series_of(counted): 8}
    assert index.watched_source("pacs").position == 20260102


def test_an_archive_that_falls_silent_as_a_whole_is_not_taken_for_series_in_trouble(
    watch: Watch,
    index: Index,
    tmp_path: Path,
) -> None:
    with StandIn().serving() as archive:
        archive.hold(make_ct_series(tmp_path / "ct"))
        watched = watch(archive.url)
        look(watched, 1)
        answer = archive.answer

        def fall_silent(path: str, accept: str) -> tuple[int, dict[str, str], bytes]:
            if "/instances?" in path:
                archive.faults += [("/", 0, {})] * 10
            return answer(path, accept)

        archive.answer = fall_silent  # type: ignore[method-assign]
        watched.look()
    assert index.watched_source("pacs").is_failing
    assert index.troubled_series("pacs") == {}


def test_a_full_disk_is_not_taken_for_a_series_in_trouble(
    make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    config = make_config(receive={"min_free_disk_mb": 10**9})
    store = Store(config, index, "watch")
    with closing(store), StandIn().serving() as archive:
        archive.hold(make_ct_series(tmp_path / "ct"))
        source = DicomWebSource(name="pacs", url=archive.url, begin=date(2026, 1, 1), overlap_days=None, poll_s=0.02)
        look(DicomWebWatch(config, source, index, store))
    assert "cannot be stored now" in index.watched_source("pacs").error
    assert index.troubled_series("pacs") == {}


def test_a_fault_of_ours_is_the_last_error_of_the_source_and_quotes_nobody(
    watch: Watch,
    index: Index,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("Doe^Jane")

    monkeypatch.setattr(WebArchive, "series", broken)
    with pytest.raises(KeyError):  # for the scheduler, which has it logged
        watch("http://127.0.0.1:1").look()
    known = index.watched_source("pacs")
    assert known.is_failing
    assert f"unexpected KeyError at {__file__}" in known.error
    assert "Doe" not in known.error


def test_the_log_says_of_a_broken_job_kind_and_place_and_no_values() -> None:
    code = (
        "import threading\n"
        "from datetime import datetime\n"
        "from apscheduler.events import EVENT_JOB_ERROR\n"
        "from apscheduler.schedulers.background import BackgroundScheduler\n"
        "from node.process import set_up_logging\n"
        "from node.broken_jobs import BrokenJobs\n"
        "set_up_logging('INFO')\n"
        "scheduler = BackgroundScheduler()\n"
        "logged = threading.Event()\n"
        "broken = BrokenJobs('the database', lambda job_id: 'look')\n"
        "scheduler.add_listener(lambda event: (broken.on_error(event), logged.set()), EVENT_JOB_ERROR)\n"
        "scheduler.add_job(lambda: int('Doe^Jane'), next_run_time=datetime.now(), misfire_grace_time=None)\n"
        "scheduler.start()\n"
        "logged.wait(60)\n"
        "scheduler.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "action=job-broke job=look: unexpected ValueError at <string>:12" in done.stderr
    assert "Doe" not in done.stderr


def test_a_stop_does_not_wait_for_the_pause_between_two_requests(tmp_path: Path) -> None:
    stopping = threading.Event()
    with StandIn().serving() as archive:
        source = DicomWebSource(name="pacs", url=archive.url, max_requests_per_s=0.01)
        with closing(WebArchive(source, stopping)) as asking:
            asking.check()
            threading.Timer(0.2, stopping.set).start()
            started = time.monotonic()
            with pytest.raises(StoppingError):
                list(asking.series(None))
    assert time.monotonic() - started < 50  # the pause has 100 s
    assert len(archive.asked) == 1


def test_one_instance_that_is_not_given_out_keeps_no_other_back(
    watch: Watch, index: Index, ahead: Clock, tmp_path: Path
) -> None:
    """A neck with one slice missing can be analysed."""
    paths = make_ct_series(tmp_path / "ct")
    bad = str(dcmread(paths[0], stop_before_pixels=True).SOPInstanceUID)
    with StandIn(Shape(gives_series=501)).serving() as archive:
        archive.hold(paths)
        archive.faults += [(f"/instances/{bad}", 500, {})] * 2  # not that of its metadata
        watched = watch(archive.url, connections=1)
        look(watched)
        assert held(index) == {series_of(paths): 7}
        assert "answered 500" in index.troubled_series("pacs")[series_of(paths)].reason
        archive.asked.clear()
        archive.faults.clear()
        ahead.ahead_s += 10
        look(watched, 1)
        assert len(archive.asked_for_files()) == 1
    assert held(index) == {series_of(paths): 8}


def test_a_series_of_which_nothing_is_given_out_is_not_asked_for_to_its_end(
    watch: Watch, index: Index, tmp_path: Path
) -> None:
    with StandIn(Shape(gives_series=501)).serving() as archive:
        archive.hold(paths := make_ct_series(tmp_path / "ct", num_slices=40))
        archive.faults += [(f"{uid}", 500, {}) for uid in list(archive.files) * 2]
        look(watch(archive.url, connections=1))
        assert len(archive.asked_for_files()) == 1 + 4  # the Series, and as many of its Instances as are tried
    assert list(index.troubled_series("pacs")) == [series_of(paths)]


# ---- Orthanc ----


@pytest.fixture
def watch_orthanc(make_config: Callable[..., Config], index: Index) -> Iterator[Callable[[str], OrthancWatch]]:
    """Makes a watch of the Orthanc at a URL, from its oldest change on."""
    config = make_config()
    with closing(Store(config, index, "watch")) as store:
        yield lambda url: OrthancWatch(config, OrthancSource(name="orthanc", url=url, begin="oldest"), index, store)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(0, "broke off in the middle"), (500, "answered 500"), ("odd", "does not answer like an Orthanc")],
)
def test_a_series_that_orthanc_does_not_give_out_holds_up_neither_the_others_nor_the_position(
    fault: Any,
    reason: str,
    watch_orthanc: Callable[[str], OrthancWatch],
    index: Index,
    ahead: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """0: every file of it breaks off in the middle."""
    broken, sound, new = (make_ct_series(tmp_path / name) for name in ("broken", "sound", "new"))
    orthanc = OrthancStandIn({"broken": broken, "sound": sound, "new": new}, faults={"broken": fault})
    orthanc.changes += ["broken", "sound"]
    with orthanc.serving():
        watched = watch_orthanc(orthanc.url)
        watched.look()
        assert held(index) == {series_of(sound): 8}
        known, trouble = index.watched_source("orthanc"), index.troubled_series("orthanc")["broken"]
        assert (known.position, known.is_failing, known.num_series, trouble.attempts) == (2, False, 1, 1)
        assert reason in trouble.reason

        orthanc.asked.clear()
        orthanc.changes.append("new")
        watched.look()  # at once: the archive has no wait
        assert held(index) == {series_of(sound): 8, series_of(new): 8}
        assert not any("broken" in path for path in orthanc.asked)

        watched = watch_orthanc(orthanc.url)  # the node is restarted
        for attempts in range(2, _MAX_ATTEMPTS + 1):
            ahead.ahead_s += 1800
            watched.look()
            assert index.troubled_series("orthanc")["broken"].attempts == attempts
        assert index.troubled_series("orthanc")["broken"].is_set_aside
        assert "action=series-set-aside" in caplog.text
        ahead.ahead_s += _DAY_S
        orthanc.asked.clear()
        watched.look()
        assert not any("broken" in path for path in orthanc.asked)

        orthanc.faults.clear()
        orthanc.changes.append("broken")  # it grew, say
        watched.look()
        assert held(index)[series_of(broken)] == 8
    assert index.troubled_series("orthanc") == {}
    assert index.watched_source("orthanc").num_series == 3


def test_a_pause_that_a_proxy_before_orthanc_asks_for_is_kept_and_the_series_then_waits_alone(
    watch_orthanc: Callable[[str], OrthancWatch], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, sound = make_ct_series(tmp_path / "busy", num_slices=40), make_ct_series(tmp_path / "sound")
    orthanc = OrthancStandIn({"busy": busy, "sound": sound}, changes=["busy", "sound"], faults={"busy": 429})
    monotonic = time.monotonic
    with orthanc.serving():
        watched = watch_orthanc(orthanc.url)
        watched.look()
        known = index.watched_source("orthanc")
        assert (known.position, known.is_failing, "answered 429" in known.error) == (1, True, True)
        assert sum("/file" in path for path in orthanc.asked) < 20  # those that were under way
        orthanc.asked.clear()
        monkeypatch.setattr("node.watch.following.time.monotonic", lambda: monotonic() + 15)
        watched.look()
        assert orthanc.asked == []
        monkeypatch.setattr("node.watch.following.time.monotonic", lambda: monotonic() + 35)
        watched.look()
        assert held(index) == {series_of(sound): 8}
        assert not any("busy" in path for path in orthanc.asked)
        assert not index.watched_source("orthanc").is_failing

        orthanc.faults.clear()
        assert index.retry_series("orthanc", ["busy"]) == 1
        watched.look()
    assert held(index) == {series_of(sound): 8, series_of(busy): 40}
    assert index.troubled_series("orthanc") == {}


@pytest.mark.parametrize("address", ["/instances/one.0", "/series/one"])
def test_a_pause_that_is_asked_for_at_a_new_instance_is_kept_and_its_series_not_forgotten(
    watch_orthanc: Callable[[str], OrthancWatch], index: Index, ahead: Clock, tmp_path: Path, address: str
) -> None:
    """Orthanc is restarted meanwhile, so it never says that the Series is stable."""
    paths = make_ct_series(tmp_path / "ct")
    orthanc = OrthancStandIn({"one": paths}, changes=[f"one.{number}" for number in range(8)], paused={address})
    with orthanc.serving():
        watch_orthanc(orthanc.url).look()
        known = index.watched_source("orthanc")
        assert ("answered 429" in known.error, known.paused_until is not None) == (True, True)
        assert orthanc.asked.count(address) == 1
        orthanc.paused.clear()
        for wait_s in (60, 120):
            ahead.ahead_s += wait_s
            watch_orthanc(orthanc.url).look()
    assert held(index) == {series_of(paths): 8}


def test_a_file_that_breaks_off_once_is_fetched_some_seconds_later(
    watch_orthanc: Callable[[str], OrthancWatch],
    index: Index,
    ahead: Clock,
    tmp_path: Path,
) -> None:
    paths = make_ct_series(tmp_path / "ct")
    orthanc = OrthancStandIn({"one": paths}, changes=["one"], faults={"one": 0})
    with orthanc.serving():
        watched = watch_orthanc(orthanc.url)
        watched.look()
        orthanc.faults.clear()
        ahead.ahead_s += 10
        watched.look()
    assert held(index) == {series_of(paths): 8}
    assert index.troubled_series("orthanc") == {}
    known = index.watched_source("orthanc")
    assert (known.position, known.num_series) == (1, 1)


def test_one_file_that_breaks_off_keeps_no_other_back(
    watch_orthanc: Callable[[str], OrthancWatch], index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_ct_series(tmp_path / "ct")
    orthanc = OrthancStandIn({"one": paths}, changes=["one"])
    answer = orthanc.answer
    monkeypatch.setattr(
        orthanc, "answer", lambda path: (0 if path == "/instances/one.2/file" else answer(path)[0], answer(path)[1])
    )
    with orthanc.serving():
        watch_orthanc(orthanc.url).look()
    assert held(index) == {series_of(paths): 7}
    assert index.troubled_series("orthanc")["one"].attempts == 1
