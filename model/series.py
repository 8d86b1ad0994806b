"""From Instances to a Volume: the door to reading.

Two users: the node takes `slice_headers` of what it receives and asks `check_series` whether they make a Series that
can be analysed; analysis and training call `read_series`. The rules are in `model.stack`, one Instance's pixels in
`model.decode`; nothing here writes or sends.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag, Tag

from model.decode import (
    PARSE_ERRORS,
    PIXEL_TAGS,
    DecodeError,
    FrameJob,
    decode_frame,
    needs_codec,
    read_instance,
)
from model.decode_pool import DecodePool
from model.missing import missing_instances
from model.stack import IncompleteSeries, SeriesError, SeriesRules, SliceHeader, Stack, check_series
from model.volume import SliceSource, Volume

__all__ = [
    "HEADER_TAGS",
    "IncompleteSeries",
    "SeriesError",
    "SeriesRules",
    "SliceHeader",
    "Stack",
    "check_series",
    "read_series",
    "slice_headers",
]

HEADER_TAGS: list[BaseTag] = [
    Tag(keyword)
    for keyword in (
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "FrameOfReferenceUID",
        "Modality",
        "ImageType",
        "InstanceNumber",
        "SamplesPerPixel",
        "Rows",
        "Columns",
        "PixelSpacing",
        "ImagerPixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "RescaleSlope",
        "RescaleIntercept",
        "RescaleType",
        "NumberOfFrames",
        "ConcatenationUID",
        "InConcatenationNumber",
        "InConcatenationTotalNumber",
        "SharedFunctionalGroupsSequence",
        "PerFrameFunctionalGroupsSequence",
    )
]
"""What `slice_headers` needs: `dcmread(path, specific_tags=HEADER_TAGS, stop_before_pixels=True)`."""

_NUM_THREADS = 2  # numpy and zlib let go of the GIL, the codecs do not (measured): more threads gain nothing


def slice_headers(ds: pydicom.Dataset) -> tuple[SliceHeader, ...]:
    """The header of a single-frame Instance, or one header a frame for Enhanced CT; never raises on odd values.

    Of a dataset without SOP Class or Instance UID the file meta information is asked. Anything but CT gives one header
    too, for `check_series` to refuse.
    """
    meta = getattr(ds, "file_meta", None) or pydicom.Dataset()
    common: dict[str, Any] = {
        "sop_class_uid": _text(ds, "SOPClassUID") or _text(meta, "MediaStorageSOPClassUID"),
        "sop_instance_uid": _text(ds, "SOPInstanceUID") or _text(meta, "MediaStorageSOPInstanceUID"),
        "series_instance_uid": _text(ds, "SeriesInstanceUID"),
        "study_instance_uid": _text(ds, "StudyInstanceUID"),
        "frame_of_reference_uid": _text(ds, "FrameOfReferenceUID"),
        "modality": _text(ds, "Modality"),
        "samples_per_pixel": _integer(ds, "SamplesPerPixel") or 1,
        "rows": _integer(ds, "Rows") or 0,
        "columns": _integer(ds, "Columns") or 0,
        "instance_number": _integer(ds, "InstanceNumber"),
    }
    frames = _items(ds, "PerFrameFunctionalGroupsSequence")
    if not frames:
        values = _frame_values([ds])
        if (_integer(ds, "NumberOfFrames") or 1) > 1:
            values["position_lps_mm"] = None  # it can be that of one frame only
        return (SliceHeader(**common, **values),)
    if concatenation_uid := _text(ds, "ConcatenationUID"):
        total = _integer(ds, "InConcatenationTotalNumber") or 0
        common["concatenation"] = (concatenation_uid, _integer(ds, "InConcatenationNumber") or 0, total)
    shared = [group for item in _items(ds, "SharedFunctionalGroupsSequence")[:1] for group in _groups(item)]
    return tuple(
        SliceHeader(**common, frame_number=number, **_frame_values([*_groups(frame), *shared, ds]))
        for number, frame in enumerate(frames, start=1)
    )


# Functional groups that hold what a single-frame CT has at its top level (PS3.3 A.38.1.4).
_GROUP_KEYWORDS = (
    "FrameContentSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence",
)


_NO_RESCALE = 1e6  # no slope or intercept of Hounsfield units comes near it


def _groups(item: pydicom.Dataset) -> list[pydicom.Dataset]:
    """The functional groups we read, of one frame or of those shared by all; each has one item (PS3.3 C.7.6.16)."""
    return [group for keyword in _GROUP_KEYWORDS for group in _items(item, keyword)[:1]]


def _frame_values(places: Sequence[pydicom.Dataset]) -> dict[str, Any]:
    """What can differ from frame to frame, each taken from the first of the places that has it."""

    def numbers(keyword: str, count: int) -> tuple[float, ...] | None:
        return next((found for place in places if (found := _numbers(place, keyword, count))), None)

    def text(keyword: str) -> str:
        return next((found for place in places if (found := _text(place, keyword))), "")

    slope, slope_fault = _rescale(places, "RescaleSlope")
    intercept, intercept_fault = _rescale(places, "RescaleIntercept")
    spacing_mm, detector_mm = numbers("PixelSpacing", 2), numbers("ImagerPixelSpacing", 2)
    stack = (("StackID", text("StackID")), ("TemporalPositionIndex", text("TemporalPositionIndex")))
    image_types = (_value(place, "FrameType") or _value(place, "ImageType") for place in places)
    image_type = next((value for value in image_types if value), ())
    return {
        "image_type": (image_type,) if isinstance(image_type, str) else tuple(str(value) for value in image_type),
        "pixel_spacing_mm": _positive(spacing_mm) or _positive(detector_mm),
        "has_detector_spacing": not _positive(spacing_mm) and _positive(detector_mm) is not None,
        "position_lps_mm": numbers("ImagePositionPatient", 3),
        "orientation": numbers("ImageOrientationPatient", 6),
        "rescale_slope": slope,
        "rescale_intercept": intercept,
        "rescale_type": text("RescaleType"),
        "rescale_fault": slope_fault or intercept_fault,
        "stack": ", ".join(f"{keyword} {value}" for keyword, value in stack if value),
    }


def _rescale(places: Sequence[pydicom.Dataset], keyword: str) -> tuple[float | None, str]:
    """The number in the first of the places that has any value; None if none has, or with what is wrong with it."""
    for place in places:
        element = place.get_item(keyword)
        if element is None or _is_blank(element.value):
            continue
        found = _numbers(place, keyword, 1)
        if found is None:
            return None, f"{keyword} is no number"
        (number,) = found
        is_scale = abs(number) < _NO_RESCALE and (number != 0 or keyword != "RescaleSlope")
        return (number, "") if is_scale else (None, f"{keyword} is {number:g}")
    return None, ""


def _is_blank(value: Any) -> bool:
    """Whether a value, parsed or not yet, is none."""
    if isinstance(value, bytes):
        return not value.strip(b" \0")
    return value is None or (isinstance(value, str) and not value.strip())


def _positive(spacing_mm: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return spacing_mm if spacing_mm and min(spacing_mm) > 0 else None


def _value(ds: pydicom.Dataset, keyword: str) -> Any:
    """The value of an attribute; None when missing or damaged (pydicom parses a value when it is first asked for)."""
    try:
        return ds.get(keyword)
    except PARSE_ERRORS:
        return None


def _items(ds: pydicom.Dataset, keyword: str) -> list[pydicom.Dataset]:
    """The items of a sequence, none when it is missing or not a sequence."""
    value = _value(ds, keyword)
    return list(value) if isinstance(value, DicomSequence) else []


def _text(ds: pydicom.Dataset, keyword: str) -> str:
    """A single text value, "" when missing."""
    value = _value(ds, keyword)
    return str(value).strip() if value is not None else ""


def _numbers(ds: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, or None."""
    try:
        values = _value(ds, keyword)
        numbers = tuple(float(value) for value in ([values] if count == 1 else values or ()))
    except PARSE_ERRORS:
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _integer(ds: pydicom.Dataset, keyword: str) -> int | None:
    """A single whole number, or None."""
    numbers = _numbers(ds, keyword, 1)
    return int(numbers[0]) if numbers else None


