"""The vertebra U-Net: trained on the studies with a mask, then, round by round, on what it labels plausibly itself.

Two networks: `unet3d`, and the reference, `unet2d`: slices with their neighbours through an
EfficientNet. At the end the held-out fold is labelled by this network, which never saw it: `cut` and all that follows
use these labels.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from monai.losses.dice import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from model.bundle import SegmentSettings
from model.levels import LEVELS
from model.networks import SliceVertebraUNet, VertebraUNet
from model.resample import average_pool, body_volume, pool_factors, pooled_grid, sample
from model.segment import LAST_LEVEL, network_input
from training import vertebrae
from training.evaluation.masks import dice
from training.files import replacing_file, write_json, write_npz
from training.rsna import NUM_FOLDS, Cache, Study
from training.steps.fit import StepData, StepModule, fit, load_weights, new_network, weights_digest
from training.steps.pseudo_labels import VertebraNetwork, predicted_labels, pseudo_label
from training.steps.run import Run, StepError, fold_folder, is_first_process, mean, read_options, read_result, rounded
from training.steps.slices import draw_slice

NUM_CLASSES = len(LEVELS) + 2
"""Of the 2.5D network: background, C1..C7, and the thoracic vertebrae."""

BELIEVED = "believed"

WATCHED_SAMPLES = 4
"""Of each held-out study: crops or slices that the loss is shown of, and that are measured beside constants."""


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """network: "unet3d" with `channels` on a grid of `spacing_mm`, crops of `crop` voxels `(Z, Y, X)`; or "unet2d" with
    `encoder`, on squares of `num_pixels` of the cache's slices. num_rounds: of pseudo-labels."""

    network: str
    channels: tuple[int, ...]
    spacing_mm: float
    crop: tuple[int, int, int]
    encoder: str
    num_pixels: int
    num_rounds: int

    def settings(self) -> SegmentSettings:
        """As a bundle has them."""
        if self.network == "unet2d":
            return SegmentSettings(encoder=self.encoder, spacing_mm=self.spacing_mm)
        return SegmentSettings(channels=self.channels, spacing_mm=self.spacing_mm)

    def new_network(self) -> VertebraNetwork:
        """Untrained."""
        return SliceVertebraUNet(self.encoder) if self.network == "unet2d" else VertebraUNet(self.channels)


def segment(run: Run, plan: SegmentPlan, *, label_all: bool) -> dict[str, Any]:
    """Trains one fold's network and labels the studies it did not see; what it measured, beside constants.

    label_all: label the studies it was trained on too, as long as no other network has; for runs of a single fold.
    """
    cache = Cache.open(run.cache)
    if plan.network == "unet2d":  # it reads the slices of the cache
        plan = replace(plan, spacing_mm=cache.spacing_mm)
    network = new_network(plan.new_network, run)
    check_pixels(network, plan)
    folder = run.begin("segment", **asdict(plan))
    if (folder / "result.json").exists():
        return read_result(run.work, "segment", run.fold)
    seen = [fold for fold in range(NUM_FOLDS) if fold != run.fold]
    learned = [(study, "truth") for study in cache.studies(seen, has_mask=True)]
    held_out = cache.studies([run.fold], has_mask=True)
    if not learned or not held_out:
        raise StepError(
            f"Fold {run.fold} has {len(held_out)} studies with a mask and the others {len(learned)}; both are needed. "
            "Choose another fold, or prepare more studies."
        )

    # 1. From the masks.
    watch = samples([(study, "truth") for study in held_out] * WATCHED_SAMPLES, plan, run.work)
    trainer = train(network, run, plan, folder, learned, watch)

    # 2. From the masks and what the network of the last round says of the other studies of the same folds.
    rounds, others = [], cache.studies(seen, has_mask=False)
    for number in range(1, plan.num_rounds + 1):
        name = f"pseudo-{run.work.name}-fold{run.fold}-round{number}"
        doubts = label_round(others, name, network, plan, run.work, folder / f"round{number}", trainer)
        rounds.append(dict(Counter(doubts)))
        believed = [(study, name) for study, doubt in zip(others, doubts, strict=True) if doubt == BELIEVED]
        trainer = train(network, run, plan, folder / f"round{number}", learned + believed, watch)

    # 3. What it says of studies it has never seen.
    device = trainer.strategy.root_device
    mine = f"fold{run.fold} {weights_digest(last_round(folder, plan))}"
    labelled = cache.studies([run.fold]) + (cache.studies(seen) if label_all else [])
    for study in labelled[trainer.global_rank :: trainer.world_size]:
        before = study.labels_drawn_by(label_set(run.work))
        another_folds = before is not None and not before.startswith(f"fold{run.fold} ")
        if before != mine and (study.fold == run.fold or not another_folds):
            labels = predict(study, network, plan, device)
            study.write_labels(label_set(run.work), np.where(labels > len(LEVELS), 0, labels), drawn_by=mine)
    trainer.strategy.barrier()
    result = {
        "held_out": measure(held_out, label_set(run.work)),
        "crops": measure_crops(network, watch, plan, device),
        "constants": constants(watch, plan),
        "pseudo_label_rounds": rounds,
    }
    if trainer.is_global_zero:
        write_json(folder / "result.json", result)
    return result


