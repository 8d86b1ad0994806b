"""Who takes results to a destination: one class for each kind of destination, in a module of its own.

All raise `SendError` (or `OSError`, for folders) when the destination as a whole cannot be used, and otherwise answer
for each file.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from node.case import ObjectProgress, ObjectState
from node.deliver.files import ResultFile
from node.send import Answer

Note = Callable[[ResultFile, ObjectProgress], None]
"""Called with what the destination said to a file, as soon as it said it."""


class Courier(Protocol):
    """A destination while a delivery is taken there; an association or session lives as long as this is open."""

    def send(self, files: Sequence[ResultFile], note: Note) -> None:
        """Takes the files there; each is noted once it is answered for, also when a later one breaks off."""

    def find(self, files: Sequence[ResultFile]) -> Collection[str]:
        """The keys of those of the files that the destination says it has."""

    def remove(self, keys: Collection[str]) -> bool:
        """Removes what superseded results left there; False where destination or configuration do not allow it."""

    def check(self) -> str:
        """A few words that say that results can be taken there, for `cspine check`."""

    def close(self) -> None:
        """Ends the association or session."""


def progress_of(answer: Answer) -> ObjectProgress:
    """How far an object is after this answer."""
    if answer.taken:
        return ObjectProgress(state=ObjectState.TAKEN, reason=answer.reason)
    return ObjectProgress(state=ObjectState.REFUSED if answer.permanent else ObjectState.WAITING, reason=answer.reason)
