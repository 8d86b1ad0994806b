"""Instances in an index, without a receiver: one put there, and where one lies."""

from pathlib import Path
from typing import Any

from node.index import Index, NewInstance


def add_instance(index: Index, *, quiet_time_s: float, **values: Any) -> bool:
    """Adds one, its values as `NewInstance` has them; whether it is new."""
    return index.add_instances([NewInstance(**values)], quiet_time_s=quiet_time_s)[0]


def path_of(index: Index, sop_instance_uid: str) -> Path:
    """The file of an Instance, which has to be here."""
    file = index.stored_file(sop_instance_uid)
    assert file is not None, f"{sop_instance_uid} is not here"
    return file.path
