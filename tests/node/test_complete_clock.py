"""What completeness, rules and preference do to cases, on a real index whose clock the test turns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from model import SliceHeader
from node.case import Case, CaseState
from node.complete import Sources, check_cases
from node.complete import clock as clock_module
from node.config import CompleteConfig, Config, DeliverConfig
from node.index import Index, NewInstance
from node.rules.settings import RulesConfig
from tests.factories import SAGITTAL, make_ct_series
from tests.node.test_complete import GAP, WHOLE, headers

STUDY = "1.2"


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def clocked(tmp_path: Path, clock: Clock, database: SecretStr | None) -> Iterator[Index]:
    """In each kind of database."""
    index = Index(tmp_path / "data", database, now=clock)
    yield index
    index.close()


class Node:
    """Receives and checks without a network."""

    def __init__(self, index: Index, clock: Clock, **rules: Any) -> None:
        self.index, self.clock = index, clock
        self.config = Config(
            complete=CompleteConfig(quiet_time_s=30),
            rules=RulesConfig(**rules),
            deliver=DeliverConfig(report_not_analysed=False),
        )
        self.sources = Sources(index, self.config)

    def open(self) -> int:
        return self.index.open_association("SCANNER")

    def arrive(self, association_id: int, slices: Sequence[SliceHeader], series: str = "1.2.3") -> None:
        """Slices come over an association, as those of the named Series; files exist only where the test made them."""
        batch = []
        for header in slices:
            uid = f"{series}.{header.sop_instance_uid.rsplit('.', 1)[1]}"
            named = replace(header, sop_instance_uid=uid, series_instance_uid=series)
            batch.append(
                NewInstance(
                    association_id=association_id,
                    calling_ae_title="SCANNER",
                    path=self.index.data_dir / "instances" / series / f"000-{uid.rsplit('.', 1)[1]}.dcm",
                    headers=[named.to_dict()],
                )
            )
        self.index.add_instances(batch, quiet_time_s=30)

    def release(self, association_id: int) -> None:
        self.index.end_association(association_id, released=True)

    def send(self, slices: Sequence[SliceHeader], series: str = "1.2.3") -> None:
        """Over one association of its own, released."""
        association_id = self.open()
        self.arrive(association_id, slices, series)
        self.release(association_id)

    def check(self, after_s: float = 0.0) -> None:
        self.clock.now_s += after_s
        check_cases(self.index, self.config, self.sources)

    def case(self, series: str = "1.2.3") -> Case:
        case = self.index.case(series)
        assert case is not None
        return case

    def states(self) -> dict[str, CaseState]:
        return {case.series_instance_uid: case.state for case in self.index.cases()}


@pytest.fixture
def make_node(clocked: Index, clock: Clock) -> Callable[..., Node]:
    return lambda **rules: Node(clocked, clock, **rules)


@pytest.fixture
def node(make_node: Callable[..., Node]) -> Node:
    return make_node()


# ---- completeness ----


def test_a_study_that_cannot_be_judged_holds_up_no_other(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.send(WHOLE, "1.2.3")
    node.clock.now_s += 1
    node.send([replace(header, study_instance_uid="1.5") for header in WHOLE], "1.5.3")
    describe = clock_module.describe_series

    def fail_at_one(headers: Sequence[SliceHeader], *others: Any) -> Any:
        if headers[0].series_instance_uid == "1.2.3":
            raise RuntimeError
        return describe(headers, *others)

    with monkeypatch.context() as patch:
        patch.setattr(clock_module, "describe_series", fail_at_one)
        with pytest.raises(RuntimeError):
            node.check(1)
        node.check()
        assert node.states() == {"1.2.3": CaseState.RECEIVING, "1.5.3": CaseState.QUEUED}
    node.check(30)
    assert node.states() == {"1.2.3": CaseState.QUEUED, "1.5.3": CaseState.QUEUED}


def test_a_whole_series_is_queued_as_soon_as_its_association_is_released(node: Node) -> None:
    association_id = node.open()
    node.arrive(association_id, WHOLE)
    node.check(0.5)
    assert node.case().state is CaseState.RECEIVING
    node.release(association_id)
    node.check()
    case = node.case()
    assert (case.state, case.won_s) == (CaseState.QUEUED, pytest.approx(29.5))


def test_a_series_with_a_gap_waits_for_the_quiet_time_and_is_then_refused_with_the_reason(node: Node) -> None:
    node.send(GAP)
    node.check(29.9)
    assert node.case().state is CaseState.RECEIVING
    node.check(0.2)
    case = node.case()
    assert case.state is CaseState.REFUSED
    assert "slice gaps" in case.reason
    assert case.won_s is None


def test_a_refused_series_goes_to_a_worker_when_a_report_is_to_say_so(node: Node) -> None:
    node.config = Config(complete=CompleteConfig(quiet_time_s=30))
    node.send(GAP)
    node.check(31)
    assert node.case().state is CaseState.QUEUED


def test_an_instance_that_comes_after_a_refusal_gives_the_series_another_chance(node: Node) -> None:
    node.send(GAP)
    node.check(31)
    assert node.case().state is CaseState.REFUSED
    node.send([header for header in WHOLE if header not in GAP])
    assert node.case().state is CaseState.RECEIVING
    node.check()
    assert node.case().state is CaseState.QUEUED
    assert node.case().num_reopened == 0  # nothing had been begun too early


def test_a_late_slice_reopens_a_series_that_was_taken_as_whole(node: Node) -> None:
    *most, last = WHOLE
    node.send(most)
    node.check()
    assert node.case().state is CaseState.QUEUED
    node.send([last])
    case = node.case()
    assert (case.state, case.num_reopened) == (CaseState.RECEIVING, 1)
    node.check(30)
    assert node.case().state is CaseState.QUEUED
    totals = node.index.totals()
    assert (totals.num_cases, totals.won_s, totals.num_reopened) == (1, 0.0, 1)


def test_an_association_for_each_image_is_judged_by_its_pauses(node: Node) -> None:
    for header in WHOLE:
        node.send([header])
        node.check(0.2)
        assert node.case().state is CaseState.RECEIVING
    node.check(1.7)
    assert node.case().state is CaseState.RECEIVING
    node.check(0.2)
    assert node.case().state is CaseState.QUEUED


def test_the_slices_of_a_series_are_not_read_as_long_as_its_sender_is_awaited(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at after each association; reading all of it each time would grow with the square of its size."""
    reads: list[str] = []
    stored_series = node.index.stored_series
    monkeypatch.setattr(node.index, "stored_series", lambda uid: reads.append(uid) or stored_series(uid))
    for header in WHOLE:
        node.send([header])
        node.check(after_s=0.1)
    assert len(reads) <= 1  # of the first, over one association so far
    node.check(after_s=30)
    assert node.case().state is CaseState.QUEUED


