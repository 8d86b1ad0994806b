"""What is wrong with a configuration, said with its line. Called by `config.py`; knows no setting by name."""

from typing import Any

import yaml

Location = tuple[str | int, ...]


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


def describe(item: Any, lines: dict[Location, int]) -> tuple[int, str]:
    """Line and sentence for one pydantic error."""
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
    value, message = item["input"], item["msg"].removeprefix("Value error, ")
    if item["type"] == "union_tag_invalid":
        tags = item["ctx"]["expected_tags"].replace("'", "").replace(", ", " or ")
        value, message = item["ctx"]["tag"], f"must be {tags}"
    elif item["type"] == "model_type":
        message = "must be a group of settings"
    is_secret = location == ("database",)  # it may hold a password
    shown = "" if is_secret or isinstance(value, dict | list) else f" (it is {value!r})"
    return lines[known], f"{_dotted(location)}: {message[0].lower()}{message[1:]}{shown}"


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)
