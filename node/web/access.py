"""Who may do what over HTTP: open on loopback, else a token or the word of a reverse proxy.

Open on loopback is open to the browsers of this machine, too, and a page of any site can have its own name resolved to
127.0.0.1 (DNS rebinding). So there only requests under a name of ours are answered.

A token comes as `Authorization: Bearer TOKEN`, or as the password of HTTP Basic, which browsers can ask for.
"""

import base64
import binascii
import logging
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from node.receive.access import parse_address
from node.web.settings import Right, WebConfig
from node.web.tokens import RIGHTS, Tokens, TokensError

log = logging.getLogger(__name__)

_RIGHT_OF: dict[str, Right] = {"POST": "store", "DELETE": "delete"}
_CORS_HEADERS = "authorization, content-type, accept"
# Each in a header of its own: Chromium takes no challenge from one that holds two.
_CHALLENGES = ('Basic realm="C-Spine Node", charset="UTF-8"', "Bearer")


class AccessMiddleware:
    """Lets through what is allowed; adds what browsers must know of other origins and of ours."""

    def __init__(self, app: ASGIApp, config: WebConfig, tokens: Tokens) -> None:
        self._app = app
        self._config = config
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        extra = self._extra_headers(headers.get("origin", ""))

        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await JSONResponse(None, 204)(scope, receive, send_more)
            return
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            log.warning("action=http-refused peer=%s status=%d", _peer(scope), refusal.status_code)
            await refusal(scope, receive, send_more)
            return
        await self._app(_as_served(scope), receive, send_more)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        """The answer to a request that is not allowed; None if it is."""
        if self._config.open_to_all and not _is_our_name(headers.get("host", ""), self._config):
            text = f"here this is localhost or {self._config.host}; for another name, set web.public_url to it"
            return JSONResponse({"error": text}, 421)
        right = _RIGHT_OF.get(scope["method"], "read")
        try:
            rights = self._rights(scope, headers)
        except (TokensError, OSError) as error:
            log.error("action=tokens-unusable: %s", error)
            return JSONResponse({"error": "tokens cannot be read here; the node's log says why"}, 503)
        if rights is None:
            answer = JSONResponse({"error": "a token is needed: cspine token make NAME"}, 401)
            for challenge in _CHALLENGES:
                answer.headers.append("WWW-Authenticate", challenge)
            return answer
        if right not in rights:
            return JSONResponse(
                {"error": f"this token has no right to {right}: cspine token make NAME --right {right}"}, 403
            )
        return None

    def _rights(self, scope: Scope, headers: Headers) -> tuple[Right, ...] | None:
        """What the client may do; None if it has not said who it is."""
        if self._config.open_to_all:  # some clients send credentials that they were not given: Bearer None, say
            return RIGHTS
        proxy = self._config.trusted_proxy
        if proxy is not None and _is_one_of(_peer(scope), proxy.addresses) and headers.get(proxy.user_header):
            return proxy.rights
        if (secret := _secret(headers.get("authorization", ""))) is not None:
            token = self._tokens.find(secret)
            return token.rights if token else None
        return None

    def _extra_headers(self, origin: str) -> list[tuple[bytes, bytes]]:
        extra = [
            # What OHIF's decoders need to share memory between threads.
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Embedder-Policy", "require-corp"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "private, no-cache"),
        ]
        if origin and origin in self._config.cors_origins:
            extra += [
                ("Access-Control-Allow-Origin", origin),
                ("Access-Control-Allow-Methods", "GET, POST, DELETE"),
                ("Access-Control-Allow-Headers", _CORS_HEADERS),
                ("Cross-Origin-Resource-Policy", "cross-origin"),
                ("Vary", "Origin"),
            ]
        return [(name.lower().encode(), value.encode("latin-1")) for name, value in extra]


def _as_served(scope: Scope) -> Scope:
    """The request as it is answered.

    Health checks ask by HEAD: it is answered as GET is, and the server leaves out the body (RFC 9110 9.3.2). Clients
    put a slash too many before a path, or behind it; but what removes something has to name it to the letter.
    """
    method, path = scope["method"], scope["path"]
    if path.startswith("/dicom-web/") and method != "DELETE":
        path = re.sub("/+", "/", path).rstrip("/")
    return {**scope, "method": "GET" if method == "HEAD" else method, "path": path}


def _is_our_name(host: str, config: WebConfig) -> bool:
    """Whether a Host header names us. One that is not there does, since browsers always send it."""
    ours = {"localhost", "127.0.0.1", "::1", config.host.lower(), urlsplit(config.public_url or "").hostname}
    try:
        return not host or (urlsplit(f"//{host}").hostname or "") in ours
    except ValueError:
        return False


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _is_one_of(peer: str, addresses: Iterable[str]) -> bool:
    """Where the node listens on "::", a peer's IPv4 address comes mapped into IPv6."""
    return bool(peer) and parse_address(peer) in map(parse_address, addresses)


def _secret(authorization: str) -> str | None:
    """The token of an Authorization header; None if there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return None