def read_series(
    paths: Sequence[Path],
    rules: SeriesRules | None = None,
    decode_pool: DecodePool | None = None,
    num_at_source: int | None = None,
    *,
    is_interrupted: bool = False,
) -> Volume:
    """The volume of one CT Series, in Hounsfield units, from all its files in any order.

    decode_pool: decodes compressed pixels on several cores; None decodes them here, one after the other.
    num_at_source: Instances that the source of the Series says it holds; None if it was not asked, or does not say.
    is_interrupted: whether its sender broke off, or had Instances refused, and did not send it again.

    A bridged slice (see `SeriesRules.max_bridged_gaps`) has the `SliceSource` of the slice below, marked interpolated:
    there is a nearest Instance to point at, but no frame that a segmentation could refer to.

    Raises:
        SeriesError: the Series cannot be analysed; the message says why.
        OSError: a file cannot be opened.
    """
    tags = [*HEADER_TAGS, *PIXEL_TAGS, Tag("PatientID")]
    try:
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            datasets = list(pool.map(read_instance, paths, repeat(tags)))
    except DecodeError as error:
        raise SeriesError(str(error)) from error
    found = [
        (header, ds, path)
        for path, ds in zip(paths, datasets, strict=True)
        if ds is not None
        for header in slice_headers(ds)
    ]
    _check_one_patient([ds for _, ds, _ in found])
    num_foreign = datasets.count(None)
    headers = [header for header, _, _ in found]
    stack = check_series(headers, rules, final=True)
    warnings = list(stack.warnings)
    if incomplete := missing_instances(headers, stack, num_at_source, is_interrupted=is_interrupted):
        warnings.append(incomplete)
    if num_foreign:
        warnings.append(f"{num_foreign} files are not DICOM and were left out.")
    held = {i: found[i][1] for i in (*stack.order, *(other for _, other in stack.duplicates))}
    files = [path for _, _, path in found]
    del datasets, found  # so that each slice's stored pixels go as soon as it is decoded: memory stays near twice
    voxels_hu = _decode(headers, held, files, stack, decode_pool)
    warnings += _check_hu(voxels_hu, headers[stack.order[0]])
    return Volume(
        study_instance_uid=headers[0].study_instance_uid,
        series_instance_uid=headers[0].series_instance_uid,
        voxels_hu=voxels_hu,
        grid=stack.grid,
        slices=_sources(headers, files, stack),
        warnings=tuple(warnings),
        incomplete=incomplete,
    )


