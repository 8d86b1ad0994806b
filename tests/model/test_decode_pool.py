"""Compressed pixels decoded by processes of their own: the same voxels, and no worker dies of a codec."""

import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

from model.decode_pool import DecodePool
from model.series import SeriesError, SeriesRules, read_series
from tests.factories import make_ct_series, make_enhanced_ct
from tests.transfer_syntaxes import convert

SMALL = SeriesRules(min_slices=3, min_extent_mm=1.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(2) as opened:
        yield opened


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


def test_compressed_slices_are_decoded_elsewhere_to_the_same_voxels(
    pool: DecodePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_ct_series(tmp_path, num_slices=9)
    plain = read_series(paths, SMALL)
    for path in paths:
        convert(path, JPEGLosslessSV1)
    monkeypatch.setattr("model.series.decode_frame", None)  # this process decodes nothing

    np.testing.assert_array_equal(read_series(paths[::-1], SMALL, pool).voxels_hu, plain.voxels_hu)


def test_frames_of_one_file_are_shared_out(pool: DecodePool, tmp_path: Path) -> None:
    order = [3, 1, 0, 2, 4, 5, 7, 6]
    path = make_enhanced_ct(tmp_path / "e.dcm", frame_order=order, transfer_syntax_uid=RLELossless)

    np.testing.assert_array_equal(read_series([path], SMALL, pool).voxels_hu, read_series([path], SMALL).voxels_hu)


def test_a_series_that_needs_no_codec_starts_no_process(tmp_path: Path) -> None:
    before = len(processes())
    with DecodePool(2) as unused:
        for syntax in (ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
            read_series(make_ct_series(tmp_path / syntax, transfer_syntax_uid=syntax), SMALL, unused)
        assert len(processes()) == before


def test_an_instance_that_cannot_be_decoded_is_named_across_processes(pool: DecodePool, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, transfer_syntax_uid=RLELossless)
    ds = pydicom.dcmread(paths[2])
    ds.PixelData = encapsulate([next(generate_frames(ds.PixelData, number_of_frames=1))[:80]])
    ds.save_as(paths[2])

    with pytest.raises(SeriesError, match=rf"Instance {ds.SOPInstanceUID} of Series [\d.]+: its pixels cannot be dec"):
        read_series(paths, SMALL, pool)


def test_after_a_codec_crashed_the_next_series_gets_new_processes(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path, transfer_syntax_uid=RLELossless)
    with DecodePool(1) as crashing:
        crashing._initializer, crashing._initargs = os._exit, (11,)
        with pytest.raises(BrokenProcessPool):
            read_series(paths, SMALL, crashing)
        crashing._initializer, crashing._initargs = None, ()

        np.testing.assert_array_equal(
            read_series(paths, SMALL, crashing).voxels_hu, read_series(paths, SMALL).voxels_hu
        )


def test_nothing_decodes_on_into_memory_that_is_gone(tmp_path: Path) -> None:
    """Its number may be another file's by then, which would be written to."""
    paths = make_ct_series(tmp_path, num_slices=40, transfer_syntax_uid=RLELossless)
    ds = pydicom.dcmread(paths[2])
    ds.PixelData = encapsulate([bytes(64)])
    ds.save_as(paths[2])
    before = len(processes())
    with DecodePool(2) as pool:
        with pytest.raises(SeriesError):
            read_series(paths, SMALL, pool)
        assert len(processes()) == before
        assert read_series(paths[3:], SMALL, pool).grid.shape[0] == 37
