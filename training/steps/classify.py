"""The fracture network: CNN per slice, BiGRU over slices, attention; is this vertebra fractured?

At the end the network is asked about every vertebra of every study: the held-out fold's answers are data for `study`
and `calibrate`, the others' are what `study` learns from.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.classification import BinaryAUROC

from model.classify import ask
from model.levels import LEVELS
from model.networks import FractureNet
from training import fractures
from training.evaluation import average_precision, roc_auc
from training.files import write_json, write_npz
from training.rsna import NUM_FOLDS, Cache, Study, cut_settings
from training.steps import regions as regions_step
from training.steps.augment import MAX_SHIFT, Sample, augmented, mixed, plain
from training.steps.fit import StepData, adamw, fit, load_weights, new_network
from training.steps.run import Run, fold_folder, read_options, read_result, rounded
from training.steps.stacks import Vertebra, both_kinds, judged_vertebrae

FRACTURED_WEIGHT = 2.0
"""How many times as often as an intact vertebra a fractured one is drawn."""


@dataclass(frozen=True, kw_only=True)
class ClassifyPlan:
    """cut: name of the stacks. The network's arguments are those of `model.networks.FractureNet`. mixup: share of
    samples that are mixtures. start: "regions" begins with the encoder that `regions` trained, "random" without.
    mirrored: the network is asked about mirror images, too (`ClassifySettings`)."""

    cut: str
    encoder: str
    num_hidden: int
    num_heads: int
    num_layers: int
    dropout: float
    mixup: float
    start: str
    mirrored: bool

    def new_network(self) -> FractureNet:
        """Untrained."""
        return FractureNet(
            self.encoder,
            self.num_hidden,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            dropout=self.dropout,
        )


def classify(run: Run, plan: ClassifyPlan) -> dict[str, Any]:
    """Trains one fold's network and writes its answers for all studies; what it measured, beside constants."""
    drawn = ("regions",) if plan.start == "regions" else ()
    if plan.start == "regions":
        regions_step.require_same(run.work, run.fold, cut=plan.cut, encoder=plan.encoder)
    cache = Cache.open(run.cache)
    network = new_network(plan.new_network, run)
    regions_step.check_slices(plan.cut, plan.encoder, cut_settings(cache, plan.cut).num_pixels, network.stride)
    folder = run.begin("classify", f"cut {plan.cut}", *drawn, **asdict(plan))
    if (folder / "result.json").exists():
        return read_result(run.work, "classify", run.fold)
    seen = judged_vertebrae(cache.studies([fold for fold in range(NUM_FOLDS) if fold != run.fold]), plan.cut)
    held_out = judged_vertebrae(cache.studies([run.fold]), plan.cut)

    # 1. What the region network has learned: bone with gaps in it, and where those gaps are.
    if plan.start == "regions":
        seen = regions_step.with_drawn(seen, run.work, run.fold)
        network.encoder.load_state_dict(regions_step.trained_network(run.work, run.fold).unet.encoder.state_dict())

    # 2. What to conclude from a whole vertebra.
    both_kinds(seen, f"What is not in fold {run.fold}")
    weights = [FRACTURED_WEIGHT if vertebra.fractured else 1.0 for vertebra in seen]
    data = StepData(run, VertebraSet(seen, plan.mixup), weights, VertebraSet(held_out, None))
    trainer = fit(FractureTraining(network, run.learning_rate), network, data, folder)

    # 3. Answers for all.
    (folder / "answers").mkdir(exist_ok=True)
    network.to(trainer.strategy.root_device)
    for study in cache.studies()[trainer.global_rank :: trainer.world_size]:
        write_answers(study, plan, network, folder / "answers")
    trainer.strategy.barrier()
    answers = [read_answers(folder, study) for study in cache.studies([run.fold])]
    seen_share = np.mean([vertebra.fractured for vertebra in seen])
    result = measure(np.array([a.logits for a in answers]), np.array([a.fractured for a in answers]), float(seen_share))
    if trainer.is_global_zero:
        write_json(folder / "result.json", result)
    return result


def trained_network(work: Path, fold: int) -> tuple[FractureNet, ClassifyPlan]:
    """A finished fold's network, and how it was made."""
    options = read_options(work, "classify", fold)
    plan = ClassifyPlan(**{name: options[name] for name in ClassifyPlan.__dataclass_fields__})
    network = plan.new_network()
    load_weights(network, fold_folder(work, "classify", fold))
    return network, plan


class VertebraSet(Dataset[Sample]):
    """Whole vertebrae. mixup: share of mixtures; None leaves all as analysis sees them."""

    def __init__(self, vertebrae: Sequence[Vertebra], mixup: float | None) -> None:
        self.vertebrae, self.mixup = vertebrae, mixup
        self.of_level: dict[int, list[int]] = defaultdict(list)
        for index, vertebra in enumerate(vertebrae):
            self.of_level[vertebra.level].append(index)

    def __len__(self) -> int:
        return len(self.vertebrae)

    def __getitem__(self, drawn: tuple[int, int] | int) -> Sample:
        if not isinstance(drawn, tuple) or self.mixup is None:
            return _plain(self.vertebrae[drawn[0] if isinstance(drawn, tuple) else drawn])
        index, seed = drawn
        rng = np.random.default_rng(seed)
        sample = _augmented(self.vertebrae[index], rng)
        if rng.random() < self.mixup:
            other = int(rng.choice(self.of_level[self.vertebrae[index].level]))
            sample = mixed(sample, _augmented(self.vertebrae[other], rng), rng)
        return sample


