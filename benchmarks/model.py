"""The model, from DICOM files to findings: stage by stage, by number of slices, and beside the winners' compute.

    make model-bench           # 300 x 512 x 512 at 0.8 x 0.5 x 0.5 mm, five rounds, from the repository's root

A phantom is written as an uncompressed Series to a temporary folder; reading it comes from the page cache. In each
round everything takes its turn, so that whatever else the machine does falls on all; figures are medians. A stage's
seconds are its own, without those of stages inside it. Peak memory is that of a whole process which does nothing else.
What takes how long does not depend on the weights, if they find the vertebrae; the number found is printed.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.runtimes import runtimes
from benchmarks.winners import winners_networks
from model import Analysis, Volume, read_series
from model.geometry import Grid
from model.phantom import Anatomy, Fracture, Phantom, default_grid, render, write_series
from model.pipeline import Pipeline, load_pipeline

NECK_MM, PIXEL_MM = 240.0, 0.5

STAGES = {
    "model.series._decode": "decode",
    "model.pipeline.check_values": "what cannot be judged",
    "model.segment.body_volume": "pool and crop the body",
    "model.segment._refined": "crop for the refiner",
    "model.segment.one_chain": "one chain of vertebrae",
    "model.segment._draw": "draw on the source grid",
    "model.segment._describe": "measure the vertebrae",
    "model.pipeline.reasons_not_to_judge": "what cannot be judged",
    "model.pipeline.judge": "cut stacks",
    "model.pipeline.attention_by_instance": "back to Instances",
    "model.pipeline.draw_regions": "back to Instances",
}
"""Functions by the stage their own seconds count for; those that are not there are passed over."""

READ, REST = "read headers, stack", "the rest"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way from disk to findings. stages_s: in the order in which they ended. calls: networks and their inputs."""

    total_s: float
    stages_s: dict[str, float]
    calls: dict[str, tuple[nn.Module, tuple[Tensor, ...]]]
    analysis: Analysis


class Stopwatch:
    """Seconds by stage; a stage inside another is taken from the outer one."""

    def __init__(self) -> None:
        self.stages_s: dict[str, float] = defaultdict(float)
        self._inner_s: list[float] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._inner_s.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - started
            self.stages_s[name] += took_s - self._inner_s.pop()
            if self._inner_s:
                self._inner_s[-1] += took_s

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="of model weights; the shipped one without it")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--growth", type=int, nargs="*", default=[100, 300, 600, 1000], metavar="SLICES")
    parser.add_argument("--only", nargs="+", choices=("stages", "winners", "runtimes", "growth"), metavar="PART")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: some minutes")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pipeline = load_pipeline(options.bundle, options.device, options.threads)
    if options.peak_of:
        _print_peak(pipeline, options.peak_of)
        return
    parts = options.only or ("stages", "winners", "runtimes", "growth")
    _print_machine(pipeline, options.threads)
    with tempfile.TemporaryDirectory(prefix="cspine-model-") as name:
        phantom = _phantom(options.slices)
        paths = write_series(phantom, Path(name) / "series")
        first = _run(pipeline, paths)  # warm-up: page cache, and what the libraries set up at their first call
        found = sum(level.in_field_of_view for level in first.analysis.findings.levels.values())
        judged = sum(level.probability is not None for level in first.analysis.findings.levels.values())
        print(f"Found {found} of 7 levels, judged {judged}; refiner: {pipeline.networks.refiner is not None}")
        _side_by_side(pipeline, paths, first, parts, options)
        if "stages" in parts:
            print(f"Peak memory of a process that does this once: {_peak(paths[0].parent, options)}")
        if "growth" in parts:
            _growth(pipeline, phantom, Path(name), options)
    print(f"Load at the end: {os.getloadavg()[0]:.1f}")


def _print_machine(pipeline: Pipeline, num_threads: int) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    is_cuda = pipeline.device.type == "cuda"
    device = torch.cuda.get_device_name(pipeline.device) if is_cuda else f"{num_threads} threads"
    print(
        f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}; {device}; torch {torch.__version__}"
    )
    print(f"{pipeline.info.name} {pipeline.info.version}; load {os.getloadavg()[0]:.1f}", flush=True)
    if not is_cuda:
        print("Not measured: CUDA, which was not asked for, or is not there.")