def test_a_sender_that_always_splits_its_series_is_awaited_for_its_second_part(
    make_node: Callable[..., Node],
) -> None:
    node = make_node(analyse_all=True)
    for number in range(3):
        series = f"1.2.{number + 10}"
        node.send(headers(60, spacing_mm=1.0)[:55], series)
        node.clock.now_s += 1.0
        node.send(headers(60, spacing_mm=1.0)[55:], series)
        node.check(40)
        assert node.case(series).state is not CaseState.RECEIVING
    node.send(headers(60, spacing_mm=1.0)[:55], "1.2.20")
    node.check(1.0)
    assert node.case("1.2.20").state is CaseState.RECEIVING
    node.send(headers(60, spacing_mm=1.0)[55:], "1.2.20")
    node.check(4.1)
    assert (node.case("1.2.20").state, node.case("1.2.20").num_instances) == (CaseState.QUEUED, 60)


def test_a_case_that_waits_is_not_judged_at_every_tick(node: Node) -> None:
    node.send(GAP)
    assert len(node.index.cases_to_check()) == 1
    node.check()
    assert node.index.cases_to_check() == []


def test_the_rules_on_slices_are_those_of_the_configuration(node: Node) -> None:
    node.config = Config(complete=CompleteConfig(min_slices=28))
    node.send(headers(28))
    node.check()
    assert node.case().state is CaseState.QUEUED


# ---- which Series ----

