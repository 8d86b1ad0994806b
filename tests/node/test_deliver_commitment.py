"""Storage commitment as SCU: reports over the same association, over a new one, late, bad, and never."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage
from pynetdicom import AE, build_role, evt
from pynetdicom.dimse_messages import N_ACTION_RSP
from pynetdicom.sop_class import (
    ComprehensiveSRStorage,
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    Verification,
)

from node.case import CaseState, DeliveryState
from node.config import Config, DicomDestination
from node.deliver import commitment
from node.index import Index
from tests.node.handed_over import Clock, deliver, hand_over, the_case, the_delivery, uids_of
from tests.orthanc_server import OrthancServer
from tests.raw_scu import ON_OPEN
from tests.receiver import listening
from tests.waiting import WAIT_S

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

MakeConfig = Callable[..., Config]


@pytest.fixture(autouse=True)
def _linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that comes is waited for, however busy the machine is."""
    monkeypatch.setattr(commitment, "_LINGER_S", WAIT_S)


@pytest.fixture
def pacs(free_port: Callable[[], int]) -> DicomDestination:
    return DicomDestination(
        type="dicom", name="pacs", host="127.0.0.1", port=free_port(), ae_title="PACS", timeout_s=30,
        verify="storage-commitment",
    )  # fmt: skip


