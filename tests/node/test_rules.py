"""Which Series are analysed and which one is preferred: patterns, ranges, rules and preferences as tables."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import generate_uid

from model import slice_headers
from node.config import ConfigError, load_config
from node.rules.kernels import kernel_type
from node.rules.match import Outcome, decide, is_preferred, rank, why_preferred
from node.rules.settings import RulesConfig
from node.rules.traits import Traits, describe_series, plane_of
from tests.factories import AXIAL, CORONAL, SAGITTAL, make_ct_series, make_enhanced_ct, make_localizer

NECK = Traits(
    modality="CT",
    body_part="CSPINE",
    series_description="C-Spine 0.6 Br60 ax",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"),
    kernel=("Br60f", "3"),
    kernel_type="bone",
    plane="axial",
    slice_thickness_mm=0.6,
    spacing_mm=0.4,
    num_slices=480,
    rows=512,
    kvp=120,
    manufacturer="SIEMENS",
    model="SOMATOM Force",
    station="CT-ED-1",
    calling_ae_title="CT_ED",
)


def rules(*series: dict[str, Any], **settings: Any) -> RulesConfig:
    return RulesConfig.model_validate({"series": series, **settings})


def matches(when: dict[str, Any], traits: Traits = NECK, unless: dict[str, Any] | None = None) -> bool:
    rule = {"name": "it", "when": when, "unless": unless or {}, "outcome": "skip"}
    return decide(rules(rule), traits).outcome is Outcome.SKIP


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        # A glob is for the whole value and ignores case.
        ({"body_part": "cspine"}, True),
        ({"body_part": "spine"}, False),
        ({"body_part": "*spine"}, True),
        ({"body_part": "?SPINE"}, True),
        ({"body_part": "[BC]SPINE"}, True),
        ({"body_part": ["HEAD", "*SPINE*"]}, True),
        ({"body_part": ["HEAD", "CHEST"]}, False),
        ({"body_part": "C.PINE"}, False),  # a dot is a dot
        # A regular expression is found anywhere and ignores case.
        ({"series_description": "/spine|neck/"}, True),
        ({"series_description": "/^spine/"}, False),
        ({"series_description": r"/\bbr6\d/"}, True),
        # A multi-valued attribute: any one value, or all of them joined.
        ({"kernel": "Br6*"}, True),
        ({"kernel": "3"}, True),
        ({"kernel": "Br60f\\3"}, True),
        ({"kernel": "B60*"}, False),
        ({"image_type": "CT_SOM? SPI"}, True),
        ({"image_type": "ORIGINAL\\PRIMARY*"}, True),
        ({"image_type": "DERIVED"}, False),
        # Numbers, both ends included.
        ({"slice_thickness_mm": {"max": 0.6}}, True),
        ({"slice_thickness_mm": {"min": 0.6}}, True),
        ({"slice_thickness_mm": {"min": 0.61}}, False),
        ({"spacing_mm": {"min": 0.3, "max": 0.5}}, True),
        ({"num_slices": {"min": 500}}, False),
        ({"kvp": 120}, True),
        ({"kvp": 100}, False),
        ({"rows": 512}, True),
        # Words that are computed.
        ({"plane": "axial"}, True),
        ({"plane": ["coronal", "sagittal"]}, False),
        ({"kernel_type": "bone"}, True),
        # The rest of the attributes.
        ({"modality": "CT"}, True),
        ({"manufacturer": "siemens*"}, True),
        ({"model": "*force"}, True),
        ({"station": "CT-ED-?"}, True),
        ({"calling_ae_title": "CT_*"}, True),
        # All conditions of a rule must hold.
        ({"body_part": "CSPINE", "kvp": 120}, True),
        ({"body_part": "CSPINE", "kvp": 100}, False),
    ],
)
def test_conditions(when: dict[str, Any], holds: bool) -> None:
    assert matches(when) is holds


@pytest.mark.parametrize(
    "when",
    [{"body_part": "*"}, {"kernel": "*"}, {"kvp": {"min": 0}}, {"study_description": "/.*/"}, {"rows": {"max": 9999}}],
)
def test_what_a_series_lacks_fulfils_no_condition(when: dict[str, Any]) -> None:
    assert not matches(when, Traits())


def test_unless_takes_back() -> None:
    assert matches({"body_part": "*"}, unless={"body_part": "*HEAD*"})
    assert not matches({"body_part": "*"}, unless={"body_part": "*SPINE*"})
    assert not matches({"body_part": "*"}, unless={"body_part": "*HEAD*", "kvp": 120})  # any one of them


def test_the_first_rule_that_matches_decides() -> None:
    ours = {"name": "ours", "when": {"station": "CT-ED-1"}, "outcome": "analyse"}
    no_siemens = {"name": "no siemens", "when": {"manufacturer": "SIEMENS"}, "outcome": "skip", "reason": "too new"}
    assert decide(rules(ours, no_siemens), NECK).outcome is Outcome.ANALYSE
    decision = decide(rules(no_siemens, ours), NECK)
    assert (decision.outcome, decision.reason) == (Outcome.SKIP, "rule 'no siemens': too new")
    assert [trial.rule.name for trial in decision.trials] == ["no siemens"]


def test_without_a_match_the_default_decides() -> None:
    head = {"name": "head", "when": {"body_part": "HEAD"}, "outcome": "skip"}
    assert decide(rules(head), NECK).outcome is Outcome.ANALYSE
    assert decide(rules(head, default="skip"), NECK).reason == "no rule matches: rules.default"
    assert decide(rules(head, default="skip"), NECK).outcome is Outcome.SKIP


@pytest.mark.parametrize(
    ("when", "unless", "outcome"),
    [
        ({"num_slices": {"max": 9999}}, {}, Outcome.OPEN),
        ({"spacing_mm": {"max": 9}, "plane": "axial"}, {}, Outcome.OPEN),
        ({"num_slices": {"max": 9999}, "plane": "coronal"}, {}, Outcome.ANALYSE),  # the plane settles it
        ({"plane": "axial"}, {"num_slices": {"min": 50}}, Outcome.OPEN),
        ({"plane": "axial"}, {}, Outcome.SKIP),
    ],
)
def test_what_hangs_on_slices_to_come_is_open(when: dict[str, Any], unless: dict[str, Any], outcome: Outcome) -> None:
    rule = {"name": "it", "when": when, "unless": unless, "outcome": "skip"}
    assert decide(rules(rule), NECK, is_whole=False).outcome is outcome


# ---- faults of the configuration ----


@pytest.mark.parametrize(
    ("rule", "line", "fault"),
    [
        ("when: {bodypart: NECK}", 5, "rules.series.0.when.bodypart is not a setting"),
        ("when: {body_part: /neck(/}", 5, "rules.series.0.when.body_part.0: not a regular expression"),
        ("when: {body_part: /neck}", 5, "a regular expression stands between two slashes, for example /spine|neck/"),
        ('when: {body_part: ""}', 5, "an empty pattern matches nothing; * matches every value"),
        ("when: {body_part: []}", 5, "the list is empty; name a value or leave the condition out"),
        ("when: {kvp: {min: 140, max: 80}}", 5, "rules.series.0.when.kvp: min (140) is more than max (80)"),
        ("when: {kvp: {}}", 5, "rules.series.0.when.kvp: give min, max or both"),
        ("when: {kvp: high}", 5, "rules.series.0.when.kvp"),
        ("when: {kvp: {at_least: 80}}", 5, "rules.series.0.when.kvp.at_least is not a setting"),
        ("when: {plane: axail}", 5, "'axial', 'coronal', 'sagittal', 'oblique' or 'unknown' (it is 'axail')"),
        ("when: {kernel_type: hard}", 5, "rules.series.0.when.kernel_type.0"),
        ("when: {}", 3, "`when` names no condition; what to do with all other Series is rules.default"),
        ("unless: {kvp: 80}", 3, "rules.series.0.when is missing"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_a_fault_with_its_line(tmp_path: Path, rule: str, line: int, fault: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"rules:\n  series:\n    - name: it\n      outcome: skip\n      {rule}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert fault in str(error.value)
    assert f"line {line}: " in str(error.value)


@pytest.mark.parametrize(
    ("prefer", "fault"),
    [
        ("thinest", "rules.prefer.0.order: must be 'thinnest' or 'most_slices' (it is 'thinest')"),
        ("{kernel_typ: bone}", "rules.prefer.0.kernel_typ is not a setting"),
        ("{}", "give one order, thinnest or most_slices, or conditions"),
    ],
)
def test_a_preference_that_cannot_be_meant_is_a_fault(tmp_path: Path, prefer: str, fault: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"rules:\n  prefer:\n    - {prefer}\n")
    with pytest.raises(ConfigError, match="line 3: ") as error:
        load_config(path)
    assert fault in str(error.value)


def test_two_rules_need_two_names(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    rule = "{name: it, when: {kvp: 80}, outcome: skip}"
    path.write_text(f"rules:\n  series: [{rule}, {rule}]\n")
    with pytest.raises(ConfigError, match="two rules share the name it; give each its own"):
        load_config(path)


# ---- the rules that come with the node ----


@pytest.mark.parametrize(
    ("image_type", "plane", "outcome"),
    [
        ("ORIGINAL\\PRIMARY\\AXIAL", "axial", Outcome.ANALYSE),
        ("ORIGINAL\\PRIMARY\\AXIAL\\CT_SOM5 SPI", "axial", Outcome.ANALYSE),
        ("ORIGINAL\\PRIMARY\\VOLUME\\NONE", "axial", Outcome.ANALYSE),
        ("DERIVED\\PRIMARY\\AXIAL", "axial", Outcome.ANALYSE),  # a thin reconstruction, or only compressed
        ("DERIVED\\PRIMARY\\AXIAL\\COMPRESSED", "axial", Outcome.ANALYSE),  # holds MPR
        ("", "axial", Outcome.ANALYSE),  # RSNA 2022
        ("", "unknown", Outcome.ANALYSE),
        ("ORIGINAL\\PRIMARY\\AXIAL", "oblique", Outcome.ANALYSE),  # whether it can be is for the model to say
        ("ORIGINAL\\PRIMARY\\LOCALIZER", "coronal", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\LOCALIZER", "axial", Outcome.SKIP),
        ("ORIGINAL\\PRIMARY\\LOCALIZER\\CT_SOM5 TOP", "sagittal", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\SCREEN SAVE", "unknown", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\OTHER\\DOSE_INFO", "unknown", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\AXIAL\\MIP", "axial", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\PROJECTION IMAGE", "axial", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\MPR", "axial", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\AXIAL_MPR", "axial", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\CT_SOM5 MPR", "axial", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\AXIAL\\MINIP", "axial", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\AXIAL\\CT_SOM5 MPR", "axial", Outcome.SKIP),
        ("DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE", "axial", Outcome.SKIP),
        ("ORIGINAL\\PRIMARY\\AXIAL", "sagittal", Outcome.SKIP),
        ("DERIVED\\PRIMARY\\AXIAL", "coronal", Outcome.SKIP),
    ],
)
def test_the_default_rules(image_type: str, plane: str, outcome: Outcome) -> None:
    values = tuple(image_type.split("\\")) if image_type else ()
    decision = decide(RulesConfig(), Traits(modality="CT", image_type=values, plane=plane))
    assert decision.outcome is outcome
    assert decision.reason


BONE_1MM = Traits(kernel_type="bone", slice_thickness_mm=1.0, num_slices=250)
SOFT_1MM = Traits(kernel_type="soft", slice_thickness_mm=1.0, num_slices=250)
BONE_3MM = Traits(kernel_type="bone", slice_thickness_mm=3.0, num_slices=80)
SOFT_HALF = Traits(kernel_type="soft", slice_thickness_mm=0.5, num_slices=500)
HEAD_BONE = Traits(kernel_type="bone", slice_thickness_mm=0.5, num_slices=400, body_part="HEAD")
NECK_SOFT_3MM = Traits(kernel_type="soft", slice_thickness_mm=3.0, body_part="CSPINE")
DERIVED_BONE = Traits(kernel_type="bone", slice_thickness_mm=0.5, image_type=("DERIVED", "PRIMARY", "AXIAL"))
ORIGINAL_SOFT = Traits(kernel_type="soft", slice_thickness_mm=2.0, image_type=("ORIGINAL", "PRIMARY", "AXIAL"))


@pytest.mark.parametrize(
    ("better", "other", "why"),
    [
        (BONE_1MM, SOFT_1MM, "kernel_type bone, here soft"),
        (BONE_1MM, BONE_3MM, "slice_thickness_mm at most 1.5, here 3"),
        (BONE_1MM, SOFT_HALF, "kernel_type bone, here soft"),
        (SOFT_1MM, BONE_3MM, "slice_thickness_mm at most 1.5, here 3"),
        (SOFT_HALF, SOFT_1MM, "thinner slices: 0.5 mm, here 1 mm"),
        (NECK_SOFT_3MM, HEAD_BONE, "body_part *SPINE* or *NECK*"),  # what a description holds is not told
        (ORIGINAL_SOFT, DERIVED_BONE, "image_type ORIGINAL"),
        (BONE_1MM, Traits(), "slice_thickness_mm at most 1.5, here (missing)"),
        (Traits(num_slices=90), Traits(num_slices=60), "more slices: 90, here 60"),
    ],
)
def test_the_default_preferences(better: Traits, other: Traits, why: str) -> None:
    config = RulesConfig()
    assert rank(config, [other, better]) == [1, 0]
    assert is_preferred(config, better, other)
    assert not is_preferred(config, other, better)
    assert why_preferred(config, better, other) == why


def test_among_equals_the_first_is_preferred() -> None:
    assert rank(RulesConfig(), [BONE_1MM, BONE_1MM]) == [0, 1]
    assert not is_preferred(RulesConfig(), BONE_1MM, BONE_1MM)
    assert why_preferred(RulesConfig(), BONE_1MM, BONE_1MM) == "both are alike and it came first"


def test_preferences_are_as_configured() -> None:
    config = rules(prefer=["most_slices", {"kernel_type": "soft"}])
    assert rank(config, [BONE_3MM, BONE_1MM, SOFT_1MM, SOFT_HALF]) == [3, 2, 1, 0]


# ---- what rules can ask ----


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (["B60s"], "bone"), (["B70f"], "bone"), (["Br60f", "3"], "bone"), (["Hr64h"], "bone"), (["U90u"], "bone"),
        (["Bl57"], "bone"), (["I70f"], "bone"), (["B30f"], "soft"), (["B41s"], "soft"), (["Br36d"], "soft"),
        (["H31s"], "soft"), (["J40f"], "soft"), (["BONE"], "bone"), (["BONEPLUS"], "bone"), (["STANDARD"], "soft"),
        (["SOFT"], "soft"), (["DETAIL"], "unknown"), (["YC"], "bone"), (["B"], "soft"), (["FC30"], "bone"),
        (["FC08"], "soft"), (["bone "], "bone"), ([], "unknown"), (["FOO", "FC30"], "bone"),
    ],
)  # fmt: skip
def test_kernel_types(kernel: list[str], kind: str) -> None:
    assert kernel_type(kernel) == kind


@pytest.mark.parametrize(
    ("orientation", "plane"),
    [
        (AXIAL, "axial"),
        (CORONAL, "coronal"),
        (SAGITTAL, "sagittal"),
        ((1, 0, 0, 0, 0.866, -0.5), "axial"),  # tilted by 30 degrees
        ((1, 0, 0, 0, 0.766, -0.643), "oblique"),  # by 40
        ((1, 0, 0, 0, 0.707, -0.707), "oblique"),
        ((-1, 0, 0, 0, 1, 0), "axial"),
        (None, "unknown"),
        ((0, 0, 0, 0, 0, 0), "unknown"),
    ],
)
def test_the_plane_of_an_orientation(orientation: tuple[float, ...] | None, plane: str) -> None:
    assert plane_of(orientation) == plane


def describe(paths: list[Path]) -> Traits:
    datasets = {path: dcmread(path) for path in paths}
    headers = [header for ds in datasets.values() for header in slice_headers(ds)]
    return describe_series(headers, {ds.SOPInstanceUID: path for path, ds in datasets.items()}, "CT1")


def test_the_traits_of_a_series(tmp_path: Path) -> None:
    def fill(_: int, ds: Dataset) -> None:
        ds.BodyPartExamined, ds.SeriesDescription, ds.ProtocolName = "CSPINE", "HWS 1.0 Br60", "Neck"
        ds.StudyDescription, ds.KVP, ds.ConvolutionKernel = "Trauma", 120, ["Br60f", "3"]
        ds.Manufacturer, ds.ManufacturerModelName, ds.StationName = "SIEMENS", "Force", "CT7"

    traits = describe(make_ct_series(tmp_path, num_slices=8, spacing_mm=1.25, edit=fill))
    assert traits == Traits(
        modality="CT",
        body_part="CSPINE",
        study_description="Trauma",
        series_description="HWS 1.0 Br60",
        protocol="Neck",
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        kernel=("Br60f", "3"),
        kernel_type="bone",
        plane="axial",
        slice_thickness_mm=1.25,
        spacing_mm=1.25,
        num_slices=8,
        rows=20,
        kvp=120.0,
        manufacturer="SIEMENS",
        model="Force",
        station="CT7",
        calling_ae_title="CT1",
    )


def test_the_traits_of_rsnas_files(tmp_path: Path) -> None:
    def strip(_: int, ds: Dataset) -> None:
        del ds.Modality, ds.ImageType

    traits = describe(make_ct_series(tmp_path, edit=strip))
    assert (traits.modality, traits.image_type, traits.plane, traits.num_slices) == ("CT", (), "axial", 8)
    assert decide(RulesConfig(), traits).outcome is Outcome.ANALYSE


def test_a_scout_among_the_slices_changes_nothing(tmp_path: Path) -> None:
    slices = make_ct_series(tmp_path / "series", num_slices=8)
    traits = describe([make_localizer(tmp_path / "scout.dcm", like=slices[0]), *slices])
    assert (traits.image_type[2], traits.plane, traits.num_slices, traits.rows) == ("AXIAL", "axial", 8, 20)


def test_enhanced_ct_has_its_traits_in_functional_groups(tmp_path: Path) -> None:
    path = make_enhanced_ct(tmp_path / "enhanced.dcm", num_frames=8, spacing_mm=1.5)
    ds = dcmread(path)
    reconstruction, details = Dataset(), Dataset()
    reconstruction.ConvolutionKernel, details.KVP = "BONE", 100
    ds.SharedFunctionalGroupsSequence[0].CTReconstructionSequence = DicomSequence([reconstruction])
    ds.SharedFunctionalGroupsSequence[0].CTXRayDetailsSequence = DicomSequence([details])
    ds.save_as(path)
    traits = describe([path])
    assert (traits.kernel_type, traits.kvp, traits.slice_thickness_mm) == ("bone", 100.0, 1.5)
    assert (traits.num_slices, traits.spacing_mm, traits.plane) == (8, 1.5, "axial")


Break = Callable[[Path], None]


@pytest.mark.parametrize(
    "ruin", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:400])]
)
def test_a_file_that_cannot_be_read_only_leaves_traits_out(tmp_path: Path, ruin: Break) -> None:
    paths = make_ct_series(tmp_path, num_slices=3)
    headers = [header for path in paths for header in slice_headers(dcmread(path))]
    for path in paths:
        ruin(path)
    traits = describe_series(headers, {header.sop_instance_uid: paths[0] for header in headers}, "CT1")
    assert (traits.plane, traits.num_slices, traits.kvp) == ("axial", 3, None)


@pytest.mark.filterwarnings("ignore:The value length")
def test_odd_values_are_missing_values(tmp_path: Path) -> None:
    def spoil(_: int, ds: Dataset) -> None:
        ds.add_new("KVP", "LO", "lots")
        ds.SeriesDescription = "x" * 3000
        ds.SeriesInstanceUID = series_uid

    series_uid = generate_uid()
    traits = describe(make_ct_series(tmp_path, num_slices=2, edit=spoil))
    assert traits.kvp is None
    assert len(traits.series_description) < 200
