"""OHIF at /viewer, on our own DICOMweb. `make viewer` brings its files; without them the address says so.

No other host is contacted: the viewer's configuration names this service only.
"""

import json
import mimetypes
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse

PLACES = (Path(__file__).parents[2] / ".viewer", Path("/opt/cspine/viewer"))  # a checkout, the container

CONFIG = {
    "routerBasename": "/viewer",
    "extensions": [],
    "modes": [],
    "showStudyList": True,
    "investigationalUseDialog": {"option": "never"},
    "disableConfirmationPrompts": True,
    "customizationService": [{"ohif.tours": {"$set": []}}],
    "defaultDataSourceName": "node",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "node",
            "configuration": {
                "friendlyName": "C-Spine Node",
                "name": "node",
                "qidoRoot": "/dicom-web",
                "wadoRoot": "/dicom-web",
                "wadoUriRoot": "/dicom-web",
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "supportsFuzzyMatching": False,
                "supportsWildcard": True,
                "omitQuotationForMultipartRequest": True,
                "bulkDataURI": {"enabled": True},
            },
        }
    ],
}
"""What OHIF is told. Its tour of the viewer, its notice of investigational use and its question whether to show a
Segmentation would stand between the case list and the first picture."""

_EXTENSION = """
window.config.extensions.push({
  id: "cspine.report",
  preRegistration: ({ servicesManager }) => {
    const sets = servicesManager.services.displaySetService;
    sets.subscribe(sets.EVENTS.DISPLAY_SETS_ADDED, ({ displaySetsAdded }) => {
      for (const set of displaySetsAdded) if (set.Modality === "SR") set.isImagingMeasurementReport = false;
    });
  },
});
"""
# OHIF shows of a TID 1500 report only its coordinates over the image, and an empty page where there are none, as in
# every report here. Of any other report it shows the text.


def config_script() -> str:
    """What OHIF loads first."""
    return f"window.config = {json.dumps(CONFIG)};{_EXTENSION}"


def find_viewer() -> Path | None:
    """The folder of OHIF's files; None if they are not here."""
    return next((place for place in PLACES if (place / "index.html").is_file()), None)


def _find_file(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder or below it; None if there is none."""
    try:
        wanted = (folder / name).resolve()
        return wanted if wanted.is_relative_to(folder.resolve()) and wanted.is_file() else None
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte in it
        return None


def _unless_known(request: Request, path: Path) -> Response:
    """A file, or 304 for a browser that has it as it is: OHIF is 17 MB to begin with."""
    answer = FileResponse(path, media_type=mimetypes.guess_type(path.name)[0], stat_result=path.stat())
    known = request.headers.get("if-none-match", "").split(",")
    if answer.headers["etag"] not in (tag.strip().removeprefix("W/") for tag in known):
        return answer
    return Response(status_code=304, headers={"ETag": answer.headers["etag"]})


def make_router() -> APIRouter:
    """Every address that nobody else has: OHIF, as it is built, asks for its files at the root.

    Below /viewer, what is no file is a page of the application, which finds its way itself.
    """
    router = APIRouter()

    @router.get("/app-config.js")
    def config() -> Response:
        return Response(config_script(), media_type="text/javascript")

    @router.get("/{path:path}")
    def file(request: Request, path: str) -> Response:
        folder = find_viewer()
        is_page = path.split("/")[0] == "viewer"
        if folder is None:
            text = "the viewer is not installed: make viewer brings it" if is_page else "there is nothing here"
            return JSONResponse({"error": text}, 404)
        wanted = _find_file(folder, path.removeprefix("viewer/"))
        if wanted is None:
            if not is_page:
                return JSONResponse({"error": "there is nothing here; the viewer is at /viewer"}, 404)
            wanted = folder / "index.html"
        return _unless_known(request, wanted)

    return router
