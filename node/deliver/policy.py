"""What becomes of a delivery after an attempt: tried again and when, verified, done, or given up with a reason.

Pure functions; `clock.py` acts on what they say.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from node.case import DeliveryState, ObjectProgress, ObjectState
from node.config import DeliverConfig
from node.retry import describe_wait, retry_wait_s

_FIRST_QUESTION_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The state a delivery takes, the sentence that goes with it, and after how many seconds it is due again."""

    state: DeliveryState
    reason: str = ""
    wait_s: float = 0.0


def after_error(
    problem: str, *, permanent: bool, state: DeliveryState, attempts: int, patience: DeliverConfig
) -> Verdict:
    """The destination as a whole could not be used. state: what is to be done again, PENDING or VERIFYING."""
    if permanent or attempts >= patience.max_attempts:
        return Verdict(state=DeliveryState.FAILED, reason=f"given up after {attempts} attempt(s): {problem}")
    wait_s = retry_wait_s(attempts, patience.retry_first_s, patience.retry_max_s)
    return Verdict(
        state=state, reason=f"attempt {attempts} failed, next in {describe_wait(wait_s)}: {problem}", wait_s=wait_s
    )


def after_answers(
    objects: Mapping[str, ObjectProgress], *, attempts: int, verified: bool, patience: DeliverConfig
) -> Verdict:
    """The destination answered for each object. verified: taken is not enough."""
    waiting = [item for item in objects.values() if item.state is ObjectState.WAITING]
    if waiting:
        problem = _list(item.reason for item in waiting)
        return after_error(problem, permanent=False, state=DeliveryState.PENDING, attempts=attempts, patience=patience)
    if verified and any(item.state is ObjectState.TAKEN for item in objects.values()):
        return Verdict(state=DeliveryState.VERIFYING, reason="taken, and not yet found there")
    refused = [item for item in objects.values() if item.state is ObjectState.REFUSED]
    if refused:
        num_there = len(objects) - len(refused)
        reason = f"{num_there} of {len(objects)} objects are there; {_list(item.reason for item in refused)}"
        return Verdict(state=DeliveryState.FAILED, reason=reason)
    return Verdict(state=DeliveryState.DONE, reason=_list(item.reason for item in objects.values()))


def next_question_s(since_sent_s: float, verify_timeout_s: float) -> float | None:
    """Seconds until the destination is asked again whether it has an object; None: it had its time.

    As long again as it has had already: an archive that files at once is asked soon, and a slow one not too often.
    """
    left_s = verify_timeout_s - since_sent_s
    if left_s <= 0:
        return None
    return min(max(since_sent_s, _FIRST_QUESTION_S), left_s)


def _list(reasons: Iterable[str]) -> str:
    """Reasons in one line, each once."""
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))
