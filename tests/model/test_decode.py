"""Decoding: every transfer syntax and every way to store a pixel gives the same Hounsfield units."""

import random
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from model.decode import PIXEL_TAGS, DecodeError, frame_hu, read_instance
from model.series import SeriesError, SeriesRules, read_series
from model.volume import Volume
from tests.factories import hu_at, make_ct_series, make_enhanced_ct
from tests.transfer_syntaxes import HTJ2K, LOSSLESS, convert, need_encoder

SMALL = SeriesRules(min_slices=3, min_extent_mm=1.0)


def assert_every_voxel_is_in_its_place(volume: Volume) -> None:
    places = volume.grid.to_lps_mm(np.stack(np.indices(volume.grid.shape), axis=-1).astype(float))
    np.testing.assert_array_equal(volume.voxels_hu, hu_at(places))


KINDS_OF_CELLS = [(False, 12), (False, 16), (True, 12), (True, 16)]  # signed, BitsStored


@pytest.mark.parametrize(
    ("transfer_syntax_uid", "signed", "bits_stored"),
    [
        pytest.param(uid, signed, bits_stored, id=f"{uid.keyword}-{'signed' if signed else 'unsigned'}{bits_stored}")
        for uid in LOSSLESS
        for signed, bits_stored in KINDS_OF_CELLS
        if not (signed and uid in HTJ2K)  # OpenJPH writes unsigned samples only
    ],
)
def test_transfer_syntaxes_decode_to_the_same_voxels(
    tmp_path: Path, transfer_syntax_uid: str, signed: bool, bits_stored: int
) -> None:
    need_encoder(transfer_syntax_uid)

    def cells(_: int, ds: Dataset) -> None:
        ds.BitsStored, ds.HighBit = bits_stored, bits_stored - 1
        values = np.frombuffer(ds.PixelData, "<u2") & (2**bits_stored - 1)  # unused bits are zero, also above a sign
        ds.PixelData = values.astype("<u2").tobytes()

    paths = make_ct_series(tmp_path, num_slices=3, rows=40, columns=36, signed=signed, edit=cells)
    for path in paths:
        convert(path, transfer_syntax_uid)  # J2K takes 32 x 32 at least

    assert_every_voxel_is_in_its_place(read_series(paths, SMALL))


def test_twelve_bit_jpeg_extended_is_refused_with_the_syntax() -> None:
    """Only pylibjpeg-libjpeg decodes it, which is GPL and therefore not installed."""
    ds = read_instance(Path(str(get_testdata_file("JPEG-lossy.dcm", download=False))), PIXEL_TAGS)
    assert ds is not None

    with pytest.raises(DecodeError, match=r"transfer syntax JPEG Extended \(Process 2 and 4\)"):
        frame_hu(ds, 1, 1.0, 0.0)


