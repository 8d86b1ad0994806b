"""The delivery matrix against real Storage SCPs, willing and unwilling; only time is made up."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from node.case import CaseState, DeliveryState, ObjectState
from node.config import Config, DicomDestination
from node.deliver.dicom import DicomCourier
from node.index import Index
from node.send import SendError
from tests.node.handed_over import Clock, deliver, hand_over, make_results, the_case, the_delivery, uids_of

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

MakeConfig = Callable[..., Config]


@pytest.fixture
def pacs(free_port: Callable[[], int]) -> DicomDestination:
    """A destination that is not asked afterwards; nothing listens there."""
    return DicomDestination(
        type="dicom", name="pacs", host="127.0.0.1", port=free_port(), ae_title="PACS", timeout_s=30, verify="none"
    )


@pytest.fixture
def asked(pacs: DicomDestination) -> DicomDestination:
    """The same, asked by C-FIND."""
    return pacs.model_copy(update={"verify": "query"})


class Pacs:
    """A Storage SCP at a destination, that answers C-FIND at IMAGE level.

    stored: the datasets it took, with their file meta information, in order. lost: UIDs it denies having.
    """

    def __init__(
        self,
        destination: DicomDestination,
        *,
        sop_classes: Sequence[str] = (CTImageStorage, ComprehensiveSRStorage),
        syntaxes: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
        on_store: Callable[[evt.Event], int] = lambda event: 0x0000,
        find_status: int | None = 0x0000,
        on_find: Callable[[evt.Event], object] = lambda event: None,
        **settings: Any,
    ) -> None:
        self.stored: list[Dataset] = []
        self.lost: set[str] = set()
        self.num_associations = 0
        self._on_store, self._find_status, self._on_find = on_store, find_status, on_find
        ae = AE(ae_title=destination.ae_title)
        ae.add_supported_context(Verification)
        for sop_class in sop_classes:
            ae.add_supported_context(sop_class, list(syntaxes))
        if find_status is not None:
            ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        for name, value in settings.items():
            setattr(ae, name, value)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find), (evt.EVT_ESTABLISHED, self._count)]
        self.server = ae.start_server((destination.host, destination.port), block=False, evt_handlers=handlers)

    def uids(self) -> list[str]:
        return [str(ds.SOPInstanceUID) for ds in self.stored]

    def _count(self, _event: evt.Event) -> None:
        self.num_associations += 1

    def _store(self, event: evt.Event) -> int:
        status = self._on_store(event)
        if status in (0x0000, 0xB000):
            self.stored.append(dcmread(BytesIO(event.encoded_dataset())))
        return status

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        self._on_find(event)
        wanted = event.identifier
        if wanted.QueryRetrieveLevel != "IMAGE":
            wanted.SOPInstanceUID = ""
        if self._find_status == 0x0000 and wanted.SOPInstanceUID not in self.lost:
            for ds in self.stored:
                if all(
                    ds[keyword].value == wanted[keyword].value
                    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
                ):
                    yield 0xFF00, wanted
        yield self._find_status or 0x0000, None


@contextmanager
def listening(destination: DicomDestination, **settings: Any) -> Iterator[Pacs]:
    pacs = Pacs(destination, **settings)
    try:
        yield pacs
    finally:
        pacs.server.shutdown()


# ---- accepts ----


def test_every_object_is_stored_over_one_association_and_the_case_is_done(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    callers: set[str] = set()

    def note_caller(event: evt.Event) -> int:
        callers.add(event.assoc.requestor.ae_title)
        return 0x0000

    with listening(pacs, on_store=note_caller) as peer:
        case = deliver(index, make_config(receive={"ae_title": "NECKS"}), pacs)
    assert (case.state, case.reason) == (CaseState.DONE, "")
    assert (callers, peer.num_associations) == ({"NECKS"}, 1)
    names = ["vertebrae.seg.dcm", "report.sr.dcm"]  # Segmentations first, then what refers to them
    assert peer.uids() == [uids_of(results)[name] for name in names]
    assert peer.stored == [dcmread(results / name) for name in names]


def test_only_what_the_profile_names_goes_out(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    wanted = DicomDestination.model_validate(pacs.model_dump() | {"profile": {"objects": ["vertebrae_seg"]}})
    with listening(pacs) as peer:
        assert deliver(index, make_config(), wanted).state is CaseState.DONE
    assert peer.uids() == [uids_of(results)["vertebrae.seg.dcm"]]


def test_what_was_taken_and_is_found_there_is_delivered(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(asked):
        case = deliver(index, make_config(), asked)
    assert (case.state, case.reason) == (CaseState.DONE, "")
    states = {item.state for item in the_delivery(index, "pacs").objects.values()}
    assert states == {ObjectState.VERIFIED}


def test_a_warning_counts_as_taken_and_is_noted(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, on_store=lambda event: 0xB000):
        case = deliver(index, make_config(), pacs)
    assert case.state is CaseState.DONE
    assert "took report.sr.dcm with status 0xB000 (attributes were changed or discarded)" in case.reason


def test_a_duplicate_at_the_peer_is_no_error(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, on_store=lambda event: 0x0111):
        assert deliver(index, make_config(), pacs).state is CaseState.DONE


# ---- refuses for good ----


def test_a_rejected_ae_title_is_given_up_at_once_with_the_reason(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    """Nodes that retry for ever because an AE title was never configured are a plague."""
    hand_over(index, results, "pacs")
    with listening(pacs, require_calling_aet=["SOMEONE-ELSE"]):
        case = deliver(index, make_config(), pacs)
    assert case.state is CaseState.FAILED
    assert "given up after 1 attempt(s)" in case.reason
    assert "rejected the association from CSPINE" in case.reason
    assert "check AE titles there" in case.reason


def test_a_peer_that_does_not_take_one_sop_class_gets_and_keeps_the_others(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(asked, sop_classes=(CTImageStorage,)) as peer:
        case = deliver(index, make_config(), asked)
    assert len(peer.stored) == 1
    assert case.state is CaseState.FAILED
    assert "1 of 2 objects are there" in case.reason
    assert "does not take Comprehensive SR Storage as Explicit VR Little Endian; allow it there" in case.reason


def test_a_refused_object_holds_up_no_other_case(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, tmp_path: Path
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, sop_classes=(CTImageStorage,)):
        assert deliver(index, make_config(), pacs).state is CaseState.FAILED
        assert index.next_delivery("pacs") is None


def test_a_peer_that_takes_nothing_is_given_up_with_the_reason(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, sop_classes=()) as peer:
        case = deliver(index, make_config(), pacs)
    assert peer.stored == []
    assert case.state is CaseState.FAILED
    assert f"{pacs.where} takes nothing of what was offered" in case.reason


def test_a_status_that_would_come_again_ends_it_for_that_object_alone(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    refuse_report = lambda event: 0xA900 if event.request.AffectedSOPClassUID == ComprehensiveSRStorage else 0  # noqa: E731
    with listening(pacs, on_store=refuse_report) as peer:
        case = deliver(index, make_config(), pacs)
    assert (case.state, len(peer.stored)) == (CaseState.FAILED, 1)
    assert "refused report.sr.dcm with status 0xA900 (the dataset does not match its SOP Class)" in case.reason


def test_a_transfer_syntax_that_is_refused_is_replaced_by_one_that_is_taken(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination
) -> None:
    image = dcmread(results / "vertebrae.seg.dcm")
    image.compress(RLELossless, generate_instance_uid=False)
    image.save_as(results / "vertebrae.seg.dcm")
    hand_over(index, results, "pacs")
    with listening(asked, syntaxes=[ImplicitVRLittleEndian]) as peer:
        assert deliver(index, make_config(), asked).state is CaseState.DONE
    assert {ds.file_meta.TransferSyntaxUID for ds in peer.stored} == {ImplicitVRLittleEndian}
    assert (peer.stored[0].pixel_array == image.pixel_array).all()


# ---- fails for now ----


def test_a_failure_status_is_tried_again_and_only_what_is_missing_is_sent(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config()
    full = lambda event: 0xA700 if event.request.AffectedSOPClassUID == ComprehensiveSRStorage else 0  # noqa: E731
    with listening(pacs, on_store=full):
        case = deliver(index, config, pacs)
    assert case.state is CaseState.DELIVERING
    assert "attempt 1 failed, next in 10 s" in case.reason
    assert "refused report.sr.dcm with status 0xA700" in case.reason
    with listening(pacs) as peer:
        assert deliver(index, config, pacs).state is CaseState.DELIVERING  # not yet due
        clock.now_s += 10
        case = deliver(index, config, pacs)
    assert (case.state, case.reason) == (CaseState.DONE, "")
    assert peer.uids() == [uids_of(results)["report.sr.dcm"]]


def test_a_peer_that_dies_mid_association_gets_only_what_it_has_not_taken(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination, clock: Clock
) -> None:
    def die_at_the_report(event: evt.Event) -> int:
        if event.request.AffectedSOPClassUID == ComprehensiveSRStorage:
            event.assoc.abort()
        return 0x0000

    hand_over(index, results, "pacs")
    config = make_config()
    with listening(asked, on_store=die_at_the_report) as peer:
        case = deliver(index, config, asked)
    assert case.state is CaseState.DELIVERING
    assert "broke the connection while report.sr.dcm was sent" in case.reason
    clock.now_s += 10
    before = peer.stored[:1]
    with listening(asked) as peer:
        peer.stored += before
        assert deliver(index, config, asked).state is CaseState.DONE
    assert peer.uids()[1:] == [uids_of(results)["report.sr.dcm"]]


def test_a_peer_that_is_busy_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, maximum_associations=1):
        ae = AE()
        ae.add_requested_context(CTImageStorage)
        other = ae.associate(pacs.host, pacs.port)
        case = deliver(index, make_config(), pacs)
        other.release()
    assert case.state is CaseState.DELIVERING
    assert "rejected the association" in case.reason


def test_a_peer_that_is_down_for_an_hour_gets_the_results_when_it_is_back(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config, began_s, waits = make_config(), clock.now_s, []
    while clock.now_s < began_s + 3600:
        assert deliver(index, config, pacs).state is CaseState.DELIVERING
        assert "cannot be reached; check host and port" in the_case(index).reason
        waits.append(the_delivery(index, "pacs").next_attempt_at - clock.now_s)
        clock.now_s += waits[-1]
    assert waits == [10 * 2**n for n in range(9)]
    with listening(pacs) as peer:
        case = deliver(index, config, pacs)
    assert (case.state, case.reason, len(peer.stored)) == (CaseState.DONE, "", 2)


def test_a_peer_that_never_comes_back_is_given_up(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config(deliver={"max_attempts": 3, "retry_first_s": 10, "destinations": ()})
    while deliver(index, config, pacs).state is CaseState.DELIVERING:
        clock.now_s += 60
    assert "given up after 3 attempt(s)" in the_case(index).reason


def test_one_that_gets_through_has_the_others_that_waited_for_the_peer_sent_at_once(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    """After a weekend nobody should wait for the end of a day's back-off."""
    config = make_config()
    hand_over(index, results, "pacs")
    for _ in range(10):
        deliver(index, config, pacs)
        clock.now_s = the_delivery(index, "pacs").next_attempt_at
    deliver(index, config, pacs)
    assert the_delivery(index, "pacs").next_attempt_at > clock.now_s + 10000
    hand_over(index, make_results(index, series_uid="4.5.6"), "pacs", series_uid="4.5.6")
    with listening(pacs) as peer:
        deliver(index, config, pacs)
    assert {delivery.state for delivery in index.deliveries()} == {DeliveryState.DONE}
    assert len(peer.stored) == 4


