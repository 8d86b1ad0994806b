"""TLS for DIMSE, as server and as client: PS3.15 B.12, the BCP 195 (RFC 8996, RFC 9325) profile.

`server_context` and `client_context` make what the sockets need of the `tls:` settings; `ServerTls` follows the files,
so that a renewed certificate is used without a restart; `describe_tls_error` says what went wrong in one sentence.
"""

import logging
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from node.config import ReceiveTls
from node.peers import ClientTls

log = logging.getLogger(__name__)

# RFC 9325 4.2, for TLS 1.2; those of TLS 1.3 are all fine. Level 2: no RSA key below 2048 bits, no SHA-1 signature.
CIPHERS_TLS_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"
WARN_BEFORE_EXPIRY = timedelta(days=30)


class TlsError(Exception):
    """A certificate, key or list of authorities cannot be used; the message says which, and why."""


def server_context(tls: ReceiveTls) -> ssl.SSLContext:
    """A context for the connections that we accept.

    Raises:
        TlsError: a file cannot be read, is not what it should be, or key and certificate do not match.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    restrict(context)
    context.verify_mode = {
        "required": ssl.CERT_REQUIRED,
        "optional": ssl.CERT_OPTIONAL,
        "none": ssl.CERT_NONE,
    }[tls.verify]
    _load_own(context, tls.certificate, tls.key)
    if tls.client_ca is not None:
        _load_authorities(context, tls.client_ca)
    return context


def client_context(tls: ClientTls) -> ssl.SSLContext:
    """A context for the connections that we make; the peer's certificate is always checked, its name too.

    Raises:
        TlsError: a file cannot be read, is not what it should be, or key and certificate do not match.
    """
    context = _ExplainingContext(ssl.PROTOCOL_TLS_CLIENT)
    restrict(context)
    if tls.certificate is not None and tls.key is not None:
        _load_own(context, tls.certificate, tls.key)
    if tls.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_authorities(context, tls.ca)
    return context


def last_error(context: ssl.SSLContext) -> str:
    """What went wrong with the last connection made with a client context; "" when nothing did."""
    error = context.error if isinstance(context, _ExplainingContext) else None
    return "" if error is None else describe_tls_error(error)


class _ExplainingSocket(ssl.SSLSocket):
    """Keeps the reason for which a connection failed: pynetdicom only logs it, where nobody who sends would look."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError as error:
            self.context.error = error  # type: ignore[attr-defined]
            self.close()  # pynetdicom leaves it open
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as error:  # with TLS 1.3 a refusal of our certificate comes with the first answer
            self.context.error = error  # type: ignore[attr-defined]
            self.close()
            raise


class _ExplainingContext(ssl.SSLContext):
    sslsocket_class = _ExplainingSocket
    error: OSError | None = None


def check_pair(certificate: Path, key: Path) -> None:
    """Returns when the certificate and its key can be used together.

    Raises:
        TlsError: a file cannot be read, is not what it should be, or the two do not match.
    """
    _load_own(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)


def restrict(context: ssl.SSLContext) -> None:
    """Leaves the versions and cipher suites of BCP 195."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_TLS_1_2)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for path in (certificate, key):
        _check_readable(path)
    try:
        # Without a password at hand OpenSSL would ask the terminal for one.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"the key {key} does not belong to the certificate {certificate}") from error
        raise TlsError(
            f"{certificate} with {key} cannot be used: both must be PEM, the key without a password{_why(error)}"
        ) from error


def _load_authorities(context: ssl.SSLContext, path: Path) -> None:
    _check_readable(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise TlsError(f"{path} holds no certificates in PEM{_why(error)}") from error


def _why(error: ssl.SSLError) -> str:
    return f" ({error.reason})" if error.reason else ""


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise TlsError(f"{path} cannot be read: {error.strerror}") from error


class ServerTls:
    """The context of the receiver, made again when one of its files has changed.

    Connections that stand keep the context they began with. New files that cannot be used are named in the log once,
    and those from before stay in use.

    Raises:
        TlsError: the files cannot be used to begin with.
    """

    def __init__(self, tls: ReceiveTls) -> None:
        self._tls = tls
        self._files = [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]
        self._seen = self._look()
        self._context = server_context(tls)

    def context(self) -> ssl.SSLContext:
        """The context for a connection that begins now. A few calls of stat, so it is asked for each."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = server_context(self._tls)
                log.info("action=certificate-reloaded certificate=%s", self._tls.certificate)
            except TlsError as error:
                log.error("action=certificate-not-reloaded: %s; the one from before stays in use", error)
        return self._context

    def _look(self) -> list[tuple[int, int, int]]:
        seen = []
        for path in self._files:
            try:
                stat = path.stat()
            except OSError:
                seen.append((0, 0, 0))
            else:
                seen.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return seen


_REASONS = {
    "HTTP_REQUEST": "it speaks HTTP",
    "WRONG_VERSION_NUMBER": "it speaks plain DICOM, or something else that is not TLS; switch TLS on there",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS version from 1.2 on; update it",
    "NO_SHARED_CIPHER": "it offers no cipher suite of BCP 195; update it, or choose the profile of PS3.15 B.12",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate of its own, and receive.tls.verify is required",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority that signed our certificate; give it that CA",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take our certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not take our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it finds our certificate expired",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it refused the handshake; it may want other ciphers, or a certificate of ours",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate of ours; give one by tls.certificate and tls.key",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS version that we do (1.2 and 1.3)",
}


def describe_tls_error(error: OSError) -> str:
    """Why the TLS handshake with a peer failed, and what to do. "it" is the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate cannot be trusted: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return "it did not end the handshake in time; does it speak TLS?"
    if isinstance(error, ssl.SSLError) and error.reason is not None:
        return _REASONS.get(error.reason, error.reason.replace("_", " ").lower())
    return "it ended the connection during the handshake; it may speak no TLS here, or not trust our certificate"


def check_dates(path: Path, *, now: datetime | None = None) -> tuple[str, str]:
    """Problem ("" when there is none) and detail: until when the certificates in a PEM file are valid.

    Raises:
        TlsError: the file cannot be read or holds no certificate.
    """
    now = now or datetime.now(UTC)
    validity = _validity(path)
    first, last = max(start for start, _ in validity), min(end for _, end in validity)
    if now < first:
        return f"{path} is valid from {first:%Y-%m-%d} only", ""
    if now >= last:
        return f"{path} expired on {last:%Y-%m-%d}; renew it", ""
    detail = f"{path}, valid until {last:%Y-%m-%d}"
    if now >= last - WARN_BEFORE_EXPIRY:
        detail += f"; WARNING: that is in {(last - now).days} days, renew it"
    return "", detail


def _validity(path: Path) -> list[tuple[datetime, datetime]]:
    """First and last moment of each certificate in a PEM file."""
    from cryptography.x509 import load_pem_x509_certificates

    _check_readable(path)
    try:
        found = load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise TlsError(f"{path} holds no certificates in PEM") from error
    return [(certificate.not_valid_before_utc, certificate.not_valid_after_utc) for certificate in found]
