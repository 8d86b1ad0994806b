"""How long a watched archive is left alone that asks for a pause, by its own clock."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler

import pytest

from node.index import Index
from node.watch.following import busy_error
from tests.test_dicomweb_watch import Watch, look, make_watch  # noqa: F401 - a fixture named watch
from tests.web_archive_stand_in import StandIn

HOUR_S = 3600


@pytest.mark.parametrize("ahead_s", [-HOUR_S, 0, 50 * 60])
@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000"])
def test_a_pause_until_a_date_is_by_the_clock_of_the_archive(
    watch: Watch, index: Index, monkeypatch: pytest.MonkeyPatch, ahead_s: int, zone: str
) -> None:
    def shown(seconds: float) -> str:
        there = datetime.now(UTC) + timedelta(seconds=ahead_s + seconds)
        return format_datetime(there, usegmt=True).replace("GMT", zone)

    monkeypatch.setattr(BaseHTTPRequestHandler, "date_time_string", lambda *_: shown(0))
    with StandIn().serving() as archive:
        archive.faults.append(("/series", 429, {"Retry-After": shown(120)}))
        look(watch(archive.url), 1)
    assert index.watched_source("pacs").paused_until == pytest.approx(time.time() + 120, abs=10)


@pytest.mark.parametrize(
    ("retry_after", "date", "pause_s"),
    [
        ("Fri, 99 Nov 2026 00:00:00 GMT", "Fri, 27 Nov 2026 00:00:00 GMT", 0),
        ("soon", "Fri, 27 Nov 2026 00:00:00 GMT", 0),
        ("Fri, 27 Nov 2026 00:00:00 GMT", "Fri, 27 Nov 2026 00:00:30 GMT", 0),
        ("Fri, 27 Nov 2026 09:00:00 GMT", "Fri, 27 Nov 2026 00:00:00 GMT", HOUR_S),  # no longer than that
        ("Fri, 27 Nov 2026 02:01:00 +0200", "Fri, 27 Nov 2026 00:00:00 GMT", 60),
        ("60", "yesterday", 60),
    ],
)
def test_a_pause_is_no_longer_than_an_hour_and_none_where_none_is_named(
    retry_after: str, date: str, pause_s: float
) -> None:
    busy = busy_error("busy", 429, retry_after, date)
    assert busy is not None
    assert busy.wait_s == pause_s
