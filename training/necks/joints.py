"""Every vertebra moves by itself: the joints of a drawn neck, from the head on C1 down to C7 on T1.

A smooth bend turns discs and facets alike. In patients each vertebra is a rigid piece that turns on the next, most of
all C1 on C2, around the dens, and the head on C1.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from model.geometry import FloatArray, Grid
from training.necks import atlas as body
from training.necks.atlas import Atlas

PIECE_MM = 3
"""Spacing of the map of which piece a place belongs to."""

BLEND_MM = 3.0
"""Standard deviation over which one piece passes into the next."""

NUM_PIECES = 9
"""Head, C1..C7, and T1 with everything below, which stays."""

TURN_SD_DEG = np.array([[6.0, 2.5, 2.0], [5.0, 3.0, 9.0], *[[4.0, 2.5, 2.5]] * 6])
"""Of each joint from the head down: nodding, to a side, about the long axis. C1 turns on C2 most.
Ranges in the living: Bogduk and Mercer, Clinical Biomechanics 15, 2000."""

SLIP_SD_MM = 0.6
"""Of each vertebra on the next, along every axis."""

STEPS = 4
"""Of the search for the place that moved to a point."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Joints:
    """Where the pieces of one neck went: turns `(9, 3, 3)` and slips_mm `(9, 3)`: from the neck to the atlas, LPS."""

    atlas: Atlas
    turns: FloatArray
    slips_mm: FloatArray

    @classmethod
    def draw(cls, atlas: Atlas, rng: np.random.Generator, strength: float) -> "Joints":
        """Each joint turned at random; what lies above goes with it. strength: 0 for none, 1 for as in patients."""
        turns, slips = np.tile(np.eye(3), (NUM_PIECES, 1, 1)), np.zeros((NUM_PIECES, 3))
        angles = strength * rng.normal(size=TURN_SD_DEG.shape) * TURN_SD_DEG
        shifts = strength * rng.normal(0, SLIP_SD_MM, size=(len(angles), 3))
        for piece, pivot in reversed(list(enumerate(_pivots_lps_mm(atlas)))):
            turn = Rotation.from_euler("xyz", angles[piece], degrees=True).as_matrix()
            turns[piece] = turn @ turns[piece + 1]
            slips[piece] = turn @ (slips[piece + 1] - pivot) + pivot + shifts[piece]
        return cls(atlas=atlas, turns=turns, slips_mm=slips)

    def to_atlas(self, points_lps_mm: FloatArray) -> FloatArray:
        """LPS mm `(n, 3)` of the neck to those of the atlas before its joints moved."""
        pieces, grid = _pieces(self.atlas)
        moved = np.einsum("kij,nj->nki", self.turns, points_lps_mm) + self.slips_mm
        places = points_lps_mm
        for _ in range(STEPS):
            unit = 2 * grid.to_index(places) / (np.asarray(grid.shape) - 1) - 1
            at = torch.from_numpy(unit[:, ::-1].copy()).float()[None, :, None, None]
            weights = F.grid_sample(pieces[None], at, padding_mode="border", align_corners=True)[0, :, :, 0, 0]
            places = np.einsum("kn,nkj->nj", weights.numpy(), moved)
        return places


def _pivots_lps_mm(atlas: Atlas) -> FloatArray:
    """What each joint turns about, from the head on C1 down to C7 on T1, `(8, 3)`: the dens, then the discs."""
    centres = atlas.centres_lps_mm
    condyles, dens = centres[0] + [0, -6, 8], centres[0] + [0, -10, 0]
    return np.stack([condyles, dens, *((centres[1:7] + centres[2:8]) / 2 + [0, -8, 0])])


@cache
def _pieces(atlas: Atlas) -> tuple[Tensor, Grid]:
    """Shares `(9, Z, Y, X)` of each piece at a place, and their grid: a place goes with the nearest bone."""
    bones = atlas.bones[::PIECE_MM, ::PIECE_MM, ::PIECE_MM]
    piece = np.full(bones.shape, -1)
    piece[(bones == body.BONE_SKULL) | (bones == body.BONE_MANDIBLE)] = 0
    spine = (bones >= 1) & (bones <= body.NUM_VERTEBRAE)
    piece[spine] = bones[spine].clip(max=body.FIRST_THORACIC)
    nearest = ndimage.distance_transform_edt(piece < 0, return_distances=False, return_indices=True)
    piece = piece[tuple(nearest)]
    shares = [
        ndimage.gaussian_filter((piece == number).astype(np.float32), BLEND_MM / PIECE_MM)
        for number in range(NUM_PIECES)
    ]
    affine = atlas.grid.affine.copy()
    affine[:3, :3] *= PIECE_MM
    z, y, x = piece.shape
    return torch.from_numpy(np.stack(shares)), Grid(shape=(z, y, x), affine=affine)
