"""report.html: what was measured on what, in words, tables and figures. The numbers are those of metrics.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.evaluation import plots
from training.evaluation.froc import FALSE_POSITIVES_PER_STUDY, Events
from training.evaluation.page import folded, page, paragraph, section, subtitle, table, tiles
from training.evaluation.tables import Matched

NOTICE = (
    "Research software, not a medical device. These numbers describe predictions on the Studies named here and nothing "
    "else; they must not be used to decide on the care of a patient."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What a report is made of. metrics: as in metrics.json. froc: curves by unit; empty when no regions were given."""

    metrics: Mapping[str, Any]
    matched: Matched
    froc: Mapping[str, Events] = field(default_factory=dict)


def write_report(report: Report) -> str:
    """The HTML document."""
    metrics, matched = report.metrics, report.matched
    sections = [
        section("Summary", *_summary(metrics)),
        section("Weighted log loss", _log_loss(metrics)),
        section(
            "ROC",
            plots.roc(matched, metrics),
            paragraph("Dots: the operating points, as they were given. Right: each level."),
        ),
        section(
            "Precision and recall",
            plots.precision_recall(matched, metrics),
            paragraph("Dotted: the prevalence, which is what chance reaches."),
        ),
        section("Each level", plots.per_level(metrics), *_ranking_and_calibration(metrics)),
        section("Calls at the operating points", *_calls(metrics)),
        section("Where the fracture is", *_localisation(metrics)),
        section(
            "Calibration",
            plots.reliability(matched, metrics),
            paragraph(
                "Dots: share of fractures among predictions of like probability, 95 % Wilson intervals. Bars: how many."
            ),
            plots.probabilities(matched, metrics),
            paragraph("Dashed: the operating point, where there is one for all."),
        ),
    ]
    if "froc" in metrics:
        sections.append(section("Fracture regions", *_regions(report)))
    if metrics.get("masks") and metrics["masks"]["num_studies"]:
        sections.append(section("Outlines of the vertebrae", *_masks(metrics["masks"])))
    if metrics["subgroups"]:
        sections.append(section("Subgroups", *_subgroups(metrics)))
    if "run" in metrics:
        sections.append(section("The run", *_run(metrics["run"])))
    sections.append(section("Studies without a partner", *_unmatched(metrics)))
    sections.append(section("What was measured, and how", *_method(metrics)))
    date = metrics["created"].replace("T", " ").removesuffix("+00:00")
    measured = f"{metrics['num_studies']} Studies of {metrics['num_patients']} patients"
    return page("Evaluation of fracture predictions", f"{measured}. Made {date} UTC.", sections)


def _summary(metrics: Mapping[str, Any]) -> list[str]:
    patient, levels = metrics["patient_overall"], metrics["all_levels"]
    best = metrics["baselines"]["best_constants"]["weighted_log_loss"]
    figures = tiles(
        [
            ("Weighted log loss", number(metrics["weighted_log_loss"], 4), f"best constants {best:.4f}"),
            ("AUC, patient", number(patient["auc"]), between(patient["auc_ci"])),
            ("AUC, all levels", number(levels["auc"]), between(levels["auc_ci"])),
            ("Sensitivity, patient", number(patient["sensitivity"]), between(patient["sensitivity_ci"])),
            ("Specificity, patient", number(patient["specificity"]), between(patient["specificity_ci"])),
            (
                "Localisation accuracy",
                number(metrics["localisation_accuracy"]),
                between(metrics["localisation_accuracy_ci"]),
            ),
        ]
    )
    apart = (
        f"{metrics['num_only_in_predictions']} Studies are only in the predictions, {metrics['num_only_in_truth']} "
        "only in the truth; they are named below and are part of no number."
    )
    return [paragraph(NOTICE, "notice"), figures, *map(paragraph, (apart, *metrics["warnings"]))]


def _log_loss(metrics: Mapping[str, Any]) -> str:
    names = {
        "all_half": "every probability 0.5",
        "base_rates": "base rates of this truth",
        "best_constants": "best constants on this truth",
    }
    rows = [["these predictions", number(metrics["weighted_log_loss"], 4), between(metrics["weighted_log_loss_ci"], 4)]]
    if challenge := metrics.get("challenge"):
        rows.append(["the model's numbers for the challenge", number(challenge["weighted_log_loss"], 4), ""])
    rows += [[text, number(metrics["baselines"][name]["weighted_log_loss"], 4), ""] for name, text in names.items()]
    return table(["", "weighted log loss", "95 % interval"], rows) + paragraph(
        "The challenge's metric, row-normalised: weight 14 or 7 for a fractured or intact patient, 2 or 1 for a level, "
        "divided by the Study's sum of weights. An undetermined output counts as the base rate."
    )


def _outputs(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"patient": metrics["patient_overall"], **metrics["levels"], "all levels": metrics["all_levels"]}


