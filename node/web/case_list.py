"""The case list: a page at the root that says what became of each Series, with a link into the viewer for each.

Plain HTML, made here for each request, which names no patient and needs no script. The links open OHIF with the
vertebrae shown: `initialSeriesInstanceUID` names their Segmentation.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response

from node.case import Case
from node.index import Index
from node.notify.notice import NOTICE, suspected_levels
from node.profiles import FINDINGS_FILE
from node.web.catalog import Catalog
from node.web.matching import Condition, QueryError
from node.web.viewer import find_viewer

_NUM_ON_PAGE = 50
_MAX_PAGE = 99_999
_MAX_SHOWN_UID = 16  # characters; the rest is in the title
_COLUMNS = ("Received", "Study", "Series", "State", "Probability", "Levels called", "Viewer")

_STYLE = """
:root{color-scheme:light dark}
body{font:1rem/1.45 system-ui,sans-serif;margin:1rem auto;max-width:80rem;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem;margin:0 0 .5rem}
.notice{border-left:.3rem solid #b45309;padding:.4rem .8rem;background:#fff7e6;margin:0 0 1rem}
table{border-collapse:collapse;width:100%}
caption{text-align:left;padding:.3rem 0;color:#555}
th,td{text-align:left;padding:.45rem .7rem .45rem 0;border-bottom:1px solid #ccc;vertical-align:top}
a{color:#0b57d0}
a:focus-visible{outline:3px solid #b45309;outline-offset:2px}
time{white-space:nowrap}
.uid{font-family:ui-monospace,monospace;font-size:.9em;white-space:nowrap}
.present{font-weight:700}
.reason{display:block;color:#555;font-size:.9em;overflow-wrap:anywhere}
nav a{display:inline-block;padding:.6rem 1rem .6rem 0}
@media (max-width:47rem){
thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
table,caption,tbody,tr,th,td{display:block}
tr{border-bottom:2px solid #888;padding:.5rem 0}
th,td{border:0;padding:.15rem 0}
td::before,th[scope=row]::before{content:attr(data-title) ": ";color:#555;font-weight:400}
td a{display:inline-block;padding:.5rem 0}
}
@media (prefers-color-scheme:dark){
body{color:#eee;background:#16181d}
.notice{background:#33270f}
caption,.reason,td::before,th[scope=row]::before{color:#bbb !important}
th,td{border-color:#444}
a{color:#8ab4f8}
}
"""
_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)


def make_router(index: Index, catalog: Catalog) -> APIRouter:
    """The page at /."""
    router = APIRouter()

    @router.get("/")
    def show(request: Request) -> Response:
        page = _page(request.query_params.get("page", "1"))
        catalog.refresh()
        found = index.cases(_NUM_ON_PAGE + 1, offset=(page - 1) * _NUM_ON_PAGE)
        cases, is_more = found[:_NUM_ON_PAGE], len(found) > _NUM_ON_PAGE
        findings = {case.case_id: read for case in cases if (read := _findings(case.valid_result_dir)) is not None}
        html = _render(cases, findings, _segmentations(catalog, cases), page, is_more=is_more)
        headers = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    return router


def _page(text: str) -> int:
    """A page's number, from 1.

    Raises:
        QueryError: it is none.
    """
    if not (text.isascii() and text.isdecimal() and 1 <= len(text) <= 5 and int(text) >= 1):
        raise QueryError(f"pages are numbered from 1 to {_MAX_PAGE}")
    return int(text)


def _findings(result_dir: Path | None) -> dict[str, Any] | None:
    """What the model said; None if there is nothing, or it has been purged."""
    if result_dir is None:
        return None
    try:
        read = json.loads((result_dir / FINDINGS_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


def _segmentations(catalog: Catalog, cases: Sequence[Case]) -> dict[str, str]:
    """SeriesInstanceUID of the vertebrae's Segmentation, by the Series it is of."""
    if not cases:
        return {}
    studies = ",".join(sorted({case.study_instance_uid for case in cases}))
    stored = catalog.matching_files([Condition("StudyInstanceUID", studies), Condition("Modality", "SEG")])
    vertebrae = sorted((one for one in stored if one.path.name.startswith("vertebrae")), key=lambda one: one.path.name)
    return {one.case_series: one.series_instance_uid for one in reversed(vertebrae)}


# ---- HTML ----


def _render(
    cases: Sequence[Case],
    findings: Mapping[int, Mapping[str, Any]],
    segmentations: Mapping[str, str],
    page: int,
    *,
    is_more: bool,
) -> str:
    has_viewer = find_viewer() is not None
    rows = "".join(
        _row(case, findings.get(case.case_id), segmentations.get(case.series_instance_uid), has_viewer)
        for case in cases
    )
    titles = "".join(f'<th scope="col" role="columnheader">{title}</th>' for title in _COLUMNS)
    table = (
        f'<table role="table"><caption>Cases, the newest first</caption><thead role="rowgroup"><tr role="row">{titles}'
        f'</tr></thead><tbody role="rowgroup">{rows}</tbody></table>'
        if cases
        else "<p>No case here. Send a CT Series to the node, and it appears after a reload.</p>"
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>C-Spine Node: cases</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>C-Spine Node</h1>"
        f'<p class="notice" role="note"><strong>{NOTICE}</strong>{"".join(_models(findings))}</p>'
        f"{table}{_pages(page, is_more=is_more)}</main></body></html>"
    )


def _models(findings: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each model that spoke here."""
    models = {(m.get("name"), m.get("version"), m.get("trained_on")) for f in findings.values() for m in [f["model"]]}
    for name, version, trained_on in sorted(models, key=str):
        yield f"<br>Model {escape(str(name))} {escape(str(version))}: {escape(str(trained_on))}"


def _row(case: Case, findings: Mapping[str, Any] | None, segmentation: str | None, has_viewer: bool) -> str:
    received = datetime.fromtimestamp(case.first_received_at).astimezone()
    shown = f'<time datetime="{received.isoformat(timespec="seconds")}">{received:%Y-%m-%d %H:%M:%S}</time>'
    more = "".join(f'<span class="reason">{escape(text)}</span>' for text in (case.reason, case.conflicts) if text)
    cells = [
        _uid(case.study_instance_uid),
        _uid(case.series_instance_uid),
        f"{escape(case.state)}{more}",
        *_said(findings),
        _link(case, segmentation) if has_viewer else "not installed: make viewer",
    ]
    named = zip(_COLUMNS[1:], cells, strict=True)
    return (
        f'<tr role="row"><th scope="row" role="rowheader" data-title="{_COLUMNS[0]}">{shown}</th>'
        + "".join(f'<td role="cell" data-title="{title}">{cell}</td>' for title, cell in named)
        + "</tr>"
    )


def _said(findings: Mapping[str, Any] | None) -> tuple[str, str]:
    """Probability of the patient, and the levels called and not judged."""
    if findings is None:
        return "–", "–"
    overall = findings["patient_overall"]
    if overall["probability"] is None:
        return "–", "could not be judged"
    levels = suspected_levels(dict(findings))
    called = f'<span class="present">{escape(", ".join(levels))}</span>' if levels else "none"
    unjudged = [name for name, level in findings["levels"].items() if level["finding"] == "undetermined"]
    if unjudged:
        called += f"; {escape(', '.join(unjudged))} not judged"
    return f"{100 * overall['probability']:.1f} %", called


def _uid(uid: str) -> str:
    """The end of a UID, which tells it apart; all of it for who points at it, or has it read out."""
    shown = uid if len(uid) <= _MAX_SHOWN_UID else "…" + uid[-_MAX_SHOWN_UID + 1 :]
    return f'<span class="uid" title="{escape(uid)}">{escape(shown)}</span>'


def _link(case: Case, segmentation: str | None) -> str:
    """Opens the Study, with the vertebrae where there are some."""
    if case.originals_purged_at is not None:
        return "purged"
    query = {"StudyInstanceUIDs": case.study_instance_uid}
    if segmentation is not None:
        query["initialSeriesInstanceUID"] = segmentation
    what = "CT with vertebrae" if segmentation is not None else "CT"
    label = f"Open case {case.case_id}: {what}"
    return f'<a href="/viewer/viewer?{escape(urlencode(query))}" aria-label="{label}">{what}</a>'


def _pages(page: int, *, is_more: bool) -> str:
    links = [f'<a href="/?page={page - 1}" rel="prev">Newer cases</a>'] if page > 1 else []
    links += [f'<a href="/?page={page + 1}" rel="next">Older cases</a>'] if is_more else []
    return f'<nav aria-label="Pages">{"".join(links)}</nav>' if links else ""