def check_pixels(network: VertebraNetwork, plan: SegmentPlan) -> None:
    """Refuses samples that the 2.5D U-Net cannot read.

    Raises:
        StepError: which do not fit, and what does.
    """
    if isinstance(network, SliceVertebraUNet) and (plan.num_pixels < 1 or plan.num_pixels % network.stride):
        raise StepError(f"--pixels is {plan.num_pixels}; {plan.encoder} needs a multiple of {network.stride}.")


def label_set(work: Path) -> str:
    """The name in the cache of the labels that networks of `work` gave to studies they had not seen."""
    return f"oof-{work.name}"


def trained_network(work: Path, fold: int) -> tuple[VertebraNetwork, SegmentPlan]:
    """A finished fold's network, and how it was made."""
    options = read_options(work, "segment", fold)
    values = {name: options[name] for name in SegmentPlan.__dataclass_fields__}
    values |= {"channels": tuple(values["channels"]), "crop": tuple(values["crop"])}
    plan = SegmentPlan(**values)
    folder = fold_folder(work, "segment", fold)
    network = plan.new_network()
    load_weights(network, last_round(folder, plan))
    return network, plan


def last_round(folder: Path, plan: SegmentPlan) -> Path:
    """Where a fold's final weights lie."""
    return folder / f"round{plan.num_rounds}" if plan.num_rounds else folder


def train(
    network: VertebraNetwork,
    run: Run,
    plan: SegmentPlan,
    folder: Path,
    learned: Sequence[tuple[Study, str]],
    watch: "Dataset[Any]",
) -> lightning.Trainer:
    """One fit, from the weights the network has."""
    folder.mkdir(parents=True, exist_ok=True)
    data = StepData(run, samples(learned, plan, run.work), [1.0] * len(learned), watch)
    module = (
        SliceSegmentation(network, run.learning_rate)
        if isinstance(network, SliceVertebraUNet)
        else VolumeSegmentation(network, run.learning_rate)
    )
    return fit(module, network, data, folder)


def samples(labelled: Sequence[tuple[Study, str]], plan: SegmentPlan, work: Path) -> "Dataset[Any]":
    """Studies with the name of the labels to take, as a training set."""
    if plan.network == "unet2d":
        return SliceSet(labelled, plan.num_pixels)
    paths = [neck_path(study, name, plan, work) for study, name in labelled]
    if is_first_process():
        for (study, name), path in zip(labelled, paths, strict=True):
            if not path.exists():
                write_neck(path, study, name, plan.spacing_mm)
    return CropSet(paths, plan.crop)


def neck_path(study: Study, name: str, plan: SegmentPlan, work: Path) -> Path:
    """Where a study's coarse neck is kept, with labels of this name; elsewhere when the study was prepared anew."""
    return (
        work
        / "segment"
        / f"necks-{plan.spacing_mm:g}mm"
        / name
        / f"{study.study_instance_uid}-{study.fingerprint[:12]}.npz"
    )


