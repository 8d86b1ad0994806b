"""Draws docs/summary.png: the overview page of a fractured phantom, as any viewer shows it.

    .venv/bin/python docs/make_summary_picture.py

The page is read back from the Secondary Capture that `encode_results` writes.
"""

import tempfile
from pathlib import Path

import matplotlib.image
import pydicom

from model import PHANTOM_BUNDLE, load_pipeline, read_series
from model.phantom import Anatomy, Fracture, default_grid, render, write_series
from node.encode import NodeIdentity, encode_results
from node.profiles import Kind, Profile


def main() -> None:
    anatomy = Anatomy.random(2, (Fracture(level="C5", kind="body", width_mm=2.0),))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = default_grid(anatomy, (0.6, 0.45, 0.45), (300, 512, 512))
        volume = read_series(write_series(render(anatomy, grid, seed=2), folder / "series"))
        overview, *_ = encode_results(
            load_pipeline(PHANTOM_BUNDLE).analyse(volume),
            volume,
            folder,
            node=NodeIdentity(),
            profiles=[Profile(objects=(Kind.SUMMARY_IMAGES,))],
        )
        page = pydicom.dcmread(overview.path).pixel_array
    matplotlib.image.imsave(Path(__file__).parent / "summary.png", page)


if __name__ == "__main__":
    main()
