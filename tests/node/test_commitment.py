"""Storage commitment, asked by pynetdicom and by Orthanc, over the same and over a new association."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from pydicom import Dataset, dcmread
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from node.commitment import report_due, scp
from node.config import Config, DicomDestination
from node.index import Index
from node.peers import DicomPeer
from node.reactor import Checkpoint
from node.receive.lane import LaneDimse
from node.send import send_files
from tests.factories import make_ct_series
from tests.orthanc_server import OrthancServer
from tests.raw_scu import ON_OPEN
from tests.receiver import listening
from tests.stored import path_of
from tests.waiting import WAIT_S, wait_until

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

MakeConfig = Callable[..., Config]
NO_SUCH_OBJECT, CONFLICT, DUPLICATE = 0x0112, 0x0119, 0x0131


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scp, "REQUESTER_MAY_RELEASE_S", 0.1)


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requester has released its association when its time for that is over, however busy the machine is."""
    report = scp.CommitmentScp._report

    def report_after_release(self: scp.CommitmentScp, association: Association, commitment_id: int) -> None:
        wait_until(lambda: not association.is_established)
        report(self, association, commitment_id)

    monkeypatch.setattr(scp.CommitmentScp, "_report", report_after_release)


@pytest.fixture
def index(either_index: Index) -> Index:
    """Each test on SQLite and on PostgreSQL."""
    return either_index


@pytest.fixture
def start(make_config: MakeConfig, index: Index) -> Iterator[Callable[..., Config]]:
    """Starts a receiver; keyword arguments are sections of the configuration, which it gives."""
    with ExitStack() as stack:
        yield lambda **sections: stack.enter_context(listening(make_config(**sections), index))


class Requester:
    """A modality: asks, and notes the reports that come on whatever association."""

    def __init__(self, port: int = 0) -> None:
        self.reports: list[tuple[int, Dataset]] = []
        self._answering: list[threading.Thread] = []
        self.roles: list[tuple[bool, bool]] = []
        self.status = 0x0000
        self.ae = AE(ae_title="CT1")
        self.ae.acse_timeout = self.ae.dimse_timeout = self.ae.network_timeout = WAIT_S
        self.ae.add_requested_context(StorageCommitmentPushModel, ExplicitVRLittleEndian)
        # As the acceptor of the report's association it grants the node the role of the SCP.
        self.ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)

    def on_report(self, event: evt.Event) -> tuple[int, None]:
        self._answering.append(threading.current_thread())
        self.reports.append((event.event_type, event.event_information))
        return self.status, None

    def on_accepted(self, event: evt.Event) -> None:
        self.roles += [(c.as_scu, c.as_scp) for c in event.assoc.accepted_contexts]

    def associate(self, config: Config) -> Association:
        association = self.ae.associate(
            "127.0.0.1", config.receive.port, ae_title="CSPINE",
            evt_handlers=[*ON_OPEN, (evt.EVT_N_EVENT_REPORT, self.on_report)],
        )  # fmt: skip
        assert association.is_established
        return association

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        handlers = [(evt.EVT_N_EVENT_REPORT, self.on_report), (evt.EVT_ACCEPTED, self.on_accepted)]
        server = self.ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
        yield
        server.shutdown()

    def wait_for_report(self, number: int = 1) -> tuple[int, Dataset]:
        wait_until(lambda: len(self.reports) >= number)
        # pynetdicom answers a report in a thread of its own; what is sent before that ends can wait for ever.
        self._answering[number - 1].join(WAIT_S)
        return self.reports[number - 1]


def ask(association: Association, transaction_uid: str, *references: tuple[str, str], **given: Any) -> int:
    """Sends N-ACTION; returns the status."""
    ds = Dataset()
    ds.TransactionUID = transaction_uid
    ds.ReferencedSOPSequence = []
    for sop_class, uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        ds.ReferencedSOPSequence.append(item)
    instance = given.get("instance", StorageCommitmentPushModelInstance)
    status, _ = association.send_n_action(ds, given.get("action", 1), StorageCommitmentPushModel, instance)
    return int(status.Status)


