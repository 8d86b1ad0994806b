"""Retention: what goes when, what never goes, what stays known, and that a kill in the middle does no harm."""

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from node.case import Case, CaseState, DeliveryState, NotificationState
from node.cases import print_table
from node.cli import main
from node.config import Config, RetentionConfig
from node.index import Index, tables
from node.priority import Priority
from node.receive.reconcile import reconcile
from node.reminder import Reminder
from node.retention import Kept, What, finish_interrupted, plan, plan_now, purge, relieve_disk, run_retention
from tests.stored import add_instance

DAY_S = 86400.0
RESULT_UID = "1.2.826.99"
MakeConfig = Callable[..., Config]
UNSAID = Reminder(0)
AT_ONCE = RetentionConfig(originals_days=0, results_days=0, failed_days=0)


def case_in(state: CaseState, *, case_id: int = 1, age_days: float = 0.0) -> Case:
    return Case(
        **dict.fromkeys(Case.__dataclass_fields__)
        | {"case_id": case_id, "state": state, "changed_at": -age_days * DAY_S, "series_instance_uid": f"1.2.{case_id}"}
    )


# ---- the plan ----


@pytest.mark.parametrize(
    ("state", "what", "age_days", "why"),
    [
        (CaseState.DONE, What.ORIGINALS, 10.5, "done 10.5 days ago, originals_days is 10"),
        (CaseState.DONE, What.ORIGINALS, 9.9, ""),
        (CaseState.DONE, What.RESULTS, 21, "done 21.0 days ago, results_days is 20"),
        (CaseState.DONE, What.RESULTS, 19, ""),
        (CaseState.FAILED, What.ORIGINALS, 6, "failed 6.0 days ago, failed_days is 5"),
        (CaseState.FAILED, What.RESULTS, 6, "failed 6.0 days ago, failed_days is 5"),
        (CaseState.REFUSED, What.ORIGINALS, 5, "refused 5.0 days ago, failed_days is 5"),
        (CaseState.REFUSED, What.ORIGINALS, 4, ""),
        (CaseState.SKIPPED, What.ORIGINALS, 6, "skipped 6.0 days ago, failed_days is 5"),
    ],
)
def test_each_thing_has_an_age_of_its_own(state: CaseState, what: What, age_days: float, why: str) -> None:
    kept = Kept(case=case_in(state, age_days=age_days), what=what, num_bytes=1)
    config = RetentionConfig(originals_days=10, results_days=20, failed_days=5)

    purges = plan([kept], config, now=0, excess_bytes=0, why_excess="")

    assert [item.why for item in purges] == ([why] if why else [])


def test_without_limits_everything_is_kept_for_good() -> None:
    config = RetentionConfig(originals_days=None, results_days=None, failed_days=None)
    kept = [Kept(case=case_in(state, age_days=9999), what=what, num_bytes=1) for state in CaseState for what in What]

    assert plan(kept, config, now=0, excess_bytes=0, why_excess="") == []


@pytest.mark.parametrize(
    ("excess_bytes", "expected"),
    [
        (0, [(1, "originals", "age")]),
        (70, [(1, "originals", "age"), (1, "results", "disk")]),  # 60 are freed by age anyway
        (75, [(1, "originals", "age"), (1, "results", "disk"), (2, "originals", "disk")]),
        (999, [(1, "originals", "age"), (1, "results", "disk"), (2, "originals", "disk"), (2, "results", "disk")]),
    ],
)
def test_a_full_disk_takes_what_was_finished_longest_ago_and_no_more_than_needed(
    excess_bytes: int, expected: list[tuple[int, str, str]]
) -> None:
    old, young = case_in(CaseState.DONE, case_id=1, age_days=8), case_in(CaseState.DONE, case_id=2, age_days=2)
    kept = [
        Kept(case=case, what=what, num_bytes=60 if what is What.ORIGINALS else 10)
        for case in (old, young)
        for what in What
    ]

    purges = plan(kept, RetentionConfig(originals_days=7), now=0, excess_bytes=excess_bytes, why_excess="disk")

    assert [
        (item.kept.case.case_id, str(item.kept.what), "disk" if item.why == "disk" else "age") for item in purges
    ] == expected


