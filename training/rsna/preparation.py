"""`cspine-train prepare`: the data set as downloaded into a cache, in parallel; a run that was killed goes on.

The story: `read_source`, `prepare_study` for each study in processes, `assign_folds`, `write_report`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.files import locked, remove_unfinished, write_json
from training.rsna.cache import FORMAT, digest
from training.rsna.folds import Member, assign_folds
from training.rsna.processes import in_processes
from training.rsna.report import write_report
from training.rsna.source import Source
from training.rsna.study import Settings, prepare_study

SEED = 2022


class NoStudiesError(Exception):
    """Not a single study can be used."""


def prepare(
    source: Source, cache: Path, settings: Settings, *, num_workers: int, seed: int = SEED
) -> Iterator[dict[str, Any]]:
    """Makes what the cache lacks, giving each study's record as it is done; after the last the cache is finished.

    seed: of the folds.

    Raises:
        BusyError: another run prepares this cache, or reads it.
        NoStudiesError: no study can be used.
        ProcessDiedError: a process died.
    """
    with locked(cache / "studies"):
        (cache / "studies").mkdir(parents=True, exist_ok=True)
        remove_unfinished(cache / "studies")
        (cache / "cache.json").unlink(missing_ok=True)  # until all studies are of these files and settings
        records: dict[str, dict[str, Any]] = {}
        jobs = {uid: (source.folder, study, cache, settings) for uid, study in source.studies.items()}
        for uid, record in in_processes(prepare_study, jobs, num_workers):
            records[uid] = record
            yield record
        usable = {uid: record for uid, record in records.items() if not record["left_out"]}
        folds = assign_folds(
            {
                uid: Member(
                    patient=record["patient"],
                    is_fractured=record["labels"]["patient_overall"],
                    has_mask=record["mask"] is not None,
                )
                for uid, record in usable.items()
            },
            seed,
        )
        write_report(cache, records, folds, source.problems)
        if not usable:
            raise NoStudiesError(f"None of {len(records)} studies can be used; {cache / 'report.txt'} says why.")
        content = {
            "format": FORMAT,
            "source": str(source.folder.absolute()),
            "spacing_mm": settings.spacing_mm,
            "seed": seed,
            "folds": dict(sorted(folds.items())),
            "fingerprint": digest([folds, {uid: record["fingerprint"] for uid, record in usable.items()}]),
        }
        write_json(cache / "cache.json", content)
