"""The addresses of the HTTP side, each a few lines: a request is understood, and answered in a form that it accepts.

`make_app` gives the ASGI application; `server.py` runs it.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Iterator
from io import FileIO
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydicom.uid import ExplicitVRLittleEndian
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from node.case import CaseState
from node.config import Config
from node.process import describe_error
from node.receive.headers import is_uid
from node.receive.sender import Sender
from node.receive.store import Store
from node.remove import delete_case
from node.web import case_list, qido, rendered, viewer, wado
from node.web.accept import Choice, Offer, choose
from node.web.access import AccessMiddleware
from node.web.catalog import Catalog, StoredInstance
from node.web.kernel_files import SendPieces, close_files, send_pieces_of
from node.web.levels import Level
from node.web.limits import in_time
from node.web.matching import QueryError
from node.web.multipart import MediaTypeError, MultipartError, MultipartReader, TooManyPartsError
from node.web.settings import WebConfig
from node.web.stow import Stored, TooLargeError, boundary_of_request, store_parts
from node.web.tokens import Tokens

log = logging.getLogger(__name__)

_IN_JSON = [Offer(media_type="application/dicom+json"), Offer(media_type="application/json")]
_TOO_SLOW = "nothing, or too little, has come for web.body_timeout_s"
_STATUSES: dict[type[Exception], int] = {  # of HTTP, of what a request may be at fault with
    QueryError: 400,
    MultipartError: 400,
    MediaTypeError: 415,
    TooManyPartsError: 413,
    ClientDisconnect: 400,
    TooLargeError: 413,
    wado.NotThereError: 404,
    wado.CannotGiveError: 406,
    TimeoutError: 408,
}
_STUDY = "/studies/{study}"
_SERIES = _STUDY + "/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"
_LEVELS = {"studies": Level.STUDY, "series": Level.SERIES, "instances": Level.INSTANCE}
_reading = APIRouter()  # searching and retrieving
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HEADERS_OF_PROXIES = ("via", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto")


def make_app(config: Config, catalog: Catalog, store: Store, tokens: Tokens) -> FastAPI:
    """The application: the case list at /, DICOMweb at /dicom-web, OHIF at /viewer."""
    app = FastAPI(title="C-Spine Node", docs_url=None, redoc_url=None)
    app.state.catalog = catalog
    app.state.web = config.web
    app.include_router(_reading, prefix="/dicom-web")
    app.include_router(_store_router(config.web, store), prefix="/dicom-web")
    app.include_router(case_list.make_router(store.index, catalog))
    app.include_router(viewer.make_router())
    app.add_middleware(AccessMiddleware, config=config.web, tokens=tokens)
    for error, status in _STATUSES.items():
        app.add_exception_handler(error, _say(status))
    app.add_exception_handler(FileNotFoundError, _say(404, "it has just been removed"))
    app.add_exception_handler(TimeoutError, _say(408, _TOO_SLOW))
    app.add_exception_handler(HTTPException, _say_http)
    app.add_exception_handler(Exception, _say_broken)
    return app


def _say(status: int, text: str = "") -> Callable[[Request, Exception], Response]:
    """Answers an error with its message, which names no patient and no path."""
    return lambda _request, error: JSONResponse({"error": text or str(error)}, status)


def _say_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    allow = {"Allow": ", ".join(("OPTIONS", *_methods(request)))}
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=allow)
    return JSONResponse({"error": f"this cannot be done here, but {allow['Allow']}"}, 405, allow)


def _methods(request: Request) -> Iterator[str]:
    """What an address has, though routes of their own answer it (RFC 9110 10.2.1)."""
    for method, also in (("GET", ("HEAD",)), ("POST", ()), ("DELETE", ())):
        asked = {**request.scope, "method": method}
        if any(route.matches(asked)[0] is Match.FULL for route in request.app.routes):
            yield from (method, *also)


def _say_broken(_request: Request, error: Exception) -> Response:
    """A fault of ours. Its message may quote a patient's data, so only kind and place are logged."""
    log.error("action=http-broke: %s", describe_error(error))
    return JSONResponse({"error": "the request cannot be answered; the node's log says where it broke"}, 500)


# ---- what every address needs ----


