"""How the networks of a bundle answer together, and how logits become findings; networks are small and untrained."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.bundle import (
    Bundle,
    ClassifySettings,
    Networks,
    RegionSettings,
    SegmentSettings,
    StudySettings,
    write_bundle,
)
from model.calibrate import Challenge, Platt
from model.classify import Judgement, judge, network_input
from model.findings import Analysis, Finding, ModelInfo
from model.geometry import Grid
from model.levels import OUTPUTS
from model.networks import FractureAnswer
from model.pipeline import Pipeline, load_pipeline
from model.pose import middle_of_box
from model.segment import Vertebra
from model.volume import Volume
from tests import factories

CPU = torch.device("cpu")
GRID = Grid.axial(shape=(30, 24, 24), spacing_mm=(1.0, 1.0, 1.0))
BUNDLE = Bundle(
    folder=Path("nowhere"),
    info=ModelInfo(name="m", version="1", trained_on="Nothing.", operating_point=0.5),
    segment=SegmentSettings(channels=(4, 8), spacing_mm=3.0),
    classify=ClassifySettings(
        encoder="residual-4-8", num_hidden=4, num_slices=5, num_pixels=16, pixel_mm=1.5, region_threshold=0.5
    ),
    metrics={},
)


def make_networks(bundle: Bundle, seed: int = 0) -> Networks:
    torch.manual_seed(seed)
    networks = bundle.new_networks()
    for network in networks.by_file().values():
        network.eval()
    return networks


def make_volume() -> Volume:
    rng = np.random.default_rng(0)
    return factories.make_volume(rng.normal(300, 300, GRID.shape).astype(np.int16), GRID)


def make_vertebrae() -> tuple[np.ndarray, list[Vertebra]]:
    """C2, C3 and C4 as slabs one above the other, C4 cut by the field of view."""
    labels = np.zeros(GRID.shape, np.uint8)
    vertebrae = []
    for label, (first, last) in {2: (20, 30), 3: (10, 20), 4: (0, 10)}.items():
        labels[first:last, 4:20, 4:20] = label
        points = GRID.to_lps_mm(np.argwhere(labels == label).astype(float))
        vertebrae.append(
            Vertebra(
                label=label,
                centroid_lps_mm=points.mean(axis=0),
                volume_mm3=float(len(points)),
                lower_lps_mm=points.min(axis=0),
                upper_lps_mm=points.max(axis=0),
                middle_lps_mm=middle_of_box(points),
                is_cut=label == 4,
            )
        )
    return labels, vertebrae


def judged(bundle: Bundle, networks: Networks) -> Judgement:
    labels, vertebrae = make_vertebrae()
    with torch.inference_mode():
        return judge(make_volume(), labels, vertebrae, networks, bundle, CPU)


def logits(judgement: Judgement) -> np.ndarray:
    return np.array([verdict.logit for verdict in judgement.verdicts.values()])


def test_the_patient_is_as_likely_fractured_as_the_likeliest_level() -> None:
    judgement = judged(BUNDLE, make_networks(BUNDLE))

    assert list(judgement.verdicts) == [2, 3, 4]
    assert judgement.patient_logit == max(logits(judgement))


def test_folds_are_averaged() -> None:
    first, second = make_networks(BUNDLE, 1), make_networks(BUNDLE, 2)
    both = Networks(unet=first.unet, fracture_nets=first.fracture_nets + second.fracture_nets)

    alone = [judged(BUNDLE, networks) for networks in (first, second)]
    together = judged(replace(BUNDLE, num_folds=2), both)

    np.testing.assert_allclose(logits(together), (logits(alone[0]) + logits(alone[1])) / 2, rtol=1e-4)
    np.testing.assert_allclose(together.verdicts[3].attention.sum(), 1, rtol=1e-5)
    regions = [judgement.verdicts[3].regions for judgement in alone]
    torch.testing.assert_close(together.verdicts[3].regions, (regions[0] + regions[1]) / 2)


class LeftSide(nn.Module):
    """Calls fractured what is bright on the left side of the image, and takes every slice for a region."""

    def forward(self, x: torch.Tensor, levels: torch.Tensor) -> FractureAnswer:
        left = x[:, :, 2, :, :4].mean(dim=(2, 3))
        return FractureAnswer(left.mean(1), left.softmax(1), x[:, :, 2], left, left)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirrored_bundle_looks_at_both_sides(mirrored: bool) -> None:
    bundle = replace(BUNDLE, classify=replace(BUNDLE.classify, mirrored=mirrored))
    networks = replace(make_networks(BUNDLE), fracture_nets=(LeftSide(),))
    volume, (labels, vertebrae) = make_volume(), make_vertebrae()
    volume.voxels_hu[..., :10] = 1500

    image = replace(volume, voxels_hu=np.ascontiguousarray(volume.voxels_hu[..., ::-1]))
    one, other = (judge(each, labels, vertebrae, networks, bundle, CPU) for each in (volume, image))

    assert np.allclose(logits(one), logits(other), atol=0.01) == mirrored
    torch.testing.assert_close(one.verdicts[3].regions, other.verdicts[3].regions.flip(-1), atol=0.01, rtol=0)


def test_each_vertebra_is_judged_by_the_head_of_its_level() -> None:
    bundle = replace(BUNDLE, classify=replace(BUNDLE.classify, num_heads=7))
    networks = make_networks(bundle)
    (network,) = networks.fracture_nets
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.evidence_weight)
    network.head.bias.data = torch.arange(7.0)

    np.testing.assert_allclose(logits(judged(bundle, networks)), [1, 2, 3])


def test_the_study_network_corrects_levels_and_speaks_for_the_patient() -> None:
    bundle = replace(BUNDLE, study=StudySettings(num_hidden=4))
    networks = make_networks(bundle)
    (study_net,) = networks.study_nets
    before = judged(bundle, networks)

    nn.init.constant_(study_net.level_head.bias, 2.0)
    nn.init.constant_(study_net.patient_head.bias, -1.0)
    after = judged(bundle, networks)

    np.testing.assert_allclose(logits(before), logits(judged(BUNDLE, networks_without_study(networks))), rtol=1e-5)
    np.testing.assert_allclose(logits(after), logits(before) + 2, rtol=1e-5)
    assert after.patient_logit == pytest.approx(max(logits(after)) - 1)


def networks_without_study(networks: Networks) -> Networks:
    return replace(networks, study_nets=())


def test_the_region_network_draws_and_has_a_say_by_its_weight() -> None:
    bundle = replace(BUNDLE, regions=RegionSettings(encoder="residual-4-8", weight=0.25))
    networks = make_networks(bundle)
    alone = judged(BUNDLE, replace(networks, region_net=None))
    assert networks.region_net is not None
    networks.region_net.scale.data.zero_()
    networks.region_net.offset.data = torch.tensor(4.0)
    nn.init.constant_(networks.region_net.unet.head.bias, 20.0)

    together = judged(bundle, networks)

    np.testing.assert_allclose(logits(together), 0.75 * logits(alone) + 0.25 * 4, rtol=1e-4)
    assert together.verdicts[3].regions.max() > 0.99
    assert together.verdicts[3].regions.min() == 0  # outside the vertebra


def test_windows_are_those_of_the_bundle() -> None:
    planes_hu = torch.tensor([-3000.0, -700, 300, 1800, 4000]).reshape(1, 5, 1, 1).expand(1, 5, 2, 2)
    masks = torch.ones(1, 1, 2, 2)

    assert network_input(planes_hu, masks)[0, 0, :5, 0, 0].tolist() == [-2, -2, 0, 3, 3]
    assert network_input(planes_hu, masks, (-700.0, 3300.0))[0, 0, :5, 0, 0].tolist() == [-2, -2, -0.75, 1.125, 3]


def doubt_only_what_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume is random and would be doubted as a whole (`test_quality.py`)."""
    monkeypatch.setattr(
        "model.pipeline.reasons_not_to_judge",
        lambda *found: {one.label: "Cut by the field of view" for one in found[2] if one.is_cut},
    )


