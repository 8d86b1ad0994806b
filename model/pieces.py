"""One level for each solid piece of bone: a body, a lateral mass, a lamina.

The networks' level is a number that changes gradually, so that the end of a body may be called the next one, and half
of an arch. Bone is thick inside its pieces and thin or dark between them; each piece has one level, and pieces that
hang together broadly have the same. Called by `model/segment.py`.

Reference: Besag, On the statistical analysis of dirty pictures, 1986 (iterated conditional modes).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from model.geometry import FloatArray

MAX_DOUBT = 1.5
"""A voxel of another level counts against a piece's level by their difference, and no more than this."""

SMOOTHING = 0.8
"""Of the depth inside bone, in voxels, so that ragged surfaces make no pieces of their own."""

LEAN = 1e-4
"""Voxels of depth from one voxel to the next."""

NUM_SWEEPS = 10

_Whole = NDArray[np.int64]


def whole_levels(logit: NDArray[np.float32], level: NDArray[np.float32], last: int) -> NDArray[np.uint8]:
    """The level of every bone voxel (logit above 0), 1..last, one for each piece; 0 elsewhere.

    logit, level: `(Z, Y, X)` on an isotropic grid fine enough to tell joints: 1 mm.
    """
    bone = logit > 0
    pieces, num = solid_pieces(bone)
    if not num:
        return np.zeros(bone.shape, np.uint8)
    members = pieces[bone] - 1
    doubts = np.stack(
        [
            np.bincount(members, np.minimum(np.abs(level[bone] - number), MAX_DOUBT), num)
            for number in range(1, last + 1)
        ],
        axis=1,
    )
    certainty = np.clip(np.tanh(logit / 2), 0.05, 1)
    touching = _contacts(pieces, num, certainty)
    chosen = doubts.argmin(axis=1)
    every_other = np.arange(num) % 2 == 0
    for _ in range(NUM_SWEEPS):
        before = chosen.copy()
        for half in (every_other, ~every_other):
            # All at once might swap neighbours back and forth for ever.
            agreed = touching @ np.eye(last)[chosen]
            chosen[half] = (doubts - agreed)[half].argmin(axis=1)
        if (chosen == before).all():
            break
    found = np.zeros(bone.shape, np.uint8)
    found[bone] = chosen[members] + 1
    return found


def solid_pieces(bone: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Bone `(Z, Y, X)` in pieces 1..n, 0 outside, and n: each voxel goes where climbing deeper into bone leads it."""
    where = np.flatnonzero(bone)
    if not len(where):
        return np.zeros(bone.shape, np.int32), 0
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(bone).astype(np.float32), SMOOTHING)
    # What is as deep as its neighbours leans to one side, so that it stays in one piece.
    depth += np.float32(LEAN) * np.add.outer(np.add.outer(*map(np.arange, bone.shape[:2])), np.arange(bone.shape[2]))
    padded = np.pad(np.where(bone, depth, -1), 1, constant_values=-1)
    numbers = np.full(padded.shape, -1, np.int64)
    numbers[1:-1, 1:-1, 1:-1][bone] = np.arange(len(where))
    places = np.flatnonzero(numbers.ravel() >= 0)
    heights, numbers_flat = padded.ravel(), numbers.ravel()
    deepest, goal = heights[places].copy(), np.arange(len(where))
    _, rows, columns = padded.shape
    for dz, dy, dx in np.ndindex(3, 3, 3):
        beside = places + ((dz - 1) * rows + dy - 1) * columns + dx - 1
        deeper = heights[beside] > deepest
        deepest[deeper] = heights[beside[deeper]]
        goal[deeper] = numbers_flat[beside[deeper]]
    while (goal[goal] != goal).any():
        goal = goal[goal]
    peaks, members = np.unique(goal, return_inverse=True)
    pieces = np.zeros(bone.shape, np.int32)
    pieces[bone] = members + 1
    return pieces, len(peaks)


def _contacts(pieces: NDArray[np.int32], num: int, certainty: FloatArray) -> sparse.csr_array:
    """How broadly pieces touch, in certain voxel faces, `(num, num)`."""
    total = sparse.csr_array((num, num))
    for axis in range(3):
        a, b = (np.moveaxis(pieces, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        meet = np.flatnonzero((a != b) & (a > 0) & (b > 0))
        weak = [np.moveaxis(certainty, axis, 0)[part].ravel()[meet] for part in (slice(None, -1), slice(1, None))]
        ends = (a[meet] - 1, b[meet] - 1)
        total = total + sparse.csr_array((np.minimum(*weak), ends), shape=(num, num))
    return total + total.T
