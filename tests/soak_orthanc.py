"""A real Orthanc and the node, either of them killed, ended or frozen at random, in each way from the one to the other.

    make soak-orthanc                                     # every way, 40 blows each
    python -m tests.soak_orthanc --ways watch lua --rounds 100 --seed 7 --folder /tmp/soak

Meanwhile small Series come to Orthanc, some grow, some are deleted there and some come again, among objects that are no
CT. At the end every CT Instance that Orthanc has must be in the node, but for what was there before it; every case must
have ended, its report must be in Orthanc once, and nothing may go on moving. None is long enough to be analysed.
"""

import argparse
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import requests
from pydicom import Dataset, dcmread
from pydicom.uid import CTImageStorage

from node.index import Index
from tests.factories import make_ct_series, make_report, make_screen_save
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.running_node import RunningNode
from tests.soak import superseded_by
from tests.untrained import write_untrained_bundle

WAYS = ("lua", "python", "stow", "watch", "dicomweb")
_LONGEST_END_S = 420.0  # an archive that failed is looked at again within five minutes
_QUIET_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where everything stays, to be looked at")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cspine-soak-") as name:
        for way in arguments.ways:
            print(strike(way, (arguments.folder or Path(name)) / way, arguments.rounds, seed), flush=True)


class Pair:
    """An Orthanc and a node, each of which can be struck and comes back with what it has. way: one of `WAYS`."""

    def __init__(self, way: str, folder: Path) -> None:
        (folder / "node").mkdir(parents=True)
        self.way, self._folder, self._num_started = way, folder / "orthanc", 0
        web_port, port, http_port = free_port(), free_port(), free_port()
        url = f"http://127.0.0.1:{http_port}"
        self._settings: dict[str, Any] = {"port": port, "http_port": http_port, "node_port": free_port()}
        self.start_orthanc(routes=False)
        make_ct_series(folder / "old", num_slices=3)
        self.orthanc.upload(folder / "old")
        self.old = self.orthanc.instances()
        until(lambda: self.orthanc.num_stable() == 1, _LONGEST_END_S)
        self.orthanc.stop()
        peer = {"name": "orthanc", "type": "orthanc", "url": url, "source_metadata": 4100}
        sources = {}
        if way in ("lua", "python"):
            peer = {"name": "orthanc", "type": "dicom", "host": "127.0.0.1", "port": port, "ae_title": "ORTHANC"}
        elif way == "watch":
            sources = {"orthanc": [{"name": "orthanc", "url": url, "poll_s": 1}]}
        elif way == "dicomweb":
            peer = {"name": "orthanc", "type": "dicomweb", "url": f"{url}/dicom-web"}
            archive = {"name": "orthanc", "url": f"{url}/dicom-web", "poll_s": 1, "overlap_days": None}
            sources = {"dicomweb": [archive | {"max_requests_per_s": 100}]}
        self.start_orthanc(routes=False)
        self.node = RunningNode(
            folder / "node",
            complete={"quiet_time_s": 3.0},
            analyse={"bundle": str(write_untrained_bundle(folder / "bundle")), "threads": 1},
            web={"enabled": way == "stow", "port": web_port},
            sources=sources,
            deliver={"retry_first_s": 0.5, "retry_max_s": 2.0, "destinations": [peer]},
        )
        if sources:
            until(lambda: self.ask(lambda index: index.watched_source("orthanc").position) is not None, _LONGEST_END_S)
        else:
            self.orthanc.stop()
            self._settings |= {"node_port": self.node.port, "routes_by": "lua" if way == "lua" else "python"}
            if way == "stow":
                self._settings["plugin_settings"] = {"StowUrl": f"http://127.0.0.1:{web_port}/dicom-web/studies"}
            self.start_orthanc()

    def start_orthanc(self, routes: bool = True) -> None:
        """With the log of each start kept."""
        log = self._folder / "orthanc.log"
        if log.exists():
            log.rename(log.with_suffix(f".{self._num_started}.log"))
        self._num_started += 1
        self.orthanc = OrthancServer(self._folder, **({"routes_by": ""} if not routes else {}) | self._settings)

    def ask(self, question: Callable[[Index], Any]) -> Any:
        """Of the node's database."""
        index = Index(self.node.data_dir)
        try:
            return question(index)
        finally:
            index.close()

    def strike(self, who: str, how: str, for_s: float) -> None:
        """Has one of them, or both, be away for a while."""
        orthanc, node = who in ("orthanc", "both"), who in ("node", "both")
        if how == "freeze":
            roots = [self.orthanc._process.pid] * orthanc + [self.node.process.pid] * node
            frozen = [one for root in roots for one in (psutil.Process(root), *psutil.Process(root).children(True))]
            for process in frozen:
                _signal(process.suspend)
            time.sleep(for_s)
            for process in frozen:
                _signal(process.resume)
            return
        if orthanc:
            (self.orthanc.stop if how == "kill" else self.orthanc.end)()
        if node:
            (self.node.kill if how == "kill" else self.node.stop)()
            self.node.wait_until_gone()
        time.sleep(for_s)
        if orthanc:
            self.start_orthanc()
        if node:
            self.node.start()

    def ct(self) -> dict[str, str]:
        """The Series of each CT Instance in Orthanc that was not there before, by SOPInstanceUID."""
        series = {one["ID"]: one["MainDicomTags"]["SeriesInstanceUID"] for one in self.get("series?expand")}
        found = {one["MainDicomTags"]["SOPInstanceUID"]: one for one in self.get("instances?expand")}
        return {
            uid: series[one["ParentSeries"]]
            for uid, one in found.items()
            if uid not in self.old
            and requests.get(f"{self.orthanc.url}/instances/{one['ID']}/metadata/SopClassUid", timeout=30).text
            == CTImageStorage
        }

    def get(self, path: str) -> Any:
        return self.orthanc.client.get_json(path)


