"""Processes and threads at the same database, with SQLite and with PostgreSQL; some of them die."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, update
from sqlalchemy.exc import DBAPIError

from node.case import Case, CaseState, DeliveryState
from node.index import Index, tables
from tests.node.test_index import new
from tests.waiting import WAIT_S

SERIES = [f"1.2.{number}" for number in range(6)]
WRITE_S = 2.0

# Forked from a process that has imported all this once: eight starts would cost more than what they do.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.node.test_index_races"])


@pytest.fixture
def index(tmp_path: Path, database: SecretStr | None) -> Iterator[Index]:
    opened = Index(tmp_path / "data", database)
    yield opened
    opened.close()


def start(function: Any, *arguments: Any) -> Any:
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def join(processes: list[Any]) -> None:
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def refuse_many(data_dir: Path, database: SecretStr | None, name: str, times: int) -> None:
    index = Index(data_dir, database)
    for _ in range(times):
        index.note_conflict(SERIES[0], name)
    index.close()


def test_conflicts_that_several_processes_refuse_are_all_counted_and_leave_nothing_else(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    index.add_instances(
        [new(index, 1, uid, association_id=index.open_association("SCANNER")) for uid in SERIES[:2]], quiet_time_s=0
    )
    before = table_sizes(index)
    join([start(refuse_many, tmp_path / "data", database, f"SCANNER{number}", 25) for number in range(4)])
    index.note_conflict("1.2.404", "SCANNER")  # the case was deleted meanwhile
    restarted = Index(tmp_path / "data", database)
    found = {case.series_instance_uid: case for case in restarted.cases()}
    restarted.close()
    case = found[SERIES[0]]
    assert (case.num_conflicts, found[SERIES[1]].num_conflicts) == (100, 0)
    assert case.last_conflict_from in {f"SCANNER{number}" for number in range(4)}
    assert table_sizes(index) == before


def table_sizes(index: Index) -> dict[str, int]:
    with index._engine.connect() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in tables.metadata.sorted_tables
        }


def queued(index: Index, number: int) -> list[str]:
    uids = [f"1.3.{n}" for n in range(number)]
    association_id = index.open_association("SCANNER")
    index.add_instances([new(index, 1, uid, association_id=association_id) for uid in uids], quiet_time_s=0)
    for case in index.cases():
        assert index.queue(case)
    return uids


def write_much(data_dir: Path, database: SecretStr | None, writer: int, told: Any) -> None:
    """Does what receivers and the clock do, in batches over Series that all writers share, each in its own order."""
    index, order, number, slowest_s = Index(data_dir, database), random.Random(writer), 0, 0.0
    ends_at = time.monotonic() + WRITE_S
    try:
        while time.monotonic() < ends_at:
            association_id = index.open_association("SCANNER")
            for _ in range(5):
                batch = [
                    new(index, 1000 * (writer + 1) + number, uid, association_id=association_id)
                    for uid in order.sample(SERIES, 4)
                ]
                started = time.monotonic()
                assert index.add_instances(batch, quiet_time_s=0) == [True] * 4
                slowest_s = max(slowest_s, time.monotonic() - started)
                number += 1
            index.end_association(association_id, released=True)
            for case in index.cases_to_check():
                index.check_again(case, time.time())
        told.put((number, slowest_s, ""))
    except Exception as error:
        told.put((number, slowest_s, repr(error)))
    finally:
        index.close()


def test_eight_processes_write_at_once_and_none_finds_the_database_locked(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    told = CONTEXT.SimpleQueue()
    processes = [start(write_much, tmp_path / "data", database, writer, told) for writer in range(8)]
    results = [told.get() for _ in processes]
    join(processes)
    assert [error for _, _, error in results if error] == []
    assert sum(case.num_instances for case in index.cases()) == 4 * sum(number for number, _, _ in results)
    assert min(number for number, _, _ in results) > 0  # nobody was left out
    assert max(slowest_s for _, slowest_s, _ in results) < 10


def die_while_writing(data_dir: Path, database: SecretStr | None, begun: Any) -> None:
    index = Index(data_dir, database)
    with index._writing() as connection:
        connection.execute(update(tables.cases).values(reason="never committed"))
        begun.put(None)
        time.sleep(60)


def test_a_writer_that_is_killed_in_a_transaction_leaves_nothing_and_holds_up_nobody(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    queued(index, 1)
    begun = CONTEXT.SimpleQueue()
    writer = start(die_while_writing, tmp_path / "data", database, begun)
    begun.get()
    waiting = threading.Thread(target=index.check_again, args=(index.cases()[0], 1.0))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    os.kill(writer.pid, signal.SIGKILL)
    waiting.join(30)  # the writer would have gone on for 60
    assert not waiting.is_alive()
    writer.join()
    assert index.cases()[0].reason == ""


def claim_all(data_dir: Path, database: SecretStr | None, told: Any) -> None:
    index = Index(data_dir, database)
    told.put([case.series_instance_uid for case in iter(index.claim_next, None)])
    index.close()


def test_pools_that_claim_at_once_never_get_the_same_case(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    uids = queued(index, 60)
    told = CONTEXT.SimpleQueue()
    processes = [start(claim_all, tmp_path / "data", database, told) for _ in range(4)]
    claimed = [uid for _ in processes for uid in told.get()]
    join(processes)
    assert Counter(claimed) == Counter(uids)
    assert {case.attempts for case in index.cases()} == {1}


def test_the_last_two_deliveries_of_a_case_may_end_at_the_same_moment(index: Index) -> None:
    """Each would find the other one pending, and the case would be delivering for ever."""
    queued(index, 15)
    for case in iter(index.claim_next, None):
        folder = index.data_dir / "cases" / case.series_instance_uid / "results"
        assert index.finish(case, folder, summary="", sop_instance_uids=(), destinations=("a", "b"))

    def deliver(destination: str) -> None:
        while (delivery := index.next_delivery(destination)) is not None:
            barrier.wait(60)
            index.settle_delivery(delivery, DeliveryState.DONE)

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=deliver, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {case.state for case in index.cases()} == {CaseState.DONE}


def test_threads_of_a_process_take_turns_too(index: Index) -> None:
    errors = []

    def add(writer: int) -> None:
        try:
            for number in range(20):
                index.add_instances([new(index, 1000 * (writer + 1) + number, "1.2.3")], quiet_time_s=0)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    (case,) = index.cases()
    assert isinstance(case, Case)
    assert case.num_instances == 80


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_postgresql_that_was_restarted_is_connected_to_again_and_stays_this_node_s(
    index: Index, database: SecretStr, tmp_path: Path
) -> None:
    queued(index, 1)
    assert index.take()
    assert index.hold()
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cspine' AND pid != pg_backend_pid()"
    )
    with psycopg.connect(database.get_secret_value(), autocommit=True) as connection:
        connection.execute(others)
        assert index.claim_next() is not None
        assert index.hold(WAIT_S)
        other = Index(tmp_path / "other", database)
        assert not other.take()
        other.close()
        connection.execute(others)
        other = Index(tmp_path / "other", database)
        assert other.take(WAIT_S)  # it came first
        assert not index.hold()
        assert not index.hold()  # nor is it asked once only
        other.close()
    assert index.hold(WAIT_S)
    other = Index(tmp_path / "other", database)
    assert not other.take()
    other.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_postgresql_that_goes_away_again_while_it_is_connected_to_is_this_node_s_in_the_end(
    index: Index, database: SecretStr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server that is restarted twice, or takes connections before it serves them."""
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cspine' AND pid != pg_backend_pid()"
    )
    assert index.take()
    connect = index._engine.connect
    with psycopg.connect(database.get_secret_value(), autocommit=True) as connection, monkeypatch.context() as patch:

        def connect_in_vain() -> Any:
            made = connect()
            connection.execute(others)
            return made

        patch.setattr(index._engine, "connect", connect_in_vain)
        connection.execute(others)
        for _ in range(2):
            with pytest.raises(DBAPIError):
                index.hold()
    assert index.hold(WAIT_S)
    other = Index(tmp_path / "other", database)
    assert not other.take()
    other.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_postgresql_that_lost_sight_of_this_node_does_not_take_it_for_another(index: Index) -> None:
    """Where the network was away, the server holds the database for a connection that is no more."""
    assert index.take()
    unseen = index._holder
    assert unseen is not None
    index._holder = None
    assert index.hold(WAIT_S)
    with pytest.raises(DBAPIError):
        unseen.execute(select(1))
    unseen.close()