def _ranking_and_calibration(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(part["num"]),
            str(part["num_positive"]),
            str(part["num_undetermined_positive"] + part["num_undetermined_negative"]),
            with_interval(part, "auc"),
            with_interval(part, "pr_auc"),
            with_interval(part, "brier"),
            number(part["ece"]),
            number(part["log_loss"]),
        ]
        for name, part in _outputs(metrics).items()
    ]
    header = ["", "answers", "fractured", "undetermined", "AUC", "PR-AUC", "Brier", "ECE", "log loss"]
    lacking: dict[str, dict[str, list[str]]] = {}
    for name, part in _outputs(metrics).items():
        for key, reason in part["reasons"].items():
            if not key.endswith("_ci"):
                lacking.setdefault(reason, {}).setdefault(name, []).append(key)
    reasons = [
        f"Not computed ({reason}): {'; '.join(f'{name} ' + ', '.join(keys) for name, keys in outputs.items())}."
        for reason, outputs in lacking.items()
    ]
    return [table(header, rows), *map(paragraph, reasons)]


def _calls(metrics: Mapping[str, Any]) -> list[str]:
    counts = ("true_positives", "false_positives", "true_negatives", "false_negatives")
    shares = ("sensitivity", "specificity", "precision", "accuracy", "f1")
    rows = [
        [
            name,
            number(part["operating_point"]),
            " / ".join(str(part[count]) for count in counts),
            *(with_interval(part, share) for share in shares),
        ]
        for name, part in _outputs(metrics).items()
    ]
    predictive = [
        [name, *(with_interval(part, f"{kind}_at_{percent}_percent") for percent in (5, 10) for kind in ("ppv", "npv"))]
        for name, part in _outputs(metrics).items()
    ]
    return [
        table(["", "point", "TP / FP / TN / FN", "sensitivity", "specificity", "precision", "accuracy", "F1"], rows),
        paragraph(_any_called(metrics["any_called"])),
        paragraph(
            "Sensitivity is recall. Intervals are Wilson's; bootstrap for F1, for all levels together, since the seven "
            "of a patient are not independent, and wherever patients have several Studies."
        ),
        subtitle("At a prevalence as in an emergency department"),
        table(["", "PPV at 5 %", "NPV at 5 %", "PPV at 10 %", "NPV at 10 %"], predictive),
    ]


def _any_called(measured: Mapping[str, Any]) -> str:
    figures = ", ".join(
        f"{name} {number(measured[name])}{in_brackets(measured[f'{name}_ci'])}"
        for name in ("sensitivity", "specificity")
        if measured[name] is not None
    )
    called = "The patient as the node calls it, for its own probability or for that of any level"
    return f"{called}: {figures or 'cannot be computed, no patient has an answer'}."


def _localisation(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            "Localisation accuracy",
            with_interval(metrics, "localisation_accuracy"),
            f"of {metrics['localisation_accuracy_num']} fractured patients, the most probable level is fractured",
        ],
        [
            "Level agreement",
            with_interval(metrics, "level_agreement"),
            f"the same, of the {metrics['level_agreement_num']} that were also called fractured",
        ],
        ["Level accuracy", number(metrics["level_accuracy"]), "of all levels with an answer, called rightly"],
        ["All seven right", with_interval(metrics, "all_levels_right"), "of all patients, every level called rightly"],
        [
            "Mean AUC of levels",
            with_interval(metrics, "mean_level_auc"),
            f"over {metrics['mean_level_auc_num']} levels",
        ],
    ]
    if attention := metrics.get("attention"):
        text = f"of a fractured level's attention on slices with a fracture; even attention: {attention['even']:.3f}"
        rows.append(["Attention alignment", with_interval(attention, "alignment"), text])
    return [table(["", "", ""], rows, is_text=True)]


def _regions(report: Report) -> list[str]:
    froc = report.metrics["froc"]
    keys = [f"sensitivity_at_{limit:g}_fp".replace(".", "_") for limit in FALSE_POSITIVES_PER_STUDY]
    rows = [
        [name, str(part["num_true"]), *(with_interval(part, key) for key in keys)]
        for name, part in (("boxes", froc), ("fractures", froc["fractures"]))
    ]
    header = ["", "true", *(f"at {limit:g} false positives per Study" for limit in FALSE_POSITIVES_PER_STUDY)]
    parts = [
        plots.froc(report.froc).replace("<svg", '<svg class="narrow"', 1),
        table(header, rows),
        paragraph(
            f"A true region is found if a predicted one overlaps it with IoU above {froc['min_iou']}. Boxes: each in "
            "its slice. Fractures: boxes that overlap from slice to slice, as one. "
            f"{froc['num_studies']} Studies: {froc['num_with_boxes']} with boxes, the others intact; "
            f"{froc['num_fractured_without_boxes']} fractured ones without boxes are left out."
        ),
        *_end_of_curves(report.metrics),
    ]
    for key, text in (
        ("boxes_of_other_studies", "Studies with true boxes that were not measured"),
        ("regions_of_other_studies", "Studies with predicted regions that were not measured"),
    ):
        parts += [folded(text, froc[key])] if froc[key] else []
    return parts