class Sender(threading.Thread):
    """Series after Series to an Orthanc that may be away: what it does not answer is tried again."""

    def __init__(self, pair: Pair, folder: Path, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.stopping, self.done = False, Counter[str]()
        self._url, self._folder, self._rng, self._known = pair.orthanc.url, folder, rng, list[list[Path]]()

    def run(self) -> None:
        kinds = {"new": 10, "grow": 4, "again": 2, "delete": 1, "delete-some": 2, "other": 2, "mixed": 1}
        while not self.stopping:
            (kind,) = self._rng.choices(list(kinds), list(kinds.values()))
            if kind in ("new", "mixed", "other") or self._known:
                self._do(kind)
                self.done[kind] += 1
            time.sleep(self._rng.expovariate(2.0))

    def _do(self, kind: str) -> None:
        folder = self._folder / f"{sum(self.done.values()):04d}-{kind}"
        earlier = self._rng.choice(self._known[-6:]) if self._known else []
        if kind in ("new", "mixed"):
            paths = make_ct_series(folder, num_slices=self._rng.randint(1, 12), edit=self._as_patient(folder.name))
            self._known.append(paths[:])
            if kind == "mixed":
                paths.append(make_screen_save(folder / "dose.dcm", like=paths[0]))
                dose = dcmread(paths[-1])
                dose.PatientID = folder.name
                dose.save_as(paths[-1])
        elif kind == "grow":
            ds = dcmread(earlier[0], stop_before_pixels=True)
            uids = {"series_instance_uid": ds.SeriesInstanceUID, "study_instance_uid": ds.StudyInstanceUID}
            edit = self._as_patient(str(ds.PatientID))
            paths = make_ct_series(folder, num_slices=self._rng.randint(1, 3), edit=edit, **uids)
            earlier += paths
        elif kind == "other":
            folder.mkdir(parents=True)
            paths = [make_report(folder / "report.dcm")]
        elif kind == "again":
            paths = earlier
        else:
            self._remove(earlier, whole=kind == "delete")
            return
        pause_s = self._rng.choice([0.0, 0.0, 0.05, 0.5, 1.5])
        for path in paths:
            self._post("instances", path.read_bytes())
            time.sleep(pause_s)

    def _as_patient(self, patient_id: str) -> Callable[[int, Dataset], None]:
        """Each has one of his own: what Orthanc notes of him is gone with his last Series."""
        return lambda _, ds: setattr(ds, "PatientID", patient_id)

    def _remove(self, paths: list[Path], *, whole: bool) -> None:
        for path in [paths[0]] if whole else self._rng.sample(paths, (len(paths) + 2) // 3):
            ds = dcmread(path, stop_before_pixels=True)
            uid = str(ds.SeriesInstanceUID if whole else ds.SOPInstanceUID)
            for found in self._post("tools/lookup", uid.encode()).json():
                self._ask("DELETE", found["Path"].lstrip("/"))

    def _post(self, path: str, body: bytes) -> requests.Response:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: bytes = b"") -> requests.Response:
        while True:
            try:
                answer = requests.request(method, f"{self._url}/{path}", data=body, timeout=30)
                if answer.status_code in (200, 404):
                    return answer
            except requests.RequestException:
                pass
            time.sleep(0.2)


def strike(way: str, folder: Path, num_rounds: int, seed: int) -> str:
    """Strikes one after the other, then looks at what became of everything; what happened, in a line.

    Raises:
        AssertionError: something is lost, stuck, there twice, or does not come to rest.
    """
    started, rng = time.monotonic(), random.Random(f"{seed} {way}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pair = Pair(way, folder)
    sender, num_struck = Sender(pair, folder / "in", random.Random(f"{seed} {way} sender")), Counter[str]()
    try:
        sender.start()
        for _ in range(num_rounds):
            time.sleep(rng.expovariate(0.5))
            (who,) = rng.choices(["orthanc", "node", "both"], [5, 3, 1])
            (how,) = rng.choices(["kill", "end", "freeze"], [3, 1, 1])
            num_struck[f"{who} {how}"] += 1
            pair.strike(who, how, rng.choice([0.0, 0.0, 1.0, 4.0]) + (how == "freeze") * rng.choice([1.0, 3.0, 15.0]))
        assert sender.is_alive(), "the sender broke"
        sender.stopping = True
        sender.join(300)
        assert not sender.is_alive(), "Orthanc takes nothing any more"
        ct = check_all_is_there(pair, folder)
        check_reports(pair)
        check_rest(pair)
    finally:
        sender.stopping = True
        pair.node.stop()
        pair.orthanc.stop()
    return (
        f"{way}: {sum(num_struck.values())} blows ({dict(num_struck)}), {dict(sender.done)}; {len(ct)} CT Instances in "
        f"{len(set(ct.values()))} Series at the end, all in the node; {time.monotonic() - started:.0f} s"
    )


def check_all_is_there(pair: Pair, folder: Path) -> dict[str, str]:
    """Waits until the node has all CT Instances that Orthanc has; these, as `Pair.ct` gives them."""
    time.sleep(3)
    ct, num_events = pair.ct(), 0

    def missing() -> list[str]:
        nonlocal num_events
        if pair.way == "lua":  # an Orthanc of this age has no heartbeat: the script wakes up when something happens
            num_events += 1
            pair.orthanc.client.upload_file(str(make_report(folder / f"in/event{num_events}.dcm")))
        held = pair.ask(lambda index: index.held_instances(list(ct)))
        return [uid for uid in ct if uid not in held]

    until(lambda: not missing(), _LONGEST_END_S, lambda: f"lost: {[(uid, ct[uid]) for uid in missing()]}")
    pair.node.wait_until_settled(timeout_s=_LONGEST_END_S)
    assert not pair.ask(lambda index: index.held_instances(list(pair.old))), "it has what was there before it"
    return ct


def check_reports(pair: Pair) -> None:
    """The latest report of each case is in Orthanc as it was made, and no other that it does not supersede."""
    there = {str(ds.SOPInstanceUID): ds for ds in pair.orthanc.read("SR") if ds.Manufacturer != "Factory"}
    made = {str(ds.SOPInstanceUID): ds for ds in map(dcmread, (pair.node.data_dir / "cases").rglob("*.dcm"))}
    assert made.keys() <= there.keys(), f"not delivered: {made.keys() - there.keys()}"
    assert there.keys() - made.keys() <= {uid for ds in there.values() for uid in superseded_by(ds)}, "two reports"
    assert all(there[uid] == ds for uid, ds in made.items()), "another version was delivered before"
    if pair.way == "watch":
        known = {case.series_instance_uid for case in pair.node.cases()}
        for series in pair.get("series?expand"):
            if series["MainDicomTags"]["SeriesInstanceUID"] in {ds.SeriesInstanceUID for ds in made.values()}:
                linked = pair.orthanc.client.get_binary(f"series/{series['ID']}/metadata/4100").decode()
                assert linked in known, f"Series {series['ID']} is linked to {linked!r}"


def check_rest(pair: Pair) -> None:
    """Nothing moves any more, and no watch has anything left to do."""

    def state() -> Any:
        return pair.orthanc.instances(), pair.node.cases(), [job["ID"] for job in pair.orthanc.jobs()]

    def is_left() -> Any:
        return pair.ask(lambda index: (index.pending_series("orthanc"), index.troubled_series("orthanc")))

    def rests() -> bool:
        before = state()
        time.sleep(_QUIET_S)
        return before == state()

    until(rests, 180, lambda: f"it goes on: {pair.orthanc.log()}")
    until(lambda: is_left() == ({}, {}), _LONGEST_END_S, lambda: f"left: {is_left()}")
    if pair.way in ("watch", "dicomweb"):
        assert not pair.ask(lambda index: index.watched_source("orthanc")).is_failing


def until(is_so: Callable[[], Any], timeout_s: float, said: Callable[[], str] = lambda: "waited in vain") -> None:
    """Returns once it is so."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, said()
        time.sleep(1)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()


if __name__ == "__main__":
    sys.exit(main())
