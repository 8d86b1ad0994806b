"""Commands over cases, each on SQLite and on PostgreSQL, while another connection (the node's) is open."""

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from pydantic import SecretStr

from node.case import Case, CaseState, DeliveryState
from node.index import Index
from node.remove import delete_case, remove_strays, remove_superseded
from tests.node.test_index import new

Cspine = Callable[..., Result]


@pytest.fixture
def index(tmp_path: Path, database: SecretStr | None) -> Iterator[Index]:
    """As the running node has it; `config.yaml`, which the commands find, names the same database."""
    url = database.get_secret_value() if database else None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"database": url}), encoding="utf-8")
    opened = Index(tmp_path / "data", database)
    yield opened
    opened.close()


def receive(index: Index, uid: str, number: int = 1, **values: Any) -> Path:
    """An Instance of a Series, with its file."""
    instance = new(index, number, uid, **values)
    instance.path.parent.mkdir(parents=True, exist_ok=True)
    instance.path.write_bytes(b"DICM")
    index.add_instances([instance], quiet_time_s=0)
    return instance.path


def the_case(index: Index, uid: str) -> Case:
    case = index.case(uid)
    assert case is not None
    return case


def analysing(index: Index, uid: str) -> Case:
    receive(index, uid)
    assert index.queue(the_case(index, uid))
    case = index.claim_next()
    assert case is not None
    return case


def finished(index: Index, uid: str, *destinations: str, folder: str = "results") -> Path:
    """Results of a Series, on disk and noted."""
    results = index.data_dir / "cases" / uid / folder
    case = analysing(index, uid)
    results.mkdir(parents=True)
    (results / "findings.json").write_text("{}", encoding="utf-8")
    assert index.finish(case, results, summary="", sop_instance_uids=(f"9.{uid}",), destinations=destinations)
    return results


def listed(cspine: Cspine, *arguments: str) -> list[Any]:
    return [json.loads(line) for line in cspine("cases", "--json", *arguments).stdout.splitlines()]


def test_cases_are_listed_by_state_with_priority_and_attempts(cspine: Cspine, index: Index) -> None:
    receive(index, "1.1", attributes={"RequestedProcedurePriority": "STAT"})
    assert index.refuse(the_case(index, "1.1"), "sagittal")
    analysing(index, "1.2")
    receive(index, "1.3")
    assert [case["series_instance_uid"] for case in listed(cspine)] == ["1.3", "1.2", "1.1"]
    (held,) = listed(cspine, "--state", "analysing")
    assert (held["priority"], held["attempts"]) == ("routine", 1)
    (refused,) = listed(cspine, "--state", "refused")
    assert (refused["priority"], refused["attempts"]) == ("stat", 0)
    assert len(listed(cspine, "--state", "refused", "--state", "receiving")) == 2
    assert cspine("cases", "--state", "lost").exit_code == 2