def store(config: Config, folder: Path, num: int = 2) -> list[tuple[str, str]]:
    """Sends Instances; their SOP Class and Instance UIDs."""
    paths = make_ct_series(folder, num_slices=num)
    peer = DicomPeer(name="node", host="127.0.0.1", port=config.receive.port, ae_title="CSPINE")
    assert all(answer.outcome.startswith("taken") for answer in send_files(paths, peer, calling_ae_title="CT1"))
    return [(CTImageStorage, str(dcmread(path).SOPInstanceUID)) for path in paths]


def held(ds: Dataset) -> list[str]:
    return [item.ReferencedSOPInstanceUID for item in ds.get("ReferencedSOPSequence", [])]


def failed(ds: Dataset) -> dict[str, int]:
    return {item.ReferencedSOPInstanceUID: item.FailureReason for item in ds.get("FailedSOPSequence", [])}


def test_what_is_held_is_committed_over_the_association_that_asked(
    start: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    config, requester, transaction_uid = start(), Requester(), generate_uid()
    references = store(config, tmp_path)
    association = requester.associate(config)
    assert ask(association, transaction_uid, *references) == 0
    event_type, ds = requester.wait_for_report()
    association.release()
    assert (event_type, ds.TransactionUID) == (1, transaction_uid)
    assert held(ds) == [uid for _, uid in references]
    assert "FailedSOPSequence" not in ds
    assert index.claim_commitment(lease_s=1) is None


def test_the_reactor_stands_still_when_a_report_is_sent(
    start: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it may take the answer, for which the report then waits in vain (`node/reactor.py`)."""
    stood: list[bool] = []
    send = LaneDimse.send_msg

    def send_msg(self: LaneDimse, primitive: object, context_id: int) -> None:
        if isinstance(primitive, N_EVENT_REPORT):
            checkpoint = self.assoc._reactor_checkpoint
            stood.append(isinstance(checkpoint, Checkpoint) and checkpoint._stands)
        send(self, primitive, context_id)

    monkeypatch.setattr(LaneDimse, "send_msg", send_msg)
    config, requester = start(), Requester()
    association = requester.associate(config)
    assert ask(association, generate_uid(), (CTImageStorage, "1.2.3")) == 0
    requester.wait_for_report()
    association.release()
    assert stood == [True]


def test_what_is_not_held_fails_with_its_reason(start: Callable[..., Config], index: Index, tmp_path: Path) -> None:
    config, requester = start(), Requester()
    first, second, third, fourth = store(config, tmp_path, 4)
    for (_, uid), damage in ((third, Path.unlink), (fourth, lambda path: os.truncate(path, 500))):  # purged, cut off
        stored = path_of(index, uid)
        damage(stored)
    unknown = generate_uid()
    association = requester.associate(config)
    ask(
        association,
        generate_uid(),
        first,
        (EnhancedCTImageStorage, second[1]),
        third,
        fourth,
        (CTImageStorage, unknown),
    )
    event_type, ds = requester.wait_for_report()
    association.release()
    assert (event_type, held(ds)) == (2, [first[1]])
    assert failed(ds) == {second[1]: CONFLICT} | dict.fromkeys((third[1], fourth[1], unknown), NO_SUCH_OBJECT)


def test_a_transaction_uid_that_was_used_before_fails_for_all_instances(
    start: Callable[..., Config], tmp_path: Path
) -> None:
    config, requester, transaction_uid = start(), Requester(), generate_uid()
    (reference,) = store(config, tmp_path, 1)
    association = requester.associate(config)
    for number in (1, 2):
        assert ask(association, transaction_uid, reference) == 0
        requester.wait_for_report(number)
    association.release()
    assert [event_type for event_type, _ in requester.reports] == [1, 2]
    assert failed(requester.reports[1][1]) == {reference[1]: DUPLICATE}


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"instance": "1.2.3"}, 0x0112),
        ({"action": 2}, 0x0123),
        ({"references": []}, 0x0115),
        ({"transaction": ""}, 0x0115),
    ],
)
def test_a_request_that_is_none_is_refused_and_not_noted(
    start: Callable[..., Config], index: Index, given: dict[str, Any], status: int
) -> None:
    config, requester = start(), Requester()
    association = requester.associate(config)
    given = dict(given)  # the other kind of database gets it, too
    references = given.pop("references", [(CTImageStorage, "1.2.3")])
    assert ask(association, given.pop("transaction", generate_uid()), *references, **given) == status
    association.release()
    time.sleep(0.15)
    assert index.claim_commitment(lease_s=1, commitment_id=1) is None


@pytest.mark.usefixtures("released")
def test_a_requester_that_released_is_told_over_a_new_association_in_which_the_node_is_the_scp(
    start: Callable[..., Config], index: Index, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    peer = {"name": "ct1", "host": "127.0.0.1", "port": port, "ae_title": "CT1"}
    config, requester = start(commitment={"peers": [peer]}), Requester()
    (reference,) = store(config, tmp_path, 1)
    association = requester.associate(config)
    assert ask(association, generate_uid(), reference) == 0
    association.release()
    with requester.listening(port):
        wait_until(lambda: report_due(index, config) or requester.reports)
    assert held(requester.reports[0][1]) == [reference[1]]
    assert requester.roles == [(True, False)]  # of the requester, which accepted


def test_a_report_that_does_not_arrive_is_tried_again_even_after_a_crash_and_then_given_up(
    start: Callable[..., Config], index: Index, tmp_path: Path, free_port: Callable[[], int],
    caplog: pytest.LogCaptureFixture, database: SecretStr | None,
) -> None:  # fmt: skip
    port = free_port()
    deliver = {"retry_first_s": 0.05, "retry_max_s": 0.05, "max_attempts": 3, "destinations": []}
    peer = {"name": "ct1", "host": "127.0.0.1", "port": port, "ae_title": "CT1", "timeout_s": 1}
    config = start(commitment={"peers": [peer]}, deliver=deliver)
    references = [(CTImageStorage, generate_uid())]
    ids = [
        index.add_commitment(transaction_uid=generate_uid(), calling_ae_title=calling, references=references, wait_s=0)
        for calling in ("CT1", "CT2")
    ]
    # A process that died with the report in hand leaves only a lease, which ends.
    assert index.claim_commitment(lease_s=0.05, commitment_id=ids[0]) is not None
    index.hand_on_commitment(ids[0])
    with closing(Index(index.data_dir, database)) as other:
        assert other.claim_commitment(lease_s=0.05, commitment_id=ids[0]) is not None
    wait_until(lambda: report_due(index, config) or ("given up" in caplog.text and "CT1 at" in caplog.text))
    assert f"CT1 at 127.0.0.1:{port} cannot be reached" in caplog.text
    assert "CT2 ended its association, and nothing says where it listens" in caplog.text


def test_a_report_that_the_requester_refuses_is_not_taken_for_delivered(
    start: Callable[..., Config], index: Index
) -> None:
    config, requester = start(), Requester()
    requester.status = 0x0110
    association = requester.associate(config)
    ask(association, generate_uid(), (CTImageStorage, "1.2.3"))
    requester.wait_for_report()
    wait_until(lambda: index.claim_commitment(lease_s=WAIT_S) is not None)  # the clock's turn
    association.release()


@pytest.mark.usefixtures("released")
def test_orthanc_asks_whether_it_may_forget_and_is_told(
    start: Callable[..., Config], index: Index, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """It ends its association at once and wants the report over a new one."""
    config = start(
        deliver={"destinations": [
            {"type": "dicom", "name": "o", "host": "127.0.0.1", "port": free_port(), "ae_title": "ORTHANC"}
        ]}
    )  # fmt: skip
    (destination,) = config.deliver.destinations
    assert isinstance(destination, DicomDestination)
    orthanc = OrthancServer(tmp_path / "orthanc", port=destination.port, node_port=config.receive.port)
    try:
        here, missing = store(config, tmp_path / "sent", 1)[0], (CTImageStorage, generate_uid())
        for references, status in (([here], "Success"), ([here, missing], "Failure")):
            body = {
                "DicomInstances": [{"SOPClassUID": c, "SOPInstanceUID": uid} for c, uid in references],
                "Timeout": 10,
            }
            asked = orthanc.client.post("modalities/cspine/storage-commitment", json=body).json()
            path = asked["Path"].lstrip("/")
            wait_until(
                lambda path=path: report_due(index, config) or orthanc.client.get_json(path)["Status"] != "Pending",
                orthanc.log,
            )
            said = orthanc.client.get_json(path)
            assert said["Status"] == status
            assert [item["SOPInstanceUID"] for item in said["Success"]] == [here[1]]
        assert [item["FailureReason"] for item in said["Failures"]] == [NO_SUCH_OBJECT]
    finally:
        orthanc.stop()