@pytest.mark.parametrize("variant", ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"])
def test_real_files_decode_alike_in_every_syntax(variant: str) -> None:
    plain, other = (
        read_instance(Path(str(get_testdata_file(name, download=False))), PIXEL_TAGS)
        for name in ("MR_small.dcm", f"MR_small_{variant}.dcm")
    )
    assert plain is not None
    assert other is not None

    np.testing.assert_array_equal(frame_hu(other, 1, 1.0, -1024.0), frame_hu(plain, 1, 1.0, -1024.0))


@pytest.mark.parametrize("transfer_syntax_uid", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.keyword)
def test_enhanced_ct_reads_frame_by_frame(tmp_path: Path, transfer_syntax_uid: str) -> None:
    order = [3, 1, 0, 2, 4, 5, 7, 6]
    path = make_enhanced_ct(tmp_path / "e.dcm", frame_order=order, transfer_syntax_uid=transfer_syntax_uid)

    volume = read_series([path], SMALL)

    assert_every_voxel_is_in_its_place(volume)
    assert [source.frame_number - 1 for source in volume.slices] == np.argsort(order).tolist()


def edited(tmp_path: Path, stored: list[int], **attributes: object) -> np.ndarray:
    """HU of the first pixels of the second slice when they are stored so, and the attributes are these."""

    def edit(i: int, ds: Dataset) -> None:
        if i == 1:
            signed = attributes.get("PixelRepresentation", 0)
            ds.PixelRepresentation = signed
            for keyword, value in attributes.items():
                setattr(ds, keyword, value)
            cells = np.array(stored, np.int64).astype(np.uint16).tobytes()
            ds.PixelData = cells + ds.PixelData[len(cells) :]

    return read_series(make_ct_series(tmp_path, num_slices=3, edit=edit), SMALL).voxels_hu[1].ravel()[: len(stored)]


@pytest.mark.parametrize(
    ("stored", "attributes", "expected_hu"),
    [
        pytest.param([0, 1024, 4000], {}, [-1024, 0, 2976], id="unsigned"),
        pytest.param([-1000, 0, 70], {"PixelRepresentation": 1, "RescaleIntercept": 0}, [-1000, 0, 70], id="signed"),
        pytest.param([1024, 1025], {"RescaleIntercept": -1000}, [24, 25], id="intercept of this slice only"),
        pytest.param([1, 2, 3], {"RescaleSlope": 0.5, "RescaleIntercept": -0.25}, [0, 1, 1], id="fractions rounded"),
        pytest.param([2000, 3], {"RescaleSlope": 2, "RescaleIntercept": -1024}, [2976, -1018], id="slope"),
        pytest.param([60000], {}, [32767], id="clipped to int16"),
        pytest.param([-2000], {"PixelRepresentation": 1}, [-1024], id="below air is air"),
        pytest.param([3000, 2000], {"PixelPaddingValue": 3000}, [-1024, 976], id="padding"),
        pytest.param(
            [63536, 1100],
            {"PixelPaddingValue": 63536, "BitsStored": 12, "HighBit": 11},
            [-1024, 76],
            id="padding first",
        ),
        pytest.param(
            [2998, 3000, 3001, 2997],
            {"PixelPaddingValue": 3000, "PixelPaddingRangeLimit": 2998},
            [-1024, -1024, 1977, 1973],
            id="padding range",
        ),
        pytest.param([0xF400], {"BitsStored": 12, "HighBit": 11}, [0], id="bits above BitsStored are not part of it"),
        pytest.param(
            [0x0FFF, -1],
            {"BitsStored": 12, "HighBit": 11, "PixelRepresentation": 1, "RescaleIntercept": 0},
            [-1, -1],
            id="12-bit sign",
        ),
        pytest.param(
            [1024], {"PhotometricInterpretation": "MONOCHROME1"}, [0], id="MONOCHROME1 changes the display only"
        ),
    ],
)
def test_stored_pixels_become_hounsfield_units(
    tmp_path: Path, stored: list[int], attributes: dict[str, object], expected_hu: list[int]
) -> None:
    assert edited(tmp_path, stored, **attributes).tolist() == expected_hu


def test_pixels_cut_short_are_refused_with_the_instance(tmp_path: Path) -> None:
    def cut(i: int, ds: Dataset) -> None:
        if i == 1:
            ds.PixelData = ds.PixelData[:100]
            ds.SOPInstanceUID = "1.2.3.4"

    with pytest.raises(SeriesError, match=r"Instance 1\.2\.3\.4 of Series .*: .*cut short: 100 bytes, expected 960"):
        read_series(make_ct_series(tmp_path, edit=cut), SMALL)


def test_pixels_no_codec_can_decode_are_refused_with_the_syntax(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, rows=32, columns=32, transfer_syntax_uid=JPEG2000Lossless)
    ds = pydicom.dcmread(paths[4])
    ds.PixelData = pydicom.encaps.encapsulate([b"not a codestream" * 4])
    ds.save_as(paths[4])

    with pytest.raises(SeriesError, match=rf"Instance {ds.SOPInstanceUID} .* transfer syntax JPEG 2000 .*Lossless"):
        read_series(paths, SMALL)


def test_a_series_without_pixels_is_refused(tmp_path: Path) -> None:
    def without(_: int, ds: Dataset) -> None:
        del ds.PixelData

    with pytest.raises(SeriesError, match="has no PixelData"):
        read_series(make_ct_series(tmp_path, edit=without), SMALL)


def test_values_that_cannot_be_hounsfield_units_are_refused(tmp_path: Path) -> None:
    def without_rescale(_: int, ds: Dataset) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType

    def empty(_: int, ds: Dataset) -> None:
        ds.PixelData = bytes(len(ds.PixelData))

    with pytest.raises(SeriesError, match=r"no RescaleSlope and RescaleIntercept, and its values run from 24 to"):
        read_series(make_ct_series(tmp_path / "a", edit=without_rescale), SMALL)
    with pytest.raises(SeriesError, match=r"is empty: every voxel is -1024 HU"):
        read_series(make_ct_series(tmp_path / "b", edit=empty), SMALL)
    volume = read_series(make_ct_series(tmp_path / "c", signed=True, edit=without_rescale), SMALL)
    assert_every_voxel_is_in_its_place(volume)
    assert "RescaleSlope and RescaleIntercept are missing" in volume.warnings[0]


def test_unusual_values_are_told(tmp_path: Path) -> None:
    def shifted(_: int, ds: Dataset) -> None:
        ds.RescaleIntercept = 0

    (warning,) = read_series(make_ct_series(tmp_path, edit=shifted), SMALL).warnings
    assert "hardly any air in the Series (0.5th percentile 24 HU)" in warning


def test_a_deflated_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, num_slices=4, transfer_syntax_uid=DeflatedExplicitVRLittleEndian)
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    with pytest.raises(SeriesError, match="is damaged and cannot be read"):
        read_series(paths, SMALL)


def test_damaged_files_end_in_a_refusal_never_in_a_crash(tmp_path: Path) -> None:
    """Bytes of one file changed or cut at random: it reads, or is refused with a SeriesError."""
    paths = make_ct_series(tmp_path, num_slices=4)
    intact, chance = paths[1].read_bytes(), random.Random(20261123)
    refused = 0
    for _ in range(150):
        damaged = bytearray(intact)
        for _ in range(chance.choice([1, 3, 30])):
            damaged[chance.randrange(132, len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            del damaged[chance.randrange(132, len(damaged)) :]
        paths[1].write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, about odd values
            try:
                read_series(paths, SMALL)
            except SeriesError:
                refused += 1
    assert 50 < refused < 150
