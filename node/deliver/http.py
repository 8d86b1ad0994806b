"""HTTP as destinations and watched archives need it: who we are, whom we trust, and what a failure means.

Proxies and credentials of the environment are not used: what goes where stands in the configuration. Redirects are not
followed, since they would turn an upload into a question.
"""

import ssl
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase, HTTPBasicAuth

from node.config import DicomWebDestination, OrthancDestination
from node.peers import ClientTls, DicomWebSource, HttpAuth
from node.send import SendError
from node.tls import TlsError, client_context, describe_tls_error

# After these (and redirects) trying again would end the same; every other failure may pass.
_WHAT_TO_DO = {
    400: "it does not understand the request",
    401: "check auth: it does not accept this user, password or token",
    403: "give this user the right to store and to look there",
    404: "check url",
    405: "check url: nothing can be stored there",
    406: "it does not answer in the form we ask for",
    413: "the object is too large for it, or for a proxy on the way; raise the limit there",
    415: "it does not take what we send: switch DICOM uploads on there",
    501: "it does not have this service: switch it on there",
}

_Error = TypeVar("_Error", bound=BaseException)


class HttpPeer:
    """An HTTP server while something is taken there. Close it after use."""

    def __init__(self, destination: DicomWebDestination | OrthancDestination | DicomWebSource) -> None:
        self.name = destination.where
        self._root = destination.url.rstrip("/")
        self._timeout_s = destination.timeout_s
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.auth = _credentials(destination.auth, self.name)
        if self._root.startswith("https:"):
            self._session.mount("https://", TlsAdapter(destination.tls or ClientTls(), self.name))

    def close(self) -> None:
        self._session.close()

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str | Sequence[str]] | None = None,
        also: Collection[int] = (),
        stream: bool = False,
    ) -> requests.Response:
        """The answer, if it has a status of 2xx or one of `also`. path: below the URL of the destination.

        stream: its body is read later, and it is to be closed.

        Raises:
            SendError: there is no such answer; permanent where another attempt would end the same.
        """
        try:
            response = self._session.request(
                method,
                f"{self._root}/{path}",
                data=body,
                headers=headers,
                params=query,
                timeout=self._timeout_s,
                allow_redirects=False,
                stream=stream,
            )
        except requests.exceptions.RequestException as error:
            raise failure(self.name, error, self._timeout_s) from error
        if 200 <= response.status_code < 300 or response.status_code in also:
            return response
        raise self.refusal(response)

    def refusal(self, response: requests.Response) -> SendError:
        """The error that an answer amounts to."""
        return refusal(self.name, response.status_code, response.reason)


def failure(name: str, error: requests.RequestException, timeout_s: float) -> SendError:
    """The error that a request without an answer amounts to. name: of the server, as messages call it."""
    if isinstance(error, requests.exceptions.SSLError):
        return _tls_error(name, error)
    if isinstance(error, requests.exceptions.Timeout):
        return SendError(f"{name} did not answer within {timeout_s:g} s")
    if isinstance(error, requests.exceptions.ConnectionError):
        return SendError(f"{name} {_describe_break(error)}")
    if isinstance(error, requests.exceptions.ChunkedEncodingError):  # so requests calls any body that ends too early
        return SendError(f"{name} broke off in the middle of an answer")
    return SendError(f"{name} did not answer properly ({type(error).__name__})")


def refusal(name: str, status: int, reason: str) -> SendError:
    """The error that an answer with this status amounts to."""
    told = f"{name} answered {status} ({reason})"
    if 300 <= status < 400:
        return SendError(f"{told}: it sends us elsewhere; put the final address into url", permanent=True)
    if status in _WHAT_TO_DO:
        return SendError(f"{told}: {_WHAT_TO_DO[status]}", permanent=True)
    return SendError(told)


def _tls_error(name: str, error: requests.exceptions.SSLError) -> SendError:
    cause = _cause(error, ssl.SSLError)
    why = describe_tls_error(cause) if cause else type(error).__name__
    untrusted = isinstance(cause, ssl.SSLCertVerificationError)
    remedy = "; name its authority under tls.ca" if untrusted else ""
    return SendError(f"{name} cannot be spoken to under TLS: {why}{remedy}", permanent=untrusted)


class TlsAdapter(HTTPAdapter):
    """Uses the node's TLS settings, and trusts the authorities they name and no others."""

    def __init__(self, tls: ClientTls, name: str) -> None:
        try:
            self._context = client_context(tls)
        except TlsError as error:
            raise SendError(f"{name} cannot be spoken to under TLS: {error}", permanent=True) from error
        self._server_name = tls.server_name
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        if self._server_name:
            kwargs |= {"server_hostname": self._server_name, "assert_hostname": self._server_name}
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)

    def cert_verify(self, *_args: Any) -> None:
        """Adds nothing: requests would add the authorities of certifi."""


class _Bearer(AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def read_secret(auth: HttpAuth, name: str) -> str:
    """The password or token.

    Raises:
        SendError: it is not there.
    """
    try:
        return auth.read_secret()
    except OSError as error:
        raise SendError(f"the secret for {name} cannot be read: {error}", permanent=True) from error


def _credentials(auth: HttpAuth | None, name: str) -> AuthBase | None:
    """Read at each use, so that a changed secret needs no restart.

    Raises:
        SendError: the secret is not there.
    """
    if auth is None:
        return None
    secret = read_secret(auth, name)
    if auth.type == "bearer":
        return _Bearer(secret)
    return HTTPBasicAuth(auth.user.encode(), secret.encode())


def _describe_break(error: requests.exceptions.ConnectionError) -> str:
    if _cause(error, ConnectionRefusedError):
        return "cannot be reached: connection refused; check url, and that it runs"
    system = _cause(error, OSError)
    if _cause(error, ConnectionError) or "RemoteDisconnected" in repr(error):
        return "broke the connection"
    why = f": {system.strerror}" if system is not None and system.strerror else ""
    return f"cannot be reached{why}; check url, and that it runs"


def _cause(error: BaseException, kind: type[_Error]) -> _Error | None:
    """The error of that kind among those that led to this one: requests wraps what urllib3 wraps."""
    seen: list[object] = [error]
    while seen:
        item = seen.pop()
        if isinstance(item, kind) and not isinstance(item, requests.exceptions.RequestException):
            return item
        if isinstance(item, BaseException):
            seen += [*item.args, item.__cause__, getattr(item, "reason", None)]
            seen += [item.__context__] if item.__cause__ is None else []
    return None
