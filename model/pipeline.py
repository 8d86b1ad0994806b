"""Volume in, Analysis out: find the vertebrae, judge each, say it as findings.

The one straight line through the model; `model.load_pipeline` is how others reach it. It reads no DICOM and writes no
files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.bundle import Bundle, Networks, read_bundle
from model.calibrate import Platt
from model.classify import Verdict, as_regions, attention_by_instance, draw_regions, judge
from model.findings import Analysis, Finding, Findings, LevelFinding, ModelInfo, PatientFinding, Region, SliceWeight
from model.hounsfield import check_values
from model.levels import LEVELS, OUTPUTS
from model.networks import VertebraUNet
from model.quality import reasons_not_to_judge
from model.resample import BODY_HU
from model.segment import Vertebra, find_vertebrae
from model.volume import Volume

PATIENT = OUTPUTS[0]

MAX_EXTENT_MM = 700.0
"""So much of a whole body is looked at, from its upper end: arms above the head, head and neck. It bounds the coarse
U-Net's time and memory, which grow with the extent."""


_NOT_FOUND = "Not found in the field of view"


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model, ready to analyse one volume after another."""

    bundle: Bundle
    networks: Networks
    device: torch.device

    @property
    def info(self) -> ModelInfo:
        """Which model this is."""
        return self.bundle.info

    def analyse(self, volume: Volume, *, on_stage: Callable[[str], None] | None = None) -> Analysis:
        """Findings and masks of one volume; the same volume gives the same answer on the same machine.

        on_stage: called with "segment" and "classify" as each begins.

        Raises:
            SeriesError: the voxels are not Hounsfield units.
        """
        begin = on_stage or (lambda stage: None)
        begin("segment")
        started = time.perf_counter()
        labels, vertebrae = self.segment(volume)
        segmented = time.perf_counter()
        begin("classify")
        analysis = self.judge(volume, labels, vertebrae)
        timings_s = {"segment": segmented - started, "classify": time.perf_counter() - segmented}
        return replace(analysis, findings=replace(analysis.findings, timings_s=timings_s))

    @torch.inference_mode()
    def segment(self, volume: Volume) -> tuple[NDArray[np.uint8], list[Vertebra]]:
        """The first step: labels on the source grid and what was found, as `find_vertebrae` gives them.

        Raises:
            SeriesError: the voxels are not Hounsfield units.
        """
        check_values(volume)
        networks, bundle = self.networks, self.bundle
        planes = _head_end(volume)
        labels, vertebrae = find_vertebrae(
            _slices_of(volume, planes),
            networks.unet,
            bundle.segment,
            self.device,
            refiner=networks.refiner,
            refine=bundle.refine,
        )
        if labels.shape == volume.grid.shape:
            return labels, vertebrae
        whole = np.zeros(volume.grid.shape, np.uint8)
        whole[planes] = labels
        return whole, vertebrae

    @torch.inference_mode()
    def judge(self, volume: Volume, labels: NDArray[np.uint8], vertebrae: list[Vertebra]) -> Analysis:
        """The second step: findings on vertebrae that were found; `timings_s` is empty."""
        reasons = reasons_not_to_judge(volume, labels, vertebrae)
        judged = [vertebra for vertebra in vertebrae if vertebra.label not in reasons]
        judgement = judge(volume, labels, judged, self.networks, self.bundle, self.device)
        fractures, saliency = np.zeros(volume.grid.shape, np.uint8), np.zeros(volume.grid.shape, np.uint8)
        by_label = {vertebra.label: vertebra for vertebra in vertebrae}
        levels = {
            name: self._level(
                volume,
                by_label.get(label),
                judgement.verdicts.get(label),
                reasons.get(label, ""),
                fractures,
                saliency,
            )
            for label, name in enumerate(LEVELS, start=1)
        }
        findings = Findings(
            study_instance_uid=volume.study_instance_uid,
            series_instance_uid=volume.series_instance_uid,
            model=self.info,
            patient_overall=self._patient(levels, judgement.patient_logit),
            levels=levels,
            warnings=(*volume.warnings, *_warnings(levels)),
        )
        logits = {LEVELS[label - 1]: verdict.logit for label, verdict in judgement.verdicts.items()}
        if judgement.patient_logit is not None:
            logits[PATIENT] = judgement.patient_logit
        return Analysis(findings=findings, vertebrae=labels, fractures=fractures, saliency=saliency, logits=logits)

    def _probability(self, output: str, logit: float) -> float:
        """Calibrated, where the bundle says how."""
        return self.bundle.calibration.get(output, Platt()).probability(logit)

    def _patient(self, levels: dict[str, LevelFinding], logit: float | None) -> PatientFinding:
        """The patient's finding, in accord with the levels': "any of them" is at least as probable as each of them.

        Absent only where all levels were judged: what was not seen may be broken.
        """
        if logit is None:
            return PatientFinding(probability=None, finding=Finding.UNDETERMINED)
        probability = max(self._probability(PATIENT, logit), *(level.probability or 0.0 for level in levels.values()))
        is_present = probability >= self.info.operating_point or any(
            level.finding is Finding.PRESENT for level in levels.values()
        )
        if is_present:
            return PatientFinding(probability=probability, finding=Finding.PRESENT)
        is_whole = all(level.finding is not Finding.UNDETERMINED for level in levels.values())
        return PatientFinding(probability=probability, finding=Finding.ABSENT if is_whole else Finding.UNDETERMINED)

    def _level(
        self,
        volume: Volume,
        vertebra: Vertebra | None,
        verdict: Verdict | None,
        reason: str,
        fractures: NDArray[np.uint8],
        saliency: NDArray[np.uint8],
    ) -> LevelFinding:
        """One level's finding; draws its fracture regions and saliency on these grids when the finding is present.

        reason: why there is no verdict on a vertebra that is there.
        """
        if vertebra is None:
            return LevelFinding(
                in_field_of_view=False, probability=None, finding=Finding.UNDETERMINED, reason=_NOT_FOUND
            )
        x, y, z = (float(value) for value in vertebra.centroid_lps_mm)
        probability, finding = None, Finding.UNDETERMINED
        attention: tuple[SliceWeight, ...] = ()
        regions: tuple[Region, ...] = ()
        if verdict is not None:
            level = LEVELS[vertebra.label - 1]
            probability = self._probability(level, verdict.logit)
            finding = Finding.PRESENT if probability >= self.info.level_operating_points[level] else Finding.ABSENT
            attention = attention_by_instance(verdict, vertebra.centroid_lps_mm, volume.grid, volume.slices)
            if finding is Finding.PRESENT:
                threshold = self.bundle.classify.region_threshold
                boxes = draw_regions(fractures, saliency, vertebra.label, verdict, volume.grid, threshold)
                regions = as_regions(boxes, volume.slices)
        return LevelFinding(
            in_field_of_view=True,
            probability=probability,
            finding=finding,
            reason=reason,
            centroid_lps_mm=(x, y, z),
            volume_mm3=vertebra.volume_mm3,
            attention=attention,
            regions=regions,
        )


def load_pipeline(bundle: Path | None = None, device: str = "auto", num_threads: int | None = None) -> Pipeline:
    """The pipeline of a bundle (None: the one that comes with the package), weights verified and loaded.

    device: "auto" takes a GPU if there is one; otherwise "cpu" or a torch device. num_threads: CPU threads; None leaves
    torch's choice.

    Raises:
        BundleError: the bundle is missing, damaged or of another architecture.
        ValueError: there is no such device.
    """
    verified = read_bundle(bundle)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    on = _device(device)
    networks = verified.load_networks()
    for network in networks.by_file().values():
        is_3d = isinstance(network, VertebraUNet)
        network.to(on, memory_format=torch.channels_last_3d if is_3d else torch.channels_last)  # type: ignore[call-overload]
    return Pipeline(bundle=verified, networks=networks, device=on)


def _head_end(volume: Volume) -> slice:
    """The planes to seek the neck in: all, but of a whole body only MAX_EXTENT_MM from its upper end down."""
    num_planes = volume.grid.shape[0]
    num_kept = int(MAX_EXTENT_MM / volume.grid.spacing_mm[0])
    if num_kept >= num_planes:
        return slice(0, num_planes)
    step = max(1, min(volume.grid.shape[1:]) // 64)
    imaged = np.flatnonzero((volume.voxels_hu[:, ::step, ::step] > BODY_HU).any(axis=(1, 2)))
    if volume.grid.affine[2, 0] < 0:
        first = int(imaged[0]) if len(imaged) else 0
        return slice(first, min(first + num_kept, num_planes))
    end = int(imaged[-1]) + 1 if len(imaged) else num_planes
    return slice(max(end - num_kept, 0), end)


def _slices_of(volume: Volume, planes: slice) -> Volume:
    """A view of these planes as a Volume of its own."""
    voxels_hu = volume.voxels_hu[planes]
    grid = volume.grid.part(np.array([planes.start, 0, 0]), voxels_hu.shape)
    return replace(volume, voxels_hu=voxels_hu, grid=grid, slices=volume.slices[planes])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {name!r} is not usable here. Choose auto, cpu, cuda or cuda:N.") from error
    return device


def _warnings(levels: dict[str, LevelFinding]) -> list[str]:
    """What the reader of the findings must know about what was not judged."""
    if all(level.reason == _NOT_FOUND for level in levels.values()):
        return ["No cervical vertebra was found: nothing was judged. Is this a CT of the neck?"]
    names_by_reason: dict[str, list[str]] = {}
    for name, level in levels.items():
        names_by_reason.setdefault(level.reason, []).append(name)
    return [f"{reason}, not judged: {', '.join(names)}." for reason, names in names_by_reason.items() if reason]
