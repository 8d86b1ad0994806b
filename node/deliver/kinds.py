"""Which courier stands for which kind of destination."""

from collections.abc import Sequence

from node.case import Delivery
from node.config import Destination, DicomDestination, DicomWebDestination, OrthancDestination
from node.deliver.courier import Courier
from node.deliver.dicom import DicomCourier
from node.deliver.dicomweb import DicomWebCourier
from node.deliver.files import ResultFile
from node.deliver.folder import FolderCourier
from node.deliver.orthanc import OrthancCourier


def open_courier(
    destination: Destination,
    calling_ae_title: str,
    delivery: Delivery | None = None,
    files: Sequence[ResultFile] = (),
) -> Courier:
    """The courier for a delivery of these files; without one, to be checked only.

    Raises:
        SendError: what the destination needs, such as a secret, is not there.
    """
    if isinstance(destination, DicomDestination):
        return DicomCourier(destination, calling_ae_title)
    if isinstance(destination, DicomWebDestination):
        return DicomWebCourier(destination)
    if isinstance(destination, OrthancDestination):
        return OrthancCourier(destination, delivery.series_instance_uid if delivery else "")
    folder = destination.path
    if delivery is not None:
        folder = folder / delivery.study_instance_uid / delivery.series_instance_uid
    return FolderCourier(folder, [file.path.name for file in files])
