"""A real Orthanc as a process of its own, for tests: this project's configuration and script, on free ports."""

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import requests
from orthanc_api_client import OrthancApiClient
from pydicom import Dataset, dcmread

from node.config import DicomDestination
from tests.ports import free_port
from tests.waiting import WAIT_S

ORTHANC_FOLDER = Path(__file__).parents[1] / "orthanc"
STABLE_AGE_S = 1


def find_orthanc() -> str:
    """The path of the Orthanc executable; without one the test is skipped, or fails where servers are required."""
    found = shutil.which("Orthanc", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if found:
        return found
    missing = "There is no Orthanc on this machine; on Debian: apt-get install orthanc"
    if os.environ.get("CSPINE_REQUIRE_SERVERS"):
        pytest.fail(missing)
    pytest.skip(missing)


def find_plugin(name: str) -> str:
    """The path of a plugin of Orthanc; likewise."""
    path = Path("/usr/share/orthanc/plugins") / name
    if not path.exists():
        missing = f"There is no {name} on this machine; on Debian: apt-get install orthanc-python"
        if os.environ.get("CSPINE_REQUIRE_SERVERS"):
            pytest.fail(missing)
        pytest.skip(missing)
    return str(path)


@dataclass(frozen=True, kw_only=True)
class StoredSeries:
    """A Series in Orthanc; ids are Orthanc's own."""

    orthanc_id: str
    modality: str
    study_instance_uid: str
    instance_ids: list[str]


class OrthancServer:
    """Runs from construction to `stop`. port: its own, for DICOM. node_port: where the node listens, or will.

    http_port: if it is to be the one from before, with what is in `folder`. password: of the user `cspine`, if it asks.
    is_archive: it gives out what it is asked for by C-GET and C-MOVE, and sends nothing by itself.
    routes_by: what sends to the node: "lua", "python" (the plugin, with `plugin_settings`) or "" for nothing.
    settings: more of Orthanc's own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        node_port: int,
        http_port: int | None = None,
        password: str = "",
        is_archive: bool = False,
        routes_by: str = "lua",
        plugin_settings: dict[str, str] | None = None,
        stable_age_s: int = STABLE_AGE_S,
        settings: dict[str, Any] | None = None,
    ) -> None:
        executable = find_orthanc()
        folder.mkdir(parents=True, exist_ok=True)
        self.destination = DicomDestination(
            type="dicom", name="orthanc", host="127.0.0.1", port=port, ae_title="ORTHANC"
        )
        http_port = http_port or free_port()
        config = read_config(ORTHANC_FOLDER / ("orthanc-python.json" if routes_by == "python" else "orthanc.json"))
        config["DicomModalities"]["cspine"]["Port"] = node_port
        config |= {
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "storage"),
            "LuaScripts": [str(ORTHANC_FOLDER / script) for script in config.get("LuaScripts", [])],
            "DicomPort": port,
            "HttpPort": http_port,
            "StableAge": stable_age_s,
            "Plugins": [find_plugin(Path(plugin).name) for plugin in config.get("Plugins", [])],
        }
        config["Plugins"] += [str(path) for path in Path("/usr/share/orthanc/plugins").glob("libOrthancDicomWeb.so")]
        if routes_by == "python":
            script = str(ORTHANC_FOLDER.parent / config["PythonScript"])
            config |= {"PythonScript": script, "CSpine": plugin_settings or {}}
        elif routes_by != "lua":
            config["LuaScripts"] = []
        if password:
            config |= {"AuthenticationEnabled": True, "RegisteredUsers": {"cspine": password}}
        if is_archive:
            config["LuaScripts"] = []
            config["DicomModalities"]["cspine"] |= {"AllowGet": True, "AllowMove": True}
        config |= settings or {}
        config_path = folder / "orthanc.json"
        config_path.write_text(json.dumps(config), encoding="utf-8")
        self._log_path = folder / "orthanc.log"
        with self._log_path.open("wb") as log:
            # Without TCP_NODELAY (a variable of dcmtk) each image waits for a delayed acknowledgement.
            environment = os.environ | {"TCP_NODELAY": "1"}
            self._process = subprocess.Popen([executable, str(config_path)], stdout=log, stderr=log, env=environment)
        self.url = f"http://127.0.0.1:{http_port}"
        self.client = OrthancApiClient(self.url, user="cspine", pwd=password)
        deadline = time.monotonic() + WAIT_S
        while not self.client.is_alive(timeout=5):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"Orthanc did not start:\n{self.log()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends it at once: a clean end would take Orthanc two to three seconds, and nothing it holds is needed."""
        self.client.close()
        self._process.kill()
        self._process.wait(20)

    def end(self) -> None:
        """Ends it by SIGTERM as a service manager would, which takes it two to three seconds."""
        self.client.close()
        self._process.terminate()
        self._process.wait(20)

    def upload(self, folder: Path) -> None:
        """Uploads every DICOM file of a folder over HTTP, as Orthanc Explorer does with a ZIP file.

        In one request: a pause between two would let a Series become stable before it is whole, and so twice.
        """
        archive = BytesIO()
        with ZipFile(archive, "w") as packed:
            for path in sorted(folder.rglob("*.dcm")):
                packed.write(path, path.relative_to(folder))
        self.client.upload(archive.getvalue())

    def series(self) -> list[StoredSeries]:
        """Every Series here."""
        return [
            StoredSeries(
                orthanc_id=series["ID"],
                modality=series["MainDicomTags"]["Modality"],
                study_instance_uid=self.client.studies.get(series["ParentStudy"]).dicom_id,
                instance_ids=series["Instances"],
            )
            for series in self.client.get_json("series?expand")
        ]

    def get_dicomweb(self, path: str) -> Any:
        """JSON from its DICOMweb service, which is a plugin."""
        return requests.get(
            f"{self.url}/dicom-web{path}", headers={"Accept": "application/dicom+json"}, timeout=20
        ).json()

    def instances(self) -> set[str]:
        """SOPInstanceUIDs of everything here."""
        return {instance["MainDicomTags"]["SOPInstanceUID"] for instance in self.client.get_json("instances?expand")}

    def read(self, modality: str) -> list[Dataset]:
        """The Instances of every Series of that modality, as Orthanc gives them out."""
        return [
            dcmread(BytesIO(self.client.instances.get_file(instance)))
            for series in self.series()
            if series.modality == modality
            for instance in series.instance_ids
        ]

    def num_stable(self) -> int:
        """How often a Series has become stable since the start: so often the script has been asked."""
        changes = self.client.get_json("changes?limit=10000")["Changes"]
        return sum(change["ChangeType"] == "StableSeries" for change in changes)

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that send to the node: Orthanc's own description of each, the oldest first."""
        jobs: list[dict[str, Any]] = self.client.get_json("jobs?expand")
        sending = [job for job in jobs if job["Type"] == "DicomModalityStore"]
        return sorted(sending, key=lambda job: job["CreationTime"])

    def log(self) -> str:
        """What it said so far."""
        return self._log_path.read_text(encoding="utf-8", errors="replace")


def read_config(path: Path) -> dict[str, Any]:
    """An Orthanc configuration: JSON in which a line may be a comment."""
    text = re.sub(r"^\s*//.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    config: dict[str, Any] = json.loads(text)
    return config