def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    catalog.refresh()
    return catalog


def _root(request: Request) -> str:
    """The address of the DICOMweb service as the client sees it."""
    web: WebConfig = request.app.state.web
    if web.public_url is not None:
        return web.public_url.rstrip("/") + "/dicom-web"
    base = str(request.base_url).rstrip("/")
    # dicomweb-client leaves the port out of Host. A proxy that does is at the default port itself.
    is_proxied = web.trusted_proxy is not None or any(name in request.headers for name in _HEADERS_OF_PROXIES)
    port = request.scope["server"][1]
    has_port = ":" in base.partition("//")[2].rpartition("]")[2]  # an IPv6 address has colons of its own
    if not has_port and not is_proxied and port != _DEFAULT_PORTS[request.url.scheme]:
        base += f":{port}"
    return base + "/dicom-web"


def _uids(request: Request) -> list[str]:
    """Of the Study, the Series and the Instance that the address names."""
    return [request.path_params[name] for name in ("study", "series", "instance") if name in request.path_params]


def _found(request: Request) -> list[StoredInstance]:
    """The Instances of the Study or Series that the address names, or that one Instance.

    Raises:
        NotThereError: there is none.
    """
    uids = _uids(request)
    found = _catalog(request).files(*uids) if all(map(is_uid, uids)) else []
    if not found:
        raise wado.NotThereError(f"{('Study', 'Series', 'Instance')[len(uids) - 1]} {uids[-1]:.64} is not here")
    return found


def _found_one(request: Request) -> StoredInstance:
    return _found(request)[0]


CatalogOf = Annotated[Catalog, Depends(_catalog)]
RootOf = Annotated[str, Depends(_root)]
FoundOf = Annotated[list[StoredInstance], Depends(_found)]
InstanceOf = Annotated[StoredInstance, Depends(_found_one)]


def _choose(request: Request, offers: list[Offer]) -> Choice:
    """The form that the client accepts; `accept` in the query string stands for the header (PS3.18 8.3.3.1).

    Raises:
        HTTPException: 406, none of them.
    """
    accept = request.query_params.get("accept") or ", ".join(request.headers.getlist("accept"))
    choice = choose(accept, offers, default_syntax=ExplicitVRLittleEndian)
    if choice is None:
        can = ", ".join(
            f'{offer.media_type}; type="{offer.part}"' if offer.part else offer.media_type for offer in offers
        )
        raise HTTPException(406, f"this can be given as {can}, with a transfer syntax it can be transcoded to")
    return choice


class _Pieces(Response):
    """A body that is made while it is sent: in a thread, some pieces at a time, each sent as it is.

    send_pieces: sends all of them, if there are files among them.
    """

    def __init__(
        self,
        pieces: Iterator[list[bytes | FileIO]],
        media_type: str,
        length: int | None,
        send_pieces: SendPieces | None,
    ) -> None:
        self._pieces, self._send_pieces = pieces, send_pieces
        headers = {"Content-Type": media_type} | ({} if length is None else {"Content-Length": str(length)})
        super().__init__(headers=headers)
        if length is None:
            del self.headers["Content-Length"]  # that of no body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = await asyncio.to_thread(next, self._pieces, None)  # what cannot be had is an error, not a broken body
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(_until_gone(receive))
        try:
            while first is not None and not gone.done():  # for a client that has gone no more is read
                following = asyncio.create_task(asyncio.to_thread(next, self._pieces, None))
                if self._send_pieces is not None:
                    await self._send_pieces(first)
                else:
                    for piece in first:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                first = await following
        finally:
            gone.cancel()
            close_files(first or ())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _related(part_type: str, boundary: str) -> str:
    return f'multipart/related; type="{part_type}"; boundary={boundary}'


def _warn(answer: Response, *warnings: str) -> Response:
    """The answer, with what was not done as it was asked for (PS3.18 8.3)."""
    for said in warnings:
        answer.headers.append("Warning", f'299 cspine: "{said}"')
    return answer


def _boundary() -> str:
    return secrets.token_hex(16)


# ---- QIDO-RS ----


