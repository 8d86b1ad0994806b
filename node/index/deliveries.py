"""Results on their way to their destinations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, select, update

from node.case import THERE, UNSETTLED, CaseState, Delivery, DeliveryState, ObjectProgress, ObjectState
from node.index import tables
from node.index.cases import Cases

_cases, _deliveries = tables.cases, tables.deliveries

_UNSAID = "taken, and left out of the report on storage commitment"
_SUPERSEDED = "not sent any more: the case has come to another end since these results were made"
_FRESH: Mapping[str, Any] = {
    "state": DeliveryState.PENDING,
    "attempts": 0,
    "reason": "",
    "transaction_uid": "",
    "unreachable": 0,
}


class Deliveries(Cases):
    """One row for each case and destination, with the latest results only."""

    def next_delivery(self, destination: str) -> Delivery | None:
        """The delivery to `destination` that is due longest, None if none is; one attempt older if it is to be sent."""
        due = (
            _deliveries.c.state.in_(UNSETTLED)
            & (_deliveries.c.destination == destination)
            & (_deliveries.c.next_attempt_at <= self.now())
        )
        found = self._find_deliveries(due, limit=1)
        if not found:
            return None
        begun = found[0].state is DeliveryState.PENDING
        return replace(found[0], attempts=found[0].attempts + begun)

    def settle_delivery(
        self,
        delivery: Delivery,
        state: DeliveryState,
        reason: str = "",
        next_attempt_at: float = 0.0,
        *,
        objects: Mapping[str, ObjectProgress] | None = None,
        sent_at: float | None = None,
        transaction_uid: str = "",
        superseded: Sequence[str] | None = None,
        unreachable: bool = False,
    ) -> bool:
        """Notes how an attempt went; the last one of a case to end makes the case DONE or FAILED.

        No change, and False, when the delivery has been retried, given up or replaced since; what the destination took
        meanwhile is noted as superseded, should it not be sent again.
        """
        values: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "attempts": delivery.attempts,
            "next_attempt_at": next_attempt_at,
            "objects": _to_json(delivery.objects if objects is None else objects),
            "sent_at": delivery.sent_at if sent_at is None else sent_at,
            "transaction_uid": transaction_uid,
            "superseded": list(delivery.superseded if superseded is None else superseded),
            "unreachable": int(unreachable),
            "changed_at": self.now(),
        }
        mine = _deliveries.c.delivery_id == delivery.delivery_id
        with self._writing() as connection:
            _lock_cases(connection, [delivery.case_id])
            # SQLite gives the number of a deleted delivery to the next one.
            of_series = _cases.c.series_instance_uid == delivery.series_instance_uid
            row = connection.execute(select(_deliveries).join(_cases).where(mine, of_series)).mappings().first()
            if row is None:
                return False
            is_same = row["result_dir"] == str(delivery.result_dir.relative_to(self.data_dir))
            is_same &= (row["state"], row["transaction_uid"]) == (delivery.state, delivery.transaction_uid)
            # A transaction is asked for once, and its report may be noted in between.
            is_same &= bool(delivery.transaction_uid) or row["changed_at"] == delivery.changed_at
            if not is_same:
                left_there = [*row["superseded"], *_keys_there(values["objects"])]
                connection.execute(update(_deliveries).where(mine).values(superseded=left_there))
                return False
            connection.execute(update(_deliveries).where(mine).values(values))
            _settle_case(connection, delivery.case_id, self.now())
            return True

    def report_commitment(self, transaction_uid: str, committed: Collection[str], failed: Mapping[str, str]) -> bool:
        """Notes what a storage commitment report says, by SOP Instance UID; False if no delivery awaits it.

        failed: with the reasons. What it does not mention is to be sent again, too: asked again at once, a destination
        would say the same. The delivery is due at once, for the clock to decide what becomes of it.
        """
        awaited = (_deliveries.c.state == DeliveryState.VERIFYING) & (_deliveries.c.transaction_uid == transaction_uid)
        with self._writing() as connection:
            row = connection.execute(select(_deliveries).where(awaited)).mappings().first()
            if row is None or not transaction_uid:
                return False
            objects = dict(row["objects"])
            unsaid = {uid for uid, item in objects.items() if item["state"] == ObjectState.TAKEN} - set(committed)
            failed = dict.fromkeys(unsaid, _UNSAID) | dict(failed)
            for uid in objects.keys() & set(committed):
                objects[uid] = _to_json({uid: ObjectProgress(state=ObjectState.VERIFIED)})[uid]
            for uid in objects.keys() & failed.keys():
                objects[uid] = _to_json({uid: ObjectProgress(state=ObjectState.WAITING, reason=failed[uid])})[uid]
            values = {"objects": objects, "transaction_uid": "", "next_attempt_at": self.now()}
            connection.execute(update(_deliveries).where(awaited).values(values))
            return True

    def is_awaited(self, transaction_uid: str) -> bool:
        """Whether the report of that storage commitment has not come yet."""
        awaited = select(_deliveries.c.delivery_id).where(_deliveries.c.transaction_uid == transaction_uid)
        with self._engine.connect() as connection:
            return connection.scalar(awaited) is not None

    def hasten(self, destination: str) -> int:
        """Makes due what waits because the destination could not be reached; returns how many that are."""
        waiting = (_deliveries.c.destination == destination) & (_deliveries.c.unreachable == 1)
        waiting &= _deliveries.c.state.in_(UNSETTLED)
        with self._writing() as connection:
            soon = {"next_attempt_at": self.now(), "unreachable": 0}
            return connection.execute(update(_deliveries).where(waiting).values(soon)).rowcount

    def drop_destinations_except(self, names: Sequence[str]) -> None:
        """Gives up deliveries to destinations that are no longer configured."""
        gone = _deliveries.c.state.in_(UNSETTLED) & _deliveries.c.destination.not_in(names)
        self._give_up(gone, "this destination is no longer in the configuration")

    # ---- by hand ----

    def deliveries(
        self,
        *,
        states: Collection[DeliveryState] = tuple(DeliveryState),
        destination: str | None = None,
        series_instance_uid: str | None = None,
        case_id: int | None = None,
    ) -> list[Delivery]:
        """Deliveries to which all that is given applies, those that changed last first."""
        wanted: ColumnElement[bool] = _deliveries.c.state.in_(states)
        if destination is not None:
            wanted &= _deliveries.c.destination == destination
        if series_instance_uid is not None:
            wanted &= _cases.c.series_instance_uid == series_instance_uid
        if case_id is not None:
            wanted &= _cases.c.case_id == case_id
        return self._find_deliveries(wanted, latest_first=True)

    def retry_delivery(self, delivery: Delivery) -> bool:
        """Has a delivery tried again now, with all attempts; False if it has moved on.

        What the destination has is not sent again, unless it had everything: then all of it is.
        """
        again = delivery.state is DeliveryState.DONE
        objects = {
            key: item if item.state in THERE and not again else ObjectProgress(state=ObjectState.WAITING)
            for key, item in delivery.objects.items()
        }
        now = self.now()
        values = {**_FRESH, "objects": _to_json(objects), "next_attempt_at": now, "changed_at": now}
        if again:  # what is there is to be replaced, should newer results come before it is sent
            values["superseded"] = [*delivery.superseded, *delivery.objects]
        with self._writing() as connection:
            _lock_cases(connection, [delivery.case_id])
            if not connection.execute(_unmoved(delivery).values(values)).rowcount:
                return False
            delivered = _cases.c.state == CaseState.DONE
            # A case whose analysis failed has another reason, and stays so.
            not_delivered = (_cases.c.state == CaseState.FAILED) & _cases.c.reason.startswith(_REASON_OF_DELIVERY)
            reopened = update(_cases).where(_cases.c.case_id == delivery.case_id, delivered | not_delivered)
            connection.execute(reopened.values(state=CaseState.DELIVERING))
            _settle_case(connection, delivery.case_id, now)
            return True

    def give_up_delivery(self, delivery: Delivery) -> bool:
        """Ends a delivery that is not done; False if there is nothing to end."""
        mine = (_deliveries.c.delivery_id == delivery.delivery_id) & _deliveries.c.state.in_(UNSETTLED)
        return self._give_up(mine, "given up by hand")

    def _give_up(self, which: ColumnElement[bool], reason: str) -> bool:
        values = {"state": DeliveryState.FAILED, "reason": reason, "transaction_uid": "", "changed_at": self.now()}
        with self._writing() as connection:
            case_ids = set(connection.scalars(select(_deliveries.c.case_id).where(which)))
            _lock_cases(connection, case_ids)
            connection.execute(update(_deliveries).where(which).values(values))
            for case_id in case_ids:
                _settle_case(connection, case_id, self.now())
            return bool(case_ids)

    def _find_deliveries(
        self, which: ColumnElement[bool], *, latest_first: bool = False, limit: int | None = None
    ) -> list[Delivery]:
        order = _deliveries.c.changed_at.desc() if latest_first else _deliveries.c.next_attempt_at
        query = select(_deliveries, _cases.c.series_instance_uid, _cases.c.study_instance_uid).join(_cases)
        with self._engine.connect() as connection:
            rows = connection.execute(query.where(which).order_by(order).limit(limit)).mappings()
            return [_to_delivery(row, self.data_dir) for row in rows]


_REASON_OF_DELIVERY = "delivery to "


def replace_deliveries(
    connection: Connection, case_id: int, result_dir: str, destinations: Sequence[str], now: float
) -> None:
    """Has results go to the destinations, instead of earlier ones of the case; notes what of those is there already."""
    supersede_deliveries(connection, case_id, now)
    rows = connection.execute(select(_deliveries).where(_deliveries.c.case_id == case_id)).mappings()
    earlier = {row["destination"]: [*row["superseded"], *_keys_there(row["objects"])] for row in rows}
    for destination in destinations:
        values = {
            **_FRESH,
            "result_dir": result_dir,
            "objects": {},
            "sent_at": 0.0,
            "superseded": list(dict.fromkeys(earlier.get(destination, []))),
            "next_attempt_at": now,
            "changed_at": now,
        }
        if destination in earlier:
            mine = (_deliveries.c.case_id == case_id) & (_deliveries.c.destination == destination)
            connection.execute(update(_deliveries).where(mine).values(values))
        else:
            connection.execute(_deliveries.insert().values(case_id=case_id, destination=destination, **values))


def supersede_deliveries(connection: Connection, case_id: int, now: float) -> None:
    """Ends deliveries of earlier results of the case that are not done, also failed ones: no outage that ends, and no
    retry of all that failed, may bring to a destination what is not true any more."""
    mine = (_deliveries.c.case_id == case_id) & (_deliveries.c.state != DeliveryState.DONE)
    values = {
        "state": DeliveryState.SUPERSEDED,
        "reason": _SUPERSEDED,
        "transaction_uid": "",
        "unreachable": 0,
        "changed_at": now,
    }
    connection.execute(update(_deliveries).where(mine).values(values))


def _lock_cases(connection: Connection, case_ids: Collection[int]) -> None:
    """Two deliveries of a case that end at once would each find the other pending."""
    cases = select(_cases.c.case_id).where(_cases.c.case_id.in_(case_ids)).order_by(_cases.c.series_instance_uid)
    connection.execute(cases.with_for_update())


def _settle_case(connection: Connection, case_id: int, now: float) -> None:
    """Takes the case of a delivery on, and lets its reason say what is wrong with any of its deliveries."""
    counts = (_deliveries.c.case_id == case_id) & (_deliveries.c.state != DeliveryState.SUPERSEDED)
    rows = connection.execute(select(_deliveries).where(counts)).mappings().all()
    states = {row["state"] for row in rows}
    if states & set(UNSETTLED):
        state = CaseState.DELIVERING
    elif DeliveryState.FAILED in states:
        state = CaseState.FAILED
    else:
        state = CaseState.DONE
    reason = "; ".join(f"{_REASON_OF_DELIVERY}{row['destination']}: {row['reason']}" for row in rows if row["reason"])
    delivering = (_cases.c.case_id == case_id) & (_cases.c.state == CaseState.DELIVERING)
    connection.execute(update(_cases).where(delivering).values(state=state, reason=reason, changed_at=now))


def _unmoved(delivery: Delivery) -> Any:
    """An update of the delivery that misses if it changed since the snapshot."""
    return update(_deliveries).where(
        _deliveries.c.delivery_id == delivery.delivery_id,
        _deliveries.c.state == delivery.state,
        _deliveries.c.changed_at == delivery.changed_at,
    )


def _to_json(objects: Mapping[str, ObjectProgress]) -> dict[str, dict[str, str]]:
    return {key: asdict(item) for key, item in objects.items()}


def _keys_there(objects: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [key for key, item in objects.items() if item["state"] in THERE]


def _to_delivery(row: RowMapping, data_dir: Path) -> Delivery:
    values = {name: row[name] for name in Delivery.__dataclass_fields__}
    objects = {
        key: ObjectProgress(state=ObjectState(item["state"]), reason=item["reason"])
        for key, item in row["objects"].items()
    }
    values |= {
        "state": DeliveryState(row["state"]),
        "result_dir": data_dir / row["result_dir"],
        "objects": objects,
        "superseded": tuple(row["superseded"]),
        "unreachable": bool(row["unreachable"]),
    }
    return Delivery(**values)
