"""Retention: what was received and made leaves the data folder when it is old, or when the disk fills.

Only finished cases are looked at (`node.case.FINISHED`, nothing left to deliver). `plan` is pure and says why each
thing goes; `purge` does it. `service.py` runs it by the clock, `cspine purge` by hand. A purge that was interrupted is
ended by the next one, and before anything is received.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from node.case import Case, CaseState
from node.config import Config, RetentionConfig
from node.index import Index
from node.process import sync
from node.reminder import Reminder

log = logging.getLogger(__name__)

_DAY_S = 86400.0


class What(StrEnum):
    """What can go of a case."""

    ORIGINALS = "originals"  # the Instances as they were received
    RESULTS = "results"  # what was made of them


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Originals or results of a finished case, and what they take.

    is_undelivered: a delivery of the case failed, so this may be all there is of its results.
    """

    case: Case
    what: What
    num_bytes: int
    is_undelivered: bool = False


@dataclass(frozen=True, kw_only=True)
class Purge:
    """Something that goes, and why."""

    kept: Kept
    why: str


def plan(
    kept: Sequence[Kept], config: RetentionConfig, *, now: float, excess_bytes: int, why_excess: str
) -> list[Purge]:
    """What goes: whatever is too old, then, until `excess_bytes` are freed, the finished longest ago first.

    What was not delivered goes by age only: somebody has to have had the days to see to it. kept: in that order.
    """
    purges = [Purge(kept=item, why=why) for item in kept if (why := _too_old(item, config, now))]
    aged = {id(purge.kept) for purge in purges}
    excess_bytes -= sum(purge.kept.num_bytes for purge in purges)
    for item in kept:
        if excess_bytes <= 0:
            break
        if id(item) not in aged and not item.is_undelivered:
            purges.append(Purge(kept=item, why=why_excess))
            excess_bytes -= item.num_bytes
    return purges


def _too_old(item: Kept, config: RetentionConfig, now: float) -> str:
    """Why it is too old, "" if it is not."""
    if item.case.state != CaseState.DONE:
        setting, days = "failed_days", config.failed_days
    elif item.what is What.ORIGINALS:
        setting, days = "originals_days", config.originals_days
    else:
        setting, days = "results_days", config.results_days
    age_days = (now - item.case.changed_at) / _DAY_S
    return (
        f"{item.case.state} {age_days:.1f} days ago, {setting} is {days:g}"
        if days is not None and age_days >= days
        else ""
    )


def plan_now(index: Index, config: Config) -> list[Purge]:
    """`plan` for the data folder as it is."""
    excess_bytes, why_excess = _excess(config)
    kept = _kept(index)
    return plan(kept, config.retention, now=index.now(), excess_bytes=excess_bytes, why_excess=why_excess)


def _kept(index: Index) -> list[Kept]:
    undelivered = index.undelivered_cases()
    return [
        replace(item, is_undelivered=case.case_id in undelivered)
        for case in index.finished_cases()
        for item in _kept_of(index, case)
    ]


def _kept_of(index: Index, case: Case) -> Iterator[Kept]:
    if case.originals_purged_at is None:
        num_bytes = sum(size_bytes(path) for path in index.instance_paths(case.series_instance_uid))
        yield Kept(case=case, what=What.ORIGINALS, num_bytes=num_bytes)
    if case.result_dir is not None and case.results_purged_at is None:
        yield Kept(case=case, what=What.RESULTS, num_bytes=size_bytes(case.result_dir.parent))


def _excess(config: Config) -> tuple[int, str]:
    """By how many bytes the data folder holds too much, and by which limit; the worst of them."""
    disk = shutil.disk_usage(config.data_dir)
    held = sum(size_bytes(config.data_dir / name) for name in ("instances", "cases"))
    retention = config.retention
    limits = [(2 * config.receive.min_free_disk_mb * 2**20 - disk.free, "the disk is nearly full")]
    if retention.max_disk_percent is not None:
        limit = retention.max_disk_percent / 100 * disk.total
        limits.append((int(held - limit), f"max_disk_percent is {retention.max_disk_percent:g}"))
    if retention.max_disk_gb is not None:
        limits.append((int(held - retention.max_disk_gb * 1e9), f"max_disk_gb is {retention.max_disk_gb:g}"))
    return max(limits)


def size_bytes(path: Path) -> int:
    """Bytes of a file or of everything under a folder; what is not there, or goes meanwhile, has none."""
    try:
        return sum(size_bytes(child) for child in path.iterdir()) if path.is_dir() else path.stat().st_size
    except FileNotFoundError:
        return 0


def purge(index: Index, purges: Sequence[Purge]) -> int:
    """Carries them out, and ends what an interrupted run began; the bytes freed. A case that moved on keeps all."""
    finish_interrupted(index)
    freed_bytes = 0
    for item in purges:
        case = item.kept.case
        remove = index.purge_originals if item.kept.what is What.ORIGINALS else index.purge_results
        if remove(case):
            finish_interrupted(index)
            freed_bytes += item.kept.num_bytes
            log.info(
                "action=purged case=%d series=%s what=%s bytes=%d: %s",
                case.case_id,
                case.series_instance_uid,
                item.kept.what,
                item.kept.num_bytes,
                item.why,
            )
    return freed_bytes


def finish_interrupted(index: Index) -> None:
    """Removes from disk what is purged and still there."""
    removed = []
    for path in index.removals():
        try:
            _remove(path)
        except OSError as error:
            log.error("action=not-purged path=%s: %s; it is tried again", path, error.strerror)
        else:
            removed.append(path)
    for folder in {path.parent for path in removed if path.parent.exists()}:
        sync(folder)  # or what a power cut brings back would be nobody's
    if removed:
        index.note_removed(removed)


def _remove(path: Path) -> None:
    """Removes a file, or a folder and all in it; either may be gone already.

    Raises:
        OSError: it cannot be removed.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_retention(index: Index, config: Config, reminder: Reminder) -> None:
    """Purges what is due, and says how much was freed, and when more should be and may not."""
    excess_bytes, why_excess = _excess(config)
    kept = _kept(index)
    purges = plan(kept, config.retention, now=index.now(), excess_bytes=excess_bytes, why_excess=why_excess)
    freed_bytes = purge(index, purges)
    if purges:
        log.info("action=retention purged=%d freed_mb=%.1f", len(purges), freed_bytes / 1e6)
    missing_bytes = excess_bytes - sum(item.kept.num_bytes for item in purges)
    if missing_bytes > 0 and reminder.is_due(why_excess):
        gone = {id(item.kept) for item in purges}
        undelivered = [item for item in kept if item.is_undelivered and id(item) not in gone]
        log.error(
            "action=nothing-to-purge missing_mb=%.1f undelivered_cases=%d undelivered_mb=%.1f: %s, and retention may "
            "remove no more. Deliver what was not (`cspine deliveries list` says why; then `retry`), remove cases by "
            "`cspine delete`, or make room on the disk. It never removes what is not finished",
            missing_bytes / 1e6,
            len({item.case.case_id for item in undelivered}),
            sum(item.num_bytes for item in undelivered) / 1e6,
            why_excess,
        )


def relieve_disk(index: Index, config: Config, reminder: Reminder) -> None:
    """`run_retention` when the disk is nearly full, so that the receiver need not refuse."""
    if shutil.disk_usage(config.data_dir).free < 2 * config.receive.min_free_disk_mb * 2**20:
        run_retention(index, config, reminder)
