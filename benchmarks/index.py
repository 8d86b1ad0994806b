"""What a committed Instance costs: milliseconds, alone and in batches, on SQLite and PostgreSQL, one process and four.

    python -m benchmarks.index [--instances N]

Each number is the median of three rounds in which the settings take turns, since disks and neighbours drift.
PostgreSQL is a private server as its packages configure it (fsync on), on a Unix socket. "cpu" is that of the writers,
without PostgreSQL's own.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from node.index import Index, NewInstance
from tests.postgresql_server import PostgreSQLServer

ROUNDS = 3


def make_batch(index: Index, association_id: int, series_uid: str, first: int, size: int) -> list[NewInstance]:
    """Instances with headers as large as those of real CT."""
    return [
        NewInstance(
            association_id=association_id,
            calling_ae_title="SCANNER",
            path=index.data_dir / "instances" / series_uid / f"{series_uid}.{number}.dcm",
            headers=[
                {
                    "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
                    "sop_instance_uid": f"{series_uid}.{number}",
                    "series_instance_uid": series_uid,
                    "study_instance_uid": "1.2.826.0.1.3680043.8.498.1",
                    "frame_of_reference_uid": "1.2.826.0.1.3680043.8.498.2",
                    "modality": "CT",
                    "rows": 512,
                    "columns": 512,
                    "instance_number": number,
                    "image_type": ["ORIGINAL", "PRIMARY", "AXIAL"],
                    "pixel_spacing_mm": [0.3515625, 0.3515625],
                    "position_lps_mm": [-90.0, -90.0, 0.625 * number],
                    "orientation": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
                    "rescale_slope": 1.0,
                    "rescale_intercept": -1024.0,
                    "rescale_type": "HU",
                }
            ],
        )
        for number in range(first, first + size)
    ]


def write(data_dir: Path, url: SecretStr | None, series_uid: str, size: int, num: int, told: Any, go: Any) -> None:
    """One writer: `num` Instances in batches of `size`; tells wall and CPU seconds."""
    index = Index(data_dir, url)
    association_id = index.open_association("SCANNER")
    batches = [make_batch(index, association_id, series_uid, n, size) for n in range(0, num, size)]
    index.add_instances(make_batch(index, association_id, series_uid, num, 1), quiet_time_s=30)  # compiles
    go.wait()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for batch in batches:
        index.add_instances(batch, quiet_time_s=30)
    told.put((time.perf_counter() - wall_s, time.process_time() - cpu_s))
    index.close()


def measure(url: SecretStr | None, processes: int, size: int, num: int) -> tuple[float, float]:
    """Wall and CPU milliseconds per Instance; with several processes the wall time that they take together."""
    context = multiprocessing.get_context("spawn")
    told, go = context.SimpleQueue(), context.Barrier(processes)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as folder:
        data_dir = Path(folder).resolve()
        writers = [
            context.Process(target=write, args=(data_dir, url, f"1.2.826.0.1.{n}", size, num, told, go))
            for n in range(processes)
        ]
        for writer in writers:
            writer.start()
        times = [told.get() for _ in writers]
        for writer in writers:
            writer.join()
    total = num * processes
    return 1e3 * max(wall for wall, _ in times) / total, 1e3 * sum(cpu for _, cpu in times) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--instances", type=int, default=320, help="by each writer")
    num = parser.parse_args().instances
    server = PostgreSQLServer(durable=True)
    settings = [
        (kind, processes, size) for processes in (1, 4) for size in (1, 4, 16) for kind in ("SQLite", "PostgreSQL")
    ]
    measured: dict[Any, list[tuple[float, float]]] = {setting: [] for setting in settings}
    try:
        for _ in range(ROUNDS):
            for kind, processes, size in settings:
                url = server.make_database() if kind == "PostgreSQL" else None
                measured[kind, processes, size].append(measure(url, processes, size, num))
    finally:
        server.stop()
    print("database    processes  batch  ms per Instance  cpu ms  Instances/s")
    for kind, processes, size in settings:
        wall, cpu = (statistics.median(values) for values in zip(*measured[kind, processes, size], strict=True))
        print(f"{kind:<10}  {processes:>9}  {size:>5}  {wall:>15.2f}  {cpu:>6.2f}  {1e3 / wall:>11.0f}")


if __name__ == "__main__":
    main()
