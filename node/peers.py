"""Settings of those whom the node calls: DICOM applications, HTTP servers, and archives that are watched.

Read by `node/config.py`, which has the rest.
"""

from datetime import date
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from node.secret import WithSecret
from node.settings import AETitle, Port, Seconds, Section, check_names


class ClientTls(Section):
    """TLS for the connections that we make to a peer."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together; give both or neither")
        return self


class DicomPeer(Section):
    """A DICOM application that we call."""

    name: str = Field(min_length=1)
    host: str = Field(min_length=1)
    port: Port
    ae_title: AETitle
    timeout_s: Seconds = 30.0
    tls: ClientTls | None = None

    @property
    def where(self) -> str:
        """The peer as messages call it."""
        return f"{self.ae_title} at {self.host}:{self.port}"


class HttpAuth(WithSecret):
    """How we say who we are over HTTP: the secret is a password or a token."""

    type: Literal["basic", "bearer"]
    user: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.has_secret:
            raise ValueError("give the password or token by secret_file or by secret_env")
        if (self.type == "basic") != bool(self.user):
            raise ValueError("type basic needs a user, and type bearer has none")
        return self


class HttpServer(Section):
    """A server that we call over HTTP."""

    name: str = Field(min_length=1)
    url: str
    auth: HttpAuth | None = None
    tls: ClientTls | None = None
    timeout_s: Seconds = 30.0

    @property
    def where(self) -> str:
        """The server as messages call it."""
        return self.url

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        # Of the whole section, so that a password in the URL is not quoted in the message.
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("url must be http(s)://HOST[:PORT][/PATH], without anything after the path")
        if parts.username is not None:
            raise ValueError("url must not hold a user or password; give them under auth")
        return self


class OrthancSource(HttpServer):
    """An Orthanc whose new CT Series are fetched. ae_title: what stands for it where a sender's AE title would."""

    ae_title: AETitle = "ORTHANC"
    begin: Literal["now", "oldest"] = "now"
    poll_s: Seconds = 5.0
    connections: int = Field(default=4, ge=1, le=32)


class DicomWebSource(HttpServer):
    """A DICOMweb archive whose new CT Series are fetched. ae_title: as for an Orthanc.

    begin: the first time, with what comes from now on, or with Studies of that day and later. overlap_days: how long
    after its StudyDate a Series may still come; None looks at all that the archive has, whatever its date.
    """

    ae_title: AETitle = "DICOMWEB"
    begin: Literal["now"] | date = "now"
    overlap_days: int | None = Field(default=2, ge=0, le=3650)
    poll_s: Seconds = 30.0
    max_requests_per_s: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    connections: int = Field(default=4, ge=1, le=10)


class SourcesConfig(Section):
    """Archives that are watched for new Series, besides those that send by themselves."""

    orthanc: tuple[OrthancSource, ...] = ()
    dicomweb: tuple[DicomWebSource, ...] = ()

    @property
    def each(self) -> tuple[OrthancSource | DicomWebSource, ...]:
        """All of them."""
        return (*self.orthanc, *self.dicomweb)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names("sources", (source.name for source in self.each))
        return self
