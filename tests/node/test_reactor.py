"""The pause of pynetdicom's reactor: whoever asks for it goes on only when the reactor stands still."""

import sys
import threading
from collections.abc import Iterator

import pytest

from node.reactor import Checkpoint
from tests.waiting import wait_until


class Reactor(threading.Thread):
    """Passes the checkpoint as fast as it can, as pynetdicom's reactor does; counts what it does behind it."""

    _kill = False
    _is_paused = False

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.checkpoint = Checkpoint(self)
        self.num_served = 0
        self.is_serving = False

    def run(self) -> None:
        while not self._kill:
            self.checkpoint.wait()
            self.is_serving = True
            self.num_served += 1
            self.is_serving = False


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places at the worst of moments
    running = Reactor()
    running.start()
    yield running
    running._kill = True
    running.checkpoint.set()
    running.join(60)
    sys.setswitchinterval(interval_s)


def test_nothing_is_served_between_clear_and_set(reactor: Reactor) -> None:
    for _ in range(2000):
        reactor.checkpoint.clear()
        before = reactor.num_served
        for _ in range(20):
            assert not reactor.is_serving
        assert reactor.num_served == before
        reactor.checkpoint.set()


def test_the_flag_that_another_thread_took_down_is_up_again_while_the_reactor_stands(reactor: Reactor) -> None:
    """As the thread does in which pynetdicom answers an N-EVENT-REPORT."""
    reactor.checkpoint.clear()
    for _ in range(3):
        wait_until(lambda: reactor._is_paused)
        reactor._is_paused = False


def test_a_reactor_that_ended_is_not_waited_for(reactor: Reactor) -> None:
    reactor._kill = True
    reactor.join(60)
    reactor.checkpoint.clear()


def test_the_reactor_does_not_wait_for_itself() -> None:
    class Asking(Reactor):
        def run(self) -> None:
            self.checkpoint.clear()

    asking = Asking()
    asking.start()
    asking.join(60)
    assert not asking.is_alive()
