"""A case whose results are to be delivered, and a clock that stands still: what the tests of delivery share."""

from pathlib import Path

from pydicom import dcmread

from node.case import Case, Delivery
from node.config import Config, Destination
from node.deliver import deliver_due
from node.index import Index
from tests import stored
from tests.factories import make_ct_series, make_report

SERIES, STUDY = "1.2.3", "1.2"


class Clock:
    """Stands in for `time.time` of the index; it stands still until moved."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def make_results(index: Index, name: str = "0123456789abcdef", series_uid: str = SERIES) -> Path:
    """A result folder: findings.json and two Instances of different SOP Class, as SEG and SR are."""
    folder = index.data_dir / "cases" / series_uid / name
    folder.mkdir(parents=True)
    make_report(folder / "report.sr.dcm")
    (image,) = make_ct_series(folder, num_slices=1)
    image.rename(folder / "vertebrae.seg.dcm")
    (folder / "findings.json").write_text("{}", encoding="utf-8")
    return folder


def uids_of(results: Path) -> dict[str, str]:
    """SOP Instance UID by file name."""
    return {path.name: str(dcmread(path).SOPInstanceUID) for path in results.glob("*.dcm")}


def add_instance(index: Index, number: int, series_uid: str = SERIES) -> None:
    """An Instance arrives."""
    uid = f"{series_uid}.{number}"
    stored.add_instance(
        index,
        association_id=index.open_association("SCANNER"),
        calling_ae_title="SCANNER",
        path=index.data_dir / "instances" / series_uid / f"{uid}.dcm",
        headers=[{"sop_instance_uid": uid, "series_instance_uid": series_uid, "study_instance_uid": STUDY}],
        quiet_time_s=0,
    )


def hand_over(index: Index, results: Path, *destinations: str, series_uid: str = SERIES) -> None:
    """Takes a case to DELIVERING."""
    if index.case(series_uid) is None:
        add_instance(index, 1, series_uid)
    assert index.queue(the_case(index, series_uid))
    case = index.claim_next()
    assert case is not None
    assert index.finish(case, results, summary="found", sop_instance_uids=(), destinations=destinations)


def the_case(index: Index, series_uid: str = SERIES) -> Case:
    case = index.case(series_uid)
    assert case is not None
    return case


def the_delivery(index: Index, destination: str) -> Delivery:
    (delivery,) = index.deliveries(destination=destination)
    return delivery


def deliver(index: Index, config: Config, destination: Destination) -> Case:
    """Does what is due; returns what became of the case."""
    deliver_due(index, config, destination)
    return the_case(index)
