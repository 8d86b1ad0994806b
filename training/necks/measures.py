"""How well necks of the atlas that nothing was trained on are outlined, since no real one here has labels."""

from pathlib import Path

import numpy as np

from model.levels import LEVELS
from model.volume import Volume
from training.evaluation.masks import measure_masks
from training.necks.atlas import load_atlas
from training.necks.stacks import FindVertebrae
from training.necks.synthetic import draw_series

LOOKS = ((1.0, 1), (1.0, 3), (0.8, 1), (0.8, 2))
"""Pixels in mm and their number to a slice's thickness, by turns."""


def measure_drawn(find: FindVertebrae, atlas: Path, seeds: range) -> dict[str, float]:
    """Mean Dice of each level over drawn necks of these seeds, "mean", and the share of levels identified.

    find: labels and vertebrae of a volume, as `find_vertebrae` gives them. atlas: as `load_atlas` cached it. The
    anatomy is the one of training in other poses: it tells a better outline from a worse one, and flatters where
    patients differ from the atlas.
    """
    body = load_atlas(Path(), atlas)
    dice: dict[str, list[float]] = {name: [] for name in LEVELS}
    identified: list[bool] = []
    for number, seed in enumerate(seeds):
        pixel_mm, thick = LOOKS[number % len(LOOKS)]
        hu, labels, grid = draw_series(body, np.random.default_rng([seed, 59]), pixel_mm=pixel_mm, thick=thick)
        volume = Volume(study_instance_uid="1", series_instance_uid="1", voxels_hu=hu, grid=grid, slices=())
        found = measure_masks(labels, find(volume)[0], grid)
        for name, value in found["dice"].items():
            dice[name].append(value)
        identified += found["identified"].values()
    every = {name: float(np.mean(values)) for name, values in dice.items() if values}
    return {**every, "mean": float(np.mean(list(every.values()))), "identified": float(np.mean(identified))}
