"""Reading a Series, by transfer syntax: in the worker process alone, and with its decode processes.

    python -m benchmarks.decode            # 300 x 512 x 512, three repeats, from the repository's root

Both ways take turns; figures are medians. CPU seconds are of the process and its children together.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from pydicom.uid import UID

from model import DecodePool, read_series
from model.phantom import Anatomy, default_grid, render, write_series
from tests.transfer_syntaxes import LOSSLESS, can_encode, convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="KEYWORD", help="such as JPEGLosslessSV1; all without it")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    anatomy = Anatomy.random(7)
    phantom = render(anatomy, default_grid(anatomy, (0.8, 0.5, 0.5), shape=(arguments.slices, 512, 512)))
    with tempfile.TemporaryDirectory(prefix="cspine-decode-") as name, DecodePool() as pool:
        plain = write_series(phantom, Path(name) / "plain")
        print(f"\n{'transfer syntax':<60}{'MB':>6}{'alone s':>9}{'CPU s':>8}{'pool s':>9}{'CPU s':>8}{'gain':>7}")
        for syntax in (uid for uid in LOSSLESS if can_encode(uid) and uid.keyword in (arguments.only or uid.keyword)):
            paths = [Path(shutil.copy(path, Path(name) / path.name)) for path in plain]
            for path in paths:
                convert(path, syntax)
            read_series(paths, decode_pool=pool)  # warm-up: page cache, and the processes have started
            alone, pooled = [], []
            for _ in range(arguments.repeats):
                alone.append(_timed(paths, None))
                pooled.append(_timed(paths, pool))
            megabytes = sum(path.stat().st_size for path in paths) / 1e6
            wall, cpu = (statistics.median(values) for values in zip(*alone, strict=True))
            pool_wall, pool_cpu = (statistics.median(values) for values in zip(*pooled, strict=True))
            print(
                f"{UID(syntax).keyword:<60}{megabytes:>6.0f}{wall:>9.2f}{cpu:>8.2f}{pool_wall:>9.2f}{pool_cpu:>8.2f}"
                f"{wall / pool_wall:>7.2f}",
                flush=True,
            )


def _timed(paths: list[Path], pool: DecodePool | None) -> tuple[float, float]:
    """Wall and CPU seconds of one reading."""
    started, cpu_started = time.perf_counter(), _cpu_s(pool)
    read_series(paths, decode_pool=pool)
    return time.perf_counter() - started, _cpu_s(pool) - cpu_started


def _cpu_s(pool: DecodePool | None) -> float:
    """CPU seconds of this process so far, and of the pool's."""
    processes = [psutil.Process(), *(psutil.Process().children() if pool else [])]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


if __name__ == "__main__":
    main()
