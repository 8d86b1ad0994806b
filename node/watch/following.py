"""What every watch of an archive does: looks now and then, never twice at once, and waits longer while that fails.

A Series that the archive does not give out, though it answers otherwise, has waits of its own, so that it holds up no
other; after some attempts it is set aside, for people to see (`cspine sources`). A pause that the archive asks for is
kept, for all of it.

How an archive tells what is new, and how it gives that out, the watch of its kind knows.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from node.config import Config
from node.index import Index
from node.peers import DicomWebSource, OrthancSource
from node.process import describe_error
from node.receive.store import Store
from node.retry import retry_wait_s
from node.rules.match import Outcome, decide
from node.send import SendError
from node.watch.describe import describe
from node.watch.taking import StoppingError, Taking

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 300.0
_MAX_ATTEMPTS = 10  # at one Series; with these waits they take an hour, in which an archive may come to itself
_LONGEST_PAUSE_S = 3600.0  # that an archive may ask for
_FIRST_SERIES_WAIT_S, _LONGEST_SERIES_WAIT_S = 10.0, 1800.0


class BusyError(SendError):
    """The archive asks for a pause of `wait_s`."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def busy_error(message: str, status: int | None, retry_after: str, said_at: str = "") -> BusyError | None:
    """The error of an answer of this status, if it asks for a pause.

    retry_after, said_at: its Retry-After and Date headers, "" for none.
    """
    # A 503 that names no time may be about what was asked for alone: a proxy that gave up on a large Series.
    if status == HTTPStatus.TOO_MANY_REQUESTS or (status == HTTPStatus.SERVICE_UNAVAILABLE and retry_after):
        return BusyError(message, _pause_s(retry_after, said_at))
    return None


def _pause_s(retry_after: str, said_at: str) -> float:
    """The pause that a Retry-After header asks for, in s or as a date (RFC 9110 10.2.3), up to an hour; 0 for none.

    A date is by the archive's own clock, which may differ from ours.
    """
    if retry_after.strip().isdecimal():
        wait_s = float(retry_after)
    elif (until := _moment(retry_after)) is not None:
        wait_s = (until - (_moment(said_at) or datetime.now(UTC))).total_seconds()
    else:
        return 0.0
    return min(max(wait_s, 0.0), _LONGEST_PAUSE_S)


def _moment(text: str) -> datetime | None:
    """That of an HTTP date, in GMT where it names no zone; None if it is none."""
    try:
        moment = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def day_of(position: int) -> date | None:
    """The day up to which a DICOMweb archive was done with; None if it is none, but a number of Orthanc's changes."""
    try:
        day = date(position // 10000, position // 100 % 100, position % 100)
    except ValueError:
        return None
    return day if day.year >= 1000 else None


class Watch(ABC):
    """Of one archive. `look` is called again and again."""

    def __init__(self, config: Config, source: OrthancSource | DicomWebSource, index: Index, store: Store) -> None:
        self.name, self.where, self.poll_s = source.name, source.where, source.poll_s
        self._ae_title = source.ae_title
        self._config, self._index, self._store = config, index, store
        self._stopping, self._looking = threading.Event(), threading.Lock()
        # Monotonic, s. A pause that the archive asked for outlives a restart.
        pause_s = (index.watched_source(self.name).paused_until or 0.0) - index.now()
        self._not_before = time.monotonic() + min(max(pause_s, 0.0), _LONGEST_PAUSE_S)
        self._num_failures, self._reason = 0, ""
        self._gave_at = 0.0  # when it gave out a Series last, s since 1970

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
        try:
            with self._looking:
                self._follow()
            if self._num_failures:
                log.info("action=source-answers source=%r", self.name)
            self._num_failures, self._reason = 0, ""
            self._index.note_success(self.name)
        except StoppingError:
            return
        except SendError as error:
            self._failed(str(error), error.wait_s if isinstance(error, BusyError) else 0.0)
        except (OSError, SQLAlchemyError) as error:
            self._failed(f"what it has cannot be stored now: {describe_error(error)}")
        except Exception as error:  # a fault of ours: the scheduler has it logged
            self._failed(describe_error(error))
            raise

    @abstractmethod
    def _follow(self) -> None:
        """Fetches what is new.

        Raises:
            SendError, StoppingError, OSError, SQLAlchemyError: not all of it.
        """

    def _is_wanted(self, attributes: Mapping[str, Any], series_instance_uid: str) -> bool:
        """Whether the rules let a Series pass, as far as one of its Instances tells. attributes: by keyword."""
        decision = decide(self._config.rules, describe(attributes, self._ae_title), is_whole=False)
        if decision.outcome is Outcome.SKIP:
            log.info("action=left-there source=%r series=%s: %s", self.name, series_instance_uid, decision.reason)
        return decision.outcome is not Outcome.SKIP

    @contextmanager
    def _taking(self, series_instance_uid: str) -> Iterator[Taking]:
        """While the Instances of a Series are fetched."""
        started, is_whole = time.monotonic(), False
        taking = Taking(self.name, self.where, self._ae_title, self._store, self._stopping)
        try:
            yield taking
            is_whole = True
        finally:
            taking.end(is_whole=is_whole)
        self._gave_at = self._index.now()
        log.info(
            "action=fetched source=%r series=%s instances=%d total_s=%.1f",
            self.name,
            series_instance_uid,
            len(taking.answered),
            time.monotonic() - started,
        )

    def _is_set_aside(self, series_id: str, error: SendError) -> bool:
        """Notes that an archive that answers otherwise did not give out a Series; whether that was once too often."""
        known = self._index.troubled_series(self.name).get(series_id)
        attempts = 1
        if known and not known.is_set_aside:  # one that was has come up again: it is begun anew
            # Who asks for a pause may ask it of everybody, unless others were given out in the meantime.
            is_about_all = isinstance(error, BusyError) and self._gave_at <= known.failed_at
            attempts = max(1, known.attempts + (not is_about_all))
        next_attempt_at = None
        if attempts < _MAX_ATTEMPTS:
            wait_s = retry_wait_s(attempts, _FIRST_SERIES_WAIT_S, _LONGEST_SERIES_WAIT_S)
            next_attempt_at = self._index.now() + wait_s
        else:
            log.error("action=series-set-aside source=%r id=%s attempts=%d: %s", self.name, series_id, attempts, error)
        self._index.note_trouble(self.name, series_id, str(error), attempts=attempts, next_attempt_at=next_attempt_at)
        return next_attempt_at is None

    def _failed(self, reason: str, pause_s: float = 0.0) -> None:
        self._num_failures += 1
        wait_s = retry_wait_s(self._num_failures, self.poll_s, max(_LONGEST_WAIT_S, self.poll_s))
        self._not_before = time.monotonic() + max(wait_s, pause_s)
        if reason != self._reason:  # an archive that is down for a night says so in one line
            log.warning("action=source-failed source=%r: %s", self.name, reason)
        self._reason = reason
        try:
            self._index.note_failure(self.name, reason, pause_s=pause_s)
        except (OSError, SQLAlchemyError) as error:
            log.error("action=failure-not-noted source=%r: %s", self.name, describe_error(error))
