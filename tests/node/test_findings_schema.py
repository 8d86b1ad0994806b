"""docs/findings.schema.json and model/findings.py say the same: what one writes the other accepts, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from model import LEVELS, Finding, Findings, LevelFinding, ModelInfo, PatientFinding, Region, SliceWeight

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "findings.schema.json").read_text(encoding="utf-8"))


def _findings() -> Findings:
    unseen = LevelFinding(in_field_of_view=False, probability=None, finding=Finding.UNDETERMINED, reason="Not found")
    seen = {"in_field_of_view": True, "centroid_lps_mm": (1.0, -2.5, 30.0), "volume_mm3": 9000.0}
    levels = dict.fromkeys(LEVELS, unseen) | {
        "C2": LevelFinding(probability=0.1, finding=Finding.ABSENT, **seen),
        "C3": LevelFinding(probability=None, finding=Finding.UNDETERMINED, reason="Cut", **seen),
        "C5": LevelFinding(
            probability=0.9,
            finding=Finding.PRESENT,
            attention=(SliceWeight(sop_instance_uid="1.2.3", weight=1.0),),
            regions=(Region(sop_instance_uid="1.2.3", x=0, y=5, width=3, height=1),),
            **seen,
        ),
    }
    return Findings(
        study_instance_uid="1.2",
        series_instance_uid="1.2.0",
        model=ModelInfo(name="m", version="1", trained_on="Phantoms only.", operating_point=0.5),
        patient_overall=PatientFinding(probability=0.9, finding=Finding.PRESENT),
        levels=levels,
        warnings=("C3 is cut by the field of view.",),
        timings_s={"read": 0.5, "segment": 1.0, "classify": 1, "encode": 0.0, "total": 2.5},
    )


def _as_json(findings: Findings) -> Any:
    return json.loads(json.dumps(findings.to_dict()))


def test_schema_is_valid_json_schema_2020_12() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_findings_satisfy_the_schema() -> None:
    jsonschema.validate(_as_json(_findings()), SCHEMA)


def test_every_property_is_described_and_every_object_is_closed() -> None:
    def check(node: Any, path: str) -> None:
        if not isinstance(node, dict):
            return
        if node.get("type") == "object":
            assert node["additionalProperties"] is False, path
            assert set(node["required"]) == set(node["properties"]), path
            for name, value in node["properties"].items():
                described = value | SCHEMA["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
                assert described.get("description"), f"{path}.{name}"
        for key, value in node.items():
            check(value, f"{path}.{key}")

    check(SCHEMA, "")


def _set(*path: str, to: Any) -> Callable[[Any], None]:
    def edit(findings: Any) -> None:
        for key in path[:-1]:
            findings = findings[int(key) if isinstance(findings, list) else key]
        findings[path[-1]] = to

    return edit


def _drop(*path: str) -> Callable[[Any], None]:
    def edit(findings: Any) -> None:
        for key in path[:-1]:
            findings = findings[key]
        del findings[path[-1]]

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_set("extra", to=1), id="unknown key"),
        pytest.param(_set("levels", "T1", to={}), id="unknown level"),
        pytest.param(_drop("levels", "C7"), id="missing level"),
        pytest.param(_drop("model", "trained_on"), id="training data unnamed"),
        pytest.param(_drop("timings_s", "encode"), id="stage without a time"),
        pytest.param(_set("levels", "C2", "probability", to=1.1), id="probability above 1"),
        pytest.param(_set("levels", "C2", "probability", to=None), id="judged without a probability"),
        pytest.param(_set("levels", "C3", "probability", to=0.5), id="undetermined with a probability"),
        pytest.param(_set("levels", "C1", "finding", to="absent"), id="absent but not seen"),
        pytest.param(_set("levels", "C2", "finding", to="maybe"), id="unknown finding"),
        pytest.param(_set("levels", "C2", "centroid_lps_mm", to=[1.0, 2.0]), id="two coordinates"),
        pytest.param(_set("levels", "C2", "volume_mm3", to=None), id="seen without a volume"),
        pytest.param(_set("levels", "C5", "regions", "0", "x", to=1.5), id="half a pixel"),
        pytest.param(_set("levels", "C5", "regions", "0", "width", to=0), id="empty box"),
        pytest.param(_set("series_instance_uid", to=""), id="no series"),
        pytest.param(_set("patient_overall", "probability", to=None), id="patient present without a probability"),
        pytest.param(_set("patient_overall", to={"probability": None, "finding": "absent"}), id="absent of nothing"),
    ],
)
def test_schema_refuses(edit: Callable[[Any], None]) -> None:
    findings = _as_json(_findings())
    edit(findings)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(findings, SCHEMA)
