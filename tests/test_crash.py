"""The node under `kill -9` and mutated input, in short; `make soak` and `make fuzz` are the long forms."""

from pathlib import Path

import pytest

from tests.fuzz_receiver import fuzz
from tests.soak import kill_at_random

# pynetdicom 3.0.4 leaves its socket unclosed when a connection is refused or reset.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.mark.timeout(600)
def test_kills_of_any_process_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    line = kill_at_random(tmp_path / "kills", num_kills=12, seed=20, num_long=2, main_share=0.15)
    assert all(role in line for role in ("main", "receiver", "worker")), line


def test_mutated_input_neither_kills_nor_hangs_a_receiver(tmp_path: Path) -> None:
    fuzz(tmp_path, num_cases=500, seed=4)