# ---- the deed ----


def receive(index: Index, series: str, num_instances: int = 3) -> list[Path]:
    """A Series as the receiver leaves it: files, and rows that name them."""
    association = index.open_association("SCANNER")
    paths = []
    for number in range(num_instances):
        path = index.data_dir / "instances" / series / f"{series}.{number}.{time.monotonic_ns()}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        header = {"sop_instance_uid": f"{series}.{number}", "series_instance_uid": series, "study_instance_uid": "1.2"}
        assert add_instance(
            index, association_id=association, calling_ae_title="SCANNER", path=path, headers=[header], quiet_time_s=1
        )
        paths.append(path)
    index.end_association(association, released=True)
    return paths


def case_of(index: Index, series: str) -> Case:
    case = index.case(series)
    assert case is not None
    return case


def analyse(index: Index, series: str, *destinations: str) -> Path:
    """Queues and analyses; the result folder."""
    assert index.queue(case_of(index, series))
    claimed = index.claim_next()
    assert claimed is not None
    folder = index.data_dir / "cases" / series / "abc"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.sr.dcm").write_bytes(bytes(500))
    uids = [f"{RESULT_UID}.{series}"]
    assert index.finish(claimed, folder, summary="x", sop_instance_uids=uids, destinations=destinations)
    return folder


def bring_to(index: Index, series: str, state: CaseState) -> None:
    """A case in that state, by the way it takes in life."""
    receive(index, series)
    if state is CaseState.REFUSED:
        index.refuse(case_of(index, series), "no stack")
    elif state in (CaseState.QUEUED, CaseState.ANALYSING, CaseState.FAILED):
        index.queue(case_of(index, series))
        if state is not CaseState.QUEUED:
            claimed = index.claim_next()
            assert claimed is not None
            if state is CaseState.FAILED:
                index.fail_attempt(claimed, "broken", 1)
    elif state is not CaseState.RECEIVING:
        analyse(index, series, *(["pacs"] if state is CaseState.DELIVERING else []))
    assert case_of(index, series).state is state


def undelivered(index: Index, series: str) -> None:
    """A case that its destination refused for good."""
    receive(index, series)
    analyse(index, series, "pacs")
    delivery = index.next_delivery("pacs")
    assert delivery is not None
    index.settle_delivery(delivery, DeliveryState.FAILED, "refused for good")


def files_of(index: Index) -> list[Path]:
    """Of what was received and made; may be asked while they go."""
    return [
        Path(folder) / name
        for top in ("instances", "cases")
        for folder, _, names in os.walk(index.data_dir / top)
        for name in names
    ]


@pytest.fixture
def index(either_index: Index) -> Index:
    """Each test on SQLite and on PostgreSQL."""
    return either_index


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    """Everything goes as soon as it may."""
    return make_config().model_copy(update={"retention": AT_ONCE})


def test_what_is_received_queued_analysed_or_delivered_never_goes(index: Index, config: Config) -> None:
    under_way = [CaseState.RECEIVING, CaseState.ANALYSING, CaseState.DELIVERING, CaseState.QUEUED]
    for number, state in enumerate(under_way):
        bring_to(index, f"1.2.{number}", state)
    before = sorted(files_of(index))
    index.now = lambda: time.time() + 9999 * DAY_S
    full = config.model_copy(update={"retention": AT_ONCE.model_copy(update={"max_disk_gb": 1e-9})})

    run_retention(index, full, UNSAID)

    assert sorted(files_of(index)) == before
    assert plan_now(index, full) == []