def _decode(
    headers: Sequence[SliceHeader],
    held: dict[int, pydicom.Dataset],
    files: Sequence[Path],
    stack: Stack,
    decode_pool: DecodePool | None,
) -> NDArray[np.int16]:
    """Voxels `(Z, Y, X)` in HU; empties `held`, compares duplicates, interpolates bridged slices."""
    voxels_hu = np.empty(stack.grid.shape, np.int16)
    places = dict(zip(stack.order, stack.z_indices, strict=True))
    kept_of = {other: kept for kept, other in stack.duplicates}

    def place(i: int, hu: NDArray[np.int16]) -> None:
        header = headers[i]
        if i in places:
            voxels_hu[places[i]] = hu
        elif not np.array_equal(voxels_hu[places[kept_of[i]]], hu):
            raise SeriesError(
                f"Series {header.series_instance_uid} has two different slices at z = "
                f"{header.z_mm:.1f} mm (Instances "
                f"{headers[kept_of[i]].sop_instance_uid} and {header.sop_instance_uid}): two acquisitions "
                "or reconstructions in one Series. Send them as two."
            )

    def decode(job: FrameJob) -> None:
        place(job.index, decode_frame(held.pop(job.index), job))

    try:
        for group in (stack.order, kept_of):
            jobs = [_frame_job(i, headers[i], files[i]) for i in group]
            compressed = [job for job in jobs if decode_pool and needs_codec(held[job.index])]
            for job in compressed:
                del held[job.index]  # a process of the pool reads it again
            if decode_pool and compressed:
                for i, hu in decode_pool.decode(compressed, stack.grid.shape[1:]):
                    place(i, hu)
            with ThreadPoolExecutor(_NUM_THREADS) as threads:
                list(threads.map(decode, [job for job in jobs if job.index in held]))
    except DecodeError as error:
        raise SeriesError(f"{error}.") from error
    for z in set(range(stack.grid.shape[0])) - set(stack.z_indices):
        voxels_hu[z] = (voxels_hu[z - 1].astype(np.int32) + voxels_hu[z + 1] + 1) // 2
    return voxels_hu