@_reading.get("/studies")
@_reading.get("/series")
@_reading.get("/instances")
@_reading.get(f"{_STUDY}/series")
@_reading.get(f"{_STUDY}/instances")
@_reading.get(f"{_SERIES}/instances")
def _search(request: Request, catalog: CatalogOf, root: RootOf) -> Response:
    form = _choose(request, _IN_JSON).offer.media_type
    level = _LEVELS[request.scope["path"].rpartition("/")[2]]
    scope = {upper.uid_keyword: uid for upper, uid in zip(Level, _uids(request), strict=False)}
    query = qido.parse_query(level, request.query_params.multi_items(), scope)
    found = qido.search(catalog, level, query, root)
    answer = Response(json.dumps(found), media_type=form) if found else Response(status_code=204)
    _warn(answer, *query.warnings)
    # Who names no limit would take the first thousand for all (PS3.18 8.3.4.4).
    is_full = len(found) == query.limit
    num_left = catalog.num_matches(level, query.conditions) - query.offset - len(found) if is_full else 0
    if num_left > 0:
        _warn(answer, f"There are {num_left} additional results that can be requested")
    return answer


# ---- WADO-RS ----


def _parts(found: list[bytes], choice: Choice) -> Response:
    boundary = _boundary()
    body = wado.multipart_of(found, wado.typed(choice.offer.part, choice.transfer_syntax), boundary)
    return Response(body, media_type=_related(choice.offer.part, boundary))


def _show(request: Request, one: rendered.Wanted | None, several: rendered.Wanted | None = None) -> Response:
    """Pictures: one, or several where the client accepts multipart/related; None where there is no such thing."""
    choice = _choose(request, rendered.offers(one=one is not None, several=several is not None))
    view = rendered.parse_view(request.query_params)
    media_type = choice.offer.part or choice.offer.media_type
    if several is not None and choice.offer.part:
        boundary = _boundary()
        pieces = rendered.multipart_of_pictures(several, media_type, view, boundary)
        return _warn(_Pieces(pieces, _related(media_type, boundary), None, None), *view.warnings)
    assert one is not None
    view = view if several is not None else view.as_thumbnail()
    picture = next(rendered.pictures(one, media_type, view))
    return _warn(Response(picture, media_type=media_type), *view.warnings)


@_reading.get(_STUDY)
@_reading.get(_SERIES)
@_reading.get(_INSTANCE)
def _retrieve(request: Request, instances: FoundOf) -> Response:
    choice = _choose(request, wado.instance_offers(instances))
    if not choice.offer.part:
        return Response(wado.instance_bytes(instances[0], choice.transfer_syntax), media_type=wado.DICOM)
    boundary = _boundary()
    send_pieces = send_pieces_of(request.scope)
    pieces, length = wado.multipart_of_instances(
        instances, choice.transfer_syntax, boundary, as_files=send_pieces is not None
    )
    return _Pieces(pieces, _related(wado.DICOM, boundary), length, send_pieces if length is not None else None)


@_reading.get(f"{_STUDY}/metadata")
@_reading.get(f"{_SERIES}/metadata")
@_reading.get(f"{_INSTANCE}/metadata")
def _metadata(request: Request, instances: FoundOf, root: RootOf) -> Response:
    form = _choose(request, _IN_JSON).offer.media_type
    told = (json.dumps(wado.metadata(instance, root)) for instance in instances)
    return Response("[" + ",".join(told) + "]", media_type=form)


@_reading.get(f"{_STUDY}/rendered")
@_reading.get(f"{_SERIES}/rendered")
def _pictures(request: Request, found: FoundOf) -> Response:
    return _show(request, rendered.middle_of(found), rendered.all_of(found))


@_reading.get(f"{_INSTANCE}/rendered")
def _picture(request: Request, instance: InstanceOf) -> Response:
    return _show(request, [(instance, [1])], rendered.all_of([instance]))


@_reading.get(f"{_STUDY}/thumbnail")
@_reading.get(f"{_SERIES}/thumbnail")
@_reading.get(f"{_INSTANCE}/thumbnail")
def _thumbnail(request: Request, found: FoundOf) -> Response:
    return _show(request, rendered.middle_of(found))


