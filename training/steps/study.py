"""The study network: a BiGRU over the seven levels, trained with the challenge's weighted log loss.

It reads what the fracture network of the same fold said of all studies, so it takes minutes, on any machine.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from model.networks import StudyNet
from training.evaluation import roc_auc, weighted_log_loss
from training.evaluation.loss import best_constants, weights
from training.files import write_json, write_npz
from training.rsna import NUM_FOLDS, Cache, Study
from training.steps.classify import read_answers
from training.steps.fit import StepData, StepModule, fit, load_weights, new_network
from training.steps.run import Run, StepError, fold_folder, read_options, read_result, rounded

CONTEXT_NOISE, DROPPED_LEVELS = 0.1, 0.1
"""Noise on the contexts, in their own standard deviations, and share of levels hidden, in training: the fracture
network has seen these studies and is surer of them than of others."""


class StudyBatch(NamedTuple):
    """One study, or a batch: contexts `(7, F)`, logits and present `(7,)`, truth and weight `(8,)` as OUTPUTS are."""

    contexts: Tensor
    logits: Tensor
    present: Tensor
    truth: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """num_hidden: GRU units per direction."""

    num_hidden: int


def study(run: Run, plan: StudyPlan) -> dict[str, Any]:
    """Trains one fold's network and keeps its logits for the held-out fold; what it measured, beside constants."""
    folder = run.begin("study", "classify", **asdict(plan))
    if (folder / "result.json").exists():
        return read_result(run.work, "study", run.fold)
    cache = Cache.open(run.cache)
    answers = fold_folder(run.work, "classify", run.fold)
    others = cache.studies([fold for fold in range(NUM_FOLDS) if fold != run.fold])
    held_out = cache.studies([run.fold])
    train, watch = StudySet(others, answers, augment=True), StudySet(held_out, answers, augment=False)
    network = new_network(lambda: StudyNet(train.num_features, plan.num_hidden), run)
    untrained = all_logits(network, watch)
    trainer = fit(
        StudyTraining(network, run.learning_rate), network, StepData(run, train, [1.0] * len(train), watch), folder
    )
    logits = all_logits(network, watch)
    result = {
        **measure(logits, watch.truth, constants=train.truth),
        "without_study_network": measure(untrained, watch.truth, constants=train.truth)["weighted_log_loss"],
    }
    if trainer.is_global_zero:
        uids = np.array([item.study_instance_uid for item in watch.studies])
        write_npz(folder / "held_out.npz", study_instance_uids=uids, logits=logits, truths=watch.truth)
        write_json(folder / "result.json", result)
    return result


def trained_network(work: Path, fold: int, num_features: int) -> tuple[StudyNet, StudyPlan]:
    """A finished fold's network, and how it was made."""
    plan = StudyPlan(num_hidden=read_options(work, "study", fold)["num_hidden"])
    network = StudyNet(num_features, plan.num_hidden)
    load_weights(network, fold_folder(work, "study", fold))
    return network, plan


class StudySet(Dataset[StudyBatch]):
    """Studies as the fracture network answered for them; those without a single judged vertebra are left out.

    truth: `(N, 8)` bool, of all that are left.
    """

    def __init__(self, studies: Sequence[Study], answers: Path, *, augment: bool) -> None:
        read = [(study, read_answers(answers, study)) for study in studies]
        read = [(study, said) for study, said in read if said.present.any()]
        if not read:
            raise StepError(f"No vertebra was judged in any of {len(studies)} studies. Train `segment` for longer.")
        self.studies = [study for study, _ in read]
        self.contexts = np.stack([said.contexts for _, said in read])
        self.present = np.stack([said.present for _, said in read])
        self.logits = np.nan_to_num(np.stack([said.logits for _, said in read]))
        levels = np.stack([said.fractured for _, said in read])
        self.truth = np.concatenate([levels.any(axis=1, keepdims=True), levels], axis=1)
        self.weight = challenge_weights(self.truth)
        self.augment = augment
        self.noise = CONTEXT_NOISE * self.contexts[self.present].std(axis=0)

    @property
    def num_features(self) -> int:
        """Of a context."""
        return int(self.contexts.shape[2])

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, drawn: tuple[int, int] | int) -> StudyBatch:
        index, seed = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        contexts, present = self.contexts[index], self.present[index]
        if self.augment:
            rng = np.random.default_rng(seed)
            contexts = contexts + self.noise * rng.standard_normal(contexts.shape)
            kept = present & (rng.random(len(present)) >= DROPPED_LEVELS)
            present = kept if kept.any() else present
        # What was not judged has no answer, and counts nothing.
        weight = self.weight[index] * np.array([True, *present])
        return StudyBatch(
            contexts=torch.from_numpy(contexts).float(),
            logits=torch.from_numpy(self.logits[index]),
            present=torch.from_numpy(present),
            truth=torch.from_numpy(self.truth[index]).float(),
            weight=torch.from_numpy(weight).float(),
        )


class StudyTraining(StepModule[StudyNet]):
    """The weighted log loss."""

    loss_name = "weighted_log_loss"

    def loss_of(self, batch: StudyBatch) -> Tensor:
        """Of a batch of studies."""
        logits = _outputs(self.network, batch)
        each = F.binary_cross_entropy_with_logits(logits, batch.truth, reduction="none")
        return (each * batch.weight).sum() / len(batch.weight)


def _outputs(network: StudyNet, batch: StudyBatch) -> Tensor:
    """Logits `(B, 8)` in the order of OUTPUTS."""
    said = network(batch.contexts, batch.logits, batch.present)
    return torch.cat([said.patient[:, None], said.logits], dim=1).float()


def challenge_weights(truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What each answer counts in the challenge's score, `(N, 8)`; each row sums to 1."""
    weight = weights(truth)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


@torch.inference_mode()
def all_logits(network: StudyNet, studies: StudySet) -> NDArray[np.float64]:
    """Logits `(N, 8)` of all studies; NaN where a level was not judged."""
    network.eval()
    items = [studies[index] for index in range(len(studies))]
    logits = _outputs(network, StudyBatch(*(torch.stack(parts) for parts in zip(*items, strict=True)))).double().numpy()
    logits[:, 1:][~studies.present] = np.nan
    return logits


def measure(logits: NDArray[np.float64], truth: NDArray[np.bool_], *, constants: NDArray[np.bool_]) -> dict[str, Any]:
    """The challenge's score and the patient's AUC, beside constants from the labels `constants` of the other folds.

    What was not judged gets the other folds' share of fractures.
    """
    best, rates = (np.clip(each, 1e-3, 1 - 1e-3) for each in (best_constants(constants), constants.mean(axis=0)))
    probability = np.where(np.isnan(logits), rates, 1 / (1 + np.exp(-logits)))
    shape = truth.shape
    return {
        "num_studies": len(truth),
        "weighted_log_loss": rounded(weighted_log_loss(truth, probability)),
        "patient_auc": rounded(roc_auc(truth[:, 0], logits[:, 0])),
        "constants": {
            "best_constants": rounded(weighted_log_loss(truth, np.broadcast_to(best, shape))),
            "base_rates": rounded(weighted_log_loss(truth, np.broadcast_to(rates, shape))),
        },
    }
