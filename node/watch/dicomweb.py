"""A DICOMweb archive that is watched: what it lists, which of that is new and has all come there, and its fetching.

QIDO-RS has no feed of changes, and no date of arrival. So every look lists the CT Series of Studies from some days back
(`overlap_days`) before the day up to which all is done (the position, as YYYYMMDD) until today, and compares them with
those that are known: a Series is fetched when it has as many Instances as at an earlier look and more than were dealt
with. Of one that grows later, what is not here is fetched too. The position moves on only as far as what is left would
still be listed; whatever dies has a Series looked at again, and only what has no row is fetched. A Series that the
archive does not give out is left until its own wait is over.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import date, timedelta
from http import HTTPStatus

from node.config import Config
from node.index import Index, WatchedSeries
from node.peers import DicomWebSource
from node.receive.incoming import IncomingFile
from node.receive.store import Store
from node.send import SendError
from node.watch.following import BusyError, Watch, day_of
from node.watch.taking import NotStoredError, Taking
from node.watch.web_archive import ListedSeries, NotGivenError, WebArchive
from node.web.multipart import Event, PartBegins, PartData

log = logging.getLogger(__name__)

_DAY_S = 86400.0
_FORGET_S = 30 * _DAY_S  # after a Series was last listed
_LONGEST_LOOK_S = 300.0  # then the archive is asked again for what is new: a backlog holds up nobody
_MAX_PENDING = 8  # Instances that are being made durable at the same time
_SAME_FOR = 0.7  # of the time between two looks, which varies by a quarter


class DicomWebWatch(Watch):
    """Of one archive."""

    def __init__(self, config: Config, source: DicomWebSource, index: Index, store: Store) -> None:
        super().__init__(config, source, index, store)
        self._source = source

    def _follow(self) -> None:
        counted_before = self._index.now() - _SAME_FOR * self.poll_s
        with closing(WebArchive(self._source, self._stopping)) as archive:
            position = self._position()
            listed = {series.series_instance_uid: series for series in archive.series(self._since(position))}
            if position is None:
                position = self._begin(listed)
            listed |= self._look_up(archive, listed)
            counts = self._count(archive, listed)
            known = self._index.watched_series(self.name)
            waiting = [row for uid, row in known.items() if counts.get(uid, 0) > (row.num_done or 0)]
            now = self._index.now()  # what was counted later was counted before the clock was set back
            come = [row for row in waiting if not counted_before < row.counted_at <= now]
            left = self._fetch(archive, listed, come)
            left += [row for row in waiting if counted_before < row.counted_at <= now]
        self._move_on(position, [listed[row.series_instance_uid].study_date for row in left])

    def _position(self) -> int | None:
        """The day up to which all is done; None if there is none, or if it is that of another kind of source.

        That day is past: if it is not, the clock was set back.
        """
        position = self._index.watched_source(self.name).position
        if position is None:
            return None
        day = day_of(position)
        if day is None:
            log.warning("action=position-forgotten source=%r: %d is no day; it begins anew", self.name, position)
            return None
        if day > _today():
            self._index.note_position(self.name, _number(day := _today()))
        return _number(day)

    def _since(self, position: int | None) -> date | None:
        """The day from which Studies are listed; None for all."""
        begin, overlap = self._source.begin, self._source.overlap_days
        if overlap is None:
            return None
        since = (_today() if position is None else _day(position)) - timedelta(days=overlap)
        if begin == "now":
            return since
        return begin if position is None else max(begin, since)

    def _begin(self, listed: Mapping[str, ListedSeries]) -> int:
        """The position after the first look: what is there already is left there, unless it was asked for."""
        begin = self._source.begin
        if begin == "now":
            self._index.note_listed(
                self.name, {uid: series.num_instances or 0 for uid, series in listed.items()}, are_done=True
            )
        position = _number(_today() if begin == "now" else begin)
        self._index.note_position(self.name, position)
        return position

    def _look_up(self, archive: WebArchive, listed: Mapping[str, ListedSeries]) -> dict[str, ListedSeries]:
        """The Series in trouble that are to be tried now and are not listed: their Studies may be too old for that."""
        found: dict[str, ListedSeries] = {}
        now = self._index.now()
        for uid, trouble in self._index.troubled_series(self.name).items():
            if uid in listed or trouble.is_set_aside or trouble.rests_at(now):
                continue
            try:
                series = next((one for one in archive.series(None, uid) if one.series_instance_uid == uid), None)
                if series is None:
                    raise NotGivenError(f"{self.where} lists no CT Series {uid}", HTTPStatus.OK)
                found[uid] = series
            except BusyError as error:
                self._is_set_aside(uid, error)
                raise
            except SendError as error:
                _blame_series(archive, error)
                self._is_set_aside(uid, error)
        return found

    def _count(self, archive: WebArchive, listed: Mapping[str, ListedSeries]) -> dict[str, int]:
        """How many Instances the archive has of each Series, as it is noted, too.

        Where it does not tell, those of a Series that is still to be fetched are listed, and how a Series that was
        dealt with grows is not seen.
        """
        known, now = self._index.watched_series(self.name), self._index.now()
        troubled = self._index.troubled_series(self.name)
        counts = {}
        for uid, series in listed.items():
            row = known.get(uid)
            if series.num_instances is not None:
                counts[uid] = series.num_instances
            elif row is not None and (row.num_done is not None or uid in troubled):
                counts[uid] = row.num_instances
            else:
                try:
                    counts[uid] = len(archive.instances(series))
                except BusyError as error:
                    self._index.note_listed(self.name, {uid: 1})
                    self._is_set_aside(uid, error)  # so the next look does not begin with it
                    raise
                except SendError as error:
                    _blame_series(archive, error)
                    counts[uid] = 1  # fetching it will fail too, and say so
        same = {uid: row.num_instances for uid, row in known.items() if now - row.listed_at < _DAY_S}
        changed = {uid: count for uid, count in counts.items() if same.get(uid) != count}
        self._index.note_listed(self.name, changed)
        return counts

    def _fetch(
        self, archive: WebArchive, listed: Mapping[str, ListedSeries], rows: Sequence[WatchedSeries]
    ) -> list[WatchedSeries]:
        """Fetches Series, the newest first, and last those in trouble; what is left for another look."""
        until, left = time.monotonic() + _LONGEST_LOOK_S, []
        troubled = self._index.troubled_series(self.name)
        for row in sorted(rows, key=lambda row: (row.series_instance_uid in troubled, -row.counted_at)):
            uid = row.series_instance_uid
            trouble, is_fetched = troubled.get(uid), False
            if time.monotonic() > until or (trouble and trouble.rests_at(self._index.now())):
                left.append(row)
                continue
            try:
                is_fetched = self._take(archive, listed[uid])
                if trouble:
                    self._index.forget_trouble(self.name, uid)
            except NotStoredError:
                raise
            except SendError as error:
                is_busy = isinstance(error, BusyError)
                if not is_busy:
                    _blame_series(archive, error)
                is_set_aside = self._is_set_aside(uid, error)
                if is_set_aside:
                    self._index.note_series_done(self.name, uid, row.num_instances, is_fetched=False)
                if is_busy:
                    raise
                if not is_set_aside:
                    left.append(row)
                continue
            self._index.note_series_done(self.name, uid, row.num_instances, is_fetched=is_fetched)
        return left

    def _take(self, archive: WebArchive, series: ListedSeries) -> bool:
        """Fetches a Series, or what of it is not here, unless it is none for us."""
        uid = series.series_instance_uid
        instances = archive.instances(series)
        if not instances:
            raise NotGivenError(f"{self.where} lists no Instances of Series {uid}", 200)
        held = self._index.held_instances(instances)
        wanted = [instance for instance in instances if instance not in held]
        if not wanted:
            return False
        # A scout may come first or last. Without metadata the rules see the Series only when it is here.
        attributes = archive.attributes(series, instances[len(instances) // 2])
        if attributes and not self._is_wanted(attributes, uid):
            return False
        with self._taking(uid) as taking:
            if not held:
                try:
                    _take_parts(archive.read_series(series), taking)
                except NotGivenError as error:
                    log.info("action=one-by-one source=%r series=%s: %s", self.name, uid, error)
            taking.take_each(
                [instance for instance in wanted if instance not in taking.answered],
                lambda instance: _take_one(archive, series, instance, taking),
                self._source.connections,
            )
        return True

    def _move_on(self, position: int, left: Iterable[date | None]) -> None:
        """Notes the day up to which all is done. left: StudyDates of what is not, and is to be listed again."""
        overlap = timedelta(days=self._source.overlap_days or 0)
        days = [_day(position) if study_date is None else study_date + overlap for study_date in left]
        moved = _number(min([_today(), *days]))
        if moved > position:
            self._index.note_position(self.name, moved)
            self._index.forget_series(self.name, self._index.now() - _FORGET_S)


def _take_parts(events: Iterable[Event], taking: Taking) -> None:
    """Takes files as they come, and makes several durable at a time."""
    file: IncomingFile | None = None
    pending: deque[Future[None]] = deque()
    pool = ThreadPoolExecutor(_MAX_PENDING, "watch")
    try:
        for event in events:
            if isinstance(event, PartBegins):
                file = taking.begin()
            elif isinstance(event, PartData):
                assert file is not None
                taking.write(file, event.data)
            else:
                assert file is not None
                pending.append(pool.submit(taking.finish, file))
                file = None
                if len(pending) == _MAX_PENDING:
                    pending.popleft().result()
        while pending:
            pending.popleft().result()
    finally:
        if file is not None:
            file.abandon()
        pool.shutdown()


def _take_one(archive: WebArchive, series: ListedSeries, sop_instance_uid: str, taking: Taking) -> SendError | None:
    """Returns when the Instance is safely here, or will never be; or why the archive does not give it out."""
    try:
        with closing(archive.read_instance(series, sop_instance_uid)) as pieces:
            taking.take(pieces, sop_instance_uid)
    except (BusyError, NotStoredError):
        raise
    except SendError as error:
        is_gone = isinstance(error, NotGivenError) and error.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
        return None if is_gone else error
    return None


def _blame_series(archive: WebArchive, error: SendError) -> None:
    """Returns if an error at a Series is about that Series.

    Raises:
        SendError, StoppingError: the archive as a whole does not answer.
    """
    if not isinstance(error, NotGivenError):
        next(archive.series(_today()), None)


def check_source(source: DicomWebSource) -> str:
    """Whether an archive can be watched.

    Raises:
        SendError: it cannot.
    """
    with closing(WebArchive(source)) as archive:
        return archive.check()


def _today() -> date:
    return date.today()


def _number(day: date) -> int:
    """A day as a number that reads like a DICOM date."""
    return int(f"{day:%Y%m%d}")


def _day(number: int) -> date:
    return date(number // 10000, number // 100 % 100, number % 100)
