"""Attributes of what the node holds, as DICOM JSON, whatever stands in a file.

What scanners and archives write is not always what it should be: "12,5" for a number, or not a number at all. One such
value must not keep a viewer from a Series.

Reference: PS3.18 F.
"""

import math
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.tag import BaseTag

from model import PARSE_ERRORS


def completed(ds: Dataset) -> Dataset:
    """The Instance as it was taken: what it lacks is as the request that brought it said, and Modality is CT.

    Instances of RSNA 2022 lack their SOP Class and Modality, without which no viewer shows them.
    """
    for keyword in ("SOPClassUID", "SOPInstanceUID"):
        if not ds.get(keyword) and (announced := ds.file_meta.get(f"MediaStorage{keyword}")):
            setattr(ds, keyword, announced)
    if not ds.get("Modality"):
        ds.Modality = "CT"
    return ds


def dataset_json(ds: Dataset) -> dict[str, Any]:
    """All attributes, by tag."""
    return {f"{tag:08X}": attribute_json(ds, tag) for tag in sorted(ds.keys())}


def attribute_json(ds: Dataset, tag: BaseTag) -> dict[str, Any]:
    """One attribute, without a value if what stands there cannot be read, or is a number that JSON lacks (NaN)."""
    try:
        element = ds[tag]
        if element.VR == "SQ":
            items = [dataset_json(item) for item in element.value]
            return {"vr": "SQ"} | ({"Value": items} if items else {})
        made: dict[str, Any] = element.to_json_dict(None, 0)
    except (OSError, *PARSE_ERRORS):  # OSError is pydicom's for a sequence that breaks off
        return {"vr": _vr(ds, tag)}
    is_json = all(math.isfinite(value) for value in made.get("Value", ()) if isinstance(value, float))
    return made if is_json else {"vr": made["vr"]}


def _vr(ds: Dataset, tag: BaseTag) -> str:
    """The VR of an attribute whose value cannot be read."""
    found = ds.get_item(tag)
    try:
        return str(found.VR if found is not None and found.VR else dictionary_VR(tag))[:2]
    except KeyError:
        return "UN"
