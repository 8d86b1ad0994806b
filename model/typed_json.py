"""JSON to frozen dataclasses: every field of its declared type, none unknown, none missing that has no default."""

import sys
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints


def from_json(kind: Any, content: object, where: str = "it") -> Any:
    """The JSON value as a `kind`: a dataclass, `tuple[X, ...]`, `dict[str, X]`, `X | None`, str, int, float, bool
    or Any.

    where: what the value is called in messages.

    Raises:
        ValueError: which part is of another type, unknown or missing.
    """
    if kind is Any:
        return content
    if is_dataclass(kind):
        return _dataclass(kind, content, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (other,) = set(arguments) - {NoneType}
        return None if content is None else from_json(other, content, where)
    if origin is tuple and isinstance(content, list) and (arguments[1] is ... or len(arguments) == len(content)):
        kinds = arguments[:1] * len(content) if arguments[1] is ... else arguments
        return tuple(from_json(kinds[i], part, f"{where}[{i}]") for i, part in enumerate(content))
    if origin is dict and isinstance(content, dict):
        return {name: from_json(arguments[1], part, f"{where}.{name}") for name, part in content.items()}
    if kind is float and type(content) is int and abs(content) < sys.float_info.max:
        return float(content)
    if origin is None and isinstance(content, kind) and (kind is bool or not isinstance(content, bool)):
        return content
    raise ValueError(f"{where} is {content!r}, which is not of type {getattr(kind, '__name__', kind)}")


def _dataclass(kind: Any, content: object, where: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}, and must have the keys {', '.join(f.name for f in fields(kind))}")
    known = {field.name: field for field in fields(kind)}
    if unknown := sorted(content.keys() - known.keys()):
        raise ValueError(f"{where} has {', '.join(unknown)}, which this version does not know")
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - content.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    types = get_type_hints(kind)
    return kind(**{name: from_json(types[name], part, f"{where}.{name}") for name, part in content.items()})
