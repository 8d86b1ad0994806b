"""The service's side: reports over associations of our own to requesters that ended theirs. Called by APScheduler."""

import logging
from collections.abc import Iterator

from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.sop_class import StorageCommitmentPushModel

from node.commitment.report import ReportError, send_report
from node.config import Config, DicomDestination, Source
from node.index import Commitment, Index
from node.peers import DicomPeer
from node.retry import retry_wait_s
from node.send import SendError, associated

log = logging.getLogger(__name__)


def report_due(index: Index, config: Config) -> None:
    """Tries every report that is due, and notes how each went."""
    longest_answer_s = max((peer.timeout_s for peer in _peers(config)), default=0.0)
    while (commitment := index.claim_commitment(lease_s=4 * longest_answer_s + 10)) is not None:
        try:
            said = _report(index, config, commitment)
        except (SendError, ReportError) as error:
            is_last = commitment.attempts >= config.deliver.max_attempts
            wait_s = retry_wait_s(commitment.attempts, config.deliver.retry_first_s, config.deliver.retry_max_s)
            index.settle_commitment(commitment, done=False, reason=str(error), retry_in_s=None if is_last else wait_s)
            log.warning(
                "action=commitment-not-reported transaction=%s calling=%r attempt=%d: %s; %s",
                commitment.transaction_uid,
                commitment.calling_ae_title,
                commitment.attempts,
                error,
                "given up" if is_last else f"next in {wait_s:g} s",
            )
        else:
            index.settle_commitment(commitment, done=True)
            log.info("action=commitment-reported transaction=%s new association: %s", commitment.transaction_uid, said)


def _report(index: Index, config: Config, commitment: Commitment) -> str:
    """Reports over a new association, on which we are the SCP though we ask for it (PS3.4 J.3.3).

    Raises:
        SendError: there is none.
        ReportError: the requester did not take it.
    """
    calling = commitment.calling_ae_title
    peer = next((p for p in _peers(config) if calling in _titles(p)), None)
    if peer is None:
        raise SendError(
            f"{calling} ended its association, and nothing says where it listens: add its host, port and AE title to "
            "commitment.peers and restart"
        )
    contexts = [(StorageCommitmentPushModel, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])]
    with associated(
        peer, contexts, calling_ae_title=config.receive.ae_title, as_scp_of=[StorageCommitmentPushModel]
    ) as association:
        return send_report(association, index, commitment)


def _peers(config: Config) -> Iterator[DicomPeer]:
    """Who listens where: those listed for this, and others that are known anyway."""
    yield from config.commitment.peers
    yield from (d for d in config.deliver.destinations if isinstance(d, DicomDestination))
    yield from config.complete.sources


def _titles(peer: DicomPeer) -> tuple[str, ...]:
    return (peer.ae_title, *(peer.sends_as if isinstance(peer, Source) else ()))
