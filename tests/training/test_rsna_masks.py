"""NIfTI masks on the grid of a CT: through affines, righted, or refused with the reason."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from model import Grid, SliceSource, Volume
from training.rsna import MaskError, labels_on, read_mask

SPACING_MM = (2.0, 1.0, 1.5)
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def column(num_levels: int = 4) -> tuple[NDArray[np.uint8], Volume]:
    """Labels and CT of a column of blocks that looks the same upside down; C1 is the highest."""
    labels = np.zeros((6 * num_levels, 20, 16), np.uint8)
    for number in range(num_levels):
        labels[6 * number + 1 : 6 * number + 5, 6:14, 5:11] = num_levels - number
    volume = Volume(
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        voxels_hu=np.where(labels > 0, 500, 30).astype(np.int16),
        grid=Grid.axial(shape=labels.shape, spacing_mm=SPACING_MM, centre_lps_mm=(3.0, -40.0, 100.0)),
        slices=tuple(SliceSource(sop_instance_uid=str(z), path=Path(f"{z}.dcm")) for z in range(len(labels))),
    )
    return labels, volume


def write(path: Path, labels: NDArray, grid: Grid) -> Path:
    nibabel.save(
        nibabel.Nifti1Image(np.ascontiguousarray(labels.transpose(2, 1, 0)), RAS @ grid.affine[:, [2, 1, 0, 3]]), path
    )
    return path


def test_a_mask_lies_where_its_affine_says(tmp_path: Path) -> None:
    labels, volume = column()

    mask = read_mask(write(tmp_path / "mask.nii.gz", labels, volume.grid), volume)

    np.testing.assert_array_equal(mask.labels, labels)
    assert (mask.was_reversed, mask.bone_share, mask.num_stray_voxels) == (False, 1.0, 0)


def test_where_the_bone_says_nothing_the_list_of_reversed_masks_decides(tmp_path: Path) -> None:
    labels, volume = column()
    path = write(tmp_path / "mask.nii", labels[::-1], volume.grid)

    mask = read_mask(path, replace(volume, study_instance_uid="1.2.826.0.1.3680043.1363"))

    np.testing.assert_array_equal(mask.labels, labels)
    assert mask.was_reversed
    with pytest.raises(MaskError, match=r"C1 does not lie above C2"):
        read_mask(path, volume)


def test_a_listed_mask_that_was_righted_by_someone_is_left_as_it_is(tmp_path: Path) -> None:
    labels, volume = column()
    hu = volume.voxels_hu.copy()
    hu[:8] = 30  # no longer the same upside down
    labels[:8] = 0
    listed = replace(volume, voxels_hu=hu, study_instance_uid="1.2.826.0.1.3680043.2243")

    mask = read_mask(write(tmp_path / "mask.nii", labels, volume.grid), listed)

    np.testing.assert_array_equal(mask.labels, labels)
    assert not mask.was_reversed


def test_a_mask_that_lies_on_no_bone_is_refused_with_its_share(tmp_path: Path) -> None:
    labels, volume = column()
    beside = replace(
        volume.grid, affine=np.array([[1, 0, 0, 8], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ volume.grid.affine
    )

    with pytest.raises(MaskError, match=r"17% of the mask lies on bone, 17% if it is turned upside down"):
        read_mask(write(tmp_path / "mask.nii", labels, beside), volume)


@pytest.mark.parametrize("stored_as", [np.uint8, np.int16])
def test_labels_that_were_stored_scaled_come_back_as_they_were(tmp_path: Path, stored_as: type) -> None:
    """As nibabel stores floats in a file of whole numbers: 3 comes back as 2.99995."""
    labels, volume = column(num_levels=19)
    image = nibabel.Nifti1Image(labels.transpose(2, 1, 0).astype(float), RAS @ volume.grid.affine[:, [2, 1, 0, 3]])
    image.set_data_dtype(stored_as)
    nibabel.save(image, tmp_path / "mask.nii")

    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii", volume).labels, labels)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((4, 4, 4), 2.5, np.float32), "values between its labels"),
        (np.full((4, 4, 4), 25, np.uint8), "values from 25 to 25; labels from 0 to 19"),
        (np.zeros((4, 4, 4), np.uint8), "values from 0 to 0"),
        (np.ones((4, 4, 4, 2), np.uint8), "three dimensions"),
    ],
)
def test_what_is_no_label_map_is_refused(tmp_path: Path, values: NDArray, reason: str) -> None:
    path = tmp_path / "mask.nii"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)

    with pytest.raises(MaskError, match=reason):
        read_mask(path, column()[1])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    labels, volume = column()
    path = write(tmp_path / "mask.nii.gz", labels, volume.grid)
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(MaskError, match=r"mask\.nii\.gz cannot be read as NIfTI"):
        read_mask(path, volume)


@pytest.mark.parametrize("turn_deg", [0, 20])
def test_labels_are_those_of_the_nearest_voxel_on_any_grid(turn_deg: float) -> None:
    rng = np.random.default_rng(0)
    source = Grid.axial(shape=(7, 9, 8), spacing_mm=(2.0, 1.1, 0.9))
    labels = rng.integers(0, 9, source.shape).astype(np.uint8)
    turn = np.deg2rad(turn_deg)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    # Off by a little, so that no place is as near to one voxel as to another.
    straight = Grid.axial(shape=(6, 10, 11), spacing_mm=(1.3, -1, 1.2), centre_lps_mm=(0.11, 0.07, 0.13))
    target = Grid(shape=straight.shape, affine=rotation @ straight.affine)
    if turn_deg == 0:
        target = Grid(shape=(11, 6, 10), affine=target.affine[:, [2, 0, 1, 3]])

    found = labels_on(labels, source, target)

    places = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), axis=-1)
    nearest = np.floor(source.to_index(target.to_lps_mm(places)) + 0.5).astype(int)
    inside = ((nearest >= 0) & (nearest < source.shape)).all(axis=-1)
    expected = np.where(inside, labels[tuple(np.where(inside[..., None], nearest, 0).transpose(3, 0, 1, 2))], 0)
    assert inside.any()
    assert not inside.all()
    np.testing.assert_array_equal(found, expected)
