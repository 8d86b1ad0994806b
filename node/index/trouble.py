"""Whether an error says that the database cannot be used just now, or that we ask it for what there is not."""

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

_ITS_DISK = "Look at its disk, and at the log of the system"
_DAMAGED = "Stop the node, keep a copy of the file, and mend it (`sqlite3 FILE .recover`) or put back a backup"
_MAY_WRITE = "The node's user must be able to write to file and folder"
_HELD = "Another program holds it"

# By primary result code (sqlite.org/rescode.html). What is not here is ours: no such table or column, wrong use.
_SQLITE = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_PROTOCOL: _HELD,
    sqlite3.SQLITE_READONLY: _MAY_WRITE,
    sqlite3.SQLITE_CANTOPEN: _MAY_WRITE,
    sqlite3.SQLITE_IOERR: _ITS_DISK,
    sqlite3.SQLITE_FULL: "Make room on its disk",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}

# By SQLSTATE, or its class (appendix A of PostgreSQL's manual). Ours are deadlocks, unknown tables, broken constraints.
_POSTGRESQL = {
    "08": "",  # the connection
    "25006": "It is read-only, as a standby is: `database` must name the one that is written to",
    "28": "See user and password in `database`",
    "3D": "See the name of the database in `database`",
    "42501": "Grant the node's user its rights",
    "53": "It needs disk, memory or more connections",
    "55P03": _HELD,
    "57": "",  # an operator stops it, or it is starting
    "58": _ITS_DISK,
    "XX": "Look at its log: it is damaged, or broke",
}


def why_unusable(error: BaseException) -> str | None:
    """Why the database cannot be reached or used, and what to do; None if it could be, or the error is another's."""
    if not isinstance(error, DBAPIError):
        return None
    if isinstance(error.orig, sqlite3.Error):
        remedy = _SQLITE.get(getattr(error.orig, "sqlite_errorcode", 0) & 0xFF)
    elif state := getattr(error.orig, "sqlstate", None):
        remedy = _POSTGRESQL.get(state, _POSTGRESQL.get(state[:2]))
    else:  # no server was there to say what is wrong
        remedy = "" if isinstance(error, OperationalError | InterfaceError) else None
    if remedy is None:
        return None
    return ". ".join(filter(None, (" ".join(str(error.orig).split()).removesuffix("."), remedy)))
