"""Levels that change gradually become one for each solid piece of bone."""

import numpy as np

from model.pieces import solid_pieces, whole_levels

Z = np.arange(40, dtype=np.float32)[:, None, None]


def column() -> np.ndarray:
    """Two bodies of 14 voxels with a neck of 3 x 3 between them, and an arch that hangs broadly on the upper one."""
    bone = np.zeros((40, 24, 12), bool)
    bone[4:18, 2:10, 1:11] = bone[22:36, 2:10, 1:11] = True
    bone[18:22, 5:8, 5:8] = True
    bone[24:33, 10:20, 4:8] = True
    return bone


def test_a_body_has_one_level_though_the_number_drifts_at_its_end() -> None:
    bone = column()
    # Foot first: C4 below C3, but the change comes five voxels too high.
    level = np.broadcast_to(np.where(Z < 27, 4.0, 3.0).astype(np.float32), bone.shape)
    found = whole_levels(np.where(bone, 4, -4).astype(np.float32), level, last=10)
    assert set(np.unique(found[4:17][bone[4:17]])) == {4}
    assert set(np.unique(found[23:36, :10][bone[23:36, :10]])) == {3}
    assert not found[~bone].any()


def test_an_arch_goes_with_the_body_it_hangs_on_where_its_number_is_in_doubt() -> None:
    bone = column()
    level = np.where(Z < 20, 4.0, 3.0).astype(np.float32) * np.ones(bone.shape, np.float32)
    level[:, 10:] = 3.55  # called C4, by a little
    found = whole_levels(np.where(bone, 4, -4).astype(np.float32), level, last=10)
    assert set(np.unique(found[24:33, 10:][bone[24:33, 10:]])) == {3}


def test_an_arch_that_is_sure_of_its_number_keeps_it() -> None:
    bone = column()
    level = np.where(Z < 20, 4.0, 3.0).astype(np.float32) * np.ones(bone.shape, np.float32)
    level[:, 11:] = 5.0
    found = whole_levels(np.where(bone, 4, -4).astype(np.float32), level, last=10)
    assert set(np.unique(found[25:32, 13:][bone[25:32, 13:]])) == {5}


def test_pieces_cover_all_bone_and_nothing_else() -> None:
    bone = column()
    pieces, num = solid_pieces(bone)
    assert ((pieces > 0) == bone).all()
    assert set(np.unique(pieces[bone])) == set(range(1, num + 1))
    assert solid_pieces(np.zeros((4, 4, 4), bool))[1] == 0
    assert not whole_levels(np.full((4, 4, 4), -1, np.float32), np.ones((4, 4, 4), np.float32), last=10).any()
