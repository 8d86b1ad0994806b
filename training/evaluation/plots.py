"""The figures of the report, each as an SVG to stand in the page: no script, no font, no file beside it.

What is black here takes the colour of the page's text, so that the figures are readable in light and dark.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from model.levels import LEVELS
from training.evaluation.binary import NUM_BINS
from training.evaluation.froc import Events, froc_curves
from training.evaluation.ranking import pr_curve, roc_curve
from training.evaluation.tables import Matched

_INK = "#010203"
"""Stands for the page's text colour."""

_PATIENT, _POOLED, _INTACT = "#d9822b", "#3a8fd0", "#7f8fa3"
_LEVEL_COLOURS = ("#8b7be0", "#4f8fdc", "#25a5b5", "#35a86b", "#a5a02c", "#e08a1e", "#d8573c")
"""C1..C7, head to foot; each reads on white and on near-black."""

_UNIT_SQUARE: dict[str, Any] = {"xlim": (-0.02, 1.02), "ylim": (-0.02, 1.02), "aspect": "equal"}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # names of subgroups are the user's
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": "#8a97a8",
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "path.simplify": True,
}


@contextmanager
def _figure(name: str, width: float, height: float, num_columns: int = 1) -> Iterator[tuple[list[Axes], list[str]]]:
    """Axes to draw on, side by side, sizes in inches; afterwards the list holds the SVG."""
    drawn: list[str] = []
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, num_columns, squeeze=False, gridspec_kw={"wspace": 0.1})
        yield list(axes[0]), drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.append(_for_page(buffer.getvalue()))


def _for_page(svg: str) -> str:
    """The SVG element alone, in the page's colours and font, without the ids that nothing refers to."""
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    end = svg.index(">")
    return re.sub(r' (width|height)="[^"]+"', "", svg[:end]) + svg[end:]