@_reading.get(_INSTANCE + "/bulkdata/{tag}")
def _bulk_data(request: Request, instance: InstanceOf, tag: str) -> Response:
    if len(tag) != 8 or not all(digit in "0123456789abcdefABCDEF" for digit in tag):
        raise wado.NotThereError("bulk data is named by a tag of eight hex digits, such as 7FE00010")
    choice = _choose(request, wado.bulk_offers(instance, tag))
    found = wado.bulk_data(instance, tag, choice.transfer_syntax)
    if not choice.offer.part:
        return Response(found[0], media_type=wado.typed(wado.OCTETS, choice.transfer_syntax))
    return _parts(found, choice)


@_reading.get(_INSTANCE + "/frames/{numbers}")
def _frames(request: Request, instance: InstanceOf, numbers: str) -> Response:
    choice = _choose(request, wado.frame_offers(instance))
    return _parts(wado.frames(instance, _numbers(numbers), choice.transfer_syntax), choice)


@_reading.get(_INSTANCE + "/frames/{numbers}/rendered")
def _frame_rendered(request: Request, instance: InstanceOf, numbers: str) -> Response:
    wanted = [(instance, _numbers(numbers))]
    return _show(request, wanted if len(wanted[0][1]) == 1 else None, wanted)


@_reading.get(_INSTANCE + "/frames/{numbers}/thumbnail")
def _frame_thumbnail(request: Request, instance: InstanceOf, numbers: str) -> Response:
    return _show(request, [(instance, _numbers(numbers)[:1])])


def _numbers(text: str) -> list[int]:
    """Frame numbers of an address, such as 1,2,5.

    Raises:
        QueryError: they are none.
    """
    fields = text.split(",")
    if not all(field.isascii() and field.isdecimal() and len(field) < 7 for field in fields):
        raise QueryError("frames are named by their numbers, from 1, such as 1,2,5")
    numbers = [int(field) for field in fields]
    if len(set(numbers)) < len(numbers):  # a frame is held in memory as often as it is named
        raise QueryError("a frame is named twice; each is given once")
    return numbers


# ---- STOW-RS, and what administrators may remove ----


def _store_router(config: WebConfig, store: Store) -> APIRouter:
    router = APIRouter()

    @router.post("/studies")
    @router.post(_STUDY)
    async def keep(request: Request) -> Response:
        form = _choose(request, _IN_JSON).offer.media_type
        reader = MultipartReader(boundary_of_request(request.headers), config.max_parts)
        length = request.headers.get("content-length", "0")
        if int(length) > config.max_body_mb << 20:  # the server has seen to it that it is a number
            raise TooLargeError(f"a request may have {config.max_body_mb} MB (web.max_body_mb)")
        source = Sender(lambda: "STOW-RS", store.index, store.run)
        stored, is_whole = Stored(), False
        try:
            await store_parts(
                in_time(request.stream(), config.body_timeout_s),
                reader,
                store,
                source,
                stored,
                study_instance_uid=request.path_params.get("study", ""),
                max_bytes=config.max_body_mb << 20,
            )
            is_whole = True
        except tuple(_STATUSES) as error:
            if not stored.taken:
                raise
            status = next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
            why = str(error) or _TOO_SLOW
        finally:
            for _, status in stored.failed:
                source.note_refusal(status)
            await asyncio.to_thread(source.end, released=is_whole)
        answer = Response(json.dumps(stored.to_json(_root(request))), stored.status, media_type=form)
        if not is_whole:  # what has been stored all the same is named
            answer.status_code = status
            _warn(answer, why)
        return answer

    @router.delete(_STUDY)
    def delete_study(found: FoundOf) -> Response:
        return delete({instance.case_series for instance in found})

    @router.delete(_SERIES)
    def delete_series(found: FoundOf, series: str) -> Response:
        """Of a received Series; with it goes what was made of it."""
        if all(instance.case_series != series for instance in found):
            raise HTTPException(409, "this Series was made from another one; delete that, and it goes too")
        return delete({series})

    def delete(series_uids: set[str]) -> Response:
        cases = [case for uid in sorted(series_uids) if (case := store.index.case(uid)) is not None]
        if any(case.state is CaseState.ANALYSING or not delete_case(store.index, case) for case in cases):
            raise HTTPException(409, "it is being received or analysed at this moment; try again when that is over")
        return Response(status_code=204)

    return router
