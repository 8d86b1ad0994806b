"""The database: which Instances are here, how far each case is, what was made of it and where it went.

`Index` is the door, put together from one module for each stage of the line. Every write is one short transaction, so
that several processes can share the database. Nothing here names a patient. Called by every stage of the node; calls
none of them.
"""

from node.index.analysing import Analysing
from node.index.committing import Commitment, Committing, HeldInstance
from node.index.completing import Completing, StoredSeries, Totals
from node.index.database import DatabaseError
from node.index.deliveries import Deliveries
from node.index.notifications import Notifications
from node.index.operating import Operating
from node.index.receiving import NewInstance, Receiving, StoredFile, is_whole
from node.index.retaining import Retaining
from node.index.trouble import why_unusable
from node.index.watching import TroubledSeries, WatchedSeries, WatchedSource, Watching

__all__ = [
    "Commitment",
    "DatabaseError",
    "HeldInstance",
    "Index",
    "NewInstance",
    "StoredFile",
    "StoredSeries",
    "Totals",
    "TroubledSeries",
    "WatchedSeries",
    "WatchedSource",
    "is_whole",
    "why_unusable",
]


class Index(Receiving, Completing, Analysing, Deliveries, Notifications, Operating, Retaining, Committing, Watching):
    """The database of one node. Safe to use from several threads and processes at once."""
