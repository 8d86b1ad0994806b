"""The tables. Nothing here names a patient. A change of them is a new step in `schema.py`."""

from sqlalchemy import JSON, BigInteger, Column, Float, ForeignKey, Integer, MetaData, String, Table, UniqueConstraint
from sqlalchemy import Index as TableIndex

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True))  # one row
pause = Table("pause", metadata, Column("since", Float, primary_key=True))  # a row while no case goes to a worker
associations = Table(
    "associations",
    metadata,
    Column("association_id", Integer, primary_key=True),
    Column("calling_ae_title", String(16), nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("ended_at", Float),  # None while it is open
    Column(
        "released", Integer
    ),  # 1 released by the peer with all taken; 0 if an Instance could not be, aborted, broken or lost
    Column("receiver", String, nullable=False, server_default=""),  # the run of a receiver process that has it
)
cases = Table(
    "cases",
    metadata,
    Column("case_id", Integer, primary_key=True),
    Column("series_instance_uid", String(64), nullable=False, unique=True),
    Column("study_instance_uid", String(64), nullable=False),
    Column("calling_ae_title", String(16), nullable=False),
    Column("attributes", JSON, nullable=False, server_default="{}"),  # of the first Instance; by keyword
    Column("state", String(16), nullable=False),
    Column("reason", String, nullable=False, default=""),
    Column("num_instances", Integer, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("first_received_at", Float, nullable=False),
    Column("last_received_at", Float, nullable=False),
    Column("next_check_at", Float, nullable=False),  # when completeness is next judged
    Column("queued_at", Float),  # since when it waits for a worker; kept when it is put back
    Column("changed_at", Float, nullable=False),
    Column("result_dir", String),  # relative to the data folder
    Column("summary", String, nullable=False, default=""),
    Column("is_outdated", Integer, nullable=False, server_default="0"),  # 1 once the case ended otherwise than they say
    Column("won_s", Float),  # against the quiet time, when it was found whole
    Column("num_reopened", Integer, nullable=False, server_default="0"),
    Column("num_at_source", Integer),  # Instances that its source said it holds, when it was taken as whole
    Column("num_conflicts", Integer, nullable=False, server_default="0"),  # refused: the UID of one that is here
    Column("last_conflict_at", Float),
    Column("last_conflict_from", String(16)),  # its calling AE title
    Column("skipped_for", String(64)),  # SeriesInstanceUID of the one that was preferred
    Column("is_asked_for", Integer, nullable=False, server_default="0"),  # 1 once somebody had it started again
    Column("originals_purged_at", Float),  # None while the Instances are kept
    Column("results_purged_at", Float),  # None while the results are kept, or if there were none
    TableIndex("cases_by_study", "study_instance_uid"),
    TableIndex("cases_by_state", "state", "next_check_at"),
    TableIndex("cases_by_change", "changed_at"),
)
instances = Table(
    "instances",
    metadata,
    Column("sop_instance_uid", String(64), primary_key=True),
    Column(
        "series_instance_uid",
        String(64),
        ForeignKey("cases.series_instance_uid", deferrable=True, initially="DEFERRED"),  # its case is written after it
        nullable=False,
        index=True,
    ),
    Column("association_id", Integer, ForeignKey("associations.association_id"), nullable=False, index=True),
    Column("path", String, nullable=False),  # relative to the data folder
    Column("num_bytes", Integer),  # of the file; None for what came before this was noted
    Column("checksum", BigInteger),  # CRC-32 of the file; as above
    Column("headers", JSON, nullable=False),  # SliceHeader.to_dict() of every frame
)
results = Table(
    "results",
    metadata,
    Column("sop_instance_uid", String(64), primary_key=True),
    Column("case_id", Integer, ForeignKey("cases.case_id"), nullable=False),
)
removals = Table(  # what retention has purged and may still be on disk
    "removals",
    metadata,
    Column("path", String, primary_key=True),  # relative to the data folder
    Column("case_id", Integer, ForeignKey("cases.case_id"), nullable=False),
)
deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_id", Integer, primary_key=True),
    Column("case_id", Integer, ForeignKey("cases.case_id"), nullable=False),
    Column("destination", String, nullable=False),
    Column("result_dir", String, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Float, nullable=False),
    Column("reason", String, nullable=False, default=""),
    Column("changed_at", Float, nullable=False, server_default="0"),
    Column("objects", JSON, nullable=False, server_default="{}"),  # ObjectProgress by SOP Instance UID
    Column("sent_at", Float, nullable=False, server_default="0"),  # when the last object was taken
    Column("transaction_uid", String(64), nullable=False, server_default=""),  # of an awaited storage commitment
    Column("superseded", JSON, nullable=False, server_default="[]"),  # UIDs of earlier results that are there
    Column("unreachable", Integer, nullable=False, server_default="0"),  # 1: the last attempt did not get through
    UniqueConstraint("case_id", "destination"),
    TableIndex("deliveries_due", "state", "destination", "next_attempt_at"),
)
notify_targets = Table(
    "notify_targets",
    metadata,
    Column("target", String, primary_key=True),
    Column("seen_until", Float, nullable=False),  # changed_at of the latest case that was looked at
)
notifications = Table(
    "notifications",
    metadata,
    Column("notification_id", Integer, primary_key=True),
    Column("case_id", Integer, ForeignKey("cases.case_id", ondelete="CASCADE"), nullable=False),
    Column("target", String, nullable=False),
    Column("about", String(16), nullable=False),  # About
    Column("subject", String, nullable=False),  # the result folder, relative to the data folder, or the reason
    Column("text", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Float, nullable=False),
    Column("reason", String, nullable=False, default=""),
    UniqueConstraint("case_id", "target", "about", "subject"),
    TableIndex("notifications_due", "state", "target", "next_attempt_at"),
)
commitments = Table(
    "commitments",
    metadata,
    Column("commitment_id", Integer, primary_key=True),
    Column("transaction_uid", String(64), nullable=False, index=True),
    Column("calling_ae_title", String(16), nullable=False),
    Column("references", JSON, nullable=False),  # SOP Class and SOP Instance UID of each Instance
    Column("is_duplicate", Integer, nullable=False),  # 1 if an earlier request had the transaction UID
    Column("state", String(16), nullable=False),  # DeliveryState, of the report
    Column("requested_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_attempt_at", Float, nullable=False),
    Column("reason", String, nullable=False, default=""),
    TableIndex("commitments_due", "state", "next_attempt_at"),
)
watched = Table(  # archives that are followed
    "watched",
    metadata,
    Column("source", String, primary_key=True),
    Column("position", BigInteger),  # how far it is done with (node/watch); None before the first look
    Column("num_series", Integer, nullable=False),  # fetched so far
    Column("succeeded_at", Float),  # the last look that found all well
    Column("failed_at", Float),  # the last one that did not
    Column("error", String, nullable=False),  # why
    Column("is_failing", Integer, nullable=False),  # 1: the last look was one that failed
    Column("paused_until", Float),  # when it may be asked again, if it asked for a pause then
)
watched_series = Table(  # of archives that tell what they have, and not what is new
    "watched_series",
    metadata,
    Column("source", String, primary_key=True),
    Column("series_instance_uid", String(64), primary_key=True),
    Column("num_instances", Integer, nullable=False),  # that the archive has of it
    Column("counted_at", Float, nullable=False),  # when it was first seen to have that many
    Column("num_done", Integer),  # how many it had when it was fetched, or passed over; None before
    Column("listed_at", Float, nullable=False),  # the last time, within a day
)
pending_series = Table(  # of watched Orthancs: that have got Instances, and were not called stable since
    "pending_series",
    metadata,
    Column("source", String, primary_key=True),
    Column("series_id", String(64), primary_key=True),  # as Orthanc calls it
    Column("noted_at", Float, nullable=False),  # when it got some last, or was asked for
)
troubled_series = Table(  # that a watched archive, which otherwise answers, did not give out
    "troubled_series",
    metadata,
    Column("source", String, primary_key=True),
    Column("series_id", String(64), primary_key=True),  # as the archive calls it
    Column("attempts", Integer, nullable=False),  # that failed
    Column("failed_at", Float, nullable=False),  # the last one
    Column("reason", String, nullable=False),  # of the last one
    Column("next_attempt_at", Float),  # None once it is set aside
)
