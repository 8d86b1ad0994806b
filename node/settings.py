"""What the sections of the configuration are made of: their base, the types of their values, what is checked alike."""

from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A group of settings: unknown keys are faults, and nothing changes once it is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_kinds(cls, values: Any) -> Any:
        """The values; to pydantic true is the number 1, and "" is the path of the folder that it is read in."""
        if not isinstance(values, dict):
            return values
        kinds = {name: list(_kinds_in(field.annotation)) for name, field in cls.model_fields.items()}
        return {
            name: _Refused(value) if _is_other(value, kinds.get(name, [])) else value for name, value in values.items()
        }


class _Refused:
    """A value that no setting takes, so that it is told with all other faults, as it was written."""

    def __init__(self, value: object) -> None:
        self._written = str(value).lower() or "''"

    def __repr__(self) -> str:
        return self._written


def _is_other(value: object, kinds: list[Any]) -> bool:
    """Whether it is a truth value where a number belongs, or nothing where a path does."""
    if isinstance(value, bool):
        return bool not in kinds and (int in kinds or float in kinds)
    return value == "" and Path in kinds


def _kinds_in(annotation: Any) -> Iterator[Any]:
    """What an annotation is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds_in(part)


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
