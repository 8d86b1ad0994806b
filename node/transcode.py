"""A DICOM file in another transfer syntax, for a peer that does not take the one it is in. Called by `send.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pydicom import dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

UNCOMPRESSED = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""What any peer can be asked to take instead, the preferred one first. Every DICOM node knows the second."""


class TranscodeError(Exception):
    """A file cannot be written in another transfer syntax; the message says why."""


@contextmanager
def transcoded(path: Path, transfer_syntax_uid: str) -> Iterator[Path]:
    """A temporary file with the same Instance in one of `UNCOMPRESSED`; pixels are the same, bit by bit.

    Raises:
        TranscodeError: the pixel data cannot be decoded here.
        OSError: the file cannot be read, or the temporary one not be written.
    """
    ds = dcmread(path)
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        try:
            ds.decompress(generate_instance_uid=False)
        except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
            syntax = ds.file_meta.TransferSyntaxUID.name
            raise TranscodeError(
                f"its pixel data in {syntax} cannot be decoded here ({type(error).__name__})"
            ) from error
    ds.file_meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    with TemporaryDirectory(prefix="cspine-") as folder:
        written = Path(folder) / path.name
        implicit = transfer_syntax_uid == ImplicitVRLittleEndian
        ds.save_as(written, implicit_vr=implicit, little_endian=True, enforce_file_format=True)
        yield written
