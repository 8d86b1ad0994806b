"""Profiles: what a destination gets, by the names of the files in a result folder."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from node.config import ConfigError, load_config
from node.profiles import PRESETS, RESULT_PATTERNS, FormMissingError, Kind, Profile, files_for, object_names

ALL = (
    "findings.json",
    "fractures.labelmap-rle.seg.dcm",
    "fractures.seg.dcm",
    "key-slices.kos.dcm",
    "report.comprehensive.no-seg.sr.dcm",
    "report.labelmap-rle.sr.dcm",
    "report.max9.sr.dcm",
    "report.sr.dcm",
    "saliency.pm.dcm",
    "summary-01.sc.dcm",
    "summary-02.sc.dcm",
    "summary.pdf.dcm",
    "vertebrae.labelmap-rle.seg.dcm",
    "vertebrae.max9-1.seg.dcm",
    "vertebrae.max9-2.seg.dcm",
    "vertebrae.seg.dcm",
)


@pytest.mark.parametrize(
    ("profile", "names"),
    [
        (Profile(), ["vertebrae.seg.dcm", "fractures.seg.dcm", "report.sr.dcm", "findings.json"]),
        (
            Profile(segmentation="labelmap", transfer_syntax="rle"),
            [
                "vertebrae.labelmap-rle.seg.dcm",
                "fractures.labelmap-rle.seg.dcm",
                "report.labelmap-rle.sr.dcm",
                "findings.json",
            ],
        ),
        (
            Profile(max_frames=9),
            [
                "vertebrae.max9-1.seg.dcm",
                "vertebrae.max9-2.seg.dcm",
                "fractures.seg.dcm",
                "report.max9.sr.dcm",
                "findings.json",
            ],
        ),
        # Nothing was in more frames than that.
        (Profile(max_frames=400), ["vertebrae.seg.dcm", "fractures.seg.dcm", "report.sr.dcm", "findings.json"]),
        (
            PRESETS["plain-pacs"],
            ["key-slices.kos.dcm", "summary-01.sc.dcm", "summary-02.sc.dcm", "report.comprehensive.no-seg.sr.dcm"],
        ),
    ],
)
def test_a_destination_gets_the_objects_of_its_profile_in_its_form(profile: Profile, names: list[str]) -> None:
    assert list(files_for(profile, ALL)) == names


def test_what_was_not_made_is_left_out() -> None:
    assert files_for(Profile(), ["vertebrae.seg.dcm", "report.sr.dcm"]) == ("vertebrae.seg.dcm", "report.sr.dcm")


def test_an_object_made_in_another_form_only_is_an_error_not_a_silence() -> None:
    with pytest.raises(FormMissingError, match=r"hold no vertebrae\.labelmap\.seg\.dcm, .*; analyse the Series again"):
        files_for(Profile(segmentation="labelmap"), ["vertebrae.seg.dcm", "report.sr.dcm"])


def test_every_name_is_one_of_the_patterns_of_results() -> None:
    profiles = [*PRESETS.values(), Profile(segmentation="labelmap", transfer_syntax="jpeg-ls", max_frames=3)]
    for name in (name for profile in profiles for kind in Kind for name in object_names(profile, kind)):
        assert any(fnmatchcase(name, pattern) for pattern in RESULT_PATTERNS), name


def test_reports_that_refer_to_different_segmentations_have_different_names() -> None:
    segs = (Kind.VERTEBRAE_SEG, Kind.FRACTURES_SEG)
    profiles = [Profile(objects=(*kinds, Kind.REPORT_SR)) for kinds in ((), segs[:1], segs[1:], segs)]
    names = {object_names(profile, Kind.REPORT_SR) for profile in profiles}
    assert len(names) == 4


def destination(profile: str) -> str:
    return (
        f"deliver:\n  destinations:\n    - name: out\n      type: folder\n      path: out\n      profile: {profile}\n"
    )


def load(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    (profile,) = load_config(path).deliver.profiles
    return profile


def test_a_profile_is_configured_by_name_or_by_its_settings(tmp_path: Path) -> None:
    assert load(tmp_path, destination("weasis")) == PRESETS["weasis"]
    assert load(tmp_path, destination("{report: comprehensive}")) == Profile(report="comprehensive")
    assert load(tmp_path, "deliver:\n  destinations: []\n") == Profile()


@pytest.mark.parametrize(
    ("profile", "fault"),
    [
        (
            "osirix",
            "line 6: deliver.destinations.0.profile: must be ohif, weasis, orthanc, plain-pacs, everything, "
            "or a group of settings (it is 'osirix')",
        ),
        ("{colour: red}", "line 6: deliver.destinations.0.profile.colour is not a setting"),
        ("{objects: [report]}", "line 6: deliver.destinations.0.profile.objects.0: must be 'vertebrae_seg'"),
        ("{transfer_syntax: rle}", "line 6: deliver.destinations.0.profile: transfer_syntax rle is for label maps; "),
        ("{max_frames: 0}", "line 6: deliver.destinations.0.profile.max_frames: must be greater than"),
    ],
)
def test_a_profile_that_cannot_be_is_refused_in_words(profile: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, destination(profile))
    assert fault in str(refusal.value)
