"""The fracture-region U-Net: where in a vertebra the fracture is.

Trained on the vertebrae with boxes, inside the box and at the bone, and on intact ones, which have no region. Then,
round by round, it draws the regions of fractured vertebrae without a box itself: that they are fractured is known from
the study's label. An intact vertebra never gets a region.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from model.classify import network_input
from model.levels import LEVELS
from model.networks import RegionUNet
from training import fractures
from training.calibration import fit_platt
from training.evaluation import average_precision, roc_auc
from training.files import replacing_file, write_json
from training.rsna import NUM_FOLDS, Cache, cut_settings
from training.stack_changes import changed
from training.steps.fit import WEIGHTS, StepData, StepModule, fit, load_weights, new_network, save_weights
from training.steps.run import Run, StepError, fold_folder, read_options, read_result, rounded
from training.steps.stacks import Vertebra, both_kinds, judged_vertebrae
from training.vertebra_stacks import PATCH_MARGIN, PATCH_MIDDLE, collate, patches

MAX_OPINIONS = 1000
"""Vertebrae that the two numbers of the second opinion are fitted to."""

MIN_PIXELS = 20
"""Regions drawn with fewer pixels than this, over all slices, are not learned from."""


@dataclass(frozen=True, kw_only=True)
class RegionsPlan:
    """cut: name of the stacks. encoder: see `model.networks.make_encoder`. patch: side of a training patch, in pixels.
    num_rounds: of drawn regions. threshold: probability from which a pixel is drawn."""

    cut: str
    encoder: str
    patch: int
    num_rounds: int
    threshold: float


def regions(run: Run, plan: RegionsPlan) -> dict[str, Any]:
    """Trains one fold's network; what it measured, beside constants."""
    cache = Cache.open(run.cache)
    network = new_network(lambda: RegionUNet(plan.encoder), run)
    check_sides(plan, cut_settings(cache, plan.cut).num_pixels, network.unet.stride)
    folder = run.begin("regions", f"cut {plan.cut}", **asdict(plan))
    if (folder / "result.json").exists():
        return read_result(run.work, "regions", run.fold)
    seen = judged_vertebrae(cache.studies([fold for fold in range(NUM_FOLDS) if fold != run.fold]), plan.cut)
    known = [vertebra for vertebra in seen if vertebra.regions_known]
    unknown = [vertebra for vertebra in seen if not vertebra.regions_known]
    all_held_out = judged_vertebrae(cache.studies([run.fold]), plan.cut)
    held_out = [vertebra for vertebra in all_held_out if vertebra.regions_known]

    # 1. From boxes, and from vertebrae that are intact.
    trainer = train(network, run, plan, folder, known, held_out)

    # 2. And from what the network of the last round draws in fractured vertebrae without a box.
    rounds = []
    for number in range(1, plan.num_rounds + 1):
        drawn = draw_round(unknown, network, plan, folder / f"round{number}", trainer)
        rounds.append({"drawn": len(drawn), "nothing_seen": len(unknown) - len(drawn)})
        trainer = train(network, run, plan, folder / f"round{number}", known + drawn, held_out)

    # 3. The two numbers that make the strongest voxels an opinion on the vertebra.
    device = trainer.strategy.root_device
    network.to(device)
    rng = np.random.default_rng(run.seed)
    asked, weights = opinion_sample(seen, rng)
    fitted = fit_platt(
        np.array([float(answer(network, vertebra).logits) for vertebra in asked]),
        np.array([vertebra.fractured for vertebra in asked]),
        weights,
    )
    with torch.no_grad():
        network.scale.fill_(fitted.scale)
        network.offset.fill_(fitted.offset)
    result = {**measure(network, held_out, plan.threshold), "rounds": rounds}
    if trainer.is_global_zero:
        opinions = {vertebra.key: float(answer(network, vertebra).logits) for vertebra in all_held_out}
        write_json(folder / "opinions.json", opinions)
        save_weights(network, folder / WEIGHTS)
        write_json(folder / "result.json", result)
    return result


def check_sides(plan: RegionsPlan, num_pixels: int, stride: int) -> None:
    """Refuses slices and patches that the network cannot read. num_pixels: of the cut. stride: of the network.

    Raises:
        StepError: what does not fit, and what does.
    """
    check_slices(plan.cut, plan.encoder, num_pixels, stride)
    side = plan.patch + 2 * PATCH_MARGIN
    most = (num_pixels - 2 * PATCH_MARGIN) // stride * stride
    if side > num_pixels:
        raise StepError(
            f"--patch {plan.patch} and its margins need slices of {side} pixels; those of the cut {plan.cut!r} have "
            f"{num_pixels}. Give at most {most}, or cut with more --pixels."
        )
    if plan.patch < 1 or plan.patch % stride:
        raise StepError(f"--patch is {plan.patch}; {plan.encoder} needs a multiple of {stride}, here at most {most}.")


