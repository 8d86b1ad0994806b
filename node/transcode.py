"""A DICOM file in another transfer syntax, for a peer that does not take the one it is in.

Called by `send.py`, `retrieve/scp.py` and `web/`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydicom import DataElement, Dataset, dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from model import PARSE_ERRORS, decoding_plugin

UNCOMPRESSED = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""What any peer can be asked to take instead, the preferred one first. Every DICOM node knows the second."""

_WORD_BYTES = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}  # of VRs whose values pydicom leaves as they are


class TranscodeError(Exception):
    """A file cannot be written in another transfer syntax; the message says why."""


@contextmanager
def transcoded(path: Path, transfer_syntax_uid: str) -> Iterator[Path]:
    """A temporary file with what `transcoded_bytes` gives.

    Raises:
        TranscodeError: as `transcoded_bytes`.
        OSError: the file cannot be read, or the temporary one not be written.
    """
    encoded = transcoded_bytes(path, transfer_syntax_uid)
    with TemporaryDirectory(prefix="cspine-") as folder:
        written = Path(folder) / path.name
        written.write_bytes(encoded)
        yield written


def transcoded_bytes(path: Path, transfer_syntax_uid: str) -> bytes:
    """A DICOM file of the same Instance in one of `UNCOMPRESSED`; pixels are the same, bit by bit.

    Raises:
        TranscodeError: the pixel data cannot be decoded here, or the file is damaged.
        OSError: the file cannot be read.
    """
    ds = None
    try:
        ds = dcmread(path)
        syntax = ds.file_meta.TransferSyntaxUID
        if syntax.is_encapsulated:
            ds.decompress(generate_instance_uid=False, decoding_plugin=decoding_plugin(syntax))
        in_little_endian(ds)
        ds.file_meta.TransferSyntaxUID = UID(transfer_syntax_uid)
        encoded = BytesIO()
        implicit = transfer_syntax_uid == ImplicitVRLittleEndian
        dcmwrite(encoded, ds, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
        return encoded.getvalue()
    except (InvalidDicomError, *PARSE_ERRORS, RuntimeError) as error:  # codecs raise RuntimeError
        name = "" if ds is None else f" from {UID(str(ds.file_meta.get('TransferSyntaxUID', ''))).name}"
        raise TranscodeError(f"it cannot be rewritten{name} ({type(error).__name__})") from error


def in_little_endian(ds: Dataset) -> None:
    """Makes every value of a dataset that was just read one of little endian; nothing if it was.

    pydicom does so with the values that it parses, when `dcmwrite` writes them. Left are those that it takes for mere
    bytes, and UN, whose values are little endian whatever the transfer syntax (PS3.5 6.2.2). OB knows no order.

    Reference: PS3.5 7.3, A.3.
    """
    if ds.original_encoding[1] is not False:
        return
    for tag in list(ds.keys()):
        element = ds.get_item(tag)
        if element.VR == "SQ":
            for item in ds[tag].value:
                in_little_endian(item)
        elif isinstance(element, RawDataElement) and element.value:
            if element.VR == "UN" and tag.is_private:
                ds[tag] = DataElement(tag, "UN", element.value)
            elif element.VR == "UN":
                ds[tag] = element._replace(is_implicit_VR=True, is_little_endian=True)
            elif element.VR in _WORD_BYTES:
                ds[tag] = element._replace(value=_swapped(element.value, _WORD_BYTES[element.VR]))


def _swapped(value: bytes, word_bytes: int) -> bytes:
    """The bytes of each word in the other order; what is no whole word stays."""
    end = len(value) - len(value) % word_bytes
    return np.frombuffer(value[:end], f"u{word_bytes}").byteswap().tobytes() + value[end:]
