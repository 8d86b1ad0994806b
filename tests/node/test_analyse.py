"""From files to a result folder: whole or not at all, under a name that stands for its input."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from model import ModelInfo, SeriesRules, load_pipeline
from node import analyse
from node.analyse import Results, analyse_series, result_folder_name
from node.config import TimeoutsConfig
from node.encode import NodeIdentity
from tests.factories import make_ct_series

MODEL = ModelInfo(name="m", version="1", trained_on="Nothing.", operating_point=0.5)


@pytest.fixture(scope="module")
def pipeline(untrained_bundle: Path) -> Any:
    return load_pipeline(untrained_bundle, "cpu", 1)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_ct_series(tmp_path_factory.mktemp("series"), num_slices=30, spacing_mm=2.5, rows=64, columns=64)


@pytest.fixture
def run(pipeline: Any, series: list[Path], tmp_path: Path) -> Any:
    """Analyses the Series into `tmp_path / "results"`."""

    def analyse_it() -> Results:
        return analyse_series(series, tmp_path / "results", pipeline, SeriesRules(), NodeIdentity())

    return analyse_it


def test_the_folder_holds_findings_and_every_object_that_is_named(run: Any, tmp_path: Path) -> None:
    results = run()
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"findings.json", *(made.path.name for made in results.objects)}
    assert all(made.path.is_file() for made in results.objects)
    assert "report.sr.dcm" in names
    written = json.loads((tmp_path / "results" / "findings.json").read_text(encoding="utf-8"))
    assert set(written["timings_s"]) == {"read", "segment", "classify", "encode", "total"}
    assert written == json.loads(json.dumps(results.findings.to_dict()))


def test_each_step_is_told_of_as_it_begins(pipeline: Any, series: list[Path], tmp_path: Path) -> None:
    """Under these names the configuration has a timeout for each."""
    told: list[str] = []
    analyse_series(series, tmp_path / "results", pipeline, SeriesRules(), NodeIdentity(), on_stage=told.append)
    assert told == list(TimeoutsConfig.model_fields)


def test_a_repeat_replaces_the_folder(run: Any, tmp_path: Path) -> None:
    first = run()
    (tmp_path / "results" / "left-over.dcm").write_bytes(b"of an earlier version")
    second = run()
    assert [made.sop_instance_uid for made in second.objects] == [made.sop_instance_uid for made in first.objects]
    assert not (tmp_path / "results" / "left-over.dcm").exists()


def test_a_failure_while_writing_leaves_what_was_there_and_the_next_attempt_works(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(analyse, "encode_results", fail)
        with pytest.raises(OSError, match="No space left"):
            run()
    assert all(made.path.is_file() for made in first.objects)
    run()
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_results_are_on_disk_before_they_have_their_name_and_the_name_before_they_are_told(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note_fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    run()
    assert {"findings.json", "report.sr.dcm"} <= set(synced)
    assert synced[-2:] == [".results.draft", tmp_path.name]


def test_a_result_folder_is_named_for_its_input_set_and_model() -> None:
    name = result_folder_name(["1.2", "1.3"], MODEL)
    assert name == result_folder_name(["1.3", "1.2", "1.2"], MODEL)
    newer = ModelInfo(name="m", version="2", trained_on="Nothing.", operating_point=0.5)
    others = [result_folder_name(["1.2"], MODEL), result_folder_name(["1.2", "1.3"], newer)]
    assert len({name, *others}) == 3