# ---- accepts and loses ----


def test_what_is_not_found_yet_is_asked_for_again_and_not_sent_again(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    with listening(asked) as peer:
        peer.lost = {uids_of(results)["report.sr.dcm"]}
        case = deliver(index, make_config(), asked)
        delivery = the_delivery(index, "pacs")
        assert (case.state, delivery.state) == (CaseState.DELIVERING, DeliveryState.VERIFYING)
        assert case.reason == "delivery to pacs: taken, and not yet found there"
        assert delivery.next_attempt_at == clock.now_s + 1
        peer.lost = set()
        clock.now_s += 1
        assert deliver(index, make_config(), asked).state is CaseState.DONE
    assert len(peer.stored) == 2


def test_what_was_taken_and_lost_is_sent_again_and_in_the_end_given_up(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config(deliver={"max_attempts": 2, "destinations": ()})
    uid = uids_of(results)["report.sr.dcm"]
    sentences = []
    with listening(asked) as peer:
        peer.lost = {uid}
        while deliver(index, config, asked).state is CaseState.DELIVERING:
            if the_delivery(index, "pacs").reason not in sentences:
                sentences.append(the_delivery(index, "pacs").reason)
            clock.now_s = the_delivery(index, "pacs").next_attempt_at
    assert sentences == [
        "taken, and not yet found there",
        "attempt 1 failed, next in 10 s: pacs took report.sr.dcm, and 5 min later lacks it",
    ]
    assert the_case(index).reason.endswith(
        "given up after 2 attempt(s): pacs took report.sr.dcm, and 5 min later lacks it"
    )
    assert peer.uids().count(uid) == 2
    assert len(peer.stored) == 3  # what was found was not sent again


@pytest.mark.parametrize(("find_status", "said"), [(None, ""), (0x0122, "status 0x0122"), (0xC001, "status 0xC001")])
def test_a_peer_that_does_not_let_us_ask_is_told_as_such_and_keeps_what_it_took(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    asked: DicomDestination,
    find_status: int | None,
    said: str,
) -> None:
    hand_over(index, results, "pacs")
    with listening(asked, find_status=find_status):
        case = deliver(index, make_config(), asked)
    assert case.state is CaseState.FAILED
    assert "does not let CSPINE ask by C-FIND what it has; allow that there, or set verify" in case.reason
    assert said in case.reason
    # Once it is allowed to, a retry asks and sends nothing.
    assert index.retry_delivery(the_delivery(index, "pacs"))
    with listening(asked) as peer:
        peer.stored += [dcmread(path) for path in results.glob("*.dcm")]
        assert deliver(index, make_config(), asked).state is CaseState.DONE
    assert len(peer.stored) == 2


def test_a_peer_that_breaks_off_when_asked_may_not_let_us_query(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination
) -> None:
    """As Orthanc does, which accepts the context from those it does not let query."""
    hand_over(index, results, "pacs")
    with listening(asked, on_find=lambda event: event.assoc.abort()):
        with pytest.raises(SendError, match="does not let CSPINE ask by C-FIND what it has; allow that there"):
            DicomCourier(asked, "CSPINE").check()
        case = deliver(index, make_config(), asked)
    assert case.state is CaseState.DELIVERING
    assert "it may not let CSPINE query: allow that there, or set verify: none" in case.reason
    with listening(asked):
        assert DicomCourier(asked, "CSPINE").check() == "answers C-ECHO and C-FIND"


def test_a_peer_that_is_out_of_resources_when_asked_is_asked_again_later(
    index: Index, make_config: MakeConfig, results: Path, asked: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    with listening(asked, find_status=0xA700) as peer:
        assert deliver(index, make_config(), asked).state is CaseState.DELIVERING
        assert the_delivery(index, "pacs").state is DeliveryState.VERIFYING
        assert len(peer.stored) == 2
