"""Lightning's Trainer as every step uses it: progress bar, curves, checkpoints, averaged weights, resuming.

A run that was killed goes on from its last checkpoint when the same command is given again. First weights depend on the
seed; which samples are drawn, how they are changed and what dropout hides on the seed and the step, not on how many
processes draw them or on a kill.
"""

import hashlib
import logging
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from model.bundle import write_weights
from training.files import replacing_file
from training.schedule import EMA_DECAY, WARM_UP_STEPS
from training.steps.run import Run, StepError

Network = TypeVar("Network", bound=nn.Module)

WEIGHTS = "weights.safetensors"
"""A finished step's averaged weights, in its folder."""

WEIGHT_DECAY, MAX_GRADIENT_NORM = 1e-2, 2.0


def new_network(make: Callable[[], Network], run: Run) -> Network:
    """An untrained network, the same each time for the same seed.

    Raises:
        StepError: it cannot be built: there is no such encoder, or it needs a package that is not installed.
    """
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    try:
        return make()
    except (ValueError, ModuleNotFoundError) as error:
        raise StepError(str(error)) from error


class Draws(Sampler[tuple[int, int]]):
    """Which samples an epoch sees: `(index, seed)` pairs, drawn by weight, the seed for all that is random in it.

    Each process of several takes its own share of the same draws.
    """

    def __init__(self, weights: Sequence[float], num_draws: int, seed: int, rank: int, num_processes: int) -> None:
        self.weights = np.asarray(weights, float) / np.sum(weights)
        self.num_draws = max(1, num_draws // num_processes)
        self.seed, self.rank, self.num_processes = seed, rank, num_processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, also when it goes on from a checkpoint."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        total = self.num_draws * self.num_processes
        indices = rng.choice(len(self.weights), size=total, p=self.weights)
        seeds = rng.integers(1 << 62, size=total)
        mine = slice(self.rank, None, self.num_processes)
        return iter(list(zip(indices[mine].tolist(), seeds[mine].tolist(), strict=True)))


class StepData(lightning.LightningDataModule):
    """A training set to draw from, and a fixed one to watch.

    train: its `__getitem__` takes an `(index, seed)` of `Draws`. watch: shown after each epoch; it decides nothing.
    """

    def __init__(self, run: Run, train: "Dataset[object]", weights: Sequence[float], watch: "Dataset[object]") -> None:
        super().__init__()
        self.run, self.train, self.weights, self.watch = run, train, weights, watch

    def train_dataloader(self) -> "DataLoader[object]":
        """Batches of one epoch."""
        assert self.trainer is not None
        draws = Draws(
            self.weights, self.run.num_draws, self.run.seed, self.trainer.global_rank, self.trainer.world_size
        )
        return self._loader(self.train, sampler=draws)

    def val_dataloader(self) -> "DataLoader[object]":
        """The samples to watch, in order."""
        return self._loader(self.watch)

    def _loader(self, dataset: "Dataset[object]", sampler: Draws | None = None) -> "DataLoader[object]":
        workers = self.run.num_workers
        return DataLoader(
            dataset,
            batch_size=self.run.batch_size,
            sampler=sampler,
            drop_last=sampler is not None and len(sampler) >= self.run.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Forked, a worker would inherit torch's threads, and hang.
            multiprocessing_context="spawn" if workers else None,
            pin_memory=torch.cuda.is_available(),
        )


class StepSeed(Callback):
    """Seeds each step by itself: what dropout hides is the same whether the run was killed before it or not.

    Not each epoch: loaders draw from the same source when they begin, which is at another time after a kill.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Another seed for each step and process."""
        rng = np.random.default_rng([self.seed, trainer.global_step, trainer.global_rank])
        torch.manual_seed(int(rng.integers(1 << 62)))


class Divergence(Callback):
    """Ends a training that diverged after the epoch that did, rather than after days."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Looks at the losses that were shown, and at the weights."""
        refuse_diverged(trainer, trainer.callback_metrics | pl_module.state_dict())


def refuse_diverged(trainer: lightning.Trainer, values: Mapping[str, Tensor]) -> None:
    """Refuses losses or weights, by name, that are no numbers: what such a network says can look like good answers.

    Raises:
        StepError: one of these, or of another process's, is not finite.
    """
    wrong = next((name for name, value in values.items() if not value.isfinite().all()), None)
    if not trainer.strategy.reduce_boolean_decision(wrong is None):
        raise StepError(
            f"Training diverged: {wrong or 'a value of another process'} is not finite. Start it again with --fresh "
            "and a smaller --learning-rate."
        )


def adamw(module: lightning.LightningModule, learning_rate: float) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` gives: AdamW, warmed up and then down to zero along a cosine, step by step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    total = int(module.trainer.estimated_stepping_batches)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepModule(lightning.LightningModule, ABC, Generic[Network]):
    """A network and its loss, `loss_of` a batch, shown under `loss_name` of training and of the held-out fold."""

    loss_name = "loss"

    def __init__(self, network: Network, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    @abstractmethod
    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch."""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The loss of a batch to learn from."""
        loss = self.loss_of(batch)
        self.log(f"train/{self.loss_name}", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """The same of the held-out fold."""
        self.log(f"held-out/{self.loss_name}", self.loss_of(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, one cycle."""
        return adamw(self, self.learning_rate)


def fit(module: lightning.LightningModule, network: nn.Module, data: StepData, folder: Path) -> lightning.Trainer:
    """Trains `network`, which is `module.network`, and leaves its averaged weights in it and in the folder.

    No epoch is chosen by what the held-out fold says of it, so that this fold stays data that nothing was fitted to.
    What was finished already is only loaded; the trainer is connected to the other processes either way.

    Raises:
        StepError: the training diverged, or Lightning cannot train so here.
    """
    run = data.run
    _quiet()
    lightning.seed_everything(run.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it, where bf16 or fp16 is not used
    trainer = _trainer(run, folder)
    last = folder / "last.ckpt"
    module.train()
    if last.exists():
        logging.getLogger(__name__).info("going on from %s", last)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    # The averaged weights are the checkpoint's, whether this process trained to the end or found that one had.
    averaged = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    mine = {key.removeprefix("network."): value for key, value in averaged.items() if key.startswith("network.")}
    refuse_diverged(trainer, mine)
    network.cpu().load_state_dict(mine)
    network.eval()
    if trainer.is_global_zero:
        save_weights(network, folder / WEIGHTS)
    trainer.strategy.barrier()
    return trainer


def save_weights(network: nn.Module, path: Path) -> None:
    """A network's weights as safetensors."""
    with replacing_file(path) as unfinished:
        write_weights(network, unfinished)


def load_weights(network: nn.Module, folder: Path) -> nn.Module:
    """The network with a finished step's weights, in evaluation mode."""
    network.load_state_dict(load_file(folder / WEIGHTS))
    return network.eval()


def weights_digest(folder: Path) -> str:
    """Of a finished step's weights, in a few letters."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:12]


def _trainer(run: Run, folder: Path) -> lightning.Trainer:
    """Lightning's, with all that a step needs.

    Raises:
        StepError: there are no such devices here, or no such strategy or precision on them.
    """
    callbacks = [
        # The latest one: what `save_last` keeps beside no other is written at the end of a run only.
        ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        WeightAveraging(avg_fn=_averaged),
        StepSeed(run.seed),
        Divergence(),
        LearningRateMonitor("step"),
        TQDMProgressBar(refresh_rate=10),
    ]
    try:
        return lightning.Trainer(
            accelerator="auto",
            devices=_devices(run.devices),
            num_nodes=run.num_nodes,
            strategy=run.strategy,
            precision=_precision(run.precision),  # type: ignore[arg-type]
            max_epochs=run.num_epochs,
            default_root_dir=folder,
            logger=TensorBoardLogger(folder, name="curves", version=""),
            callbacks=callbacks,
            use_distributed_sampler=False,
            gradient_clip_val=MAX_GRADIENT_NORM,
            log_every_n_steps=25,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise StepError(
            f"Lightning cannot train with --devices {run.devices}, --num-nodes {run.num_nodes}, "
            f"--strategy {run.strategy} and --precision {run.precision} here: {error}"
        ) from error


def _averaged(kept: Tensor, new: Tensor, num_averaged: Tensor | int) -> Tensor:
    """As `training.schedule` averages: over more steps the longer the run is."""
    if not kept.is_floating_point():
        return new
    num = float(num_averaged)
    return torch.lerp(kept, new, 1 - min(EMA_DECAY, (1 + num) / (10 + num)))


def _devices(devices: str) -> str | int | list[int]:
    """ "auto", a number of devices, or a list of their numbers ("0,2")."""
    if "," in devices:
        return [int(number) for number in devices.split(",") if number]
    return int(devices) if devices.lstrip("-").isdigit() else devices


def _precision(precision: str) -> str:
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def _quiet() -> None:
    """Leaves out what Lightning says of itself at every fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
