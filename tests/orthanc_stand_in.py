"""What of Orthanc's REST API a watch asks, for what a real one does not do on demand: faults at one Series."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

from pydicom import dcmread

from tests.serving import Quiet, serving


@dataclass
class OrthancStandIn:
    """With Series by name. faults: statuses of files of a Series; 0 cuts them, 429 asks for a pause of 30 s.

    changes: the Series that became stable, and Instances that came, in order. paused: addresses at which it asks for
    that pause, too.
    """

    series: dict[str, list[Path]]
    changes: list[str] = field(default_factory=list)
    faults: dict[str, int | Literal["odd"]] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, path: str) -> tuple[int, Any]:
        """Status and body: of a file bytes, else what becomes JSON."""
        self.asked.append(path)
        if path in self.paused:
            return 429, {}
        kind, _, rest = path.removeprefix("/").partition("/")
        if path == "/changes?last":
            return 200, {"Changes": [], "Last": len(self.changes)}
        if path.startswith("/changes?since="):
            since = int(path.removeprefix("/changes?since=").partition("&")[0])
            numbered = list(enumerate(self.changes, start=1))[since:]
            kinds = {True: "NewInstance", False: "StableSeries"}
            found = [{"Seq": number, "ID": name, "ChangeType": kinds["." in name]} for number, name in numbered]
            return 200, {"Changes": found, "Last": len(self.changes), "Done": True}
        name, number = rest.split("/")[0].partition(".")[::2]
        if kind == "series" and rest.endswith("/instances?expand"):
            if self.faults.get(name) == "odd":
                return 200, [{"nothing": "known"}]
            uids = [str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in self.series[name]]
            return 200, [{"ID": f"{name}.{n}", "MainDicomTags": {"SOPInstanceUID": uid}} for n, uid in enumerate(uids)]
        if kind == "series":
            uid = str(dcmread(self.series[name][0], stop_before_pixels=True).SeriesInstanceUID)
            return 200, {
                "IsStable": True,
                "Instances": [],
                "MainDicomTags": {"Modality": "CT", "SeriesInstanceUID": uid},
            }
        if rest.endswith("/simplified-tags"):
            return 200, {"Modality": "CT", "ImageType": "ORIGINAL\\PRIMARY\\AXIAL"}
        if not rest.endswith("/file"):
            return 200, {"ParentSeries": name}
        return int(self.faults.get(name, 200)), self.series[name][int(number)].read_bytes()

    @contextmanager
    def serving(self) -> Iterator["OrthancStandIn"]:
        stand_in = self

        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = stand_in.answer(self.path)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "30")
                self.end_headers()
                self.wfile.write(data if status else data[:100])

        with serving(Handler) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self
