"""Fixtures that several files share: of delivery, of the receiver, of query and retrieve."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from node.config import Config
from node.index import Index
from tests.certificates import Authority
from tests.node.handed_over import Clock, make_results
from tests.node.retrieving import Held
from tests.receiver import listening


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the certificates of a file's tests."""
    return Authority(tmp_path_factory.mktemp("ca"))


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


@pytest.fixture
def receiver(make_config: Callable[..., Config], index: Index) -> Iterator[Config]:
    """A receiver on the `index` fixture; gives its configuration."""
    with listening(make_config(), index) as config:
        yield config


@pytest.fixture
def start(make_config: Callable[..., Config], index: Index) -> Iterator[Callable[..., Config]]:
    """Starts a receiver with these settings of `receive`; gives its configuration."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(listening(make_config(receive=settings), index, grace_s=0.2))


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """A node that answers queries, for all tests of a file."""
    node = Held(tmp_path_factory.mktemp("held"))
    with listening(node.config, node.index):
        yield node
    node.index.close()
