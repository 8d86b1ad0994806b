"""What happens in an Orthanc, or is set there, while its script or plugin sends: nothing of it may cost a slice."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from pydicom import Dataset

from node.config import Config
from node.index import Index
from tests.factories import make_ct_series, make_report
from tests.orthanc_server import ORTHANC_FOLDER, STABLE_AGE_S, OrthancServer
from tests.test_orthanc import wait_until
from tests.test_orthanc_push import Pusher, counts, pusher, receiving, uid_of

__all__ = ["pusher"]

lua, by_job = (pytest.mark.parametrize("pusher", [way], indirect=True) for way in ("lua", "python"))


def wait_for(index: Index, expected: dict[str, int], orthanc: OrthancServer, folder: Path) -> None:
    """Until the node has these. An Orthanc without a heartbeat needs events: reports come in the meantime."""
    folder.mkdir(exist_ok=True)
    for number in range(60):
        if counts(index.cases()) == expected:
            return
        orthanc.client.upload_file(str(make_report(folder / f"{number}.dcm")))
        time.sleep(1)
    pytest.fail(f"{counts(index.cases())} is not {expected}\n{orthanc.log()}")


def test_an_instance_that_is_deleted_while_the_node_is_away_keeps_no_other_back(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    series = make_ct_series(tmp_path / "in", num_slices=6)
    orthanc = pusher.start()
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    (found,) = orthanc.series()
    orthanc.client.delete(f"instances/{found.instance_ids[1]}")
    with receiving(pusher, make_config, index):
        wait_for(index, {uid_of(series): 5}, orthanc, tmp_path / "other")


def test_an_instance_that_the_node_refuses_keeps_no_other_back(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    def make_odd(i: int, ds: Dataset) -> None:
        ds.Modality = "MR" if i == 2 else "CT"

    series = make_ct_series(tmp_path / "in", num_slices=6, edit=make_odd)
    orthanc = pusher.start()
    with receiving(pusher, make_config, index):
        orthanc.upload(tmp_path / "in")
        wait_for(index, {uid_of(series): 5}, orthanc, tmp_path / "other")
        assert "cspine: NOT SENT" in orthanc.log()


@lua
def test_a_job_that_orthanc_forgets_at_once_is_made_again(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    series = make_ct_series(tmp_path / "in", num_slices=4)
    orthanc = pusher.start(JobsHistorySize=0)
    orthanc.upload(tmp_path / "in")
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    with receiving(pusher, make_config, index):
        wait_for(index, {uid_of(series): 4}, orthanc, tmp_path / "other")


@lua
def test_another_script_that_breaks_keeps_ours_from_nothing(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    (tmp_path / "broken.lua").write_text("function OnStableSeries() error('a fault of theirs') end")
    series = make_ct_series(tmp_path / "in", num_slices=4)
    orthanc = pusher.start(LuaScripts=[str(tmp_path / "broken.lua"), str(ORTHANC_FOLDER / "cspine.lua")])
    with receiving(pusher, make_config, index):
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: counts(index.cases()) == {uid_of(series): 4}, "it has come", orthanc.log)
    assert "a fault of theirs" in orthanc.log()


def test_what_came_after_the_first_series_is_sent_though_that_one_is_deleted_and_orthanc_killed(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    orthanc = pusher.start()
    series = {name: make_ct_series(tmp_path / name, num_slices=4) for name in ("first", "second")}
    for number, name in enumerate(series):
        orthanc.upload(tmp_path / name)
        wait_until(lambda num=number: orthanc.num_stable() > num, "it is stable", orthanc.log)
    wait_until(lambda: "cspine: NOT SENT" in orthanc.log(), "the log says so", orthanc.log)
    orthanc.client.delete(f"series/{orthanc.client.lookup(uid_of(series['first']))[0]}")
    pusher.stop()
    with receiving(pusher, make_config, index):
        orthanc = pusher.start()
        wait_until(lambda: counts(index.cases()) == {uid_of(series["second"]): 4}, "it has come", orthanc.log)


def test_an_instance_that_comes_in_place_of_one_that_was_sent_is_sent_though_orthanc_is_killed(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    """The number of Instances is what it was."""
    series = make_ct_series(tmp_path / "in", num_slices=4)
    uid = uid_of(series)
    make_ct_series(tmp_path / "new", num_slices=1, series_instance_uid=uid)
    with receiving(pusher, make_config, index):
        orthanc = pusher.start()
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: counts(index.cases()) == {uid: 4}, "it has come", orthanc.log)
        time.sleep(STABLE_AGE_S)
        pusher.stop()
        orthanc = pusher.start(stable_age_s=1000)
        (found,) = orthanc.series()
        orthanc.client.delete(f"instances/{found.instance_ids[0]}")
        orthanc.client.upload_file(str(make_report(tmp_path / "report.dcm")))  # the first to come since the start
        orthanc.upload(tmp_path / "new")
        time.sleep(1)
        pusher.stop()
        orthanc = pusher.start()
        wait_until(lambda: counts(index.cases()) == {uid: 5}, "the new one has come", orthanc.log)


@by_job
def test_a_job_that_is_cancelled_before_it_runs_holds_up_no_other_series(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    """It waits for another one, of a modality that does not answer."""
    make_ct_series(tmp_path / "cancelled", num_slices=4)
    series = make_ct_series(tmp_path / "in", num_slices=4)
    report = make_report(tmp_path / "report.dcm")
    orthanc = pusher.start(ConcurrentJobs=1)
    with socket.create_server(("127.0.0.1", 0)) as silent, receiving(pusher, make_config, index):

        def ask(method: str, path: str, **body: Any) -> Any:
            answer = requests.request(
                method, f"{orthanc.url}/{path}", json=body, auth=("cspine", "hunter2"), timeout=20
            )
            return answer.json() if answer.content else None

        ask("PUT", "modalities/silent", AET="SILENT", Host="127.0.0.1", Port=silent.getsockname()[1])
        (uploaded,) = orthanc.client.upload_file(str(report))
        ask("POST", "modalities/silent/store", Resources=[uploaded], Asynchronous=True)
        orthanc.upload(tmp_path / "cancelled")
        wait_until(lambda: len(orthanc.jobs()) == 2, "it is to be sent", orthanc.log)
        *_, job = orthanc.jobs()
        assert job["State"] == "Pending"
        ask("POST", f"jobs/{job['ID']}/cancel")
        orthanc.upload(tmp_path / "in")
        wait_until(lambda: counts(index.cases()) == {uid_of(series): 4}, "only the other has come", orthanc.log, 40)


@lua
def test_with_checked_revisions_all_goes_and_what_went_may_go_again(
    pusher: Pusher, make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    series = make_ct_series(tmp_path / "in", num_slices=4)
    late = make_ct_series(tmp_path / "late", num_slices=1, series_instance_uid=uid_of(series))
    orthanc = pusher.start(CheckRevisions=True)
    with receiving(pusher, make_config, index):
        for path, num in ((series[0].parent, 4), (late[0].parent, 5)):
            orthanc.upload(path)
            wait_until(lambda num=num: counts(index.cases()) == {uid_of(series): num}, "it has come", orthanc.log)
    assert "NOT SENT" not in orthanc.log()
