"""Draws docs/result.png: a phantom study, analysed by `cspine analyze`, with what its SEG objects say laid over it.

    .venv/bin/python docs/make_result_picture.py [SERIES_DIR RESULTS_DIR PICTURE]

Without arguments a fractured phantom is made and analysed. Everything drawn is read back from the DICOM files.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import highdicom as hd
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from model import Grid, Volume, read_series
from model.phantom import Anatomy, Fracture, default_grid, render, write_series

COLOURS = plt.get_cmap("tab10").colors


def main() -> None:
    if len(sys.argv) == 4:
        draw(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        anatomy = Anatomy.random(2, (Fracture(level="C5", kind="body", width_mm=2.0),))
        write_series(render(anatomy, default_grid(anatomy, (0.8, 0.6, 0.6)), seed=2), folder / "series")
        command = [sys.executable, "-m", "node", "analyze", str(folder / "series"), "--out", str(folder / "out")]
        subprocess.run(command, check=True)
        draw(folder / "series", folder / "out", Path(__file__).parent / "result.png")


def draw(series_dir: Path, results_dir: Path, picture: Path) -> None:
    """Sagittal, coronal and axial slices through the most suspicious level, radiological convention."""
    volume = read_series([path for path in series_dir.rglob("*") if path.is_file()])
    findings = json.loads((results_dir / "findings.json").read_text())
    vertebrae = read_mask(results_dir / "vertebrae.seg.dcm", volume)
    fractures_path = results_dir / "fractures.seg.dcm"
    fractures = read_mask(fractures_path, volume) if fractures_path.exists() else np.zeros_like(vertebrae)
    seen = {name: level for name, level in findings["levels"].items() if level["centroid_lps_mm"]}
    focus = max(seen, key=lambda name: seen[name]["probability"] or 0)
    centroid = np.array(seen[focus]["centroid_lps_mm"])
    if fractures.any():
        centroid = volume.grid.to_lps_mm(np.argwhere(fractures).mean(0))

    figure, axes = plt.subplots(1, 3, figsize=(15, 6), facecolor="black")
    # Patient axes of each view: to the right of the picture, and downwards (LPS).
    left, back, foot = np.eye(3)[0], np.eye(3)[1], -np.eye(3)[2]
    for axis, title, right, down in (
        (axes[0], "sagittal", back, foot),
        (axes[1], "coronal", left, foot),
        (axes[2], "axial", left, back),
    ):
        show(axis, volume, vertebrae, fractures, centroid, right, down)
        axis.set_title(title, color="white")
    said = "  ".join(
        f"{name} {'—' if level['probability'] is None else format(level['probability'], '.2f')}"
        for name, level in findings["levels"].items()
    )
    overall = findings["patient_overall"]["probability"]
    figure.suptitle(f"patient {'—' if overall is None else format(overall, '.2f')}   {said}", color="white")
    figure.text(0.5, 0.02, f"Research software. {findings['model']['trained_on']}", color="orange", ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(picture, dpi=80)


def show(
    axis: Axes,
    volume: Volume,
    vertebrae: NDArray[np.uint8],
    fractures: NDArray[np.uint8],
    centre_lps_mm: NDArray[np.float64],
    right: NDArray[np.float64],
    down: NDArray[np.float64],
) -> None:
    """A plane through the patient, sampled every 0.5 mm."""
    steps = np.arange(-75, 75, 0.5)
    points = centre_lps_mm + steps[:, None, None] * down + steps[None, :, None] * right
    hu = pick(volume.voxels_hu, volume.grid, points, -1024)
    axis.imshow(hu, cmap="gray", vmin=-250, vmax=1050)
    labels = pick(vertebrae, volume.grid, points, 0)
    for label in np.unique(labels[labels > 0]):
        axis.contour(labels == label, levels=[0.5], colors=[COLOURS[label - 1]], linewidths=1.2)
    suspicious = pick(fractures, volume.grid, points, 0) > 0
    axis.imshow(np.ma.masked_where(~suspicious, suspicious), cmap="autumn", alpha=0.55)
    axis.axis("off")


def pick(array: NDArray[np.generic], grid: Grid, points: NDArray[np.float64], outside: int) -> NDArray[np.generic]:
    """Nearest voxels at LPS points."""
    index = np.rint(grid.to_index(points)).astype(int)
    inside = ((index >= 0) & (index < grid.shape)).all(-1)
    values = np.full(points.shape[:-1], outside, array.dtype)
    values[inside] = array[tuple(index[inside].T)]
    return values


def read_mask(path: Path, volume: Volume) -> NDArray[np.uint8]:
    """Level labels `(Z, Y, X)` on the volume's grid, from a SEG whose segment labels begin with the level's name."""
    seg = hd.seg.segread(path)
    block = seg.get_volume(combine_segments=True)
    mask = np.zeros(volume.grid.shape, np.uint8)
    to_grid = np.linalg.inv(volume.grid.affine) @ block.affine
    for number in seg.segment_numbers:
        index = np.argwhere(block.array == number) @ to_grid[:3, :3].T + to_grid[:3, 3]
        level = int(seg.get_segment_description(number).segment_label[1])
        mask[tuple(np.rint(index).astype(int).T)] = level
    return mask


if __name__ == "__main__":
    main()
