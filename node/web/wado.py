"""WADO-RS: Instances, their metadata, frames and bulk data, as bytes to send. Knows no HTTP but its media types.

Reference: PS3.18 10.4 (Retrieve), 8.7.3 (media types), F (DICOM JSON).
"""

import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRLittleEndian

from model import PARSE_ERRORS, decoding_plugin
from node.index import NewInstance
from node.transcode import TranscodeError, in_little_endian, transcoded_bytes
from node.web.accept import Offer
from node.web.attributes import completed, dataset_json
from node.web.catalog import StoredInstance
from node.web.multipart import end_of, part_head

DICOM, OCTETS = "application/dicom", "application/octet-stream"
_PIXEL_TAGS = {Tag("PixelData"), Tag("FloatPixelData"), Tag("DoubleFloatPixelData")}
_INLINE_CHARACTERS = 1368  # of Base64, for 1024 bytes; longer values are bulk data
_NUM_READ, _NUM_OPEN = 8, 32  # files that are read, or only opened, before the first of them is sent
# Media types of compressed frames (PS3.18 table 8.7.3-5).
_IMAGE_TYPES = {
    "1.2.840.10008.1.2.4.50": "image/jpeg",
    "1.2.840.10008.1.2.4.51": "image/jpeg",
    "1.2.840.10008.1.2.4.57": "image/jpeg",
    "1.2.840.10008.1.2.4.70": "image/jpeg",
    "1.2.840.10008.1.2.4.80": "image/jls",
    "1.2.840.10008.1.2.4.81": "image/jls",
    "1.2.840.10008.1.2.4.90": "image/jp2",
    "1.2.840.10008.1.2.4.91": "image/jp2",
    "1.2.840.10008.1.2.4.201": "image/jphc",
    "1.2.840.10008.1.2.4.202": "image/jphc",
    "1.2.840.10008.1.2.4.203": "image/jphc",
    "1.2.840.10008.1.2.5": "image/dicom-rle",
}


class NotThereError(Exception):
    """What is asked for does not exist; the message says what."""


class CannotGiveError(Exception):
    """It exists, but not in the form that is asked for; the message says why."""


# ---- Instances ----


def instance_offers(instances: Sequence[StoredInstance]) -> list[Offer]:
    """Forms that all of these Instances can be given in."""
    stored = {instance.transfer_syntax_uid for instance in instances}
    as_stored = stored.pop() if len(stored) == 1 else ""
    syntaxes = (as_stored,) if as_stored == ExplicitVRLittleEndian else (as_stored, ExplicitVRLittleEndian)
    offers = [Offer(media_type="multipart/related", part=DICOM, transfer_syntaxes=syntaxes)]
    if len(instances) == 1:
        offers.append(Offer(media_type=DICOM, transfer_syntaxes=syntaxes))
    return offers


def instance_bytes(instance: StoredInstance, transfer_syntax: str) -> bytes:
    """A DICOM file. transfer_syntax: "" gives it as it is stored.

    Raises:
        CannotGiveError: it cannot be transcoded.
        OSError: it has just gone.
    """
    if transfer_syntax in ("", instance.transfer_syntax_uid):
        return instance.path.read_bytes()
    try:
        return transcoded_bytes(instance.path, transfer_syntax)
    except TranscodeError as error:
        raise CannotGiveError(
            f"Instance {instance.sop_instance_uid} cannot be given so: {error}; ask for transfer-syntax=*"
        ) from error


def multipart_of_instances(
    instances: Sequence[StoredInstance], transfer_syntax: str, boundary: str, *, as_files: bool
) -> tuple[Iterator[list[bytes | FileIO]], int | None]:
    """multipart/related of DICOM files, some pieces at a time, and its length in bytes if that is known beforehand.

    as_files: Instances that are given as they are stored come as open files, if all are.
    """
    is_as_stored = all(transfer_syntax in ("", instance.transfer_syntax_uid) for instance in instances)
    as_files = as_files and is_as_stored

    def head(instance: StoredInstance) -> bytes:
        syntax = transfer_syntax or instance.transfer_syntax_uid
        return part_head(boundary, f"{DICOM}; transfer-syntax={syntax}")

    def body(instance: StoredInstance) -> bytes | FileIO:
        return _open(instance.path) if as_files else instance_bytes(instance, transfer_syntax)

    def pieces() -> Iterator[list[bytes | FileIO]]:
        num_at_a_time = _NUM_OPEN if as_files else _NUM_READ
        for start in range(0, len(instances), num_at_a_time):
            some = instances[start : start + num_at_a_time]
            yield [piece for one in some for piece in (head(one), body(one))]
        yield [end_of(boundary)]

    if not is_as_stored:
        return pieces(), None
    length = sum(len(head(instance)) + instance.path.stat().st_size for instance in instances)
    return pieces(), length + len(end_of(boundary))


def _open(path: Path) -> FileIO:
    """A file that is about to be sent: the kernel is told to read it, so that nobody waits for the disk then."""
    file = FileIO(path)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    return file


# ---- metadata ----


def metadata(instance: StoredInstance, root: str) -> dict[str, Any]:
    """DICOM JSON of all but bulk data, which is given by address.

    Raises:
        CannotGiveError: the Instance cannot be parsed.
        OSError: it has just gone.
    """
    url = f"{instance_url(instance, root)}/bulkdata"
    try:
        ds = completed(dcmread(instance.path, stop_before_pixels=True))
        in_little_endian(ds)
    except PARSE_ERRORS as error:
        raise CannotGiveError(f"Instance {instance.sop_instance_uid} cannot be parsed") from error
    made = dataset_json(ds)
    for name, told in made.items():
        if len(told.get("InlineBinary", "")) > _INLINE_CHARACTERS:
            made[name] = {"vr": told["vr"], "BulkDataURI": f"{url}/{name}"}
    if "Rows" in ds:
        made["7FE00010"] = {"vr": "OW", "BulkDataURI": f"{url}/7FE00010"}
    return dict(sorted(made.items()))