def check_slices(cut: str, encoder: str, num_pixels: int, stride: int) -> None:
    """Refuses slices of a cut that an encoder of this name cannot read, see `check_sides`.

    Raises:
        StepError: they do not fit.
    """
    if num_pixels % stride:
        raise StepError(
            f"Slices of the cut {cut!r} have {num_pixels} pixels; {encoder} needs a multiple of {stride}. "
            "Cut with other --pixels, or give another --encoder."
        )


def require_same(work: Path, fold: int, **options: str) -> None:
    """Refuses a finished fold that was trained with other options than these, for a step that must have the same.

    Raises:
        StepError: it was, or it is not finished.
    """
    before = read_options(work, "regions", fold)
    for name, value in options.items():
        if before[name] != value:
            raise StepError(
                f"{fold_folder(work, 'regions', fold)} was trained with --{name} {before[name]}, and `classify` has "
                f"--{name} {value}: they must be the same. Give both the same."
            )


def opinion_sample(
    vertebrae: Sequence[Vertebra], rng: np.random.Generator
) -> tuple[list[Vertebra], NDArray[np.float64]]:
    """At most MAX_OPINIONS vertebrae, up to half of each kind, and how many each stands for: of both some, always."""
    asked, weights = [], []
    for fractured in (True, False):
        kind = [vertebra for vertebra in vertebrae if vertebra.fractured == fractured]
        chosen = rng.permutation(len(kind))[: MAX_OPINIONS // 2]
        asked += [kind[i] for i in chosen]
        weights += [len(kind) / len(chosen)] * len(chosen)
    return asked, np.array(weights)


def trained_network(work: Path, fold: int) -> RegionUNet:
    """A finished fold's network."""
    network = RegionUNet(read_options(work, "regions", fold)["encoder"])
    load_weights(network, fold_folder(work, "regions", fold))
    return network


def read_opinions(work: Path, fold: int, studies: Sequence[str]) -> NDArray[np.float64]:
    """The second opinion on C1..C7 of studies that a fold held out, logits `(N, 7)`; NaN where there is none."""
    read_options(work, "regions", fold)  # refused here if `regions` is not finished
    opinions = json.loads((fold_folder(work, "regions", fold) / "opinions.json").read_text(encoding="utf-8"))
    return np.array([[opinions.get(f"{uid}.{level}", np.nan) for level in LEVELS] for uid in studies])


def with_drawn(vertebrae: Sequence[Vertebra], work: Path, fold: int) -> list[Vertebra]:
    """The same vertebrae, with the regions that this fold's last round drew where there is no box."""
    num_rounds = read_options(work, "regions", fold)["num_rounds"]
    folder = fold_folder(work, "regions", fold) / f"round{num_rounds}" / "drawn"
    return [_with_drawn(vertebra, folder) for vertebra in vertebrae]


def train(
    network: RegionUNet,
    run: Run,
    plan: RegionsPlan,
    folder: Path,
    known: Sequence[Vertebra],
    held_out: Sequence[Vertebra],
) -> lightning.Trainer:
    """One fit, from the weights the network has; half of what it sees is fractured."""
    num_fractured, num_intact = both_kinds(known, f"Of fold {run.fold}'s training studies, what has known regions")
    weights = [1 / num_fractured if vertebra.fractured else 1 / num_intact for vertebra in known]
    data = StepData(run, PatchSet(known, plan.patch), weights, PatchSet(held_out, plan.patch))
    return fit(RegionTraining(network, run.learning_rate), network, data, folder)


class PatchSet(Dataset[tuple[Tensor, Tensor]]):
    """Patches of slices: input `(P, 6, Y, X)` and regions `(P, Y, X)`, P of one vertebra."""

    def __init__(self, vertebrae: Sequence[Vertebra], num_pixels: int) -> None:
        self.vertebrae, self.num_pixels = vertebrae, num_pixels

    def __len__(self) -> int:
        return len(self.vertebrae)

    def __getitem__(self, drawn: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        index, seed = drawn if isinstance(drawn, tuple) else (drawn, drawn)
        rng = np.random.default_rng(seed)
        cut = patches(self.vertebrae[index].read(), rng, self.num_pixels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the noise of `changed`
            batch = changed(collate(cut), rng)
        inputs = network_input(batch.planes_hu, batch.masks)[:, 0]
        return inputs[PATCH_MIDDLE], batch.regions[:, 0][PATCH_MIDDLE]


class RegionTraining(StepModule[RegionUNet]):
    """Cross-entropy and Dice of fractured pixels, as `training.fractures` has them."""

    def __init__(self, network: RegionUNet, learning_rate: float) -> None:
        super().__init__(network.to(memory_format=torch.channels_last), learning_rate)  # type: ignore[call-overload]
        # Patches say nothing of the second opinion, which has two numbers of its own.
        network.scale.requires_grad_(False)
        network.offset.requires_grad_(False)

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of a batch of patches."""
        inputs, regions = (part.flatten(0, 1) for part in batch)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        return fractures.region_loss(self.network.unet(inputs).float(), regions)


@torch.inference_mode()
def answer(network: RegionUNet, vertebra: Vertebra) -> Any:
    """The network's answer for one whole vertebra, on the CPU; regions are probabilities, 0 away from the bone."""
    batch = collate([vertebra.read()])
    inputs = network_input(batch.planes_hu, batch.masks)
    device = next(network.parameters()).device
    said = network(inputs.to(device))
    near = F.max_pool2d(batch.masks, 7, 1, 3) > 0.25
    return said._replace(logits=said.logits[0].float().cpu(), regions=(said.regions.float().sigmoid().cpu() * near)[0])


def draw_round(
    unknown: Sequence[Vertebra], network: RegionUNet, plan: RegionsPlan, folder: Path, trainer: lightning.Trainer
) -> list[Vertebra]:
    """Draws the regions of fractured vertebrae without a box; gives those in which it saw any.

    Each process draws its share; a round that was interrupted goes on.
    """
    (folder / "drawn").mkdir(parents=True, exist_ok=True)
    network.to(trainer.strategy.root_device)
    for vertebra in unknown[trainer.global_rank :: trainer.world_size]:
        path = folder / "drawn" / f"{vertebra.key}.npz"
        if not path.exists():
            mask = answer(network, vertebra).regions.numpy() >= plan.threshold
            with replacing_file(path) as unfinished, unfinished.open("wb") as file:
                np.savez_compressed(file, regions=mask if mask.sum() >= MIN_PIXELS else np.zeros_like(mask))
    network.cpu()
    trainer.strategy.barrier()
    return [v for v in (_with_drawn(vertebra, folder / "drawn") for vertebra in unknown) if v.regions_known]


def _with_drawn(vertebra: Vertebra, folder: Path) -> Vertebra:
    path = folder / f"{vertebra.key}.npz"
    if vertebra.regions_known or not path.exists():
        return vertebra
    with np.load(path) as arrays:
        seen = bool(arrays["regions"].any())
    return replace(vertebra, drawn=path, regions_known=True) if seen else vertebra


def measure(network: RegionUNet, vertebrae: Sequence[Vertebra], threshold: float) -> dict[str, Any]:
    """On whole vertebrae with known regions: how well pixels near bone are ranked, and vertebrae, beside constants.

    dice: of all fractured vertebrae together; of the constant, every pixel near the bone is fracture.
    """
    truths, scores, opinions = [], [], []
    overlap = drawn = broken = everywhere = 0
    for vertebra in vertebrae:
        stack, said = vertebra.read(), answer(network, vertebra)
        opinions.append(float(said.logits))
        near = (said.regions > 0).numpy() & (stack.masks > 64)
        probability = said.regions.numpy()
        # Of millions of pixels, every seventh ranks them well enough.
        truths.append(stack.regions[near][::7])
        scores.append(probability[near][::7])
        if vertebra.fractured:
            mask = probability >= threshold
            overlap += int((mask & stack.regions).sum())
            drawn += int(mask.sum())
            broken += int(stack.regions.sum())
            everywhere += int(near.sum())
    truth, score = np.concatenate(truths), np.concatenate(scores)
    fractured = np.array([vertebra.fractured for vertebra in vertebrae])
    inside = int(sum((v.read().regions & (v.read().masks > 64)).sum() for v in vertebrae if v.fractured))
    return {
        "num_vertebrae": len(vertebrae),
        "num_fractured": int(fractured.sum()),
        "pixel_average_precision": rounded(average_precision(truth, score)),
        "dice": round(2 * overlap / max(drawn + broken, 1), 4),
        "vertebra_auc": rounded(roc_auc(fractured, np.array(opinions))),
        "constants": {
            "pixel_average_precision": rounded(truth.mean()),
            "dice": round(2 * inside / max(everywhere + broken, 1), 4),
            "vertebra_auc": 0.5,
        },
    }
