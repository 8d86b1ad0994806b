"""Parts of the training steps by themselves: what is drawn, doubted, mixed, halved and weighed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.levels import OUTPUTS


def test_opinions_are_asked_of_both_kinds_however_rare_one_is() -> None:
    from training.steps.regions import opinion_sample
    from training.steps.stacks import Vertebra

    vertebrae = [
        Vertebra(study=None, cut="A", level=0, fractured=number == 2999, regions_known=True)  # type: ignore[arg-type]
        for number in range(3000)
    ]

    asked, weights = opinion_sample(vertebrae, np.random.default_rng(0))

    assert [vertebra.fractured for vertebra in asked] == [True] + [False] * 500
    assert weights[0] == 1
    assert weights.sum() == pytest.approx(3000)


def test_a_cut_without_these_studies_and_studies_without_vertebrae_are_two_faults(tmp_path: Path) -> None:
    from training.steps.run import StepError
    from training.steps.stacks import judged_vertebrae

    none = SimpleNamespace(judged=np.zeros(7, bool))
    for folder, stacks, sentence in (
        (tmp_path / "none", None, "The cut 'A' has none of 1 studies; .* or for a single fold with --label-all"),
        (tmp_path, none, "No vertebra was found in any of 1 studies. Train `segment` for longer."),
    ):
        study: Any = SimpleNamespace(
            stacks=lambda cut, stacks=stacks: stacks, stacks_folder=lambda cut, folder=folder: folder
        )
        with pytest.raises(StepError, match=sentence):
            judged_vertebrae([study], "A")


def test_draws_depend_on_seed_and_epoch_and_are_shared_out_among_processes() -> None:
    from training.steps.fit import Draws

    alone = Draws([1, 0, 2], 8, seed=3, rank=0, num_processes=1)
    alone.set_epoch(5)
    shares = []
    for rank in range(2):
        share = Draws([1, 0, 2], 8, seed=3, rank=rank, num_processes=2)
        share.set_epoch(5)
        shares.append(list(share))

    drawn = list(alone)
    assert drawn[::2] == shares[0]
    assert drawn[1::2] == shares[1]
    assert {index for index, _ in drawn} <= {0, 2}
    alone.set_epoch(6)
    assert list(alone) != drawn


def test_labels_of_a_neck_are_doubted_for_a_reason() -> None:
    from model.geometry import Grid
    from training.steps.pseudo_labels import doubt

    grid = Grid.axial(shape=(150, 40, 40), spacing_mm=(1.0, 1.0, 1.0), centre_lps_mm=(0.0, 0.0, 0.0))
    labels = np.zeros(grid.shape, np.uint8)
    for label in range(1, 8):  # C1 at the head, where Z is high
        labels[140 - 18 * label : 155 - 18 * label, 8:32, 8:32] = label
    assert doubt(labels, labels, grid) is None

    assert doubt(np.where(labels == 3, 0, labels), labels, grid) == "levels missing"
    assert doubt(np.where(labels > 0, 8 - labels, 0).astype(np.uint8), labels, grid) == "implausible distance"
    shifted = np.roll(labels, 6, axis=2)
    assert doubt(labels, shifted, grid) == "disagrees with its mirror image"
    small = labels.copy()
    small[(labels == 4) & (np.arange(40) < 20)] = 0
    assert doubt(small, small, grid) is None
    small[(labels == 4) & (np.arange(40) < 27)] = 0
    assert doubt(small, small, grid) == "implausible volume"


def test_a_mixture_has_both_labels_in_part_and_no_regions() -> None:
    from training.steps.augment import Sample, mixed

    def sample(value: float) -> Sample:
        shape = (3, 6, 8, 8)
        return Sample(
            inputs=torch.full(shape, value),
            regions=torch.ones(3, 8, 8),
            known=torch.tensor(1.0),
            fractured=torch.tensor(value),
            level=torch.tensor(2),
        )

    mixture = mixed(sample(1.0), sample(0.0), np.random.default_rng(0))

    assert 0 < mixture.fractured < 1
    assert torch.allclose(mixture.inputs, mixture.fractured)
    assert mixture.known == 0


def test_calibration_halves_share_no_patient_and_have_both_kinds() -> None:
    from training.steps.calibrate import halve

    patients = ["a", "a", "b", "c", "d", "e"]
    fractured = np.array([True, False, True, False, False, False])

    first = halve(patients, fractured)

    assert first[0] == first[1]
    assert first[0] != first[2]
    assert first[3:].any()
    assert not first[3:].all()


@pytest.mark.parametrize(("opinion_is_right", "weight"), [(True, 0.5), (False, 0.0)])
def test_the_second_opinion_counts_as_much_as_it_helps(opinion_is_right: bool, weight: float) -> None:
    from training.steps.calibrate import HeldOut, fit_all

    rng = np.random.default_rng(0)
    levels = rng.random((60, 7)) < 0.3
    truths = np.concatenate([levels.any(axis=1, keepdims=True), levels], axis=1)
    right, guessed = 4.0 * truths - 2, rng.normal(size=truths.shape)
    held_out = HeldOut(
        study_instance_uids=[str(number) for number in range(60)],
        logits=guessed if opinion_is_right else right + guessed,
        opinions=(right if opinion_is_right else 3 * guessed)[:, 1:],
        truths=truths,
        folds=[0],
    )

    fitted = fit_all(held_out, 0.95, 0.85)

    assert fitted.region_weight == weight
    assert fitted.platt.keys() == set(OUTPUTS)
    assert 0 < fitted.level_operating_point < 1
