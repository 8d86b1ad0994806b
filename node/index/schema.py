"""Which shape the tables have, and how an older database becomes today's: numbered steps, run once, in order."""

from sqlalchemy import Connection, inspect, select

from node.index.tables import metadata, schema_version

STEPS = (
    # 1: what 0.1.0 made, before there was a version, gets what priority and the choice of Series look at.
    ("ALTER TABLE cases ADD COLUMN attributes JSON DEFAULT '{}' NOT NULL",),
    # 2: notifications find what is new.
    ("CREATE INDEX cases_by_change ON cases (changed_at)",),
    # 3: how long a case has been waiting for a worker, however often it was put back.
    (
        "ALTER TABLE cases ADD COLUMN queued_at FLOAT",
        "UPDATE cases SET queued_at = changed_at WHERE state = 'queued' OR state = 'analysing'",
    ),
    # 4: the choice among the Series of a Study, and what completeness won.
    (
        "ALTER TABLE cases ADD COLUMN won_s FLOAT",
        "ALTER TABLE cases ADD COLUMN num_reopened INTEGER DEFAULT '0' NOT NULL",
        "ALTER TABLE cases ADD COLUMN skipped_for VARCHAR(64)",
        "CREATE INDEX cases_by_study ON cases (study_instance_uid)",
    ),
    # 5: what was purged is known.
    (
        "ALTER TABLE cases ADD COLUMN originals_purged_at FLOAT",
        "ALTER TABLE cases ADD COLUMN results_purged_at FLOAT",
    ),
    # 6: requests for storage commitment, a new table.
    (),
    # 7: what a dead receiver leaves is told apart; a file that lost bytes is found.
    (
        "ALTER TABLE associations ADD COLUMN receiver VARCHAR DEFAULT '' NOT NULL",
        "ALTER TABLE instances ADD COLUMN num_bytes INTEGER",
    ),
    # 8: how far each object of a delivery is, and what a destination has of earlier results.
    (
        "ALTER TABLE deliveries ADD COLUMN changed_at FLOAT DEFAULT 0 NOT NULL",
        "ALTER TABLE deliveries ADD COLUMN objects JSON DEFAULT '{}' NOT NULL",
        "ALTER TABLE deliveries ADD COLUMN sent_at FLOAT DEFAULT 0 NOT NULL",
        "ALTER TABLE deliveries ADD COLUMN transaction_uid VARCHAR(64) DEFAULT '' NOT NULL",
        "ALTER TABLE deliveries ADD COLUMN superseded JSON DEFAULT '[]' NOT NULL",
        "ALTER TABLE deliveries ADD COLUMN unreachable INTEGER DEFAULT 0 NOT NULL",
    ),
    # 9: a Series that somebody asks for is analysed whatever the rules say.
    ("ALTER TABLE cases ADD COLUMN is_asked_for INTEGER DEFAULT '0' NOT NULL",),
    # 10: archives that are followed, a new table; written out here since a later step changes it.
    (
        "CREATE TABLE watched (source VARCHAR NOT NULL, position BIGINT, num_series INTEGER NOT NULL, "
        "succeeded_at FLOAT, failed_at FLOAT, error VARCHAR NOT NULL, is_failing INTEGER NOT NULL, "
        "PRIMARY KEY (source))",
    ),
    # 11: a file that a power cut left with its length and without its bytes is found.
    ("ALTER TABLE instances ADD COLUMN checksum BIGINT",),
    # 12: what is known of the Series of a watched archive, a new table.
    (),
    # 13: Series that a watched archive did not give out, a new table.
    (),
    # 14: a pause that a watched archive asked for outlives a restart.
    ("ALTER TABLE watched ADD COLUMN paused_until FLOAT",),
    # 15: Series that came to a watched Orthanc, and that it did not call stable yet, a new table.
    (),
    # 16: a result says that its source holds more than what was analysed.
    ("ALTER TABLE cases ADD COLUMN num_at_source INTEGER",),
    # 17: Instances that were refused for the UID of one that is here.
    (
        "ALTER TABLE cases ADD COLUMN num_conflicts INTEGER DEFAULT '0' NOT NULL",
        "ALTER TABLE cases ADD COLUMN last_conflict_at FLOAT",
        "ALTER TABLE cases ADD COLUMN last_conflict_from VARCHAR(16)",
    ),
    # 18: results that a case has of before it was refused or skipped after all are shown to nobody.
    (
        "ALTER TABLE cases ADD COLUMN is_outdated INTEGER DEFAULT '0' NOT NULL",
        "UPDATE cases SET is_outdated = 1 WHERE state = 'skipped'",
    ),
)
"""Step n takes a database of version n - 1 to version n. A step that was released never changes."""


class SchemaError(Exception):
    """The database is of a version that this node does not know."""


def bring_up_to_date(connection: Connection) -> None:
    """Makes the tables of a new database, or takes those of an older one to today's version.

    Raises:
        SchemaError: a newer node wrote it.
    """
    tables = inspect(connection).get_table_names()
    version = 0
    if schema_version.name in tables:
        version = connection.execute(select(schema_version.c.version)).scalar_one()
        if version == len(STEPS):
            return
    if version > len(STEPS):
        raise SchemaError(
            f"the database has schema version {version} and this node knows up to {len(STEPS)}: a newer node wrote it. "
            "Run that one, or restore the data folder as it was before the upgrade"
        )
    if "cases" in tables:
        for statement in (text for step in STEPS[version:] for text in step):
            connection.exec_driver_sql(statement)
    metadata.create_all(connection)  # what a step did not touch: whole new tables
    connection.execute(schema_version.delete())
    connection.execute(schema_version.insert().values(version=len(STEPS)))
