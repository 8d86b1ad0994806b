"""Fixtures that the tests of delivery share."""

from pathlib import Path

import pytest

from node.index import Index
from tests.node.handed_over import Clock, make_results


@pytest.fixture
def clock(index: Index, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the index, and so of everything that is due."""
    clock = Clock()
    monkeypatch.setattr(index, "now", clock)
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # waits without chance
    return clock


@pytest.fixture
def results(index: Index) -> Path:
    return make_results(index)