class Pacs:
    """Takes everything, and is asked to commit. requests: what it was asked.

    lost: UIDs that it does not commit to. left_out: UIDs that it says nothing of.
    """

    def __init__(self, destination: DicomDestination, *, report_over: str = "same", node_port: int = 0) -> None:
        self.requests: list[Dataset] = []
        self.lost: set[str] = set()
        self.left_out: set[str] = set()
        self.num_stored = 0
        self.answers: list[int] = []
        self._report_over, self._node_port = report_over, node_port
        self._threads: list[threading.Thread] = []
        self._asked: list[tuple[Any, Dataset]] = []
        ae = AE(ae_title=destination.ae_title)
        for sop_class in (Verification, CTImageStorage, ComprehensiveSRStorage, StorageCommitmentPushModel):
            ae.add_supported_context(sop_class)
        self.server = ae.start_server(
            (destination.host, destination.port),
            block=False,
            evt_handlers=[
                *ON_OPEN,
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_N_ACTION, self._commit),
                (evt.EVT_DIMSE_SENT, self._report_what_was_asked),
            ],
        )

    def stop(self) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)
        self.server.shutdown()

    def report(self, association: Any, request: Dataset) -> None:
        """Says what of a request is kept."""
        ds = Dataset()
        ds.TransactionUID = request.TransactionUID
        not_kept = self.lost | self.left_out
        kept = [item for item in request.ReferencedSOPSequence if item.ReferencedSOPInstanceUID not in not_kept]
        lost = [item for item in request.ReferencedSOPSequence if item.ReferencedSOPInstanceUID in self.lost]
        for item in lost:
            item.FailureReason = 0x0112
        ds.ReferencedSOPSequence = kept
        if lost:
            ds.FailedSOPSequence = lost
        status, _ = association.send_n_event_report(
            ds, 2 if lost else 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )
        self.answers.append(status.get("Status", -1))

    def report_to_node(self, request: Dataset) -> None:
        """The same, over an association of its own, in which it is the SCP."""
        ae = AE(ae_title="PACS")
        ae.add_requested_context(StorageCommitmentPushModel)
        role = build_role(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        association = ae.associate(
            "127.0.0.1", self._node_port, ae_title="CSPINE", ext_neg=[role], evt_handlers=ON_OPEN
        )
        assert association.is_established
        assert association.accepted_contexts[0].as_scp
        self.report(association, request)
        association.release()

    def _store(self, _event: evt.Event) -> int:
        self.num_stored += 1
        return 0x0000

    def _commit(self, event: evt.Event) -> tuple[int, None]:
        assert event.action_type == 1
        assert event.request.RequestedSOPInstanceUID == StorageCommitmentPushModelInstance
        request = event.action_information
        self.requests.append(request)
        self._asked.append((event.assoc, request))
        return 0x0000, None

    def _report_what_was_asked(self, event: evt.Event) -> None:
        """Once the answer to N-ACTION is out, and not before."""
        if not isinstance(event.message, N_ACTION_RSP):
            return
        association, request = self._asked.pop()
        if self._report_over == "same":
            self._threads.append(threading.Thread(target=self.report, args=(association, request)))
        elif self._report_over == "new":
            self._threads.append(threading.Thread(target=self.report_to_node, args=(request,)))
        else:
            return
        self._threads[-1].start()


@contextmanager
def committing(destination: DicomDestination, **settings: Any) -> Iterator[Pacs]:
    pacs = Pacs(destination, **settings)
    try:
        yield pacs
    finally:
        pacs.stop()


def referenced(request: Dataset) -> Sequence[str]:
    return [item.ReferencedSOPInstanceUID for item in request.ReferencedSOPSequence]


@pytest.mark.parametrize("report_over", ["same", "new"])
def test_what_the_pacs_commits_to_is_delivered(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, report_over: str
) -> None:
    config = make_config()
    hand_over(index, results, "pacs")
    with listening(config, index), committing(
        pacs, report_over=report_over, node_port=config.receive.port
    ) as peer:  # fmt: skip
        case = deliver(index, config, pacs)
    assert (case.state, case.reason) == (CaseState.DONE, "")
    assert [sorted(referenced(request)) for request in peer.requests] == [sorted(uids_of(results).values())]
    assert peer.answers == [0x0000]


def test_what_it_does_not_commit_to_is_sent_again_alone(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    report = uids_of(results)["report.sr.dcm"]
    with committing(pacs) as peer:
        peer.lost = {report}
        case = deliver(index, make_config(), pacs)
        assert case.state is CaseState.DELIVERING
        assert "attempt 1 failed, next in 10 s" in case.reason
        assert "taken, but not committed to: status 0x0112 (it does not have this Instance)" in case.reason
        peer.lost = set()
        clock.now_s += 10
        assert deliver(index, make_config(), pacs).state is CaseState.DONE
    assert peer.num_stored == 3
    assert referenced(peer.requests[1]) == [report]


def test_what_its_report_says_nothing_of_is_sent_again_after_a_while_and_in_the_end_given_up(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    config = make_config(deliver={"max_attempts": 2, "destinations": ()})
    hand_over(index, results, "pacs")
    with committing(pacs) as peer:
        peer.left_out = {uids_of(results)["report.sr.dcm"]}
        case = deliver(index, config, pacs)
        assert "attempt 1 failed, next in 10 s: taken, and left out of the report on storage commitment" in case.reason
        assert len(peer.requests) == 1
        clock.now_s += 10
        assert deliver(index, config, pacs).state is CaseState.FAILED
    assert (len(peer.requests), peer.num_stored) == (2, 3)


def test_a_report_that_comes_hours_later_to_a_node_that_was_restarted_counts(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    pacs: DicomDestination,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commitment, "_LINGER_S", 0.1)
    config = make_config()
    hand_over(index, results, "pacs")
    with committing(pacs, report_over="none", node_port=config.receive.port) as peer:
        assert deliver(index, config, pacs).state is CaseState.DELIVERING
        delivery = the_delivery(index, "pacs")
        assert delivery.state is DeliveryState.VERIFYING
        assert delivery.reason == "taken; the report on storage commitment is awaited"
        again = Index(config.data_dir)
        try:
            with listening(config, again):
                peer.report_to_node(peer.requests[0])
                peer.report_to_node(peer.requests[0])  # a report that comes twice does no harm
            assert deliver(again, config, pacs).state is CaseState.DONE
        finally:
            again.close()
    assert peer.answers == [0x0000, 0x0000]
    assert peer.num_stored == 2


def test_a_pacs_that_never_reports_is_asked_again_and_in_the_end_given_up(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    pacs: DicomDestination,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commitment, "_LINGER_S", 0.0)
    config = make_config(deliver={"max_attempts": 3, "destinations": ()})
    hand_over(index, results, "pacs")
    with committing(pacs, report_over="none") as peer:
        while deliver(index, config, pacs).state is CaseState.DELIVERING:
            assert the_delivery(index, "pacs").next_attempt_at == clock.now_s + pacs.verify_timeout_s
            clock.now_s = the_delivery(index, "pacs").next_attempt_at
    assert the_case(index).reason.endswith("no report on storage commitment came within 5 min")
    transactions = {request.TransactionUID for request in peer.requests}
    assert (len(peer.requests), len(transactions), peer.num_stored) == (2, 2, 2)


def test_a_pacs_without_storage_commitment_is_told_as_such(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    ae = AE(ae_title="PACS")
    for sop_class in (Verification, CTImageStorage, ComprehensiveSRStorage):
        ae.add_supported_context(sop_class)
    server = ae.start_server((pacs.host, pacs.port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0)])
    hand_over(index, results, "pacs")
    case = deliver(index, make_config(), pacs)
    server.shutdown()
    assert case.state is CaseState.FAILED
    assert "does not offer CSPINE storage commitment; allow that there, or set verify: query or none" in case.reason


def test_a_pacs_that_is_gone_when_it_is_asked_is_asked_again_and_gets_nothing_twice(
    index: Index,
    make_config: MakeConfig,
    results: Path,
    pacs: DicomDestination,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hand_over(index, results, "pacs")
    with committing(pacs) as peer:
        with monkeypatch.context() as patch:
            patch.setattr(
                "node.deliver.clock.request_commitment",
                lambda destination, *args, **settings: commitment.request_commitment(
                    destination.model_copy(update={"port": 1}), *args, **settings
                ),
            )
            case = deliver(index, make_config(), pacs)
        assert case.state is CaseState.DELIVERING
        assert "cannot be reached" in case.reason
        assert the_delivery(index, "pacs").state is DeliveryState.VERIFYING
        clock.now_s += 10
        assert deliver(index, make_config(), pacs).state is CaseState.DONE
    assert peer.num_stored == 2


def test_orthanc_commits_over_an_association_to_our_receiver(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    config = make_config()
    hand_over(index, results, "orthanc")
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=config.receive.port)
    try:
        destination = orthanc.destination.model_copy(update={"verify": "storage-commitment"})
        with listening(config, index):
            case = deliver(index, config, destination)
        assert (case.state, case.reason) == (CaseState.DONE, "")
    finally:
        orthanc.stop()
