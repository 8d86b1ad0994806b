"""What is wrong with a configuration, said with its line. Called by `config.py`; knows no setting by name."""

import re
from collections.abc import Sequence
from datetime import date
from typing import Any

import yaml
from pydantic import AfterValidator

Location = tuple[str | int, ...]


def written_like(pattern: str, example: str) -> AfterValidator:
    """Of a text that the whole pattern must fit: a person who is told the pattern itself cannot read it."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"must be written like {example}")
        return value

    return AfterValidator(check)


class Loader(yaml.SafeLoader):
    """Names the line of a date that does not exist, too; PyYAML leaves a bare ValueError."""

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError as error:
            message = f"there is no such date or time as {node.value}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error


Loader.add_constructor("tag:yaml.org,2002:timestamp", Loader.construct_yaml_timestamp)


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """In one line."""
    text = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
    return text + ("; indent with spaces, not with tabs" if "'\\t'" in text else "")


def lines_of(root: yaml.Node | None) -> tuple[dict[Location, int], list[tuple[int, str]]]:
    """The 1-based line of every key and list item, and a fault for every key given twice."""
    lines: dict[Location, int] = {(): 1}
    faults: list[tuple[int, str]] = []

    def walk(node: yaml.Node | None, location: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*location, str(key.value))
                if here in lines:
                    faults.append((key.start_mark.line + 1, f"{_dotted(here)} is given twice"))
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                lines[*location, number] = value.start_mark.line + 1
                walk(value, (*location, number))

    walk(root, ())
    return lines, faults


# What pydantic calls the branches of a union.
_BRANCHES = {
    "dicom",
    "dicomweb",
    "orthanc",
    "folder",
    "webhook",
    "mail",
    "hl7",
    "fhir",
    "word",
    "list",
    "IPv4Network",
    "IPv6Network",
}


# What pydantic says of a type in Python's words.
_WORDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "path_type": "must be the path of a file or folder",
    "tuple_type": "must be a list",
    "model_type": "must be a group of settings",
    "model_attributes_type": "must be a group of settings",
    "too_short": "must have at least one entry",
}


def describe_all(errors: Sequence[Any], lines: dict[Location, int]) -> list[tuple[int, str]]:
    """Line and sentence for each pydantic error, but for lists that are too short for their entries are wrong."""
    wrong = [item["loc"] for item in errors]
    return [
        _describe(item, lines)
        for item in errors
        if item["type"] != "too_short" or not any(loc[: len(item["loc"])] == item["loc"] != loc for loc in wrong)
    ]


def _describe(item: Any, lines: dict[Location, int]) -> tuple[int, str]:
    # A union adds the name of its branch ("dicom") to the location; the file has no such level.
    location: Location = ()
    for part in item["loc"]:
        if part not in _BRANCHES or (*location, part) in lines:
            location = (*location, part)
    if item["type"].startswith("union_tag"):
        location = (*location, "type")
    known = location
    while known not in lines:
        known = known[:-1]
    if item["type"] == "extra_forbidden":
        return lines[known], f"{_dotted(location)} is not a setting"
    if item["type"] in ("missing", "union_tag_not_found"):
        return lines[known], f"{_dotted(location)} is missing"
    value = item["input"]
    message = _WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
    if item["type"] == "union_tag_invalid":
        tags = item["ctx"]["expected_tags"].replace("'", "").replace(", ", " or ")
        value, message = item["ctx"]["tag"], f"must be {tags}"
    is_secret = location == ("database",) or re.search("://[^/]*@", str(value))  # it may hold a password
    shown = "" if is_secret or isinstance(value, dict | list) else f" (it is {_as_written(value)})"
    message = f"{message[0].lower()}{message[1:]}".replace("input should be", "must be")
    return lines[known], f"{_dotted(location)}: {message}{shown}"


def _as_written(value: Any) -> str:
    """The value as it stands in YAML, not in Python."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return value.isoformat() if isinstance(value, date) else repr(value)


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)
