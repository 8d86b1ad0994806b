"""The clock side of delivery: what is due is tried, and how it went is noted.

What is due, and when it is tried again, stands in the database; the clock that calls `deliver_due` is APScheduler's.
Each destination has a job of its own there, so a slow or dead one holds up no other.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from pydicom.uid import generate_uid

from node.case import Delivery, DeliveryState, ObjectProgress, ObjectState
from node.config import Config, Destination, DicomDestination, FolderDestination
from node.deliver.commitment import request_commitment
from node.deliver.courier import Courier
from node.deliver.files import ResultFile, files_to_deliver
from node.deliver.kinds import open_courier
from node.deliver.policy import Verdict, after_answers, after_error, next_question_s
from node.index import Index
from node.process import describe_error
from node.retry import describe_wait
from node.send import SendError

log = logging.getLogger(__name__)

_WAITING = ObjectProgress(state=ObjectState.WAITING)


def deliver_due(index: Index, config: Config, destination: Destination) -> None:
    """Tries every delivery to this destination that is due, and notes how each went."""
    while (delivery := index.next_delivery(destination.name)) is not None:
        _Attempt(index, config, destination, delivery).run()


class _Attempt:
    """One attempt at one delivery: what is missing is sent, what was taken is verified."""

    def __init__(self, index: Index, config: Config, destination: Destination, delivery: Delivery) -> None:
        self._index = index
        self._config = config
        self._destination = destination
        self._delivery = delivery
        self._objects = dict(delivery.objects)
        self._sent_at = delivery.sent_at
        self._superseded = delivery.superseded
        # One that is only verified again has not failed unless that fails.
        self._attempts = delivery.attempts
        self._attempts_if_failed = delivery.attempts + (delivery.state is DeliveryState.VERIFYING)

    def run(self) -> None:
        try:
            files = files_to_deliver(
                self._delivery, self._destination.profile, is_folder=isinstance(self._destination, FolderDestination)
            )
            self._objects = {file.key: self._objects.get(file.key, _WAITING) for file in files}
            courier = open_courier(self._destination, self._config.receive.ae_title, self._delivery, files)
            try:
                verdict = self._advance(courier, files)
            finally:
                courier.close()
        except (SendError, OSError) as error:
            permanent = isinstance(error, SendError) and error.permanent
            self._settle(self._after_error(str(error), permanent=permanent), unreachable=not permanent)
            return
        except Exception as error:  # put off, so that the others do not wait for it
            self._settle(self._after_error(describe_error(error), permanent=False))
            raise
        if verdict is not None:
            self._settle(verdict)
        if num_hastened := self._index.hasten(self._destination.name):
            log.info("action=hastened destination=%r deliveries=%d", self._destination.name, num_hastened)

    def _advance(self, courier: Courier, files: Sequence[ResultFile]) -> Verdict | None:
        """Takes the delivery as far as it goes now; None when a storage commitment report will say how it ends.

        Raises:
            SendError: the destination as a whole could not be used.
            OSError: a folder cannot be written, or the results not be read.
        """
        waiting = [file for file in files if self._objects[file.key].state is ObjectState.WAITING]
        if waiting and self._delivery.state is DeliveryState.PENDING:
            courier.send(waiting, self._note)
            self._sent_at = self._index.now()
        verdict = self._judge()
        if verdict.state is DeliveryState.VERIFYING:
            taken = [file for file in files if self._objects[file.key].state is ObjectState.TAKEN]
            if self._destination.verify == "storage-commitment":
                return self._ask_for_commitment(taken)
            verdict = self._look(courier, taken)
        if verdict.state is DeliveryState.DONE and courier.remove(set(self._superseded) - self._objects.keys()):
            self._superseded = ()
        return verdict

    def _note(self, file: ResultFile, progress: ObjectProgress) -> None:
        self._objects[file.key] = progress

    def _look(self, courier: Courier, taken: Sequence[ResultFile]) -> Verdict:
        """Asks the destination whether it has what it took; what it has not got in all its time is to be sent again."""
        found = courier.find(taken)
        for file in taken:
            if file.key in found:
                self._objects[file.key] = replace(self._objects[file.key], state=ObjectState.VERIFIED)
        verdict = self._judge()
        if verdict.state is not DeliveryState.VERIFYING:
            return verdict
        since_sent_s = self._index.now() - self._sent_at
        timeout_s = 0.0 if isinstance(self._destination, FolderDestination) else self._destination.verify_timeout_s
        wait_s = next_question_s(since_sent_s, timeout_s)
        if wait_s is not None:
            return replace(verdict, wait_s=wait_s)
        for file in taken:
            if file.key not in found:
                lost = (
                    f"{self._destination.name} took {file.path.name}, and {describe_wait(since_sent_s)} later lacks it"
                )
                self._objects[file.key] = ObjectProgress(state=ObjectState.WAITING, reason=lost)
        return self._judge()

    def _ask_for_commitment(self, taken: Sequence[ResultFile]) -> Verdict | None:
        """Asks the destination to commit to what it took; None when it was asked. The report may come before this ends.

        Raises:
            SendError: it cannot be asked.
        """
        destination = self._destination
        assert isinstance(destination, DicomDestination)
        wait_s = destination.verify_timeout_s
        if self._delivery.transaction_uid:  # it was asked, and its time is over
            problem = f"no report on storage commitment came within {describe_wait(wait_s)}"
            verdict = self._after_error(problem, permanent=False)
            if verdict.state is DeliveryState.FAILED:
                return verdict
            self._attempts = self._attempts_if_failed
            wait_s = max(wait_s, verdict.wait_s)  # a report that comes late still counts
        asked = Verdict(
            state=DeliveryState.VERIFYING, reason="taken; the report on storage commitment is awaited", wait_s=wait_s
        )
        transaction_uid = str(generate_uid())
        # Noted before it is asked: the report may come to the receiver before the answer comes here.
        if self._settle(asked, transaction_uid=transaction_uid):
            self._delivery = replace(self._delivery, state=DeliveryState.VERIFYING, transaction_uid=transaction_uid)
            calling = self._config.receive.ae_title
            request_commitment(destination, taken, transaction_uid, self._index, calling_ae_title=calling)
        return None

    def _judge(self) -> Verdict:
        verified = self._destination.verify != "none"
        return after_answers(self._objects, attempts=self._attempts, verified=verified, patience=self._config.deliver)

    def _after_error(self, problem: str, *, permanent: bool) -> Verdict:
        """What the failure of this attempt leads to: what was taken is not sent again."""
        waiting = not self._objects or any(item.state is ObjectState.WAITING for item in self._objects.values())
        state = DeliveryState.PENDING if waiting else DeliveryState.VERIFYING
        self._attempts = self._attempts_if_failed
        return after_error(
            problem, permanent=permanent, state=state, attempts=self._attempts, patience=self._config.deliver
        )

    def _settle(self, verdict: Verdict, *, unreachable: bool = False, transaction_uid: str = "") -> bool:
        """Notes the verdict; False if the delivery was retried, given up or replaced meanwhile."""
        delivery = self._delivery
        settled = self._index.settle_delivery(
            replace(delivery, attempts=self._attempts),
            verdict.state,
            verdict.reason,
            self._index.now() + verdict.wait_s,
            objects=self._objects,
            sent_at=self._sent_at,
            transaction_uid=transaction_uid,
            superseded=self._superseded,
            unreachable=unreachable,
        )
        where = f"case={delivery.case_id} series={delivery.series_instance_uid} destination={delivery.destination!r}"
        if not settled:
            log.info("action=delivery-overtaken %s: it was retried, given up or replaced meanwhile", where)
        elif verdict.state is DeliveryState.DONE:
            log.info("action=delivered %s attempts=%d", where, self._attempts)
        elif verdict.state is DeliveryState.VERIFYING and not unreachable:
            log.info("action=verifying %s attempts=%d", where, self._attempts)
        else:
            log.warning("action=not-delivered %s: %s", where, verdict.reason)
        return settled
