"""How the shipped model is made: the story, start to end. `cspine-train necks` calls it.

No patient here has a labelled vertebra. Necks drawn from a hand-made atlas teach what vertebrae are and in which order
they come; real planning CTs, which the network labels itself where their contours agree, teach what they look like;
fractures inserted into drawn bone teach what is broken.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model.bundle import (
    Bundle,
    ClassifySettings,
    Networks,
    RefineSettings,
    SegmentSettings,
    TrainingData,
    write_bundle,
)
from model.classify import ask, network_input
from model.findings import ModelInfo
from model.levels import OUTPUTS
from model.networks import FractureNet, VertebraUNet
from model.segment import find_vertebrae
from training.calibration import fit_platt
from training.evaluation.loss import LEVEL_PREVALENCE
from training.fractures import train_fracture_net
from training.necks.atlas import load_atlas
from training.necks.measures import measure_drawn
from training.necks.openkbp import RealNeck, holds_neck, read_contours
from training.necks.rounds import pseudo_labels
from training.necks.samples import (
    COARSE_MM,
    FINE_MM,
    read_real,
    write_drawn,
    write_patient_stacks,
    write_phantom,
    write_real,
    write_stacks_of_drawn,
)
from training.necks.stacks import FindVertebrae
from training.necks.train import AuxiliaryUNet, guess_path, train_necks, write_guess
from training.phantom_measures import auc, choose_operating_point
from training.samples import write_all, write_stacks
from training.vertebra_stacks import collate, read_stack

logger = logging.getLogger(__name__)

SEGMENT = SegmentSettings(channels=(8, 24, 64, 112, 160), spacing_mm=COARSE_MM, continued_mm=150.0)
REFINE = RefineSettings(channels=(8, 24, 48, 80, 96), in_channels=4, spacing_mm=FINE_MM)
COARSE_CROP, FINE_CROP = (80, 48, 64), (80, 80, 64)

CLASSIFY = ClassifySettings(
    encoder="residual-24-48-96-160",
    num_hidden=64,
    num_slices=15,
    num_pixels=112,
    pixel_mm=0.75,
    region_threshold=0.5,
    mirrored=True,
)
VERSION = "0.12.0"
TRAINED_ON = (
    "Trained without one labelled patient: on necks drawn from an atlas and a phantom, on unlabelled planning CT, and "
    "on fractures that were put into drawn and real bone. It has never seen a real fracture, nor RSNA data: its "
    "probabilities are not validated on patients."
)
TRAINING_DATA = (
    TrainingData(
        name="SPL/NAC Head and Neck Atlas 2016 (Open Anatomy)",
        licence="3D Slicer licence (believed; the atlas's repository does not state it)",
        use="label map from which necks are drawn; inserted fractures",
    ),
    TrainingData(
        name="OpenKBP",
        licence="MIT",
        use="planning CT with contours, no vertebra labels: coarse network; bone that fractures are put into",
    ),
    TrainingData(name="cspine phantom", licence="MIT", use="drawn necks and fractures"),
)

HELD_OUT_SEED = 20261125
FIRST_HELD_OUT_STACK = 100_000
NUM_HELD_OUT = 40
MIN_CORD_POINTS = 8
KNOWS_FROM = 5
"""The round from which on the coarse network's own borders label necks, too."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of everything; by default about as much as made the shipped weights (`training/LOG.md`).

    num_patients: real necks whose vertebrae, as they are and broken, the fracture network sees too. fracture_steps: on
    patches, then on stacks, in cycles that each begin with what the last one learned.
    """

    num_coarse: int = 1100
    num_fine: int = 1400
    num_phantoms: int = 90
    num_stacks: int = 820
    num_phantom_stacks: int = 60
    num_patients: int = 100
    num_held_out_stacks: int = 90
    num_held_out_series: int = 8
    coarse_steps: tuple[int, ...] = (1800, 1300, 12500, 7800, 2600, 9000)
    fine_steps: tuple[int, ...] = (2000, 8900, 1350, 3600, 1250)
    fracture_steps: tuple[tuple[int, int], ...] = (
        (5700, 5400),
        (11000, 3650),
        (8000, 2700),
        (1500, 3000),
        (1800, 1700),
        (1000, 3000),
        (800, 9500),
    )
    batch_size: int = 4
    num_workers: int = 2

    @classmethod
    def quick(cls, num_workers: int) -> "Plan":
        """Just enough to run every step once."""
        return cls(
            num_coarse=4,
            num_fine=4,
            num_phantoms=2,
            num_stacks=6,
            num_phantom_stacks=2,
            num_patients=2,
            num_held_out_stacks=6,
            num_held_out_series=1,
            coarse_steps=(2, 2),
            fine_steps=(2, 2),
            fracture_steps=((2, 2), (2, 2)),
            num_workers=num_workers,
        )


def held_out_patients(folder: Path) -> tuple[list[Path], list[Path]]:
    """OpenKBP's patients to train on, and NUM_HELD_OUT that hold a whole neck to judge by; always the same."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder} holds no OpenKBP patients (*.npz). Name the folder `openkbp` of the data.")
    whole = [path for path in paths if holds_neck(read_contours(path))]
    drawn = np.random.default_rng(HELD_OUT_SEED).choice(len(whole), min(NUM_HELD_OUT, len(whole) // 3), replace=False)
    held_out = sorted(whole[index] for index in drawn)
    return [path for path in paths if path not in held_out], held_out


def train_vertebrae(data: Path, work: Path, plan: Plan) -> tuple[VertebraUNet, VertebraUNet]:
    """The coarse network and the refiner, from the atlas and the unlabelled necks in `data`."""
    atlas = work / "atlas.npz"
    load_atlas(data / "atlas" / "HN-Atlas-labels.nrrd", atlas)
    training, _ = held_out_patients(data / "openkbp")

    # 1. Draw necks for both networks, and read the real ones.
    drawn = _all(write_drawn, work / "coarse", range(plan.num_coarse), plan.num_workers, atlas, False)
    phantoms = _all(write_phantom, work / "coarse-phantoms", range(plan.num_phantoms), plan.num_workers, False)
    fine = _all(write_drawn, work / "fine", range(plan.num_fine), plan.num_workers, atlas, True)
    fine_phantoms = _all(write_phantom, work / "fine-phantoms", range(plan.num_phantoms), plan.num_workers, True)
    unet = AuxiliaryUNet(VertebraUNet(SEGMENT.channels))
    real = [read_real(path, unet.unet.stride) for path in training]
    weak = list(_write_weak(real, work / "weak"))

    # 2. The coarse network, first from what is sure, then also from what it has understood itself.
    torch.set_num_threads(plan.num_workers)
    sources = [(0.72, drawn), (0.28, weak)]
    for number, num_steps in enumerate(plan.coarse_steps):
        if number:
            folder = work / f"round-{number}"
            trust, knows = (0.15 if number == 1 else 0.5), number >= KNOWS_FROM
            believed = list(pseudo_labels(unet.unet, real, trust, folder, knows=knows))
            logger.info("round %d believes %d of %d necks", number, len(believed), len(real))
            # A young network may label no neck likely enough: it goes on with what is sure.
            sources = [(0.42, drawn), (0.42, believed or weak), (0.08, weak), (0.08, phantoms)]
        steps = train_necks(
            unet,
            sources,
            num_steps=num_steps,
            learning_rate=2e-3 if number else 3e-3,
            norm_share=0.3 if number else 0.5,
            level_weight=1.5 if number else 0.75,
            shape=COARSE_CROP,
            seed=number,
        )
        _follow(f"coarse network, round {number}", steps, num_steps)
        _keep(unet, work / f"coarse-{number}.pt")

    # 3. The refiner, from drawn bone alone: outlines are the same in any neck. First it is told guesses that are made
    # up, then what the coarse network really says.
    refiner = AuxiliaryUNet(VertebraUNet(REFINE.channels, REFINE.in_channels))
    for number, num_steps in enumerate(plan.fine_steps):
        for path in (*fine, *fine_phantoms):
            if number:
                write_guess(unet.unet, path)
            else:
                guess_path(path).unlink(missing_ok=True)  # an earlier run's
        steps = train_necks(
            refiner,
            [(0.88, fine), (0.12, fine_phantoms)],
            num_steps=num_steps,
            learning_rate=2e-3 if number else 3e-3,
            norm_share=0.3 if number else 0.5,
            level_weight=2.0 if number else 0.75,
            shape=FINE_CROP,
            refine=True,
            seed=number,
        )
        _follow(f"refiner, round {number}", steps, num_steps)
        _keep(refiner, work / f"fine-{number}.pt")
    _take_mean(refiner, work, "fine", len(plan.fine_steps))
    return unet.unet, refiner.unet


def train_necks_bundle(data: Path, out: Path, work: Path, plan: Plan) -> Bundle:
    """Draws, trains, calibrates and exports to `out`.

    data: holds `atlas/HN-Atlas-labels.nrrd` and `openkbp/`. work: folder for what is drawn; a later run uses it again.
    """
    torch.manual_seed(0)  # of the first weights; each training has its own seed
    unet, refiner = train_vertebrae(data, work, plan)
    find = _finder(unet, refiner)
    training, _ = held_out_patients(data / "openkbp")
    network = train_fractures(work, plan, unet, find, training)
    seeds = range(FIRST_HELD_OUT_STACK, FIRST_HELD_OUT_STACK + plan.num_held_out_stacks)
    held_out = _all(write_stacks_of_drawn, work / "stacks", seeds, plan.num_workers, work / "atlas.npz", CLASSIFY, find)
    with torch.inference_mode():
        drawn = measure_drawn(find, work / "atlas.npz", range(plan.num_held_out_series))
    return export(out, unet, refiner, network, held_out, drawn)


def train_fractures(
    work: Path, plan: Plan, unet: VertebraUNet, find: FindVertebrae, patients: list[Path]
) -> FractureNet:
    """The fracture network, from fractures inserted into drawn necks, phantoms, and real necks.

    Of drawn necks alone it said 0.5 to 0.6 of every real vertebra (`training/LOG.md`). find: as `_finder` gives it.
    patients: of OpenKBP.
    """
    workers, seeds, phantom_seeds = plan.num_workers, range(plan.num_stacks), range(plan.num_phantom_stacks)
    stacks = _all(write_stacks_of_drawn, work / "stacks", seeds, workers, work / "atlas.npz", CLASSIFY, find)
    stacks += _all(write_stacks, work / "phantom-stacks", phantom_seeds, workers, SEGMENT, CLASSIFY, unet)
    for path in patients[: plan.num_patients]:
        write_patient_stacks(work / "patients" / path.name, path, find, CLASSIFY)
    stacks += sorted((work / "patients").glob("[!.]*.npz"))
    network = FractureNet(CLASSIFY.encoder, CLASSIFY.num_hidden, num_heads=CLASSIFY.num_heads, dropout=0.3)
    torch.set_num_threads(plan.num_workers)
    for number, (num_patch_steps, num_stack_steps) in enumerate(plan.fracture_steps):
        steps = train_fracture_net(
            network,
            stacks,
            num_patch_steps=num_patch_steps,
            num_stack_steps=num_stack_steps,
            batch_size=plan.batch_size,
            seed=2 + number,
            is_for_patients=True,
        )
        _follow(f"fracture network, cycle {number}", steps, num_patch_steps + num_stack_steps)
        _keep(network, work / f"fractures-{number}.pt")
    _take_mean(network, work, "fractures", len(plan.fracture_steps))
    return network


def mean_weights(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of networks of which each went on from the last: right more often than either, on real bone above all.

    Reference: Wortsman et al., Model soups, ICML 2022. Whole numbers, which only count, are the last one's.
    """
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if last.is_floating_point() else last
        for name, last in states[-1].items()
    }


def _finder(unet: VertebraUNet, refiner: VertebraUNet) -> FindVertebrae:
    return partial(
        find_vertebrae, network=unet, settings=SEGMENT, device=torch.device("cpu"), refiner=refiner, refine=REFINE
    )


def export(
    out: Path,
    unet: VertebraUNet,
    refiner: VertebraUNet,
    network: FractureNet,
    held_out: list[Path],
    drawn: dict[str, float],
) -> Bundle:
    """The finished bundle in `out`, calibrated on necks that nothing was trained on.

    held_out: stacks as `write_stacks_of_drawn` makes them. drawn: what `measure_drawn` found.
    """
    logits, truths = vertebra_logits(network, held_out)
    # Training saw fractures BOOST times as often as RSNA's patients have them: each counts as often as in those.
    share = float(LEVEL_PREVALENCE.mean())
    weights = np.where(truths, share / truths.mean(), (1 - share) / (1 - truths.mean()))
    platt = fit_platt(logits, truths, weights)
    threshold = choose_operating_point(logits, truths)
    operating_point = platt.probability(float(np.log(threshold / (1 - threshold))))
    bundle = Bundle(
        folder=out,
        info=ModelInfo(
            name="cspine-necks", version=VERSION, trained_on=TRAINED_ON, operating_point=round(operating_point, 4)
        ),
        segment=SEGMENT,
        refine=REFINE,
        classify=CLASSIFY,
        calibration=dict.fromkeys(OUTPUTS, platt),
        training_data=TRAINING_DATA,
        metrics={
            "held_out_drawn": {
                "num_vertebrae": len(truths),
                "num_fractured": int(truths.sum()),
                "vertebra_auc": round(auc(logits, truths), 4),
                "vertebra_sensitivity": round(float((logits[truths] >= np.log(threshold / (1 - threshold))).mean()), 4),
            },
            "held_out_drawn_dice": {name: round(value, 4) for name, value in drawn.items()},
        },
    )
    write_bundle(bundle, Networks(unet=unet, refiner=refiner, fracture_nets=(network,)))
    return bundle


@torch.inference_mode()
def vertebra_logits(network: FractureNet, paths: list[Path]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Logit and truth of every vertebra in cached stacks."""
    network.eval()
    logits, truths = [], []
    for path in paths:
        with np.load(path) as arrays:
            truth = arrays["fractured"]
        batch = collate([read_stack(path, index) for index in range(len(truth))])
        inputs, levels = network_input(batch.planes_hu, batch.masks), torch.zeros(len(truth), dtype=torch.int64)
        said = ask(network, inputs, levels, torch.device("cpu"), mirrored=CLASSIFY.mirrored)
        logits.append(said.logits.double().numpy())
        truths.append(truth)
    return np.concatenate(logits), np.concatenate(truths)


def _all(write: object, folder: Path, seeds: range, num_workers: int, *settings: object) -> list[Path]:
    paths: list[Path] = []
    for path in write_all(write, folder, seeds, num_workers, *settings):  # type: ignore[arg-type]
        paths.append(path)
        if len(paths) % 25 == 0:
            logger.info("%s: %d of %d", folder.name, len(paths), len(seeds))
    return [path for path in paths if path.exists()]


def _write_weak(necks: list[RealNeck], folder: Path) -> Iterator[Path]:
    for neck in necks:
        if len(neck.cord_lps_mm) >= MIN_CORD_POINTS:
            write_real(folder / f"{neck.name}.npz", neck, neck.cord_lps_mm)
            yield folder / f"{neck.name}.npz"


def _follow(what: str, steps: Iterator[tuple[int, float]], num_steps: int) -> None:
    """Runs a training, with a line of progress every 50 steps."""
    recent: list[float] = []
    for step, loss in steps:
        recent.append(loss)
        if step % 50 == 49:
            logger.info("%s: %d of %d, loss %.3f", what, step + 1, num_steps, float(np.mean(recent)))
            recent.clear()


def _take_mean(network: nn.Module, work: Path, name: str, num: int) -> None:
    """The mean of what the last two of `num` rounds kept (`_keep`)."""
    paths = [work / f"{name}-{number}.pt" for number in range(num)[-2:]]
    network.load_state_dict(mean_weights([torch.load(path, weights_only=True) for path in paths]))


def _keep(network: nn.Module, path: Path) -> None:
    """Weights of a step, so that a run that is cut off need not begin anew."""
    torch.save(network.state_dict(), path)