LOCALIZER = [replace(header, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")) for header in WHOLE[:2]]
REFORMATS = [replace(header, orientation=SAGITTAL) for header in WHOLE]
THIN = headers(80, spacing_mm=1.0)


def test_a_series_that_a_rule_leaves_out_is_skipped_at_once_and_says_by_which(node: Node) -> None:
    node.send(LOCALIZER, "1.2.4")
    node.send(REFORMATS, "1.2.5")
    node.check()
    assert node.states() == {"1.2.4": CaseState.SKIPPED, "1.2.5": CaseState.SKIPPED}
    assert node.case("1.2.4").reason == "rule 'localizers': a scout, not slices"
    assert node.case("1.2.5").reason.startswith("rule 'other planes'")


def test_a_scout_that_comes_first_in_a_series_of_slices_does_not_decide(node: Node) -> None:
    association_id = node.open()
    scouts = [replace(header, sop_instance_uid=f"1.2.3.9{i}") for i, header in enumerate(LOCALIZER)]
    node.arrive(association_id, scouts)
    node.check(1)
    node.arrive(association_id, [replace(h, instance_number=(h.instance_number or 0) + 2) for h in WHOLE])
    node.release(association_id)
    node.check()
    assert node.case().state is not CaseState.SKIPPED


def test_reformats_that_come_one_by_one_are_skipped_when_their_sender_is_done(node: Node) -> None:
    node.send(REFORMATS[:1])
    for header in REFORMATS[1:]:
        node.send([header])
        node.check(0.2)
        assert node.case().state is CaseState.RECEIVING
    node.check(2)
    assert node.case().state is CaseState.SKIPPED


def test_a_rule_on_the_number_of_slices_waits_for_all_of_them(make_node: Callable[..., Node]) -> None:
    short = {"name": "short", "when": {"num_slices": {"max": 35}}, "outcome": "skip"}
    node = make_node(series=(short,))
    node.send(WHOLE[:20])
    node.check(1)
    assert node.case().state is CaseState.RECEIVING
    node.send(WHOLE[20:])
    node.check(30)
    assert node.case().state is CaseState.QUEUED


def test_a_skipped_series_is_analysed_when_somebody_asks_for_it(node: Node) -> None:
    by_rule = [replace(header, image_type=("DERIVED", "SECONDARY", "AXIAL")) for header in WHOLE]
    node.send(by_rule, "1.2.4")
    node.send(WHOLE, "1.2.5")
    node.send(THIN, "1.2.6")
    node.check()
    assert node.states() == {
        "1.2.4": CaseState.SKIPPED,
        "1.2.5": CaseState.SKIPPED,
        "1.2.6": CaseState.QUEUED,
    }
    won_s = node.case("1.2.6").won_s
    for series in ("1.2.4", "1.2.5"):
        assert node.index.retry(node.case(series))
    node.check(60)
    assert set(node.states().values()) == {CaseState.QUEUED}
    assert node.case("1.2.6").won_s == won_s


# ---- which one of a Study ----


def test_one_series_of_a_study_is_analysed_and_the_others_say_which_and_why(node: Node) -> None:
    for series, slices in (("1.2.5", WHOLE), ("1.2.6", THIN), ("1.2.7", headers(60, spacing_mm=1.5))):
        node.send(slices, series)
    node.check()
    assert node.states() == {
        "1.2.5": CaseState.SKIPPED,
        "1.2.6": CaseState.QUEUED,
        "1.2.7": CaseState.SKIPPED,
    }
    expected = "Series 1.2.6 of this Study is preferred (thinner slices: 1 mm, here 2 mm)"
    assert node.case("1.2.5").reason == expected


def test_analyse_all_takes_every_series_that_fits(make_node: Callable[..., Node]) -> None:
    node = make_node(analyse_all=True)
    node.send(WHOLE, "1.2.5")
    node.send(THIN, "1.2.6")
    node.send(LOCALIZER, "1.2.7")
    node.check()
    assert sorted(node.states().values()) == [CaseState.QUEUED, CaseState.QUEUED, CaseState.SKIPPED]


def test_a_whole_series_waits_for_one_of_its_study_that_is_arriving(node: Node) -> None:
    other = node.open()
    node.arrive(other, THIN[:10], "1.2.6")
    node.send(WHOLE, "1.2.5")
    node.check(5)
    assert node.case("1.2.5").state is CaseState.RECEIVING
    node.arrive(other, THIN[10:], "1.2.6")
    node.release(other)
    node.check()
    assert node.states() == {"1.2.5": CaseState.SKIPPED, "1.2.6": CaseState.QUEUED}


def test_the_wait_for_others_ends_after_study_wait_s(node: Node) -> None:
    node.arrive(node.open(), THIN[:10], "1.2.6")
    node.send(WHOLE, "1.2.5")
    node.check()
    node.check(9.9)
    assert node.case("1.2.5").state is CaseState.RECEIVING
    node.check(0.2)
    assert node.states() == {"1.2.5": CaseState.QUEUED, "1.2.6": CaseState.RECEIVING}


def test_the_wait_for_others_is_never_longer_than_the_quiet_time(make_node: Callable[..., Node]) -> None:
    node = make_node(study_wait_s=500)
    other = node.open()
    node.send(WHOLE, "1.2.5")
    node.arrive(other, GAP, "1.2.6")
    node.check()
    node.check(30.1)
    assert node.states() == {"1.2.5": CaseState.QUEUED, "1.2.6": CaseState.REFUSED}


def test_nothing_waits_for_what_a_rule_leaves_out(node: Node) -> None:
    node.send(REFORMATS[::2], "1.2.6")  # not whole
    node.send(WHOLE, "1.2.5")
    node.check()
    assert node.states() == {"1.2.5": CaseState.QUEUED, "1.2.6": CaseState.SKIPPED}


def test_nothing_waits_for_series_of_other_studies(node: Node) -> None:
    elsewhere = [replace(header, study_instance_uid="1.9") for header in WHOLE[:5]]
    node.arrive(node.open(), elsewhere, "1.9.1")
    node.send(WHOLE)
    node.check()
    assert node.case().state is CaseState.QUEUED


def test_a_better_series_takes_the_place_of_one_that_was_not_begun(node: Node) -> None:
    node.send(WHOLE, "1.2.5")
    node.check()
    node.send(THIN, "1.2.6")
    node.check(20)
    assert node.states() == {"1.2.5": CaseState.SKIPPED, "1.2.6": CaseState.QUEUED}


@pytest.mark.parametrize(("better_later", "state"), [("analyse", CaseState.QUEUED), ("skip", CaseState.SKIPPED)])
def test_a_better_series_that_comes_after_one_was_begun(
    make_node: Callable[..., Node], better_later: str, state: CaseState
) -> None:
    node = make_node(better_later=better_later)
    node.send(WHOLE, "1.2.5")
    node.check()
    assert node.index.claim_next() is not None
    node.send(THIN, "1.2.6")
    node.check(20)
    assert node.states() == {"1.2.5": CaseState.ANALYSING, "1.2.6": state}


def test_a_worse_series_that_comes_later_is_skipped(node: Node) -> None:
    node.send(THIN, "1.2.6")
    node.check()
    assert node.index.claim_next() is not None
    node.send(WHOLE, "1.2.5")
    node.check(20)
    assert node.states() == {"1.2.5": CaseState.SKIPPED, "1.2.6": CaseState.ANALYSING}


def test_the_next_best_is_analysed_when_the_preferred_one_cannot_be(node: Node) -> None:
    node.send(WHOLE, "1.2.5")
    node.send(THIN, "1.2.6")
    node.check()
    held = node.index.claim_next()
    assert held is not None
    assert held.series_instance_uid == "1.2.6"
    assert node.index.refuse(held, "its pixels cannot be decoded")
    node.check()
    assert node.states() == {"1.2.5": CaseState.QUEUED, "1.2.6": CaseState.REFUSED}
    assert node.case("1.2.5").reason == ""


def test_the_next_best_is_analysed_when_a_report_says_that_the_preferred_one_cannot_be(node: Node) -> None:
    node.send(WHOLE, "1.2.5")
    node.send(THIN, "1.2.6")
    node.check()
    held = node.index.claim_next()
    assert held is not None
    node.index.finish(
        held,
        node.index.data_dir / "cases/1.2.6/report",
        summary="Not analysed",
        sop_instance_uids=["1.2.6.99"],
        destinations=["pacs"],
        refusal="its pixels cannot be decoded",
    )
    node.check()
    assert node.states() == {"1.2.5": CaseState.QUEUED, "1.2.6": CaseState.REFUSED}


def test_a_late_slice_of_the_preferred_series_keeps_it_preferred(node: Node) -> None:
    node.send(WHOLE, "1.2.5")
    node.send(THIN[:-1], "1.2.6")
    node.check()
    assert node.index.claim_next() is not None
    node.send(THIN[-1:], "1.2.6")
    node.check(31)
    assert node.states() == {"1.2.5": CaseState.SKIPPED, "1.2.6": CaseState.QUEUED}


def test_descriptions_and_kernels_are_read_from_the_file_of_a_typical_slice(node: Node, tmp_path: Path) -> None:
    def describe(kernel: str) -> Callable[[int, Any], None]:
        return lambda _i, ds: setattr(ds, "ConvolutionKernel", kernel)

    for series, kernel in (("1.2.5", "STANDARD"), ("1.2.6", "BONEPLUS")):
        node.send(WHOLE, series)
        (made,) = make_ct_series(tmp_path / series, num_slices=1, edit=describe(kernel))
        uids = sorted(header["sop_instance_uid"] for header in node.index.stored_series(series).headers)
        typical = node.index.instance_files(series)[uids[len(uids) // 2]]
        typical.parent.mkdir(parents=True)
        made.rename(typical)
    node.check()
    assert node.states() == {"1.2.5": CaseState.SKIPPED, "1.2.6": CaseState.QUEUED}
    assert node.case("1.2.5").reason.endswith("(kernel_type bone, here soft)")
