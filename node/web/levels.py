"""The levels of queries, and which attributes each of them has. For QIDO-RS and C-FIND."""

from enum import Enum


class Level(Enum):
    """What a query is about: the UID that names one, keywords that are matched and returned, and others only returned.

    Reference: PS3.18 tables 10.6.3-3 to 10.6.3-5.
    """

    STUDY = (
        "StudyInstanceUID",
        (
            "StudyDate",
            "StudyTime",
            "AccessionNumber",
            "ReferringPhysicianName",
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "PatientSex",
            "StudyInstanceUID",
            "StudyID",
            "StudyDescription",
            "TimezoneOffsetFromUTC",
        ),
    )
    SERIES = (
        "SeriesInstanceUID",
        (
            "Modality",
            "SeriesDescription",
            "SeriesInstanceUID",
            "SeriesNumber",
            "BodyPartExamined",
            "PerformedProcedureStepStartDate",
            "PerformedProcedureStepStartTime",
        ),
        ("RequestAttributesSequence",),
    )
    INSTANCE = (
        "SOPInstanceUID",
        ("SOPClassUID", "SOPInstanceUID", "InstanceNumber", "Rows", "Columns", "BitsAllocated", "NumberOfFrames"),
    )

    def __init__(self, uid_keyword: str, keywords: tuple[str, ...], only_returned: tuple[str, ...] = ()) -> None:
        self.uid_keyword = uid_keyword
        self.keywords = keywords
        self.only_returned = only_returned


IN_REQUEST = tuple(
    f"RequestAttributesSequence.{keyword}" for keyword in ("ScheduledProcedureStepID", "RequestedProcedureID")
)
"""What is matched of a Series in the items of a sequence, by QIDO-RS only."""