def test_results_wait_for_the_last_destination_or_for_its_being_given_up(index: Index, config: Config) -> None:
    receive(index, "1.2.3")
    folder = analyse(index, "1.2.3", "pacs", "archive")
    for destination, end in (("pacs", DeliveryState.DONE), ("archive", DeliveryState.FAILED)):
        run_retention(index, config, UNSAID)
        assert folder.exists()
        delivery = index.next_delivery(destination)
        assert delivery is not None
        index.settle_delivery(delivery, end, "" if end is DeliveryState.DONE else "given up")
    run_retention(index, config, UNSAID)

    assert not folder.exists()
    assert case_of(index, "1.2.3").state is CaseState.FAILED


def test_what_could_not_be_delivered_goes_by_age_and_never_for_room(index: Index, make_config: MakeConfig) -> None:
    undelivered(index, "1.2.3")
    bring_to(index, "1.2.4", CaseState.DONE)
    full = make_config().model_copy(update={"retention": RetentionConfig(max_disk_gb=1e-9)})

    assert {item.kept.case.series_instance_uid for item in plan_now(index, full)} == {"1.2.4"}
    index.now = lambda: time.time() + 31 * DAY_S
    why = {item.kept.case.series_instance_uid: item.why for item in plan_now(index, full)}
    assert why["1.2.3"] == "failed 31.0 days ago, failed_days is 30"


def test_results_wait_until_everyone_was_told_of_them(index: Index, config: Config) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    row = {
        "target": "chat",
        "about": "analysed",
        "subject": "cases/1.2.3/abc",
        "text": "",
        "at": 0,
        "next_attempt_at": 0,
    }
    with index._writing() as connection:
        connection.execute(
            tables.notifications.insert().values(
                case_id=1, state=NotificationState.PENDING, attempts=0, reason="", **row
            )
        )
    assert plan_now(index, config) == []

    with index._writing() as connection:
        connection.execute(tables.notifications.update().values(state=NotificationState.SENT))
    assert len(plan_now(index, config)) == 2


