"""How patiently a failed delivery is tried again. Pure arithmetic; called by `clock.py`."""


def retry_wait_s(attempts: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after that many failed attempts: `first_s`, then twice as long each time, up to `longest_s`."""
    return min(first_s * 2.0 ** min(attempts - 1, 64), longest_s)
