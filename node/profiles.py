"""What a destination gets: the vocabulary that configuration, encoding and delivery share.

A `Profile` says which objects go to a destination and in which form. `encode/` writes into a result folder every object
that some destination's profile asks for; `files_for` says which of the files there go to one of them. The contract
between the two is the file name (`docs/objects.md`), which `object_names` gives. Nothing here reads or writes a file.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from node.settings import Section


class Kind(StrEnum):
    """A kind of result object. Their order is the order in which they are delivered."""

    VERTEBRAE_SEG = "vertebrae_seg"  # Segmentation: C1..C7
    FRACTURES_SEG = "fractures_seg"  # Segmentation: suspected fractures
    SALIENCY_MAP = "saliency_map"  # Parametric Map: where the model looked
    KEY_OBJECTS = "key_objects"  # Key Object Selection: the slices that carry the answer
    SUMMARY_IMAGES = "summary_images"  # Secondary Capture: overview page and key slices, for any viewer
    SUMMARY_PDF = "summary_pdf"  # Encapsulated PDF: the same
    REPORT_SR = "report_sr"  # Structured report; always there
    FINDINGS_JSON = "findings_json"  # findings.json; for folders, never sent by DICOM


_SYNTAX_SUFFIXES = {"explicit-vr-le": "", "rle": "-rle", "jpeg-ls": "-jls"}
_SEG_STEMS = {Kind.VERTEBRAE_SEG: "vertebrae", Kind.FRACTURES_SEG: "fractures"}
FINDINGS_FILE = "findings.json"
_FIXED_NAMES = {
    Kind.SALIENCY_MAP: "saliency.pm.dcm",
    Kind.KEY_OBJECTS: "key-slices.kos.dcm",
    Kind.SUMMARY_IMAGES: "summary-*.sc.dcm",
    Kind.SUMMARY_PDF: "summary.pdf.dcm",
    Kind.FINDINGS_JSON: FINDINGS_FILE,
}

RESULT_PATTERNS = ("*.seg.dcm", "*.pm.dcm", "*.kos.dcm", "*.sc.dcm", "*.pdf.dcm", "*.sr.dcm", FINDINGS_FILE)
"""Every name a result file can have: what else lies in a folder is not ours."""


class Profile(Section):
    """Which objects a destination gets, and in which form."""

    objects: tuple[Kind, ...] = Field(
        default=(Kind.VERTEBRAE_SEG, Kind.FRACTURES_SEG, Kind.REPORT_SR, Kind.FINDINGS_JSON), min_length=1
    )
    # binary: Segmentation Storage, which viewers know. labelmap: Label Map Segmentation Storage, far smaller.
    segmentation: Literal["binary", "labelmap"] = "binary"
    # Of label maps; everything else is Explicit VR Little Endian.
    transfer_syntax: Literal["explicit-vr-le", "rle", "jpeg-ls"] = "explicit-vr-le"
    # Frames of a Segmentation above which it is split over several Series; None: never. A level is never split.
    max_frames: int | None = Field(default=None, ge=1)
    # SOP Class of the report: Comprehensive 3D SR, or Comprehensive SR for archives that refuse it.
    report: Literal["comprehensive-3d", "comprehensive"] = "comprehensive-3d"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.transfer_syntax != "explicit-vr-le" and self.segmentation != "labelmap":
            raise ValueError(
                f"transfer_syntax {self.transfer_syntax} is for label maps; set segmentation: labelmap, or leave it out"
            )
        return self

    @property
    def segmentations(self) -> tuple[Kind, ...]:
        """The Segmentations among the objects; the report refers to these and to no others."""
        return tuple(kind for kind in _SEG_STEMS if kind in self.objects)


_SEGS = (Kind.VERTEBRAE_SEG, Kind.FRACTURES_SEG)
PRESETS: Mapping[str, Profile] = {
    # Shows BINARY Segmentations over the CT, and any picture.
    "ohif": Profile(objects=(*_SEGS, Kind.SUMMARY_IMAGES, Kind.REPORT_SR)),
    # Refuses a Segmentation of more than 400 frames; shows key objects.
    "weasis": Profile(objects=(*_SEGS, Kind.KEY_OBJECTS, Kind.SUMMARY_IMAGES, Kind.REPORT_SR), max_frames=400),
    # Stores anything but label maps, unless told to.
    "orthanc": Profile(objects=(*_SEGS, Kind.KEY_OBJECTS, Kind.SUMMARY_IMAGES, Kind.SUMMARY_PDF, Kind.REPORT_SR)),
    # Shows neither Segmentations nor structured reports: pictures, and a report it can at least keep.
    "plain-pacs": Profile(objects=(Kind.KEY_OBJECTS, Kind.SUMMARY_IMAGES, Kind.REPORT_SR), report="comprehensive"),
    "everything": Profile(objects=tuple(Kind)),
}


def _from_preset(value: Any) -> Any:
    """The preset of that name; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise ValueError(f"must be {', '.join(PRESETS)}, or a group of settings")
    return PRESETS[value]


