"""An Orthanc that is followed: its changes from the last position on, what of them is fetched, and how.

The position moves on when a Series is safely here, or is none for us; whatever dies in between has it looked at again.
Instances that are here already are not fetched again. What is no CT, and so every result, is left there.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from sqlalchemy.exc import SQLAlchemyError

from model import PARSE_ERRORS
from node.config import Config
from node.deliver.http import TlsAdapter, failure, read_secret, refusal
from node.index import Index
from node.peers import ClientTls, OrthancSource
from node.process import describe_error
from node.receive.incoming import IncomingFile
from node.receive.sender import Sender
from node.receive.status import OUT_OF_RESOURCES, RefusedError
from node.receive.store import Store
from node.retry import retry_wait_s
from node.rules.match import Outcome, decide
from node.send import SendError
from node.watch.describe import describe
from orthanc.client import GoneError, Instance, Orthanc, OrthancError

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 300.0
_MAX_ATTEMPTS = 5  # at one Series, where Orthanc answers, with an error


class _StoppingError(Exception):
    """The node stops."""


class OrthancWatch:
    """Of one Orthanc. `look` is called again and again, never twice at once."""

    def __init__(self, config: Config, source: OrthancSource, index: Index, store: Store) -> None:
        self.source = source
        self._config, self._index, self._store = config, index, store
        self._stopping, self._looking = threading.Event(), threading.Lock()
        self._not_before = 0.0  # monotonic, s
        self._num_failures, self._reason = 0, ""
        self._attempts: Counter[str] = Counter()  # at Series that Orthanc does not give out

    def stop(self) -> None:
        """Has a look that is going on end soon."""
        self._stopping.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the end of that look."""
        if self._looking.acquire(timeout=max(0.0, timeout_s)):
            self._looking.release()

    def look(self) -> None:
        """Fetches what is new; whatever goes wrong is noted, and tried again after a wait that grows."""
        if time.monotonic() < self._not_before:
            return
        name = self.source.name
        try:
            with self._looking, closing(_open(self.source)) as orthanc:
                self._follow(orthanc)
            if self._num_failures:
                log.info("action=source-answers source=%r", name)
            self._num_failures, self._reason = 0, ""
            self._index.note_success(name)
        except _StoppingError:
            return
        except (OrthancError, SendError) as error:
            self._failed(str(_explain(self.source, error)))
        except (OSError, SQLAlchemyError) as error:
            self._failed(f"what it has cannot be stored now: {describe_error(error)}")

    def _follow(self, orthanc: Orthanc) -> None:
        name = self.source.name
        position, last = self._index.watched_source(name).position, orthanc.last_change()
        if position is None:
            position = last if self.source.begin == "now" else 0
            self._index.note_position(name, position)
        if last < position:
            log.warning("action=source-anew source=%r: its changes begin anew, so it is looked through again", name)
            position = 0
        while position < last:
            changes = orthanc.changes(position)
            for change in changes.stable:
                is_fetched = self._take(orthanc, change.series_id)
                self._index.note_position(name, change.number, num_fetched=int(is_fetched))
            if changes.last <= position:
                return
            position = changes.last
            self._index.note_position(name, position)

    def _take(self, orthanc: Orthanc, series_id: str) -> bool:
        """Fetches a Series unless it is none for us; False also when Orthanc does not give it out."""
        try:
            is_fetched = self._fetch_wanted(orthanc, series_id)
        except GoneError:
            return False
        except OrthancError as error:
            is_about_series = error.status is not None and error.status >= 400 and error.status not in (401, 403, 503)
            self._attempts[series_id] += is_about_series
            if self._attempts[series_id] < _MAX_ATTEMPTS:
                raise
            log.error("action=series-not-fetched source=%r id=%s: %s", self.source.name, series_id, error)
            is_fetched = False
        del self._attempts[series_id]
        return is_fetched

    def _fetch_wanted(self, orthanc: Orthanc, series_id: str) -> bool:
        series = orthanc.series_tags(series_id)
        if series.get("Modality") != "CT":
            return False
        instances = orthanc.instances(series_id)
        held = self._index.held_instances([instance.sop_instance_uid for instance in instances])
        wanted = [instance for instance in instances if instance.sop_instance_uid not in held]
        if not wanted:
            return False
        # A scout may come first or last.
        traits = describe(orthanc.tags(instances[len(instances) // 2]), self.source.ae_title)
        decision = decide(self._config.rules, traits, is_whole=False)
        uid = series.get("SeriesInstanceUID", "")
        if decision.outcome is Outcome.SKIP:
            log.info("action=left-there source=%r series=%s: %s", self.source.name, uid, decision.reason)
            return False
        started = time.monotonic()
        self._fetch(orthanc, wanted)
        log.info(
            "action=fetched source=%r series=%s instances=%d total_s=%.1f",
            self.source.name,
            uid,
            len(wanted),
            time.monotonic() - started,
        )
        return True

    def _fetch(self, orthanc: Orthanc, instances: Sequence[Instance]) -> None:
        """Takes Instances, several at the same time; for the index they are one association."""
        sender = Sender(lambda: self.source.ae_title, self._index, self._store.run)
        is_whole = False
        pool = ThreadPoolExecutor(self.source.connections, "watch")
        try:
            for _ in pool.map(lambda instance: self._fetch_one(orthanc, instance, sender), instances):
                pass
            is_whole = True
        finally:
            pool.shutdown(cancel_futures=True)
            sender.end(released=is_whole)

    def _fetch_one(self, orthanc: Orthanc, instance: Instance, sender: Sender) -> None:
        """Returns when the Instance is safely here, or will never be."""
        file = IncomingFile(self._store, sender)
        try:
            with closing(orthanc.read(instance)) as pieces:
                for piece in pieces:
                    if self._stopping.is_set():
                        raise _StoppingError
                    file.write(memoryview(piece))
                    if file.refusal is not None:
                        break
            file.finish()
        except GoneError:
            file.abandon()
        except RefusedError as refusal:
            if refusal.status == OUT_OF_RESOURCES:
                raise SendError(f"what {self.source.where} has cannot be stored now: {refusal}") from refusal
            self._refused(instance, str(refusal))
        except (OSError, SQLAlchemyError, OrthancError, SendError, _StoppingError):
            file.abandon()
            raise
        except PARSE_ERRORS as error:
            self._refused(instance, f"it cannot be parsed: {describe_error(error)}")

    def _refused(self, instance: Instance, reason: str) -> None:
        log.warning(
            "action=instance-refused by=watch source=%r instance=%.64r: %s",
            self.source.name,
            instance.sop_instance_uid,
            reason,
        )

    def _failed(self, reason: str) -> None:
        self._num_failures += 1
        wait_s = retry_wait_s(self._num_failures, self.source.poll_s, max(_LONGEST_WAIT_S, self.source.poll_s))
        self._not_before = time.monotonic() + wait_s
        if reason != self._reason:  # an archive that is down for a night says so in one line
            log.warning("action=source-failed source=%r: %s", self.source.name, reason)
        self._reason = reason
        try:
            self._index.note_failure(self.source.name, reason)
        except (OSError, SQLAlchemyError) as error:
            log.error("action=failure-not-noted source=%r: %s", self.source.name, describe_error(error))


def check_source(source: OrthancSource) -> str:
    """Whether an Orthanc can be watched: how far its changes are.

    Raises:
        SendError: it cannot.
    """
    try:
        with closing(_open(source)) as orthanc:
            return f"is at change {orthanc.last_change()}"
    except OrthancError as error:
        raise _explain(source, error) from error


def _open(source: OrthancSource) -> Orthanc:
    auth = source.auth
    secret = read_secret(auth, source.where) if auth else ""
    is_basic = auth is not None and auth.type == "basic"
    return Orthanc(
        source.url,
        user=auth.user if auth else "",
        password=secret if is_basic else "",
        token="" if is_basic else secret,
        timeout_s=source.timeout_s,
        num_connections=source.connections,
        adapter=TlsAdapter(source.tls or ClientTls(), source.where) if source.url.startswith("https:") else None,
    )


def _explain(source: OrthancSource, error: OrthancError | SendError) -> SendError:
    """The error in the words that deliveries have for it."""
    if isinstance(error, SendError):
        return error
    if error.cause is not None:
        return failure(source.where, error.cause, source.timeout_s)
    if error.status is not None and error.status != 200:
        return refusal(source.where, error.status, error.reason)
    return SendError(f"{source.where} {error}")