def analysed(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, networks: Networks) -> Analysis:
    monkeypatch.setattr("model.pipeline.find_vertebrae", lambda *_, **__: make_vertebrae())
    doubt_only_what_is_cut(monkeypatch)
    return Pipeline(bundle=bundle, networks=networks, device=CPU).analyse(make_volume())


def make_certain(logit: float) -> Networks:
    networks = make_networks(BUNDLE)
    (network,) = networks.fracture_nets
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.evidence_weight)
    nn.init.constant_(network.head.bias, logit)
    return networks


def test_a_bundle_with_every_network_is_loaded_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubt_only_what_is_cut(monkeypatch)
    bundle = replace(
        BUNDLE,
        folder=tmp_path,
        segment=SegmentSettings(encoder="efficientnet-b0", spacing_mm=2.0),
        classify=replace(BUNDLE.classify, encoder="efficientnet-b0", num_pixels=32, num_heads=7, num_layers=2),
        num_folds=2,
        study=StudySettings(num_hidden=4),
        regions=RegionSettings(encoder="residual-4-8", weight=0.5),
    )
    write_bundle(bundle, bundle.new_networks())
    pipeline = load_pipeline(tmp_path, device="cpu")

    labels, _ = pipeline.segment(make_volume())
    analysis = pipeline.judge(make_volume(), *make_vertebrae())

    assert labels.shape == GRID.shape
    assert analysis.logits.keys() == {"C2", "C3", "patient_overall"}
    assert all(np.isfinite(logit) for logit in analysis.logits.values())