def _answered(matched: Matched, column: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Truth and probability of one output's answers."""
    keep = ~np.isnan(matched.predicted[:, column])
    return matched.truth[keep, column], matched.predicted[keep, column]


def _pooled(matched: Matched) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    keep = ~np.isnan(matched.predicted[:, 1:])
    return matched.truth[:, 1:][keep], matched.predicted[:, 1:][keep]


def _curves(matched: Matched) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Name, colour, width, truth and probability: patient and all levels, then each level; of two classes only."""
    first = [
        ("patient", _PATIENT, 2.2, *_answered(matched, 0)),
        ("all levels", _POOLED, 2.2, *_pooled(matched)),
    ]
    levels = [
        (name, colour, 1.5, *_answered(matched, column))
        for column, (name, colour) in enumerate(zip(LEVELS, _LEVEL_COLOURS, strict=True), start=1)
    ]
    return [each for each in first if 0 < each[3].sum() < len(each[3])], [
        each for each in levels if 0 < each[3].sum() < len(each[3])
    ]


def _of(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The measures of a curve's name."""
    keys = {"patient": "patient_overall", "all levels": "all_levels"}
    found: Mapping[str, Any] = metrics[keys[name]] if name in keys else metrics["levels"][name]
    return found


def roc(matched: Matched, metrics: Mapping[str, Any]) -> str:
    """ROC of patient and pooled levels, with the operating point, and of each level."""
    with _figure("roc", 7.6, 3.7, 2) as (axes, drawn):
        for axis, curves in zip(axes, _curves(matched), strict=True):
            axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", alpha=0.6)
            for name, colour, width, truth, probability in curves:
                measured = _of(metrics, name)
                label = f"{name}  {measured['auc']:.3f}"
                axis.plot(*roc_curve(truth, probability), color=colour, linewidth=width, label=label)
                if measured["specificity"] is not None and measured["sensitivity"] is not None:
                    axis.plot(1 - measured["specificity"], measured["sensitivity"], "o", color=colour, markersize=5)
            axis.set(xlabel="1 - specificity", ylabel="sensitivity", **_UNIT_SQUARE)
            _legend(axis, loc="lower right", title="AUC")
    return drawn[0]


def precision_recall(matched: Matched, metrics: Mapping[str, Any]) -> str:
    """Precision against recall; dotted: the prevalence, which is what chance reaches."""
    with _figure("pr", 7.6, 3.7, 2) as (axes, drawn):
        for axis, curves in zip(axes, _curves(matched), strict=True):
            for name, colour, width, truth, probability in curves:
                axis.axhline(truth.mean(), color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
                label = f"{name}  {_of(metrics, name)['pr_auc']:.3f}"
                axis.plot(*pr_curve(truth, probability), color=colour, linewidth=width, label=label)
            axis.set(xlabel="recall", ylabel="precision", **_UNIT_SQUARE)
            _legend(axis, loc="best", title="PR-AUC")
    return drawn[0]


def reliability(matched: Matched, metrics: Mapping[str, Any]) -> str:
    """Share of fractures in each bin of probability with Wilson intervals, above how many there are."""
    with _figure("reliability", 7.6, 3.9, 2) as (axes, drawn):
        for axis, name, colour in zip(axes, ("patient", "all levels"), (_PATIENT, _POOLED), strict=True):
            measured = _of(metrics, name)
            bins = measured["reliability"]
            axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", alpha=0.6)
            if bins:
                x = [part["mean_probability"] for part in bins]
                y = [part["share_positive"] for part in bins]
                spread = np.abs(np.array([part["share_positive_ci"] for part in bins]).T - y)
                share = [part["num"] / measured["num"] for part in bins]
                middles = [(part["lower"] + part["upper"]) / 2 for part in bins]
                axis.bar(middles, share, width=0.9 / NUM_BINS, color=colour, alpha=0.25, label="share of all")
                axis.errorbar(x, y, yerr=spread, fmt="o-", color=colour, markersize=4, capsize=2, linewidth=1.4)
                axis.set_title(f"{name}: ECE {measured['ece']:.3f}, Brier {measured['brier']:.3f}")
            axis.set(xlabel="probability said", ylabel="share fractured", **_UNIT_SQUARE)
    return drawn[0]


def probabilities(matched: Matched, metrics: Mapping[str, Any]) -> str:
    """How the probabilities of fractured and intact ones are spread; dashed: the operating point."""
    with _figure("probabilities", 7.6, 2.6, 2) as (axes, drawn):
        pairs = (("patient", _answered(matched, 0)), ("all levels", _pooled(matched)))
        for axis, (name, (truth, probability)) in zip(axes, pairs, strict=True):
            edges = np.linspace(0, 1, 31).tolist()
            for kind, colour, of_kind in (("intact", _INTACT, ~truth), ("fractured", _LEVEL_COLOURS[-1], truth)):
                if of_kind.any():
                    weights = np.full(int(of_kind.sum()), 1 / of_kind.sum())
                    axis.hist(probability[of_kind], edges, weights=weights, color=colour, alpha=0.55, label=kind)
            point = _of(metrics, name)["operating_point"]
            if point is not None:
                axis.axvline(point, color=_INK, linestyle="--", linewidth=1)
            axis.set(xlabel=f"probability said, {name}", ylabel="share of its kind", xlim=(0, 1))
            _legend(axis, loc="upper right")
    return drawn[0]


def per_level(metrics: Mapping[str, Any]) -> str:
    """AUC, sensitivity and specificity of each output with their intervals."""
    rows = [metrics["patient_overall"], *metrics["levels"].values()]
    colours = (_PATIENT, *_LEVEL_COLOURS)
    with _figure("levels", 7.6, 2.9, 3) as (axes, drawn):
        for axis, key in zip(axes, ("auc", "sensitivity", "specificity"), strict=True):
            _forest(axis, ("patient", *metrics["levels"]), rows, key, colours)
            axis.set_title({"auc": "AUC"}.get(key, key))
        for axis in axes[1:]:
            axis.set_yticklabels([])
    return drawn[0]


def subgroup(name: str, metrics: Mapping[str, Any]) -> str:
    """Patient's AUC, sensitivity and specificity in each category; the bar behind them: of all Studies."""
    rows = [part["patient_overall"] for part in metrics["subgroups"][name].values()]
    labels = [f"{_cut(category)} (n = {part['num_studies']})" for category, part in metrics["subgroups"][name].items()]
    with _figure(f"subgroup {name}", 7.6, 1.1 + 0.27 * len(rows), 3) as (axes, drawn):
        for axis, key in zip(axes, ("auc", "sensitivity", "specificity"), strict=True):
            interval = metrics["patient_overall"][f"{key}_ci"]
            if interval:
                axis.axvspan(*interval, color=_PATIENT, alpha=0.15, linewidth=0)
            _forest(axis, labels, rows, key, [_PATIENT] * len(rows))
            axis.set_title({"auc": "AUC, patient"}.get(key, key))
        for axis in axes[1:]:
            axis.set_yticklabels([])
    return drawn[0]


def froc(curves: Mapping[str, Events]) -> str:
    """Sensitivity against false positives per Study; of single boxes, and of fractures through several slices."""
    with _figure("froc", 4.6, 3.4) as ((axis,), drawn):
        for (name, events), colour in zip(curves.items(), (_POOLED, _PATIENT), strict=True):
            if events.num_true.sum() == 0:
                continue
            false_positives, sensitivity = froc_curves(events, np.ones((1, len(events.num_true))))
            axis.step(false_positives[0], sensitivity[0], where="post", color=colour, label=name)
        for limit in (0.5, 1, 2):
            axis.axvline(limit, color=_INK, linewidth=0.8, linestyle=":", alpha=0.6)
        axis.set(xlabel="false positives per Study", ylabel="sensitivity", ylim=(-0.02, 1.02), xlim=(-0.05, 4))
        _legend(axis, loc="lower right")
    return drawn[0]


def _forest(
    axis: Axes, labels: Sequence[str], rows: Sequence[Mapping[str, Any]], key: str, colours: Sequence[str]
) -> None:
    """A point and its interval in each row, from the top."""
    for place, (measured, colour) in enumerate(zip(rows, colours, strict=True)):
        value, interval = measured[key], measured[f"{key}_ci"]
        if interval:
            axis.plot(interval, [place, place], color=colour, linewidth=2, alpha=0.6, solid_capstyle="butt")
        if value is not None:
            axis.plot(value, place, "o", color=colour, markersize=5, clip_on=False)
    axis.set_yticks(range(len(rows)), labels)
    lowest = min((end for part in rows for end in _ends(part, key)), default=0.0)
    axis.set(ylim=(len(rows) - 0.5, -0.5), xlim=(math.floor(10 * lowest - 0.1) / 10, 1.01))
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def _ends(measured: Mapping[str, Any], key: str) -> list[float]:
    """All that is drawn of a row."""
    value = measured[key]
    return [] if value is None else [value, *(measured[f"{key}_ci"] or [])]


def _legend(axis: Axes, **options: str) -> None:
    """None where nothing was drawn: of one class only, or without an answer."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**options)


def _cut(text: str) -> str:
    return text if len(text) <= 28 else f"{text[:27]}…"
