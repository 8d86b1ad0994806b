"""An Orthanc that is followed: its changes from the last position on, what of them is fetched, and how.

The position moves on when a Series is safely here, is none for us, or is noted as one that Orthanc did not give out,
which is then tried again by itself; whatever dies in between has it looked at again. Instances that are here already
are not fetched again. What is no CT, and so every result, is left there.

An Orthanc that is restarted while a Series is not stable yet never says in its changes that it is. So each Series that
gets Instances is noted as pending until Orthanc calls it stable; if that is long in coming, it is asked.
"""

import logging
from collections.abc import Iterable
from contextlib import closing

from node.config import Config
from node.deliver.http import TlsAdapter, failure, read_secret, refusal
from node.index import Index
from node.peers import ClientTls, OrthancSource
from node.receive.store import Store
from node.send import SendError
from node.watch.following import BusyError, Watch, busy_error, day_of
from node.watch.taking import Taking
from orthanc.client import GoneError, Instance, Orthanc, OrthancError, Series

log = logging.getLogger(__name__)

_CALLED_STABLE_WITHIN_S = 60.0  # of its last Instance: Orthanc's own StableAge


class OrthancWatch(Watch):
    """Of one Orthanc."""

    def __init__(self, config: Config, source: OrthancSource, index: Index, store: Store) -> None:
        super().__init__(config, source, index, store)
        self._source = source

    def _follow(self) -> None:
        try:
            with closing(_open(self._source)) as orthanc:
                self._follow_changes(orthanc)
        except OrthancError as error:
            raise _explain(self._source, error) from error

    def _follow_changes(self, orthanc: Orthanc) -> None:
        position, last = self._index.watched_source(self.name).position, orthanc.last_change()
        if position is not None and last < position and day_of(position):
            log.warning("action=position-forgotten source=%r: %d is a day; it begins anew", self.name, position)
            position = None
        if position is None:
            position = last if self._source.begin == "now" else 0
            self._index.note_position(self.name, position)
        # The latest change of which Orthanc still tells: those of a patient go when the patient is deleted.
        if last < position and orthanc.changes(position, limit=1).last < position:
            log.warning(
                "action=source-anew source=%r: its changes begin anew, so it is looked through again", self.name
            )
            position = 0
            self._index.note_position(self.name, position)  # or, once there are as many changes, nobody would know
        troubled = self._index.troubled_series(self.name)
        while position < last:
            changes = orthanc.changes(position)
            self._index.note_pending(self.name, self._pending(orthanc, changes.new_instance_ids))
            for change in changes.stable:
                self._take(orthanc, change.series_id, change.number, was_troubled=change.series_id in troubled)
            if changes.last <= position:
                break
            position = changes.last
            self._index.note_position(self.name, position)
        self._take_pending(orthanc, position)
        for series_id, trouble in self._index.troubled_series(self.name).items():
            if not trouble.is_set_aside and not trouble.rests_at(self._index.now()):
                self._take(orthanc, series_id, position, was_troubled=True)

    def _pending(self, orthanc: Orthanc, instance_ids: Iterable[str]) -> set[str]:
        """The CT Series of these Instances.

        Raises:
            OrthancError: it does not answer at all, or asks for a pause.
        """
        known, found = set[str](), set[str]()
        for instance_id in instance_ids:
            if instance_id in known:
                continue
            try:
                series_id = orthanc.series_of(instance_id)
                series = orthanc.series(series_id)
            except GoneError:
                continue
            except OrthancError as error:
                if busy_error("", error.status, error.retry_after):  # the position stays, so all are asked about again
                    raise
                orthanc.last_change()  # raises if it does not answer at all: then it is not about this Instance
                log.warning("action=series-not-told source=%r instance=%s: %s", self.name, instance_id, error)
                continue
            known.update(series.instance_ids)
            if _may_be_ct(series):
                found.add(series_id)
        return found

    def _take_pending(self, orthanc: Orthanc, position: int) -> None:
        """Fetches the Series that are stable although Orthanc did not say so."""
        now, troubled = self._index.now(), self._index.troubled_series(self.name)
        for series_id, noted_at in self._index.pending_series(self.name).items():
            if noted_at <= now < noted_at + _CALLED_STABLE_WITHIN_S:
                continue
            try:
                if not orthanc.series(series_id).is_stable:
                    self._index.note_pending(self.name, [series_id])
                    continue
            except OrthancError:
                pass  # which is found again, and noted, or forgotten
            self._take(orthanc, series_id, position, was_troubled=series_id in troubled)

    def _take(self, orthanc: Orthanc, series_id: str, position: int, *, was_troubled: bool) -> None:
        """Fetches a Series unless it is none for us, or notes that Orthanc does not give it out; then the position.

        Raises:
            OrthancError, BusyError: it is not about this Series alone; BusyError when all that is noted.
        """
        trouble: SendError | None = None
        is_fetched = False
        try:
            is_fetched = self._fetch_wanted(orthanc, series_id)
        except GoneError:
            pass
        except OrthancError as error:
            trouble = _explain(self._source, error)
            if not isinstance(trouble, BusyError):
                orthanc.last_change()  # raises if it does not answer at all: then it is not about this Series
        if trouble:
            self._is_set_aside(series_id, trouble)
        elif was_troubled:
            self._index.forget_trouble(self.name, series_id)
        self._index.forget_pending(self.name, series_id)
        self._index.note_position(self.name, position, num_fetched=int(is_fetched))
        if isinstance(trouble, BusyError):
            raise trouble

    def _fetch_wanted(self, orthanc: Orthanc, series_id: str) -> bool:
        series = orthanc.series(series_id)
        if not _may_be_ct(series):
            return False
        instances = orthanc.instances(series_id)
        held = self._index.held_instances([instance.sop_instance_uid for instance in instances])
        wanted = [instance for instance in instances if instance.sop_instance_uid not in held]
        if not wanted:
            return False
        # A scout may come first or last.
        uid = series.tags.get("SeriesInstanceUID", "")
        if not self._is_wanted(orthanc.tags(instances[len(instances) // 2]), uid):
            return False
        with self._taking(uid) as taking:
            taking.take_each(wanted, lambda instance: _fetch_one(orthanc, instance, taking), self._source.connections)
        return True


def _may_be_ct(series: Series) -> bool:
    # That of RSNA 2022 has no Modality; the receiver takes it, too, and refuses by its SOP Class what is no CT.
    return (series.tags.get("Modality") or "CT") == "CT"


def _fetch_one(orthanc: Orthanc, instance: Instance, taking: Taking) -> OrthancError | None:
    """Returns when the Instance is safely here, or will never be; or why Orthanc does not give it out."""
    try:
        with closing(orthanc.read(instance)) as pieces:
            taking.take(pieces, instance.sop_instance_uid)
    except GoneError:
        return None
    except OrthancError as error:
        if busy_error("", error.status, error.retry_after):  # no more is asked for
            raise
        return error
    return None


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
        refused = refusal(source.where, error.status, error.reason)
        return busy_error(str(refused), error.status, error.retry_after) or refused
    return SendError(f"{source.where} {error}")