def _plain(vertebra: Vertebra) -> Sample:
    return plain(vertebra.read(), fractured=vertebra.fractured, known=vertebra.regions_known, level=vertebra.level)


def _augmented(vertebra: Vertebra, rng: np.random.Generator) -> Sample:
    stack = vertebra.read(shift=int(rng.integers(-MAX_SHIFT, MAX_SHIFT + 1)))
    return augmented(stack, rng, fractured=vertebra.fractured, known=vertebra.regions_known, level=vertebra.level)


class FractureTraining(lightning.LightningModule):
    """Verdict, regions where they are known, attention on slices with a region: the losses of `training.fractures`."""

    def __init__(self, network: FractureNet, learning_rate: float) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.learning_rate = learning_rate
        self.auc = BinaryAUROC()

    def training_step(self, batch: Sample, batch_index: int) -> Tensor:
        """The loss of a batch of vertebrae."""
        said = self.network(batch.inputs, batch.level)
        verdict = F.binary_cross_entropy_with_logits(said.logits.float(), batch.fractured)
        known = batch.known > 0
        # Summed over what is known, times nothing where that is nothing: every weight has a gradient at every step.
        regions = fractures.region_loss(said.regions.float()[known], batch.regions[known]) if known.any() else 0.0
        attention = fractures.attention_loss(said.attention.float(), batch.regions * batch.known[:, None, None, None])
        loss: Tensor = 2 * verdict + regions + attention + 0 * said.regions.sum()
        self.log_dict({"train/loss": loss, "train/verdict": verdict}, prog_bar=True)
        return loss

    def validation_step(self, batch: Sample, batch_index: int) -> None:
        """Cross-entropy and AUC over vertebrae of the held-out fold."""
        logits = self.network(batch.inputs, batch.level).logits.float()
        verdict = F.binary_cross_entropy_with_logits(logits, batch.fractured)
        self.auc.update(logits, batch.fractured.int())
        self.log("held-out/verdict", verdict, prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """The AUC of all, if there are both kinds."""
        truths = torch.cat(self.auc.target) if isinstance(self.auc.target, list) else self.auc.target
        if truths.any() and not truths.all():
            self.log("held-out/auc", self.auc.compute(), prog_bar=True)
        self.auc.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, one cycle."""
        return adamw(self, self.learning_rate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a fracture network said of a study's C1..C7, each array `(7, ...)`; NaN and 0 where it was not asked.

    logits, contexts: of the network. present: which levels it was asked about. fractured: the study's labels.
    """

    logits: NDArray[np.float32]
    contexts: NDArray[np.float32]
    present: NDArray[np.bool_]
    fractured: NDArray[np.bool_]


@torch.inference_mode()
def write_answers(study: Study, plan: ClassifyPlan, network: FractureNet, folder: Path) -> None:
    """Asks about all judged vertebrae of a study, of which there may be none; what is there already is kept."""
    path = folder / f"{study.study_instance_uid}.npz"
    if path.exists():
        return
    stacks = study.stacks(plan.cut)
    logits = np.full(len(LEVELS), np.nan, np.float32)
    contexts = np.zeros((len(LEVELS), network.head.in_features), np.float32)
    if stacks is not None and stacks.judged.any():
        vertebrae = judged_vertebrae([study], plan.cut)
        samples = [_plain(vertebra) for vertebra in vertebrae]
        device = next(network.parameters()).device
        inputs, levels = (torch.stack([getattr(s, name) for s in samples]) for name in ("inputs", "level"))
        said = ask(network, inputs, levels, device, mirrored=plan.mirrored)
        places = [vertebra.level for vertebra in vertebrae]
        logits[places] = said.logits.numpy()
        contexts[places] = said.context.numpy()
    write_npz(path, logits=logits, contexts=contexts)


def read_answers(folder: Path, study: Study) -> Answers:
    """What the network of a finished fold, in `folder`, said of a study."""
    with np.load(folder / "answers" / f"{study.study_instance_uid}.npz") as arrays:
        logits = arrays["logits"]
        return Answers(
            logits=logits,
            contexts=arrays["contexts"],
            present=~np.isnan(logits),
            fractured=np.array(study.levels),
        )


def measure(logits: NDArray[np.float32], fractured: NDArray[np.bool_], constant: float) -> dict[str, Any]:
    """Over all vertebrae that were judged, beside a constant: the share of fractured ones in the other folds."""
    judged = ~np.isnan(logits)
    truth, score = fractured[judged], logits[judged].astype(float)
    by_level = {
        level: rounded(roc_auc(fractured[here, i], logits[here, i]))
        for i, level in enumerate(LEVELS)
        if (here := judged[:, i]).any() and 0 < fractured[here, i].mean() < 1
    }
    return {
        "num_vertebrae": int(judged.sum()),
        "num_fractured": int(truth.sum()),
        "cross_entropy": rounded(np.mean(np.logaddexp(0, score) - truth * score)),
        "auc": rounded(roc_auc(truth, score)),
        "average_precision": rounded(average_precision(truth, score)),
        "auc_by_level": by_level,
        "constants": {
            "cross_entropy": rounded(-np.mean(np.where(truth, np.log(constant), np.log(1 - constant)))),
            "auc": 0.5,
            "average_precision": rounded(truth.mean()),
        },
    }
