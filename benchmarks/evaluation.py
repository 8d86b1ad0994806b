"""What an evaluation costs: CPU seconds of one core, from made-up tables in memory to metrics, and to the report.

python -m benchmarks.evaluation [--studies N] [--resamples N]
"""

import argparse
import time

import numpy as np

from model.levels import OUTPUTS
from training.evaluation.metrics import Settings, measure_all
from training.evaluation.report import Report, write_report
from training.evaluation.tables import Matched


def draw(num_studies: int) -> Matched:
    """Labels as frequent as the challenge's, and good predictions."""
    rng = np.random.default_rng(0)
    levels = rng.random((num_studies, 7)) < np.array([0.072, 0.141, 0.036, 0.053, 0.080, 0.137, 0.195])
    truth = np.column_stack([levels.any(axis=1), levels])
    return Matched(
        studies=tuple(f"1.2.{number}" for number in range(num_studies)),
        truth=truth,
        predicted=1 / (1 + np.exp(-(rng.normal(size=truth.shape) + 3 * truth - 2))),
        only_in_predictions=(),
        only_in_truth=(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    matched = draw(options.studies)
    settings = Settings(operating_points=dict.fromkeys(OUTPUTS, 0.5), num_resamples=options.resamples)
    scanners = {study: f"scanner {number % 4}" for number, study in enumerate(matched.studies)}
    for name, subgroups in (("metrics", {}), ("metrics with four subgroups", {"scanner": scanners})):
        started = time.process_time()
        metrics = measure_all(matched, settings, subgroups)
        print(f"{name:<28} {time.process_time() - started:6.2f} s")
    metrics |= {
        "created": "2026-01-01T00:00:00+00:00",
        "inputs": {},
        "settings": {"operating_points": {}, "num_resamples": options.resamples, "seed": 0},
        "num_only_in_predictions": 0,
        "num_only_in_truth": 0,
        "only_in_predictions": [],
        "only_in_truth": [],
        "warnings": [],
    }
    started = time.process_time()
    report = write_report(Report(metrics=metrics, matched=matched))
    print(f"{'report':<28} {time.process_time() - started:6.2f} s, {len(report) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
