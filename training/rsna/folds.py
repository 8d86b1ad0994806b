"""Five folds in which patients with and without fractures, and with and without a mask, are equally many."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from training.rsna.cache import NUM_FOLDS


@dataclass(frozen=True, kw_only=True)
class Member:
    """What decides a study's fold. patient: studies of one patient share a fold."""

    patient: str
    is_fractured: bool
    has_mask: bool


def assign_folds(studies: Mapping[str, Member], seed: int) -> dict[str, int]:
    """The fold, 0..4, of each study by UID; the same studies and seed give the same folds.

    A patient counts as fractured, or as having a mask, if one of their studies does. Within each of the four kinds
    patients are dealt out in an order that only the seed and their name decide; kinds follow on one another, so that
    folds differ by one patient at most.
    """
    by_patient: dict[str, list[str]] = defaultdict(list)
    for uid, member in studies.items():
        by_patient[member.patient].append(uid)

    def place(patient: str) -> tuple[bool, bool, str]:
        members = [studies[uid] for uid in by_patient[patient]]
        shuffled = hashlib.sha256(f"{seed} {patient}".encode()).hexdigest()
        return any(m.has_mask for m in members), any(m.is_fractured for m in members), shuffled

    dealt = enumerate(sorted(by_patient, key=place))
    return {uid: number % NUM_FOLDS for number, patient in dealt for uid in by_patient[patient]}