def _phantom(num_slices: int) -> Phantom:
    anatomy = Anatomy.random(7, (Fracture(level="C5", kind="body", width_mm=2.0),))
    return render(anatomy, default_grid(anatomy, (NECK_MM / 300, PIXEL_MM, PIXEL_MM), shape=(num_slices, 512, 512)))


def _run(pipeline: Pipeline, paths: list[Path]) -> Run:
    """From disk to findings, with a stopwatch on every stage."""
    watch = Stopwatch()
    calls: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {}
    names = {id(network): Path(file).stem for file, network in pipeline.networks.by_file().items()}

    def watched(answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(network: nn.Module, batch: Tensor, device: torch.device, *more: Tensor) -> Any:
            calls[names[id(network)]] = network, (batch, *more)
            with watch.stage(names[id(network)]):
                return answer(network, batch, device, *more)

        return call

    with ExitStack() as patches:
        for place, stage in STAGES.items():
            module, _, function = place.rpartition(".")
            original = getattr(sys.modules[module], function, None)
            if original is not None:
                patches.enter_context(patch(place, watch.timed(original, stage)))
        for module in ("model.segment", "model.classify"):
            patches.enter_context(patch(f"{module}.answer", watched(sys.modules[module].answer)))
        started = time.perf_counter()
        with watch.stage(READ):
            volume = read_series(paths)
        with watch.stage(REST):
            analysis = pipeline.analyse(volume)
        total_s = time.perf_counter() - started
    return Run(total_s=total_s, stages_s=dict(watch.stages_s), calls=calls, analysis=analysis)


def _side_by_side(
    pipeline: Pipeline, paths: list[Path], first: Run, parts: tuple[str, ...], options: argparse.Namespace
) -> None:
    """Rounds in which the pipeline, our networks and the winners' take turns, and their medians."""
    device = pipeline.device
    ours = {
        name: (network, tuple(tensor.to(device, copy=True) for tensor in inputs))
        for name, (network, inputs) in first.calls.items()
    }
    theirs = winners_networks(device) if "winners" in parts else {}
    networks = ours | theirs
    ways: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (network, inputs) in ours.items() if "runtimes" in parts else ():
        for way, call in runtimes(network, inputs, device, options.compile).items():
            ways[name, way] = call
    runs: list[Run] = []
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        runs.append(_run(pipeline, paths))
        for name, (network, inputs) in networks.items():
            call = _inference(network, inputs)
            if not number:
                call()
            seconds[name, ""].append(_seconds(call, device))
        for key, call in ways.items():
            seconds[key].append(_seconds(call, device))
    if "stages" in parts:
        _print_stages(runs)
    if theirs:
        _print_networks("Ours", ours, seconds)
        _print_networks("The winners', one of each kind, random weights", theirs, seconds)
        ours_s, theirs_s = (sum(statistics.median(seconds[name, ""]) for name in side) for side in (ours, theirs))
        print(f"Compute of the winners' design over ours: {theirs_s:.2f} s / {ours_s:.2f} s = {theirs_s / ours_s:.1f}")
    if ways:
        _print_runtimes(ours, ways, seconds)


def _inference(network: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    @torch.inference_mode()
    def call() -> Any:
        return network(*inputs)

    return call


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _print_stages(runs: list[Run]) -> None:
    print(f"\n{'stage':<28}{'median s':>10}{'fastest':>9}   of {len(runs)} rounds")
    for stage in runs[0].stages_s:
        values = [run.stages_s[stage] for run in runs]
        print(f"{stage:<28}{statistics.median(values):>10.3f}{min(values):>9.3f}")
    totals = [run.total_s for run in runs]
    print(f"{'from disk to findings':<28}{statistics.median(totals):>10.3f}{min(totals):>9.3f}")


def _print_networks(
    title: str,
    networks: dict[str, tuple[nn.Module, tuple[Tensor, ...]]],
    seconds: dict[tuple[str, str], list[float]],
) -> None:
    print(f"\n{title:<48}{'input':<24}{'M weights':>10}{'GFLOP':>8}{'median s':>10}{'GFLOP/s':>9}")
    for name, (network, inputs) in networks.items():
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(*inputs)
        gflop = counter.get_total_flops() / 1e9
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        median_s = statistics.median(seconds[name, ""])
        shape = " x ".join(map(str, inputs[0].shape))
        print(f"  {name:<46}{shape:<24}{millions:>10.2f}{gflop:>8.0f}{median_s:>10.3f}{gflop / median_s:>9.0f}")


def _print_runtimes(
    networks: dict[str, tuple[nn.Module, tuple[Tensor, ...]]],
    ways: dict[tuple[str, str], Callable[[], Any]],
    seconds: dict[tuple[str, str], list[float]],
) -> None:
    """off: the largest difference of the network's logits from those of plain PyTorch, for how much rounding costs."""
    print(f"\n{'network':<28}{'runtime':<34}{'median s':>10}{'fastest':>9}{'off':>9}")
    for (name, way), call in ways.items():
        plain = _logits(_inference(*networks[name])())
        off = float((_logits(call()) - plain).abs().max())
        values = seconds[name, way]
        print(f"{name:<28}{way:<34}{statistics.median(values):>10.3f}{min(values):>9.3f}{off:>9.1g}")


def _logits(outputs: Any) -> Tensor:
    """The vertebra U-Nets' answer comes last, the fracture network's first."""
    output = outputs[-1] if torch.as_tensor(outputs[-1]).ndim == 5 else outputs[0]
    return torch.as_tensor(output).float().cpu()


def _growth(pipeline: Pipeline, phantom: Phantom, folder: Path, options: argparse.Namespace) -> None:
    """The same neck in more and thinner slices; in each round every number of them has its turn."""
    series = {}
    for num_slices in sorted(options.growth):
        series[num_slices] = write_series(_resliced(phantom, num_slices), folder / str(num_slices), seed=num_slices)
        _run(pipeline, series[num_slices])
    num_rounds = max(1, options.rounds // 2)
    totals: dict[int, list[float]] = {n: [] for n in series}
    for _ in range(num_rounds):
        for n, paths in series.items():
            totals[n].append(_run(pipeline, paths).total_s)
    print(f"\n{'slices':>8}{'slice mm':>10}{'median s':>10}{'ms a slice more':>17}   peak memory")
    before: tuple[int, float] | None = None
    for num_slices, paths in series.items():
        median_s = statistics.median(totals[num_slices])
        more = f"{1000 * (median_s - before[1]) / (num_slices - before[0]):.1f}" if before else ""
        before = num_slices, median_s
        peak = _peak(paths[0].parent, options)
        print(f"{num_slices:>8}{NECK_MM / num_slices:>10.2f}{median_s:>10.2f}{more:>17}   {peak}", flush=True)
        shutil.rmtree(paths[0].parent)


def _resliced(phantom: Phantom, num_slices: int) -> Phantom:
    """The same neck in another number of slices, interpolated between those it has."""
    old = phantom.grid
    step = (old.shape[0] - 1) / (num_slices - 1)
    voxels_hu = np.empty((num_slices, *old.shape[1:]), np.int16)
    for z in range(num_slices):
        below = min(int(z * step), old.shape[0] - 2)
        share = z * step - below
        voxels_hu[z] = (1 - share) * phantom.voxels_hu[below] + share * phantom.voxels_hu[below + 1]
    affine = old.affine.copy()
    affine[:3, 0] *= step
    return replace(phantom, voxels_hu=voxels_hu, grid=Grid(shape=voxels_hu.shape, affine=affine))


def _peak(series: Path, options: argparse.Namespace) -> str:
    """Of a process of its own, as a sentence."""
    command = [sys.executable, "-m", "benchmarks.model", "--device", options.device, "--threads", str(options.threads)]
    command += ["--bundle", str(options.bundle)] if options.bundle else []
    return subprocess.run(
        [*command, "--peak-of", str(series)], check=True, capture_output=True, text=True
    ).stdout.strip()


def _print_peak(pipeline: Pipeline, series: Path) -> None:
    loaded_mb = _resident_mb("VmRSS")
    volume: Volume = read_series(sorted(series.glob("*.dcm")))
    read_mb = _resident_mb("VmHWM")
    pipeline.analyse(volume)
    print(f"{_resident_mb('VmHWM'):.0f} MB (before reading {loaded_mb:.0f}, after it {read_mb:.0f})", end="")
    if pipeline.device.type == "cuda":
        print(f"; on the GPU {torch.cuda.max_memory_allocated(pipeline.device) / 1e6:.0f} MB", end="")


def _resident_mb(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