def instance_url(instance: StoredInstance | NewInstance, root: str) -> str:
    """The address of an Instance."""
    study = study_url(instance, root)
    return f"{study}/series/{instance.series_instance_uid}/instances/{instance.sop_instance_uid}"


def study_url(instance: StoredInstance | NewInstance, root: str) -> str:
    """The address of its Study."""
    return f"{root}/studies/{instance.study_instance_uid}"


def bulk_offers(instance: StoredInstance, name: str) -> list[Offer]:
    """Forms that a top-level attribute, given by its tag, can be given in: pixels in those of frames."""
    if Tag(int(name, 16)) not in _PIXEL_TAGS:
        return [Offer(media_type="multipart/related", part=OCTETS), Offer(media_type=OCTETS)]
    offers = frame_offers(instance)
    if ExplicitVRLittleEndian in offers[0].transfer_syntaxes:
        offers.append(Offer(media_type=OCTETS, transfer_syntaxes=(ExplicitVRLittleEndian,)))
    return offers


def bulk_data(instance: StoredInstance, name: str, transfer_syntax: str) -> list[bytes]:
    """The value of a top-level attribute, given by its tag, in little endian; of compressed pixels, each frame.

    transfer_syntax: of `bulk_offers`. Pixels that are compressed are decoded to one value, unless it is theirs.

    Raises:
        NotThereError: it has no such attribute.
        CannotGiveError: the pixels cannot be decoded, or the Instance not be parsed.
    """
    tag = Tag(int(name, 16))
    if tag in _PIXEL_TAGS and UID(instance.transfer_syntax_uid).is_compressed:
        found = frames(instance, range(1, instance.num_frames + 1), transfer_syntax)
        return found if transfer_syntax == instance.transfer_syntax_uid else [b"".join(found)]
    try:
        ds = dcmread(instance.path)
        in_little_endian(ds)
        value = ds[tag].value if tag in ds else None
    except PARSE_ERRORS as error:
        raise CannotGiveError(f"Instance {instance.sop_instance_uid} cannot be parsed") from error
    if not isinstance(value, bytes):
        raise NotThereError(f"Instance {instance.sop_instance_uid} has no bulk data at {name}")
    return [value]


# ---- frames ----


def frame_offers(instance: StoredInstance) -> list[Offer]:
    """Forms that frames of an Instance can be given in."""
    stored = instance.transfer_syntax_uid
    if not UID(stored).is_compressed:
        return [Offer(media_type="multipart/related", part=OCTETS, transfer_syntaxes=(ExplicitVRLittleEndian,))]
    compressed = _IMAGE_TYPES.get(stored, OCTETS)
    syntaxes = (stored, ExplicitVRLittleEndian) if _can_decode(stored) else (stored,)
    return [
        Offer(media_type="multipart/related", part=OCTETS, transfer_syntaxes=syntaxes),
        Offer(media_type="multipart/related", part=compressed, transfer_syntaxes=(stored,)),
    ]


def frames(instance: StoredInstance, numbers: Sequence[int], transfer_syntax: str) -> list[bytes]:
    """Frames, each as compressed in the stored syntax, or as little-endian pixels.

    Raises:
        NotThereError: there is no such frame, or there are no pixels.
        CannotGiveError: the pixels cannot be decoded.
    """
    if not numbers or max(numbers) > instance.num_frames or min(numbers) < 1:
        raise NotThereError(
            f"Instance {instance.sop_instance_uid} has frames 1 to {instance.num_frames}; asked for {list(numbers)}"
        )
    try:
        ds = dcmread(instance.path)
        if "PixelData" not in ds:
            raise NotThereError(f"Instance {instance.sop_instance_uid} has no pixels")
        if UID(instance.transfer_syntax_uid).is_compressed and transfer_syntax == instance.transfer_syntax_uid:
            total = instance.num_frames
            return [get_frame(ds.PixelData, number - 1, number_of_frames=total) for number in numbers]
        return [_native_frame(ds, number - 1) for number in numbers]
    except (*PARSE_ERRORS, RuntimeError) as error:
        raise CannotGiveError(f"frames of Instance {instance.sop_instance_uid} cannot be decoded") from error


def _native_frame(ds: Dataset, index: int) -> bytes:
    """Pixels of one frame, little endian, as PixelData would hold them."""
    bits = int(ds.BitsAllocated)
    size = int(ds.Rows) * int(ds.Columns) * int(ds.get("SamplesPerPixel", 1)) * bits // 8
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_compressed and syntax.is_little_endian and bits >= 8:
        found = ds.PixelData[size * index : size * (index + 1)]
        if len(found) < size:
            raise EOFError("PixelData is cut short")
        return bytes(found)
    pixels = pixel_array(ds, index=index, raw=True, decoding_plugin=decoding_plugin(syntax))
    if bits == 1:
        return np.packbits(pixels.ravel(), bitorder="little").tobytes()
    return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()


def _can_decode(syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(syntax)).is_available)
    except NotImplementedError:
        return False


def typed(media_type: str, transfer_syntax: str) -> str:
    """A Content-Type, with the transfer syntax where there is one (PS3.18 8.7.3.5.2)."""
    return f"{media_type}; transfer-syntax={transfer_syntax}" if transfer_syntax else media_type


def multipart_of(parts: Sequence[bytes], content_type: str, boundary: str) -> bytes:
    """multipart/related of parts of one type."""
    return b"".join(part_head(boundary, content_type) + part for part in parts) + end_of(boundary)
