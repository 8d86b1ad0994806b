"""How long something that failed waits until it is tried again: a delivery, a notification, a report."""

import random


def retry_wait_s(attempts: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after that many failed attempts: `first_s`, then twice as long each time, up to `longest_s`.

    Up to a tenth less, by chance: what failed together is not all tried again at the same moment.
    """
    return min(first_s * 2.0 ** min(attempts - 1, 64), longest_s) * random.uniform(0.9, 1.0)


def describe_wait(seconds: float) -> str:
    """A wait as people say it."""
    for size_s, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {unit}"
    return f"{seconds:.0f} s"