def _end_of_curves(metrics: Mapping[str, Any]) -> list[str]:
    """What a model that was run cannot show: regions of what it did not call."""
    froc = metrics["froc"]
    if "run" not in metrics or not froc["num_true"]:
        return []
    key = "false_positives_per_study_at_any_score"
    return [
        paragraph(
            f"Regions of levels that the model does not call are not drawn: the curve ends at {froc[key]:.2f} false "
            f"positives per Study for boxes, at {froc['fractures'][key]:.2f} for fractures. Beyond that, the table has "
            "the sensitivity there."
        )
    ]


def _masks(masks: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            str(part["num_levels"]),
            str(part["num_not_drawn"]),
            number(part["dice"]),
            number(part["hd95_mm_median"], 2),
            number(part["surface_distance_mm"], 2),
            with_interval(part, "identification_rate"),
        ]
        for name, part in ({**masks["levels"], "all levels": masks}).items()
    ]
    header = [
        "",
        "in the truth",
        "not drawn",
        "Dice",
        "HD95, mm (median)",
        "surface distance, mm",
        "identification rate",
    ]
    return [
        table(header, rows),
        paragraph(
            f"{masks['num_studies']} Studies with masks; mean of their mean Dice "
            f"{number(masks['mean_dice'])}{in_brackets(masks['mean_dice_ci'])}. Levels that a mask lacks are left out; "
            f"{masks['num_invented']} such were drawn nevertheless. Identified: the centroid lies within 20 mm of the "
            "true one and nearer to it than to that of any other level."
        ),
        *([folded("Masks that could not be used", _named(masks["problems"]))] if masks["problems"] else []),
    ]


def _run(run: Mapping[str, Any]) -> list[str]:
    model, latency = run["model"], run["latency_s"]
    rows = [
        ["Model", f"{model['name']} {model['version']} (bundle.json {model['sha256'][:12]}…)"],
        ["Trained on", model["trained_on"]],
        ["Device", ", ".join(run["devices"])],
        ["From files to findings", f"{latency['p50']:.2f} s in the median, 95 % within {latency['p95']:.2f} s"],
        ["Of that", f"reading {latency['read_p50']:.2f} s, analysis {latency['analyse_p50']:.2f} s"],
        ["Slices", f"{run['num_slices_p50']:.0f} in the median"],
        ["Peak memory of the process", f"{run['peak_memory_bytes'] / 2**30:.2f} GiB"],
    ]
    return [table(["", ""], rows, is_text=True), folded("Studies without an answer", _named(run["failures"]))]


def _named(reasons: Mapping[str, str]) -> list[str]:
    return [f"{study}: {reason}" for study, reason in reasons.items()]


def _subgroups(metrics: Mapping[str, Any]) -> list[str]:
    parts = [paragraph("Bands: the interval of all Studies. Small groups have wide intervals; differences need care.")]
    header = ["", "Studies", "fractured", "log loss", "AUC, patient", "sensitivity", "specificity", "AUC, all levels"]
    for name, categories in metrics["subgroups"].items():
        rows = [
            [
                category,
                str(group["num_studies"]),
                str(group["patient_overall"]["num_positive"]),
                number(group["weighted_log_loss"]),
                *(with_interval(group["patient_overall"], key) for key in ("auc", "sensitivity", "specificity")),
                with_interval(group["all_levels"], "auc"),
            ]
            for category, group in categories.items()
        ]
        parts += [subtitle(name), plots.subgroup(name, metrics), table(header, rows)]
    return parts


def _unmatched(metrics: Mapping[str, Any]) -> list[str]:
    return [
        folded("Only in the predictions", metrics["only_in_predictions"]),
        folded("Only in the truth", metrics["only_in_truth"]),
    ]


def _method(metrics: Mapping[str, Any]) -> list[str]:
    settings = metrics["settings"]
    points = ", ".join(f"{name} {value:g}" for name, value in settings["operating_points"].items())
    files = [[name.replace("_", " "), entry["file"], entry["sha256"]] for name, entry in metrics["inputs"].items()]
    return [
        table(["", "file", "sha256"], files, is_text=True),
        paragraph(f"Operating points, as given: {points}."),
        paragraph(
            f"Intervals: 95 %. Bootstrap: {settings['num_resamples']} resamples of patients (seed {settings['seed']}); "
            "none where more than 5 % of the resamples have no value, or all the same. PR-AUC is average precision. "
            "ECE has ten bins of equal width. Undetermined answers are left out of everything but the log loss, and "
            "counted."
        ),
    ]


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def between(interval: list[float] | None, digits: int = 3) -> str:
    """An interval, or nothing."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if interval else ""


def in_brackets(interval: list[float] | None) -> str:
    """An interval as it follows a figure in a sentence, or nothing."""
    return f" ({between(interval)})" if interval else ""


def with_interval(measured: Mapping[str, Any], key: str) -> str:
    """A cell: the figure, and below it its interval."""
    return f"{number(measured.get(key))}\n{between(measured.get(f'{key}_ci'))}"