def write_neck(path: Path, study: Study, name: str, spacing_mm: float) -> None:
    """A study on the 3D U-Net's grid, as `training.samples.segment_sample` stores a phantom."""
    labels = study.labels(name)
    assert labels is not None, f"{study.study_instance_uid} has no labels {name}"
    coarse_hu, grid = body_volume(np.array(study.neck_hu()), study.neck_grid, spacing_mm, 1)
    factors = pool_factors(study.neck_grid, spacing_mm)
    numbers = np.minimum(labels, LAST_LEVEL).astype(np.int16)
    pooled = torch.stack([average_pool(part, factors) for part in ((numbers > 0).astype(np.int16), numbers)])
    share, level_sum = sample(pooled, pooled_grid(study.neck_grid, factors), grid)
    level = torch.where(share > 0, level_sum / share.clamp(min=1e-6), torch.zeros_like(share))
    write_npz(
        path,
        hu=coarse_hu.round().to(torch.int16).numpy(),
        share=(share * 255).round().to(torch.uint8).numpy(),
        level=level.round().to(torch.uint8).numpy(),
    )


class CropSet(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Crops of necks for the 3D U-Net: input `(2, Z, Y, X)`, share and level `(Z, Y, X)`."""

    def __init__(self, paths: list[Path], crop: tuple[int, int, int]) -> None:
        self.paths, self.crop = paths, crop

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, drawn: tuple[int, int] | int) -> tuple[Tensor, Tensor, Tensor]:
        index, seed = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the noise of `draw_crop`
            hu, share, level = vertebrae.draw_crop(self.paths[index], np.random.default_rng(seed), self.crop)
        return network_input(hu), share, level


class SliceSet(Dataset[tuple[Tensor, Tensor]]):
    """Slices for the 2.5D U-Net: input `(3, Y, X)`, labels `(Y, X)`."""

    def __init__(self, labelled: Sequence[tuple[Study, str]], num_pixels: int) -> None:
        self.labelled, self.num_pixels = labelled, num_pixels

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, drawn: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        index, seed = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        study, name = self.labelled[index]
        labels = study.labels(name)
        assert labels is not None
        return draw_slice(
            study.neck_hu(), np.minimum(labels, NUM_CLASSES - 1), np.random.default_rng(seed), self.num_pixels
        )


class VolumeSegmentation(StepModule[VertebraUNet]):
    """Trains the 3D U-Net as `training.vertebrae` does: outline, and one number for the level, at every scale."""

    def __init__(self, network: VertebraUNet, learning_rate: float) -> None:
        super().__init__(network.to(memory_format=torch.channels_last_3d), learning_rate)  # type: ignore[call-overload]

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch of crops."""
        if self.global_step >= vertebrae.NORM_SHARE * self.trainer.estimated_stepping_batches:
            vertebrae.freeze_norms(self.network)
        return super().training_step(batch, batch_index)

    def loss_of(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Of a batch of crops."""
        inputs, share, level = batch
        return vertebrae.loss([scores.float() for scores in self.network(inputs)], share, level)


class SliceSegmentation(StepModule[SliceVertebraUNet]):
    """Trains the 2.5D U-Net with Dice and cross-entropy over background, C1..C7 and the thoracic vertebrae."""

    def __init__(self, network: SliceVertebraUNet, learning_rate: float) -> None:
        super().__init__(network.to(memory_format=torch.channels_last), learning_rate)  # type: ignore[call-overload]
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of a batch of slices."""
        loss: Tensor = self.loss(self.network.unet(batch[0]).float(), batch[1][:, None])
        return loss


def label_round(
    studies: list[Study],
    name: str,
    network: VertebraNetwork,
    plan: SegmentPlan,
    work: Path,
    folder: Path,
    trainer: lightning.Trainer,
) -> list[str]:
    """Labels studies without a mask: of each, BELIEVED or the reason not to learn from it.

    Each process labels its share; a round that was interrupted goes on.
    """
    (folder / "doubts").mkdir(parents=True, exist_ok=True)
    notes = [folder / "doubts" / f"{study.study_instance_uid}.txt" for study in studies]
    mine = slice(trainer.global_rank, None, trainer.world_size)
    for study, note in zip(studies[mine], notes[mine], strict=True):
        if not note.exists():
            with torch.inference_mode():
                answer = pseudo_label(study, network, plan.spacing_mm, trainer.strategy.root_device)
            if answer.doubt is None:
                study.write_labels(name, answer.labels)
                if plan.network == "unet3d":
                    write_neck(neck_path(study, name, plan, work), study, name, plan.spacing_mm)
            with replacing_file(note) as unfinished:
                unfinished.write_text(answer.doubt or BELIEVED, encoding="utf-8")
    trainer.strategy.barrier()
    return [note.read_text(encoding="utf-8") for note in notes]


@torch.inference_mode()
def predict(study: Study, network: VertebraNetwork, plan: SegmentPlan, device: torch.device) -> NDArray[np.uint8]:
    """Labels on the study's `neck_grid`; thoracic ones too."""
    return predicted_labels(np.array(study.neck_hu()), study.neck_grid, network, plan.spacing_mm, device)


def measure(studies: list[Study], name: str) -> dict[str, Any]:
    """Labels of a set beside the masks: mean Dice, Dice a level, share of levels that carry their own number."""
    overlaps, numbered = [], []
    for study in studies:
        labels, truth = study.labels(name), study.labels()
        assert labels is not None
        assert truth is not None
        levels = range(1, len(LEVELS) + 1)
        overlaps.append([dice(labels == n, truth == n) if (truth == n).any() else np.nan for n in levels])
        numbered += [(labels[truth == n] == n).mean() > 0.5 for n in levels if (truth == n).any()]
    table = np.array(overlaps)
    return {
        "num_studies": len(studies),
        "mean_dice": rounded(mean(table[~np.isnan(table)])),
        "dice": {level: rounded(mean(row[~np.isnan(row)])) for level, row in zip(LEVELS, table.T, strict=True)},
        "levels_numbered_rightly": rounded(mean(numbered)),
    }


@torch.inference_mode()
def measure_crops(
    network: VertebraNetwork, watch: "Dataset[Any]", plan: SegmentPlan, device: torch.device
) -> dict[str, float | None]:
    """Cross-entropy of "vertebra" and mean error of the level on the held-out samples: comparable with `constants`."""
    network.to(device)
    cross_entropy, errors = [], []
    for index in range(len(watch)):  # type: ignore[arg-type]
        inputs, *truth = watch[index]
        bone, level = _targets(truth, plan)
        if isinstance(network, SliceVertebraUNet):
            probability = network.unet(inputs[None].to(device)).float().cpu().softmax(dim=1)[0]
            logit = torch.logit(1 - probability[0], eps=1e-6)
            answer = 1 + probability[1:].argmax(dim=0).float()
        else:
            logit, answer = network(inputs[None].to(device))[-1][0].float().cpu()
        cross_entropy.append(float(F.binary_cross_entropy_with_logits(logit, bone)))
        errors += (answer - level)[bone > 0.5].abs().tolist()
    network.cpu()
    return {"cross_entropy": rounded(mean(cross_entropy)), "level_error": rounded(mean(errors))}


def constants(watch: "Dataset[Any]", plan: SegmentPlan) -> dict[str, float | None]:
    """The same of the best answer that does not look at the image: one probability, and the median level."""
    bones, levels = [], []
    for index in range(len(watch)):  # type: ignore[arg-type]
        bone, level = _targets(watch[index][1:], plan)
        bones.append(float(bone.mean()))
        levels += level[bone > 0.5].tolist()
    share = float(np.clip(np.mean(bones), 1e-6, 1 - 1e-6))
    cross_entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    errors = np.abs(np.array(levels) - np.median(levels)) if levels else np.array([])
    return {"cross_entropy": rounded(float(cross_entropy)), "level_error": rounded(mean(errors))}


def _targets(truth: Sequence[Tensor], plan: SegmentPlan) -> tuple[Tensor, Tensor]:
    """How much of each voxel is vertebra, and its level."""
    if plan.network == "unet2d":
        return (truth[0] > 0).float(), truth[0].float()
    return truth[0].clamp(0, 1), truth[1]
