"""The states of a case: what follows what, and the chart of it."""

import re
from pathlib import Path

import pytest

from node.case import FINISHED, TRANSITIONS, CaseState
from node.index import Index
from tests.node.test_index import add, the_case

CHART = (Path(__file__).parents[2] / "docs" / "states.md").read_text(encoding="utf-8")
FROM_ALL = {CaseState.RECEIVING, CaseState.REFUSED}


def test_the_chart_is_what_the_code_allows() -> None:
    drawn = {(CaseState(a), CaseState(b)) for a, b in re.findall(r"^    (\w+) --> (\w+): ", CHART, re.MULTILINE)}
    everywhere = {(a, b) for a in CaseState for b in FROM_ALL if a is not b}
    allowed = {(a, b) for a, following in TRANSITIONS.items() for b in following}
    assert allowed == drawn | everywhere


def test_whatever_has_not_ended_goes_on_by_itself() -> None:
    for state in set(CaseState) - FINISHED:
        assert TRANSITIONS[state] & FINISHED or TRANSITIONS[state] - FROM_ALL, state


@pytest.mark.parametrize("state", sorted(set(CaseState) - TRANSITIONS[CaseState.RECEIVING]))
def test_a_state_that_does_not_follow_is_a_mistake_of_ours(index: Index, state: CaseState) -> None:
    add(index, 1)
    with pytest.raises(ValueError, match=rf"case 1 is receiving, which {state} does not follow"):
        index._move(the_case(index), state)
    assert the_case(index).state is CaseState.RECEIVING
