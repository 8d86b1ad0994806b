"""Results on their way to their destinations."""

from collections.abc import Collection, Sequence

from sqlalchemy import Connection, select, update

from node.case import CaseState, Delivery, DeliveryState
from node.index import tables
from node.index.cases import Cases

_cases, _deliveries = tables.cases, tables.deliveries


class Deliveries(Cases):
    """One row for each case and destination, with the latest results only."""

    def next_delivery(self, destination: str) -> Delivery | None:
        """The delivery to `destination` that is due longest, None if none is."""
        due = (
            select(_deliveries, _cases.c.series_instance_uid, _cases.c.study_instance_uid)
            .join(_cases)
            .where(
                _deliveries.c.state == DeliveryState.PENDING,
                _deliveries.c.destination == destination,
                _deliveries.c.next_attempt_at <= self.now(),
            )
            .order_by(_deliveries.c.next_attempt_at)
            .limit(1)
        )
        with self._engine.connect() as connection:
            row = connection.execute(due).mappings().first()
        if row is None:
            return None
        return Delivery(
            delivery_id=row["delivery_id"],
            case_id=row["case_id"],
            series_instance_uid=row["series_instance_uid"],
            study_instance_uid=row["study_instance_uid"],
            result_dir=self.data_dir / row["result_dir"],
            destination=row["destination"],
            attempts=row["attempts"] + 1,
        )

    def settle_delivery(
        self, delivery: Delivery, state: DeliveryState, reason: str = "", next_attempt_at: float = 0.0
    ) -> None:
        """Notes how an attempt went; the last one of a case to end makes the case DONE or FAILED."""
        mine = update(_deliveries).where(
            _deliveries.c.delivery_id == delivery.delivery_id,
            _deliveries.c.result_dir == str(delivery.result_dir.relative_to(self.data_dir)),
        )
        with self._writing() as connection:
            _lock_cases(connection, [delivery.case_id])
            outcome = mine.values(
                state=state, reason=reason, attempts=delivery.attempts, next_attempt_at=next_attempt_at
            )
            if connection.execute(outcome).rowcount:
                _settle_case(connection, delivery.case_id, self.now())

    def drop_destinations_except(self, names: Sequence[str]) -> None:
        """Gives up deliveries to destinations that are no longer configured."""
        gone = (_deliveries.c.state == DeliveryState.PENDING) & _deliveries.c.destination.not_in(names)
        with self._writing() as connection:
            case_ids = set(connection.scalars(select(_deliveries.c.case_id).where(gone)))
            _lock_cases(connection, case_ids)
            reason = "this destination is no longer in the configuration"
            connection.execute(update(_deliveries).where(gone).values(state=DeliveryState.FAILED, reason=reason))
            for case_id in case_ids:
                _settle_case(connection, case_id, self.now())


def _lock_cases(connection: Connection, case_ids: Collection[int]) -> None:
    """Two deliveries of a case that end at once would each find the other pending."""
    cases = select(_cases.c.case_id).where(_cases.c.case_id.in_(case_ids)).order_by(_cases.c.series_instance_uid)
    connection.execute(cases.with_for_update())


def _settle_case(connection: Connection, case_id: int, now: float) -> None:
    """Takes the case of a delivery on, and lets its reason say what is wrong with any of its deliveries."""
    rows = connection.execute(select(_deliveries).where(_deliveries.c.case_id == case_id)).mappings().all()
    states = {row["state"] for row in rows}
    if DeliveryState.PENDING in states:
        state = CaseState.DELIVERING
    elif DeliveryState.FAILED in states:
        state = CaseState.FAILED
    else:
        state = CaseState.DONE
    reason = "; ".join(f"delivery to {row['destination']}: {row['reason']}" for row in rows if row["reason"])
    delivering = (_cases.c.case_id == case_id) & (_cases.c.state == CaseState.DELIVERING)
    connection.execute(update(_cases).where(delivering).values(state=state, reason=reason, changed_at=now))