def test_what_was_purged_is_known(
    index: Index,
    config: Config,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for series, state in (("1.2.3", CaseState.DONE), ("1.2.4", CaseState.REFUSED)):
        bring_to(index, series, state)
    caplog.set_level(logging.INFO)

    run_retention(index, config, UNSAID)

    assert files_of(index) == []
    done, refused = case_of(index, "1.2.3"), case_of(index, "1.2.4")
    assert done.originals_purged_at == pytest.approx(time.time(), abs=60)
    assert done.results_purged_at == pytest.approx(time.time(), abs=60)
    assert (refused.reason, refused.results_purged_at) == ("no stack", None)
    assert (done.num_instances, index.instance_paths("1.2.3")) == (3, [])
    assert index.is_result(f"{RESULT_UID}.1.2.3"), "what this node made is never analysed, purged or not"
    assert index.stored_file("1.2.3.0") is None
    assert "series=1.2.3 what=originals bytes=3000: done 0.0 days ago, originals_days is 0" in caplog.text
    assert "action=retention purged=3 freed_mb=0.0" in caplog.text
    print_table([done], lambda _: Priority.ROUTINE)
    assert "originals purged" in (shown := capsys.readouterr().out)
    assert "results purged" in shown
    assert plan_now(index, config) == []


def test_originals_may_go_and_results_stay(index: Index, make_config: MakeConfig) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    config = make_config().model_copy(update={"retention": RetentionConfig(originals_days=0, results_days=None)})

    run_retention(index, config, UNSAID)

    case = case_of(index, "1.2.3")
    assert case.originals_purged_at is not None
    assert case.results_purged_at is None
    assert [path.name for path in files_of(index)] == ["report.sr.dcm"]


def test_a_purged_series_that_comes_again_is_new(index: Index, config: Config) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    index.note_conflict("1.2.3", "SCANNER")
    run_retention(index, config, UNSAID)

    paths = receive(index, "1.2.3", 2)

    case = case_of(index, "1.2.3")
    assert (case.num_conflicts, case.conflicts) == (0, "")  # with Instances that are no more
    assert (case.state, case.num_instances, case.originals_purged_at) == (CaseState.RECEIVING, 2, None)
    assert len(index.stored_series("1.2.3").headers) == 2
    assert case.results_purged_at is not None
    folder = analyse(index, "1.2.3")
    assert case_of(index, "1.2.3").results_purged_at is None
    assert all(path.exists() for path in [*paths, folder])


def test_a_case_that_is_analysed_again_before_its_turn_keeps_everything(index: Index, config: Config) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    purges = plan_now(index, config)
    assert index.retry(case_of(index, "1.2.3"))
    folder = analyse(index, "1.2.3")  # of the same name, for the same Instances
    paths = index.instance_paths("1.2.3")

    assert purge(index, purges) == 0

    assert all(path.exists() for path in [*paths, folder])


def test_a_case_that_a_late_instance_reopens_keeps_everything(index: Index, config: Config) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    purges = plan_now(index, config)
    path = index.data_dir / "instances" / "1.2.3" / "late.dcm"
    path.write_bytes(b"late")
    header = {"sop_instance_uid": "1.2.3.99", "series_instance_uid": "1.2.3", "study_instance_uid": "1.2"}
    add_instance(
        index,
        association_id=index.open_association("X"),
        calling_ae_title="X",
        path=path,
        headers=[header],
        quiet_time_s=1,
    )

    assert purge(index, purges) == 0

    assert len(index.instance_paths("1.2.3")) == 4
    assert len(files_of(index)) == 5


@pytest.mark.parametrize("free_mb", [150, 250])
def test_a_disk_that_is_nearly_full_is_relieved(
    index: Index, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, free_mb: int
) -> None:
    """The receiver refuses below 100 MB; at twice that, room is made."""
    bring_to(index, "1.2.3", CaseState.DONE)
    usage = SimpleNamespace(total=10**12, used=0, free=free_mb * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    relieve_disk(index, make_config(receive={"min_free_disk_mb": 100}), UNSAID)

    assert bool(files_of(index)) == (free_mb > 200)


def test_a_disk_that_is_full_of_what_was_not_delivered_is_told_of_once_an_hour(
    index: Index, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undelivered(index, "1.2.3")
    bring_to(index, "1.2.4", CaseState.DONE)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=150 * 2**20))
    config, reminder, now_s = make_config(receive={"min_free_disk_mb": 100}), Reminder(3600), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    for _ in range(121):
        relieve_disk(index, config, reminder)
        now_s[0] += 30
    first, second = [message for message in caplog.messages if "action=nothing-to-purge" in message]
    assert "missing_mb=52.4 undelivered_cases=1 undelivered_mb=0.0: the disk is nearly full, and retention" in first
    assert "`cspine deliveries list`" in second
    assert {path.parent.name for path in files_of(index) if path.parent.parent.name == "instances"} == {"1.2.3"}


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_disk_percent": 0.5}, ["1.2.4"]),
        ({"max_disk_gb": 5e-6}, ["1.2.4"]),
        ({"max_disk_gb": 1}, ["1.2.3", "1.2.4"]),
    ],
)
def test_the_share_of_the_disk_is_kept(
    index: Index,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, float],
    left: list[str],
) -> None:
    for series in ("1.2.3", "1.2.4"):
        bring_to(index, series, CaseState.DONE)
    usage = SimpleNamespace(total=10**6, used=0, free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = make_config().model_copy(update={"retention": RetentionConfig(**limits)})  # type: ignore[arg-type]

    run_retention(index, config, UNSAID)

    assert sorted({path.parent.name for path in files_of(index) if path.suffix == ".dcm"} - {"abc"}) == left


# ---- kills ----


@pytest.mark.parametrize("what", list(What))
def test_a_purge_that_died_before_the_files_went_is_ended_and_is_no_damage(index: Index, what: What) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    (index.purge_originals if what is What.ORIGINALS else index.purge_results)(case_of(index, "1.2.3"))
    assert len(files_of(index)) == 4

    finish_interrupted(index)  # as the node does before its receiver reconciles

    assert len(files_of(index)) == (1 if what is What.ORIGINALS else 3)
    assert reconcile(index) == 0
    assert index.removals() == []


def test_results_made_again_before_an_interrupted_purge_is_ended_stay(index: Index, config: Config) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    for remove in (index.purge_results, index.purge_originals):
        remove(case_of(index, "1.2.3"))
    finish_interrupted_originals = [path for path in index.removals() if path.suffix == ".dcm"]
    receive(index, "1.2.3", 2)
    folder = analyse(index, "1.2.3")

    finish_interrupted(index)

    assert (folder / "report.sr.dcm").exists()
    assert not any(path.exists() for path in finish_interrupted_originals)
    assert reconcile(index) == 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_dash_nine_in_the_middle_and_again_converges(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    index = Index(tmp_path / "data")
    for number in range(30):
        bring_to(index, f"1.2.{number}", CaseState.DONE)
    (tmp_path / "config.yaml").write_text(
        "data_dir: data\nretention: {originals_days: 0, results_days: 0}\n", encoding="utf-8"
    )
    program = (
        "import sys, time; from pathlib import Path; from node import retention\n"
        "from node.config import load_config; from node.index import Index\n"
        "remove, num_left = retention._remove, int(sys.argv[2])\n"
        "def remove_slowly(path):\n"
        "    global num_left; remove(path); num_left -= 1; time.sleep(0.5 if num_left < 10 else 0)\n"
        "retention._remove = remove_slowly; config = load_config(Path(sys.argv[1])); index = Index(config.data_dir)\n"
        "print('go', flush=True); retention.run_retention(index, config, None)"
    )
    num_files = len(files_of(index))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "config.yaml"), str(num_files)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    deadline = time.monotonic() + 60
    wanted = num_files - rng.randrange(1, num_files - 20)
    while len(files_of(index)) > wanted and process.poll() is None:
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    process.stdout.close()
    assert files_of(index), "the kill came too late to try anything"

    finish_interrupted(index)
    for case in index.cases():  # rows and files agree, case by case
        here = index.instance_paths(case.series_instance_uid)
        assert all(path.exists() for path in here)
        assert len(here) == (0 if case.originals_purged_at else 3)
        assert case.result_dir is not None
        assert case.result_dir.is_dir() == (case.results_purged_at is None)
    assert reconcile(index) == 0
    run_retention(index, Config(data_dir=tmp_path / "data", retention=AT_ONCE), UNSAID)
    assert files_of(index) == []
    index.close()


# ---- by hand ----


def test_cspine_purge_says_what_would_go_and_then_does_it(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    bring_to(index, "1.2.3", CaseState.DONE)
    path = tmp_path / "config.yaml"
    url = database.get_secret_value() if database else "null"
    path.write_text(f"data_dir: data\ndatabase: {url}\nretention: {{originals_days: 0}}\n", encoding="utf-8")

    dry = CliRunner().invoke(main, ["purge", "--dry-run", "--config", str(path)], env={"COLUMNS": "200"})
    assert "done 0.0 days ago, originals_days is 0" in dry.output
    assert "MB would be freed." in dry.output
    assert len(files_of(index)) == 4
    wet = CliRunner().invoke(main, ["purge", "--config", str(path)], env={"COLUMNS": "200"})
    assert "MB freed." in wet.output
    assert len(files_of(index)) == 1
    again = CliRunner().invoke(main, ["purge", "--config", str(path)])
    assert (again.output, again.exit_code) == ("There is nothing to purge.\n", 0)
