"""How receiver processes share what connects to their one socket."""

import time

import pytest

from node.config import Config
from tests.node.sending import associate


def test_the_more_a_process_serves_the_longer_it_leaves_a_connection_to_others(
    receiver: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else three of four senders meet in one process of two."""
    left_s: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr("node.receive.server.time.sleep", lambda s: (left_s.append(s), sleep(s))[1])
    associations = [associate(receiver) for _ in range(6)]
    for association in associations:
        association.release()
    assert [seconds for seconds in left_s if seconds in (0, 0.002, 0.004, 0.006, 0.008)] == [
        0,
        0.002,
        0.004,
        0.006,
        0.008,
    ]
