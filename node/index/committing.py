"""Requests for storage commitment, and what is known of the Instances they ask about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, select, update

from node.case import DeliveryState
from node.index import tables
from node.index.database import CHUNK, Database

_commitments, _instances = tables.commitments, tables.instances

_KEPT_S = 30 * 86400.0  # so long a transaction UID counts as used


@dataclass(frozen=True, kw_only=True)
class Commitment:
    """A request for storage commitment. references: SOP Class and SOP Instance UID of each Instance."""

    commitment_id: int
    transaction_uid: str
    calling_ae_title: str
    references: list[tuple[str, str]]
    is_duplicate: bool
    attempts: int


@dataclass(frozen=True, kw_only=True)
class HeldInstance:
    """An Instance that has a row."""

    sop_class_uid: str
    path: Path
    num_bytes: int | None  # of the file, as it was received; None if that was not noted


class Committing(Database):
    """One row for each request."""

    def add_commitment(
        self, *, transaction_uid: str, calling_ae_title: str, references: Sequence[tuple[str, str]], wait_s: float
    ) -> int:
        """Notes a request whose report is due for the clock in `wait_s`; returns its id. Drops old finished ones."""
        now = self.now()
        same = select(_commitments.c.commitment_id).where(_commitments.c.transaction_uid == transaction_uid)
        old = (_commitments.c.requested_at < now - _KEPT_S) & (_commitments.c.state != DeliveryState.PENDING)
        with self._writing() as connection:
            connection.execute(delete(_commitments).where(old))
            row = _commitments.insert().values(
                transaction_uid=transaction_uid,
                calling_ae_title=calling_ae_title,
                references=[list(pair) for pair in references],
                is_duplicate=int(connection.scalar(same.limit(1)) is not None),
                state=DeliveryState.PENDING,
                requested_at=now,
                next_attempt_at=now + wait_s,
            )
            return int(connection.execute(row.returning(_commitments.c.commitment_id)).scalar_one())

    def claim_commitment(self, *, lease_s: float, commitment_id: int | None = None) -> Commitment | None:
        """A request whose report is to be sent now, for the caller alone for `lease_s`: the one given, else one due."""
        now = self.now()
        pending = _commitments.c.state == DeliveryState.PENDING
        if commitment_id is None:
            wanted = pending & (_commitments.c.next_attempt_at <= now)
        else:
            wanted = pending & (_commitments.c.commitment_id == commitment_id)
        found = select(_commitments).where(wanted).order_by(_commitments.c.next_attempt_at).limit(1)
        with self._engine.connect() as connection:  # most of the time nothing is due, and that needs no turn to write
            if connection.execute(found).first() is None:
                return None
        with self._writing() as connection:
            row = connection.execute(found.with_for_update()).mappings().first()
            if row is None:
                return None
            mine = update(_commitments).where(_commitments.c.commitment_id == row["commitment_id"])
            connection.execute(mine.values(next_attempt_at=now + lease_s, attempts=row["attempts"] + 1))
        return Commitment(
            commitment_id=row["commitment_id"],
            transaction_uid=row["transaction_uid"],
            calling_ae_title=row["calling_ae_title"],
            references=[(sop_class, uid) for sop_class, uid in row["references"]],
            is_duplicate=bool(row["is_duplicate"]),
            attempts=row["attempts"] + 1,
        )

    def hand_on_commitment(self, commitment_id: int) -> None:
        """Has the clock send a report that could not go over the requester's association."""
        with self._writing() as connection:
            pending = (_commitments.c.commitment_id == commitment_id) & (_commitments.c.state == DeliveryState.PENDING)
            connection.execute(update(_commitments).where(pending).values(next_attempt_at=self.now(), attempts=0))

    def settle_commitment(
        self, commitment: Commitment, *, done: bool, reason: str = "", retry_in_s: float | None = None
    ) -> None:
        """Notes how a report went. retry_in_s: when to try it again; None is never."""
        state = DeliveryState.DONE if done else DeliveryState.FAILED
        if retry_in_s is not None:
            state = DeliveryState.PENDING
        with self._writing() as connection:
            mine = update(_commitments).where(_commitments.c.commitment_id == commitment.commitment_id)
            connection.execute(
                mine.values(state=state, reason=reason, next_attempt_at=self.now() + (retry_in_s or 0.0))
            )

    def held_instances(self, sop_instance_uids: Sequence[str]) -> dict[str, HeldInstance]:
        """Those of the Instances that have a row, by UID."""
        held = {}
        columns = select(_instances.c.sop_instance_uid, _instances.c.path, _instances.c.num_bytes, _instances.c.headers)
        with self._engine.connect() as connection:
            for begin in range(0, len(sop_instance_uids), CHUNK):
                chunk = sop_instance_uids[begin : begin + CHUNK]
                rows = connection.execute(columns.where(_instances.c.sop_instance_uid.in_(chunk)))
                for uid, path, num_bytes, headers in rows:
                    held[uid] = HeldInstance(
                        sop_class_uid=str(headers[0]["sop_class_uid"]),
                        path=self.data_dir / path,
                        num_bytes=num_bytes,
                    )
        return held
