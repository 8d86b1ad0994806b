"""DICOM files rewritten in other transfer syntaxes, by whichever of pydicom, GDCM and OpenJPH can encode them."""

import os
import shutil
import subprocess
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

LOSSLESS = [
    ImplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    RLELossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
]
HTJ2K = {HTJ2KLossless: "LRCP", HTJ2KLosslessRPCL: "RPCL"}
_BY_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
}


def need_encoder(transfer_syntax_uid: str) -> None:
    """Skips a test that needs a program to encode, unless servers are required."""
    if not can_encode(transfer_syntax_uid):
        reason = "ojph_compress (Debian's openjph-tools) writes the HTJ2K files of this test"
        if os.environ.get("CSPINE_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def can_encode(transfer_syntax_uid: str) -> bool:
    """Whether `convert` can write that syntax here: only HTJ2K needs a program, `ojph_compress` (openjph-tools)."""
    return transfer_syntax_uid not in HTJ2K or shutil.which("ojph_compress") is not None


def convert(path: Path, transfer_syntax_uid: str) -> None:
    """Rewrites an uncompressed little endian file of 16-bit cells in place, its UIDs kept."""
    syntax = UID(transfer_syntax_uid)
    if syntax in _BY_GDCM:
        _convert_by_gdcm(path, _BY_GDCM[syntax])
        return
    ds = pydicom.dcmread(path)
    if syntax in HTJ2K:
        ds.PixelData = encapsulate([_openjph(ds, path, HTJ2K[syntax])])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    elif syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
        ds.compress(syntax, generate_instance_uid=False)
    elif syntax == ExplicitVRBigEndian:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        pydicom.dcmwrite(path, _with_syntax(ds, syntax), implicit_vr=False, little_endian=False)
        return
    _with_syntax(ds, syntax).save_as(path, enforce_file_format=True)


def undefine_lengths(path: Path) -> None:
    """Rewrites a file in place, all its sequences and their items with delimiters."""

    def undefine(ds: Dataset) -> None:
        ds.is_undefined_length_sequence_item = True
        for element in ds:
            if element.VR == "SQ":
                element.is_undefined_length = True
                for item in element.value:
                    undefine(item)

    ds = pydicom.dcmread(path)
    undefine(ds)
    ds.save_as(path)


def _with_syntax(ds: Dataset, syntax: UID) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


def _convert_by_gdcm(path: Path, syntax: int) -> None:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def _openjph(ds: Dataset, path: Path, progression: str) -> bytes:
    """One frame of unsigned cells as a codestream."""
    assert ds.PixelRepresentation == 0, "OpenJPH reads unsigned PGM only"
    pgm, codestream = path.with_suffix(".pgm"), path.with_suffix(".j2c")
    cells = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    pgm.write_bytes(b"P5 %d %d %d\n" % (ds.Columns, ds.Rows, 2**ds.BitsStored - 1) + cells)
    command = ["ojph_compress", "-i", pgm, "-o", codestream, "-reversible", "true", "-prog_order", progression]
    subprocess.run(command, check=True, capture_output=True)
    try:
        return codestream.read_bytes()
    finally:
        pgm.unlink()
        codestream.unlink()