def test_probabilities_are_calibrated_by_output_and_logits_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = replace(BUNDLE, calibration={"C3": Platt(scale=2.0, offset=-1.0), "patient_overall": Platt(offset=5.0)})

    analysis = analysed(monkeypatch, bundle, make_certain(0.5))

    found = analysis.findings
    assert analysis.logits == {"C2": 0.5, "C3": 0.5, "patient_overall": 0.5}
    assert found.levels["C2"].probability == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert found.levels["C3"].probability == pytest.approx(0.5)
    assert found.patient_overall.probability == pytest.approx(1 / (1 + np.exp(-5.5)))


def test_the_patient_is_at_least_as_probably_fractured_as_any_level(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = replace(BUNDLE, calibration={"patient_overall": Platt(offset=-9.0)})

    found = analysed(monkeypatch, bundle, make_certain(1.0)).findings

    assert found.patient_overall.probability == found.levels["C2"].probability
    assert found.patient_overall.finding is Finding.PRESENT


def test_a_level_may_have_an_operating_point_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = replace(BUNDLE, info=replace(BUNDLE.info, level_operating_points={"C3": 0.1}))

    found = analysed(monkeypatch, bundle, make_certain(-1.0)).findings  # 27 %

    assert found.levels["C2"].finding is Finding.ABSENT
    assert found.levels["C3"].finding is Finding.PRESENT
    assert found.patient_overall.finding is Finding.PRESENT


def test_a_cut_level_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = analysed(monkeypatch, BUNDLE, make_certain(0.0))

    assert analysis.findings.levels["C4"].finding is Finding.UNDETERMINED
    assert analysis.findings.levels["C4"].reason == "Cut by the field of view"
    assert analysis.findings.levels["C3"].reason == ""
    assert analysis.findings.levels["C5"].reason == "Not found in the field of view"
    assert "C4" not in analysis.logits
    assert "Cut by the field of view, not judged: C4." in analysis.findings.warnings


def test_the_challenge_gets_numbers_of_its_own() -> None:
    challenge = Challenge(
        platt=dict.fromkeys(OUTPUTS, Platt(scale=2.0)) | {"C1": Platt(offset=1.0)},
        undetermined={name: 0.1 * i for i, name in enumerate(OUTPUTS)},
    )

    row = challenge.row({"patient_overall": 0.0, "C1": -1.0, "C2": 800.0})

    assert list(row) == list(OUTPUTS)
    assert (row["patient_overall"], row["C1"], row["C2"]) == (0.5, 0.5, 1.0)
    assert row["C7"] == pytest.approx(0.7)