def _frame_job(index: int, header: SliceHeader, path: Path) -> FrameJob:
    return FrameJob(
        index=index,
        label=f"Instance {header.sop_instance_uid} of Series {header.series_instance_uid}",
        path=path,
        frame_number=header.frame_number,
        slope=1.0 if header.rescale_slope is None else header.rescale_slope,
        intercept=header.rescale_intercept or 0.0,
    )


def _sources(headers: Sequence[SliceHeader], files: Sequence[Path], stack: Stack) -> tuple[SliceSource, ...]:
    """One source for each Z index."""
    at = dict(zip(stack.z_indices, stack.order, strict=True))
    sources: list[SliceSource] = []
    for z in range(stack.grid.shape[0]):
        if z in at:
            header = headers[at[z]]
            source = SliceSource(
                sop_instance_uid=header.sop_instance_uid,
                path=files[at[z]],
                position_lps_mm=header.position_lps_mm or (),
                frame_number=header.frame_number,
            )
        else:
            source = replace(sources[-1], is_interpolated=True)
        sources.append(source)
    return tuple(sources)


def _check_one_patient(datasets: Sequence[pydicom.Dataset]) -> None:
    """Refuses Instances of two patients that a copy or an anonymiser gave one SeriesInstanceUID. Names nobody.

    Raises:
        SeriesError: they have different PatientIDs.
    """
    patients = {str(ds.get("PatientID") or "").strip() for ds in datasets} - {""}
    if len(patients) > 1:
        raise SeriesError(
            f"Series {_text(datasets[0], 'SeriesInstanceUID')} comes with {len(patients)} PatientIDs: two patients may "
            "be mixed. Give each Series a UID of its own, and send them again."
        )


def _check_hu(voxels_hu: NDArray[np.int16], header: SliceHeader) -> list[str]:
    """Warnings about values that are unusual for a neck CT; refuses what cannot be Hounsfield units."""
    series = f"Series {header.series_instance_uid}"
    sample = voxels_hu[::2, ::4, ::4]
    low, high = (float(value) for value in np.percentile(sample, (0.5, 99.5)))
    if voxels_hu.min() == voxels_hu.max():
        raise SeriesError(f"{series} is empty: every voxel is {voxels_hu.flat[0]} HU.")
    if header.rescale_intercept is None and low > -500:
        raise SeriesError(
            f"{series} has no RescaleSlope and RescaleIntercept, and its values run from {low:.0f} to {high:.0f}: "
            "they are not Hounsfield units (air would be near -1000). Send the original CT."
        )
    warnings = []
    if header.rescale_intercept is None:
        warnings.append(
            "RescaleSlope and RescaleIntercept are missing; the stored values look like Hounsfield units and were "
            "taken as such."
        )
    if low > -500:
        warnings.append(
            f"There is hardly any air in the Series (0.5th percentile {low:.0f} HU); its values may be wrong."
        )
    if high < 150:
        warnings.append(
            f"There is hardly any bone in the Series (99.5th percentile {high:.0f} HU); its values may be wrong."
        )
    return warnings