ProfileSetting = Annotated[Profile, BeforeValidator(_from_preset)]
"""A `Profile` in a configuration: the name of a preset, or its settings."""


class FormMissingError(Exception):
    """The results do not hold an object in the form that a profile asks for; the message says what to do."""


def object_names(profile: Profile, kind: Kind) -> tuple[str, ...]:
    """The patterns (`fnmatch`) of the files that a profile takes of a kind; the first that matches any is the one.

    A Segmentation in more frames than a profile takes is `vertebrae.max400-1.seg.dcm`, `-2` and so on; the report that
    refers to its parts is `report.max400.sr.dcm`. Where it has fewer, they are those of a profile without `max_frames`.
    A report's name also says which Segmentations it refers to, if not both, and in which form.
    """
    form = f".{profile.segmentation}{_SYNTAX_SUFFIXES[profile.transfer_syntax]}".replace(".binary", "")
    cap = f".max{profile.max_frames}" if profile.max_frames else ""
    if kind in _SEG_STEMS:
        whole = f"{_SEG_STEMS[kind]}{form}"
        return (*([f"{whole}{cap}-*.seg.dcm"] if cap else []), f"{whole}.seg.dcm")
    if kind is Kind.REPORT_SR:
        sop_class = ".comprehensive" if profile.report == "comprehensive" else ""
        refers_to = {
            (): ".no-seg",
            (Kind.VERTEBRAE_SEG,): f"{form}.no-fractures",
            (Kind.FRACTURES_SEG,): f"{form}.no-vertebrae",
        }.get(profile.segmentations, form)
        whole = f"report{sop_class}{refers_to}"
        split = cap and profile.segmentations
        return (*([f"{whole}{cap}.sr.dcm"] if split else []), f"{whole}.sr.dcm")
    return (_FIXED_NAMES[kind],)


def files_for(profile: Profile, names: Iterable[str]) -> tuple[str, ...]:
    """The files, of those in a result folder, that go to a destination with this profile, in the order to send them.

    Objects that were not made (there is no fracture to mark) are left out.

    Raises:
        FormMissingError: an object was made, but not in this form, because no destination wanted it then.
    """
    here = sorted(names)
    chosen: list[str] = []
    for kind in Kind:
        if kind not in profile.objects:
            continue
        patterns = object_names(profile, kind)
        found = next((hit for pattern in patterns if (hit := [n for n in here if fnmatchcase(n, pattern)])), [])
        stem = patterns[-1].split(".")[0]
        if not found and any(name.split(".")[0] == stem for name in here):
            raise FormMissingError(
                f"the results hold no {patterns[-1]}, though another form of it: they were made for other profiles; "
                "analyse the Series again"
            )
        chosen += found
    return tuple(chosen)
