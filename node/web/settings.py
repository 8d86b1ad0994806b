"""The settings of the HTTP side; read by `node/config.py`."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from node.config_faults import written_like
from node.settings import Port, Seconds, Section, is_loopback

Right = Literal["read", "store", "delete"]


def _check_address(value: str) -> str:
    return str(ip_address(value))


class TrustedProxy(Section):
    """A reverse proxy that says who a user is. Whoever it names has the rights."""

    addresses: tuple[Annotated[str, AfterValidator(_check_address)], ...] = Field(min_length=1)
    user_header: Annotated[str, written_like(r"[A-Za-z0-9-]+", "X-Remote-User")] = "X-Remote-User"
    rights: tuple[Right, ...] = ("read",)


class WebTls(Section):
    """HTTPS."""

    certificate: Path
    key: Path


class WebConfig(Section):
    """The HTTP side: DICOMweb and the viewer."""

    enabled: bool = False
    host: str = Field(default="127.0.0.1", min_length=1)  # empty would be every interface
    port: Port = 8043
    allow: Literal["loopback", "tokens"] = "loopback"
    trusted_proxy: TrustedProxy | None = None
    tls: WebTls | None = None
    public_url: Annotated[str, written_like(r"https?://[^\s?#]+", "https://cspine.example.org")] | None = None
    cors_origins: tuple[Annotated[str, written_like(r"https?://[^/\s*]+", "https://viewer.example.org")], ...] = ()
    max_body_mb: int = Field(default=4096, ge=1)
    max_parts: int = Field(default=5000, ge=1)
    body_timeout_s: Seconds = 60.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.allow == "loopback" and not is_loopback(self.host) and self.trusted_proxy is None:
            raise ValueError(
                f"host {self.host} is for other machines, and allow is loopback, which lets none of them in; write "
                "allow: tokens and make one with cspine token make NAME, or name a trusted_proxy"
            )
        return self

    @property
    def open_to_all(self) -> bool:
        """Whether a client on this machine need not say who it is."""
        return self.allow == "loopback" and is_loopback(self.host) and self.trusted_proxy is None
