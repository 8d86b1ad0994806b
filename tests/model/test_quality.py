"""What is refused, what is left undetermined and why: phantoms made worse in one way each, and things that are no neck.

The rules are asked with the phantom's true outlines, so that they do not hang on any weights.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from model.geometry import Grid
from model.hounsfield import check_values
from model.phantom import Anatomy, default_grid, render
from model.pose import middle_of_box
from model.quality import C2_STEP, _squeezed, reasons_not_to_judge
from model.segment import Vertebra
from model.series import SeriesError, read_series
from model.volume import Volume
from tests.factories import make_ct_series, make_volume

Labels = np.ndarray
ALL = set(range(1, 8))
REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "ct"


@cache
def neck(seed: int = 4) -> tuple[Volume, Labels]:
    """A phantom that is all right, and its vertebrae C1..C7; not to be written to."""
    anatomy = Anatomy.random(seed)
    made = render(anatomy, default_grid(anatomy, (2.0, 1.2, 1.2)))
    return make_volume(made.voxels_hu, made.grid), np.where(made.vertebrae > 7, 0, made.vertebrae).astype(np.uint8)


def vertebrae_of(labels: Labels, grid: Grid) -> list[Vertebra]:
    found = []
    for label in np.unique(labels[labels > 0]):
        indices = np.argwhere(labels == label)
        points = grid.to_lps_mm(indices.astype(float))
        found.append(
            Vertebra(
                label=int(label),
                centroid_lps_mm=points.mean(axis=0),
                volume_mm3=len(points) * grid.voxel_volume_mm3,
                lower_lps_mm=points.min(axis=0),
                upper_lps_mm=points.max(axis=0),
                middle_lps_mm=middle_of_box(points),
                is_cut=False,
            )
        )
    return found


def reasons(volume: Volume, labels: Labels) -> dict[int, str]:
    return reasons_not_to_judge(volume, labels, vertebrae_of(labels, volume.grid))


def scaled(grid: Grid, factors: tuple[float, float, float]) -> Grid:
    affine = grid.affine.copy()
    affine[:3, :3] *= factors
    return Grid(shape=grid.shape, affine=affine)


def index_of(labels: Labels, label: int) -> tuple[int, int, int]:
    z, y, x = (int(value) for value in np.argwhere(labels == label).mean(axis=0))
    return z, y, x


@pytest.mark.parametrize("seed", [4, 5])
def test_a_neck_that_is_all_right_gets_no_reason(seed: int) -> None:
    volume, labels = neck(seed)

    check_values(volume)
    assert reasons(volume, labels) == {}
    assert reasons_not_to_judge(volume, np.zeros_like(labels), []) == {}


MISTAKES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "without its intercept": (lambda hu: hu + 1024, "look like Hounsfield units plus about 1000"),
    "times ten": (lambda hu: hu * 10, "look like ten times Hounsfield units"),
    "a tenth": (lambda hu: hu / 10, "look like a tenth of Hounsfield units"),
    "inverted": (lambda hu: -hu, "look like Hounsfield units of the opposite sign"),
    "signed read as unsigned": (lambda hu: np.where(hu < 0, hu + 65536, hu), r"\d+% of the body is above 4000 HU"),
}


@pytest.mark.parametrize(("mistake", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_values_on_another_scale_are_refused_by_name(mistake: Callable[..., np.ndarray], says: str) -> None:
    volume, _ = neck()
    wrong = np.clip(mistake(volume.voxels_hu.astype(np.int32)), -1024, 32767).astype(np.int16)

    with pytest.raises(SeriesError, match=f"^Series 1.2 does not hold Hounsfield units: .*{says}.*original CT"):
        check_values(replace(volume, voxels_hu=wrong))


def test_the_values_of_a_small_field_of_view_without_air_are_not_refused() -> None:
    volume, labels = neck()
    z, y, x = index_of(labels, 4)
    part = np.ascontiguousarray(volume.voxels_hu[z - 20 : z + 20, y - 15 : y + 30, x - 25 : x + 25])

    check_values(make_volume(part, Grid.axial(shape=part.shape, spacing_mm=volume.grid.spacing_mm)))


def test_voxels_that_are_not_numbers_never_become_a_volume(tmp_path: Path) -> None:
    def as_float(_: int, ds: object) -> None:
        del ds.PixelData  # type: ignore[attr-defined]
        ds.FloatPixelData = np.full((ds.Rows, ds.Columns), np.nan, "<f4").tobytes()  # type: ignore[attr-defined]

    with pytest.raises(SeriesError, match="has no PixelData"):
        read_series(make_ct_series(tmp_path, num_slices=60, edit=as_float))
    volume, _ = neck()
    with pytest.raises(SeriesError, match="voxels of type float32; int16 Hounsfield units are needed"):
        check_values(replace(volume, voxels_hu=np.full(volume.grid.shape, np.nan, np.float32)))


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ((2.5, 1.0, 1.0), "Slices 5.0 mm apart can hide a fracture (up to 4.0 mm are judged)"),
        ((1.0, 2.0, 2.0), "Pixels of 2.4 mm can hide a fracture (up to 2.0 mm are judged)"),
        ((0.55, 0.55, 0.55), "as small as a child's"),
        ((1.6, 1.6, 1.6), "are not those of a neck (up to 24 mm)"),
    ],
    ids=["5 mm slices", "large pixels", "a child", "lumbar"],
)
def test_what_holds_for_the_whole_neck_is_said_of_every_level(factors: tuple[float, float, float], says: str) -> None:
    volume, labels = neck()

    found = reasons(replace(volume, grid=scaled(volume.grid, factors)), labels)

    assert set(found) == ALL
    assert len(set(found.values())) == 1
    assert says in found[1]


@pytest.mark.parametrize(
    ("factor", "says"),
    [(0.5, "Air has -5"), (0.75, "Air has -7"), (2, "of the body is above 2000 HU")],
)
def test_values_that_are_pressed_together_or_stretched_are_not_judged(factor: float, says: str) -> None:
    volume, labels = neck()
    voxels_hu = np.clip(volume.voxels_hu * factor, -1024, 32767).astype(np.int16)

    check_values(replace(volume, voxels_hu=voxels_hu))  # or its refusal would say so
    found = reasons(replace(volume, voxels_hu=voxels_hu), labels)

    assert len(found) == 7
    assert all(says in reason and "check RescaleSlope" in reason for reason in found.values())


@pytest.mark.parametrize("num_empty", [1, 3])
def test_empty_slices_in_the_neck_put_all_levels_in_doubt(num_empty: int) -> None:
    volume, labels = neck()
    z = index_of(labels, 5)[0]
    hu = volume.voxels_hu.copy()
    hu[z : z + num_empty] = -1024

    found = reasons(replace(volume, voxels_hu=hu), labels)

    assert set(found) == ALL
    assert set(found.values()) == {f"{num_empty} of the slices between others show nothing (they may be damaged)"}


def test_a_slim_neck_above_a_wide_chest_is_no_gap() -> None:
    """100 cm² among slices of 900."""
    voxels_hu, labels = np.full((100, 100, 100), -1024, np.int16), np.zeros((100, 100, 100), np.uint8)
    voxels_hu[:60], voxels_hu[60:90, 33:67, 33:67], voxels_hu[90:] = 40, 40, 40
    for label in range(1, 8):
        labels[88 - 4 * label : 91 - 4 * label, 45:55, 45:55] = label

    found = reasons(make_volume(voxels_hu, Grid.axial(shape=labels.shape, spacing_mm=(3.0, 3.0, 3.0))), labels)

    assert not any("show nothing" in reason for reason in found.values())


def test_a_vertebra_at_slices_that_show_only_a_remnant_is_cut() -> None:
    volume, labels = neck()
    z = index_of(labels, 6)[0]
    is_head_last = volume.grid.affine[2, 0] > 0
    beyond = slice(None, z) if is_head_last else slice(z + 1, None)
    hu, cut = volume.voxels_hu.copy(), labels.copy()
    hu[beyond], cut[beyond] = -1024, 0
    hu[beyond, 2:6, 10:-10] = 20  # a strip, as of a table

    found = reasons(replace(volume, voxels_hu=hu), cut)

    assert found[6] == "Cut by the field of view"
    assert 3 not in found


def test_a_vertebra_cut_by_a_circular_field_of_view_is_cut() -> None:
    volume, labels = neck()
    _, y, x = index_of(labels, 4)
    rows, columns = np.mgrid[: labels.shape[1], : labels.shape[2]]
    # Its edge runs through the middle of the vertebrae.
    outside = ((rows - y) * 1.2) ** 2 + ((columns - x - 42) * 1.2) ** 2 > 50**2
    hu, seen = volume.voxels_hu.copy(), labels.copy()
    hu[:, outside], seen[:, outside] = -1024, 0

    assert reasons(replace(volume, voxels_hu=hu), seen)[4] == "Cut by the field of view"


def test_values_cut_by_a_window_for_soft_tissue_are_not_judged() -> None:
    volume, labels = neck()

    found = reasons(replace(volume, voxels_hu=volume.voxels_hu.clip(-160, 240)), labels)

    assert set(found) == ALL
    assert "Values end at 240 HU" in found[4]


def test_a_neck_upside_down_is_not_judged() -> None:
    volume, labels = neck()

    found = reasons(replace(volume, voxels_hu=volume.voxels_hu[::-1].copy()), labels[::-1])

    assert set(found) == ALL
    assert "Head and feet look swapped" in found[1]


def test_outlines_in_noise_are_not_judged() -> None:
    volume, labels = neck()
    noise = np.random.default_rng(0).normal(0, 150, volume.grid.shape).astype(np.int16)

    assert "Noise hides the anatomy" in reasons(replace(volume, voxels_hu=noise), labels)[1]


@pytest.mark.parametrize(("noise_hu", "is_judged"), [(60, True), (150, False)])
def test_noise_in_which_fractures_are_missed_is_not_judged(noise_hu: int, is_judged: bool) -> None:
    volume, labels = neck()
    noise = np.random.default_rng(3).normal(0, noise_hu, labels.shape)
    noisy = np.clip(volume.voxels_hu + noise, -1024, 3000).astype(np.int16)

    found = reasons(replace(volume, voxels_hu=noisy), labels)

    assert set(found) == (set() if is_judged else ALL)
    assert all("Noise of 18" in reason for reason in found.values())  # in pixels of 1.2 mm: as 180 in those of 1 mm


def test_a_vertebra_between_noisy_shoulders_is_not_judged_and_the_others_are() -> None:
    volume, labels = neck()
    z = index_of(labels, 7)[0]
    noise = np.random.default_rng(3).normal(0, 150, labels.shape)
    noise[z + 8 :] = 0
    noisy = np.clip(volume.voxels_hu + noise, -1024, 3000).astype(np.int16)

    found = reasons(replace(volume, voxels_hu=noisy), labels)

    assert "Noise of" in found[7]
    assert not {1, 2, 3, 4} & set(found)


@pytest.mark.parametrize("tilt_deg", [0, 25])
def test_slices_of_4_mm_are_judged_however_they_are_tilted_or_rounded(tilt_deg: float) -> None:
    volume, labels = neck()
    grid = scaled(volume.grid, (4.0000001 / volume.grid.spacing_mm[0], 1.0, 1.0))
    affine = grid.affine.copy()
    affine[1, 0] = affine[2, 0] * np.tan(np.deg2rad(tilt_deg))
    tilted = Grid(shape=grid.shape, affine=affine)

    assert not any("mm apart can hide" in reason for reason in reasons(replace(volume, grid=tilted), labels).values())


def test_hair_or_foam_on_both_sides_is_no_lung() -> None:
    volume, labels = neck()
    wide = ((0, 0), (0, 0), (60, 60))
    hu, around = np.pad(volume.voxels_hu, wide, constant_values=-1024), np.pad(labels, wide)
    affine = volume.grid.affine.copy()
    affine[:3, 3] -= 60 * affine[:3, 2]
    hu[hu < -900] = -750
    grid = Grid(shape=hu.shape, affine=affine)

    assert not any("Lung" in reason for reason in reasons(replace(volume, voxels_hu=hu, grid=grid), around).values())


def test_what_is_left_of_a_cut_vertebra_puts_no_other_in_doubt() -> None:
    volume, labels = neck()
    z, y, x = index_of(labels, 3)
    top = z + 6
    seen, voxels_hu = np.where(labels[:top] == 2, 0, labels[:top]), volume.voxels_hu[:top].copy()
    remnant = (slice(top - 3, top), slice(y - 12, y + 12), slice(x - 12, x + 12))  # of C2, 9 mm above C3's centroid
    seen[remnant], voxels_hu[remnant] = 2, 400

    grid = replace(volume.grid, shape=seen.shape)
    found = reasons(replace(volume, voxels_hu=voxels_hu, grid=grid), seen.astype(np.uint8))

    assert found[2] == "Cut by the field of view"
    assert not {4, 5, 6, 7} & set(found)


@pytest.mark.parametrize(("share", "doubted"), [(0.95, set()), (0.8, {4, 5, 6, 7})])
@pytest.mark.parametrize("is_cut", [True, False])
def test_vertebrae_squeezed_against_the_end_of_the_slices_are_not_judged(
    share: float, doubted: set[int], is_cut: bool
) -> None:
    volume, labels = neck()
    chain = {vertebra.label: vertebra for vertebra in vertebrae_of(labels, volume.grid)}
    heights_mm = -np.cumsum([0, 16 * C2_STEP, 16, 16 * share, 16, 16])
    for label, z_mm in enumerate(heights_mm, start=2):
        chain[label] = replace(chain[label], centroid_lps_mm=np.array([0.0, 0.0, z_mm]), is_cut=is_cut and label == 7)

    assert set(_squeezed(list(chain.values()))) == (doubted if is_cut else set())


def test_two_vertebrae_are_too_few_to_number() -> None:
    volume, labels = neck()

    found = reasons(volume, np.where(labels < 3, labels, 0).astype(np.uint8))

    assert set(found) == {1, 2}
    assert found[1].startswith("Only 2 cervical vertebrae were found")


def test_a_chain_that_begins_below_c2_may_have_other_numbers() -> None:
    volume, labels = neck()

    found = reasons(volume, np.where(labels > 3, labels, 0).astype(np.uint8))

    assert set(found) == {4, 5, 6, 7}
    assert found[4].startswith("C4 is the highest level found: without C1 and C2")


def test_a_screw_takes_its_vertebra_out_and_leaves_the_far_ones() -> None:
    volume, labels = neck()
    z, y, x = index_of(labels, 6)
    voxels_hu = volume.voxels_hu.copy()
    voxels_hu[z - 1 : z + 1, y - 8 : y + 8, x + 8 : x + 11] = 3071

    found = reasons(replace(volume, voxels_hu=voxels_hu), labels)

    assert found[6] == "Metal in or at the vertebra"
    assert not {1, 2, 3, 4} & set(found)


@pytest.mark.parametrize("is_padded", [False, True], ids=["the volume ends", "empty slices follow"])
def test_half_a_vertebra_at_the_end_of_the_slices_is_cut(is_padded: bool) -> None:
    volume, labels = neck()
    first = index_of(labels, 6)[0]
    voxels_hu, kept = volume.voxels_hu.copy(), labels.copy()
    voxels_hu[:first], kept[:first] = -1024, 0
    cut = replace(volume, voxels_hu=voxels_hu)
    if not is_padded:
        affine = volume.grid.affine.copy()
        affine[:3, 3] = volume.grid.to_lps_mm(np.array([first, 0, 0], float))
        z, y, x = volume.grid.shape
        kept = kept[first:]
        cut = make_volume(voxels_hu[first:], Grid(shape=(z - first, y, x), affine=affine))

    found = reasons(cut, kept)

    assert found.pop(6) == "Cut by the field of view"
    assert not {1, 2, 3, 4} & set(found)


def test_an_outline_around_soft_tissue_is_not_bone() -> None:
    volume, labels = neck()
    voxels_hu = np.where(labels == 4, 60, volume.voxels_hu).astype(np.int16)

    found = reasons(replace(volume, voxels_hu=voxels_hu), labels)

    assert found == {4: "Not as dense as bone (less than 60% above 150 HU)"}


def test_part_of_a_vertebra_is_too_small() -> None:
    volume, labels = neck()
    kept = labels.copy()
    x = index_of(labels, 5)[2]
    kept[:, :, x - 8 :][labels[:, :, x - 8 :] == 5] = 0

    assert "Too small for a vertebra" in reasons(volume, kept).get(5, "")


def test_two_vertebrae_drawn_as_one_are_not_judged() -> None:
    volume, labels = neck()
    fused = np.array([0, 1, 2, 3, 4, 4, 5, 6], np.uint8)[labels]

    found = reasons(volume, fused)

    assert set(found) == {4}
    assert "Too large" in found[4]


def test_levels_beside_one_that_was_missed_are_not_judged() -> None:
    volume, labels = neck()
    missed = np.array([0, 1, 2, 3, 4, 0, 5, 6], np.uint8)[labels]

    found = reasons(volume, missed)

    assert set(found) == {3, 4, 5, 6}
    assert "Out of step" in found[4]


def test_a_vertebra_between_lungs_is_not_of_the_neck() -> None:
    volume, labels = neck()
    z, y, x = index_of(labels, 7)
    voxels_hu = volume.voxels_hu.copy()
    for side in (x - 55, x + 25):
        voxels_hu[z - 3 : z + 4, y - 40 : y, side : side + 30] = -750

    found = reasons(replace(volume, voxels_hu=voxels_hu), labels)

    assert "Lung on both sides" in found[7]
    assert not {1, 2, 3, 4} & set(found)


def test_a_sudden_shift_is_motion_at_the_level_it_passes_through() -> None:
    volume, labels = neck()
    z = index_of(labels, 5)[0]
    voxels_hu, moved = volume.voxels_hu.copy(), labels.copy()
    for voxels in (voxels_hu, moved):
        voxels[z:] = np.roll(voxels[z:], 5, axis=2)

    found = reasons(replace(volume, voxels_hu=voxels_hu), moved)

    assert found[5] == "Motion: neighbouring slices do not fit together"
    assert not {1, 2, 7} & set(found)


def test_in_tilted_slices_motion_is_at_the_level_it_passes_through_too() -> None:
    volume, labels = neck()
    affine = volume.grid.affine.copy()
    affine[2, 1] = affine[1, 1] * np.tan(np.deg2rad(20))  # the gantry was tilted: further back is higher
    # The spine lies well behind the middle of the image.
    front = ((0, 0), (60, 0), (0, 0))
    grid = Grid(shape=(volume.grid.shape[0], volume.grid.shape[1] + 60, volume.grid.shape[2]), affine=affine)
    voxels_hu, moved = np.pad(volume.voxels_hu, front, constant_values=-1024), np.pad(labels, front)
    z = index_of(moved, 5)[0]
    for voxels in (voxels_hu, moved):
        voxels[z:] = np.roll(voxels[z:], 5, axis=2)

    found = reasons(replace(volume, voxels_hu=voxels_hu, grid=grid), moved)

    assert found[5] == "Motion: neighbouring slices do not fit together"
    assert not {1, 2, 7} & set(found)


def test_slices_of_two_moments_by_turns_are_motion() -> None:
    volume, labels = neck()
    z = index_of(labels, 5)[0]
    voxels_hu, moved = volume.voxels_hu.copy(), labels.copy()
    for voxels in (voxels_hu, moved):
        voxels[z % 2 : z + 40 : 2] = np.roll(voxels[z % 2 : z + 40 : 2], 3, axis=2)

    found = reasons(replace(volume, voxels_hu=voxels_hu), moved)

    assert {label for label, reason in found.items() if "Motion" in reason} >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", ["hn_chum_001", "pycerr_pt1"])
def test_a_real_neck_is_not_refused_or_doubted_as_a_whole(name: str) -> None:
    paths = [path for path in (REAL / name).rglob("*") if path.is_file()]
    if not paths:
        pytest.skip(f"the real CT {name} is not on this machine")
    volume = read_series(paths)
    # Blocks in place of outlines, one above the other: whatever is said of them is said of the volume.
    blocks = np.zeros(volume.grid.shape, np.uint8)
    for label in range(1, 8):
        z = 60 - 5 * label
        blocks[z : z + 4, 240:265, 240:270] = label
    voxels_hu = np.where(blocks > 0, 400, volume.voxels_hu).astype(np.int16)

    check_values(volume)
    assert reasons(replace(volume, voxels_hu=voxels_hu), blocks) == {}
