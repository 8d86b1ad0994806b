"""What the sections of the configuration are made of: their base, the types of their values, what is checked alike."""

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of settings: unknown keys are faults, and nothing changes once it is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_ae_title(value: str) -> str:
    """The AE title, stripped; PS3.5 6.2 (VR AE): 1 to 16 printable ASCII characters, no backslash."""
    value = value.strip()
    if not 1 <= len(value) <= 16 or not value.isascii() or not value.isprintable() or "\\" in value:
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return value


AETitle = Annotated[str, AfterValidator(_check_ae_title)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def listed(value: Any) -> Any:
    """One value is a list of one."""
    return value if isinstance(value, list | tuple | None) else (value,)


def repeated(values: Iterable[str]) -> str:
    """Those that are there more than once, as a message lists them; "" if none is."""
    values = list(values)
    return ", ".join(sorted({value for value in values if values.count(value) > 1}))


def check_names(what: str, names: Iterable[str], attribute: str = "name") -> None:
    """Raises ValueError if two of `what` share a name."""
    if twice := repeated(names):
        raise ValueError(f"two {what} share the {attribute} {twice}; give each its own")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
