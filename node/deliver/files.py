"""The files of a delivery: which of a result folder go to a destination, and what each is."""

from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from model import PARSE_ERRORS
from node.case import Delivery
from node.profiles import FormMissingError, Profile, files_for
from node.send import SendError


@dataclass(frozen=True, kw_only=True)
class ResultFile:
    """A file to deliver. key: SOP Instance UID, or the name of a file that is no DICOM Instance."""

    path: Path
    key: str
    sop_class_uid: str = ""
    study_instance_uid: str = ""
    series_instance_uid: str = ""


def files_to_deliver(delivery: Delivery, profile: Profile, *, is_folder: bool) -> list[ResultFile]:
    """The files that go to a destination with this profile, in the order to send them.

    Raises:
        SendError: they are not there, are damaged, or were made for other profiles.
    """
    try:
        names = files_for(profile, (path.name for path in delivery.result_dir.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        names = ()
    except FormMissingError as error:
        raise SendError(str(error), permanent=True) from error
    if not is_folder:
        names = tuple(name for name in names if name.endswith(".dcm"))
    if not names:
        raise SendError(
            f"{delivery.result_dir} holds nothing for this destination; analyse the Series again", permanent=True
        )
    return [_describe(delivery.result_dir / name) for name in names]


def _describe(path: Path) -> ResultFile:
    if path.suffix != ".dcm":
        return ResultFile(path=path, key=path.name)
    tags = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"]
    try:
        ds = dcmread(path, stop_before_pixels=True, specific_tags=[*tags])
        sop_class, sop_instance, study, series = (str(ds[tag].value) for tag in tags)
    except (InvalidDicomError, *PARSE_ERRORS) as error:
        raise SendError(f"{path} is damaged; analyse the Series again", permanent=True) from error
    return ResultFile(
        path=path,
        key=sop_instance,
        sop_class_uid=sop_class,
        study_instance_uid=study,
        series_instance_uid=series,
    )