def test_pause_holds_the_queue_across_restarts_until_resume(
    cspine: Cspine, index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    receive(index, "1.1")
    assert index.queue(the_case(index, "1.1"))
    assert cspine("pause").exit_code == 0
    assert cspine("pause").exit_code == 0
    assert index.claim_next() is None
    receive(index, "1.2")  # receiving goes on
    restarted = Index(tmp_path / "data", database)
    assert restarted.claim_next() is None
    restarted.close()
    assert "Paused since" in cspine("cases").stderr
    assert "paused" in cspine("check").stdout
    assert cspine("resume").exit_code == 0
    assert index.claim_next() is not None
    assert "Paused" not in cspine("cases").stderr


def test_retry_starts_again_what_has_ended_and_says_so_of_each(cspine: Cspine, index: Index) -> None:
    finished(index, "1.1")
    receive(index, "1.2")
    assert index.refuse(the_case(index, "1.2"), "sagittal")
    held = analysing(index, "1.3")
    number = the_case(index, "1.2").case_id
    result = cspine("retry", "1.1", str(number), "1.3", "4.5.6")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["Case 1.1 is started again.", f"Case {number} is started again."]
    assert result.stderr.splitlines() == [
        "Case 1.3 is analysing; only what has ended is started again.",
        "Case 4.5.6 does not exist; see `cspine cases`.",
    ]
    again = the_case(index, "1.2")
    assert (again.state, again.reason, again.attempts) == (CaseState.RECEIVING, "", 0)
    assert {case.series_instance_uid for case in index.cases_to_check()} == {"1.1", "1.2"}
    assert the_case(index, "1.3") == held or the_case(index, "1.3").state is CaseState.ANALYSING


def test_a_case_whose_instances_are_gone_is_not_started_again(cspine: Cspine, index: Index) -> None:
    """With nothing to judge it would never end."""
    finished(index, "1.1")
    receive(index, "1.2")
    index.forget_instances(["1.2.1"])
    before = the_case(index, "1.1")
    assert index.purge_originals(before)
    result = cspine("retry", "1.1", "1.2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "Case 1.1 has no Instances any more, they were purged; send the Series again.",
        "Case 1.2 has no Instances any more, they were lost from the disk; send the Series again.",
    ]
    assert not index.retry(before)  # purged since it was looked at
    assert index.cases_to_check() == []


def test_a_case_of_which_a_file_was_lost_is_not_started_again_before_it_is_back(cspine: Cspine, index: Index) -> None:
    finished(index, "1.1")
    (path,) = index.instance_paths("1.1")
    path.rename(path.with_suffix(".away"))
    result = cspine("retry", "1.1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has 1 Instances whose files are missing or cut off; send the Series again first" in result.stderr
    path.with_suffix(".away").rename(path)
    assert cspine("retry", "1.1").exit_code == 0


def test_a_failed_case_has_all_its_attempts_again(cspine: Cspine, index: Index) -> None:
    assert index.fail_attempt(analysing(index, "1.1"), "step 'segment' hung", max_attempts=1) is CaseState.FAILED
    assert cspine("retry", "1.1").exit_code == 0
    assert index.queue(the_case(index, "1.1"))
    held = index.claim_next()
    assert held is not None
    assert index.fail_attempt(held, "it hung again", max_attempts=2) is CaseState.QUEUED


def test_delete_leaves_nothing_of_a_case_and_all_of_the_others(cspine: Cspine, index: Index) -> None:
    finished(index, "1.1", "pacs")
    kept = receive(index, "1.2")
    assert cspine("delete", "1.1", "--yes").exit_code == 0
    assert index.case("1.1") is None
    assert index.next_delivery("pacs") is None
    assert not index.is_result("9.1.1")
    assert index.stored_file("1.1.1") is None
    files = {path for path in index.data_dir.rglob("*") if path.is_file() and "sqlite" not in path.name}
    assert files == {kept}
    assert not (index.data_dir / "instances" / "1.1").exists()
    receive(index, "1.1")  # it may come again
    assert the_case(index, "1.1").num_instances == 1


def test_delete_asks_first(cspine: Cspine, index: Index) -> None:
    path = receive(index, "1.1")
    assert cspine("delete", "1.1").exit_code == 1
    assert path.exists()
    assert index.case("1.1") is not None


def test_delete_of_what_is_being_analysed_needs_force_and_its_results_come_to_nothing(
    cspine: Cspine, index: Index
) -> None:
    held = analysing(index, "1.1")
    result = cspine("delete", "1.1", "--yes")
    assert (result.exit_code, index.case("1.1") is not None) == (1, True)
    assert "--force" in result.stderr
    assert cspine("delete", "1.1", "--yes", "--force").exit_code == 0
    results = index.data_dir / "cases" / "1.1" / "results"
    results.mkdir(parents=True)
    assert not index.finish(held, results, summary="", sop_instance_uids=("9.1",), destinations=["pacs"])
    remove_superseded(index, "1.1")
    assert not results.parent.exists()


def test_a_case_that_got_another_instance_meanwhile_is_not_deleted(index: Index) -> None:
    receive(index, "1.1")
    old = the_case(index, "1.1")
    late = receive(index, "1.1", 2)
    assert not delete_case(index, old)
    assert late.exists()
    assert the_case(index, "1.1").num_instances == 2


def test_a_file_that_arrives_while_its_series_is_deleted_is_kept(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(index, "1.1")
    delete_rows = index.delete_case
    arrived = []

    def delete_rows_then_receive(case: Case) -> Any:
        paths = delete_rows(case)
        arrived.append(receive(index, "1.1", 2))
        return paths

    monkeypatch.setattr(index, "delete_case", delete_rows_then_receive)
    assert delete_case(index, the_case(index, "1.1"))
    assert arrived[0].exists()
    assert the_case(index, "1.1").num_instances == 1


def test_superseded_results_go_when_nothing_refers_to_them_any_more(index: Index) -> None:
    old = finished(index, "1.1", "pacs", folder="old")
    remove_superseded(index, "1.1")
    assert old.exists()
    receive(index, "1.1", 2)
    remove_superseded(index, "1.1")
    assert old.exists()  # the delivery of it is still due
    delivery = index.next_delivery("pacs")
    assert delivery is not None
    index.settle_delivery(delivery, DeliveryState.DONE)
    assert index.queue(the_case(index, "1.1"))
    case = index.claim_next()
    assert case is not None
    latest = old.with_name("new")
    latest.mkdir()
    remove_superseded(index, "1.1")
    assert latest.exists()  # written, not noted yet
    assert index.finish(case, latest, summary="", sop_instance_uids=(), destinations=["pacs"])
    remove_superseded(index, "1.1")
    assert [path.name for path in old.parent.iterdir()] == ["new"]


def test_result_folders_of_cases_that_are_no_more_go_at_the_start(index: Index) -> None:
    kept = finished(index, "1.1")
    stray = index.data_dir / "cases" / "1.2" / "results"
    stray.mkdir(parents=True)
    remove_strays(index)
    assert (kept.exists(), stray.parent.exists()) == (True, False)


def test_what_was_won_against_the_quiet_time_is_told_of_each_case_and_in_total(cspine: Cspine, index: Index) -> None:
    for number, won_s in ((1, 28.5), (2, 20.0)):
        receive(index, f"1.{number}")
        assert index.queue(the_case(index, f"1.{number}"), won_s=won_s)
    receive(index, "1.3")
    assert [(case["won_s"], case["num_reopened"]) for case in listed(cspine)] == [(None, 0), (20.0, 0), (28.5, 0)]
    expected = "Won against the quiet time: 48 s over 2 Series. Late Instances after a start: 0."
    assert expected in " ".join(cspine("cases").stderr.split())
    assert expected not in cspine("cases", "--json").output
    assert expected in " ".join(cspine("cases", "--totals").stdout.split())
    totals = json.loads(cspine("cases", "--totals", "--json").stdout)
    assert totals == {"num_cases": 2, "won_s": 48.5, "num_reopened": 0}


def test_what_outdated_results_said_is_not_told_beside_the_refusal(cspine: Cspine, index: Index) -> None:
    case = analysing(index, "1.1")
    results = index.data_dir / "cases" / "1.1" / "results"
    assert index.finish(case, results, summary="fracture at C5", sop_instance_uids=(), destinations=())
    assert "fracture at C5" in cspine("cases").stdout
    assert index.retry(the_case(index, "1.1"))  # under rules that have changed, say
    assert index.refuse(the_case(index, "1.1"), "gaps")
    told = cspine("cases").stdout
    assert ("gaps" in told, "fracture" in told) == (True, False)


def test_refused_conflicts_are_told_of_their_series(cspine: Cspine, index: Index) -> None:
    receive(index, "1.1")
    receive(index, "1.2")
    assert "refused" not in cspine("cases").stdout
    index.note_conflict("1.1", "OLD")
    index.note_conflict("1.1", "CT1")
    told = " ".join(cspine("cases").stdout.split())
    assert told.count("refused") == 1
    assert "2 Instances refused: an Instance with the same UID is here, with other content or in another" in told
    assert re.search("transfer syntax. Last [0-9]{4}-[0-9: -]{14}, from CT1", told)
    other, hit = listed(cspine)
    assert (hit["num_conflicts"], hit["last_conflict_from"]) == (2, "CT1")
    assert abs(datetime.fromisoformat(hit["last_conflict_at"]).timestamp() - time.time()) < 60
    assert (other["num_conflicts"], other["last_conflict_at"], other["last_conflict_from"]) == (0, None, None)
