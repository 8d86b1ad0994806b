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

OPTIONAL = {
    Level.STUDY: (
        # Patient
        "IssuerOfPatientID",
        "TypeOfPatientID",
        "IssuerOfPatientIDQualifiersSequence",
        "OtherPatientIDs",
        "OtherPatientIDsSequence",
        "OtherPatientNames",
        "PatientBirthTime",
        "PatientSpeciesDescription",
        "PatientSpeciesCodeSequence",
        "PatientBreedDescription",
        "ResponsiblePerson",
        "ResponsiblePersonRole",
        "ResponsibleOrganization",
        "EthnicGroup",
        "PatientComments",
        "PatientIdentityRemoved",
        "DeidentificationMethod",
        "DeidentificationMethodCodeSequence",
        "QualityControlSubject",
        "ReferencedPatientSequence",
        # General Study
        "IssuerOfAccessionNumberSequence",
        "ReferringPhysicianIdentificationSequence",
        "ConsultingPhysicianName",
        "PhysiciansOfRecord",
        "PhysiciansOfRecordIdentificationSequence",
        "NameOfPhysiciansReadingStudy",
        "PhysiciansReadingStudyIdentificationSequence",
        "RequestingService",
        "RequestingServiceCodeSequence",
        "ReferencedStudySequence",
        "ProcedureCodeSequence",
        "ReasonForPerformedProcedureCodeSequence",
        # Patient Study
        "AdmittingDiagnosesDescription",
        "AdmittingDiagnosesCodeSequence",
        "PatientAge",
        "PatientSize",
        "PatientWeight",
        "PatientBodyMassIndex",
        "MedicalAlerts",
        "Allergies",
        "SmokingStatus",
        "PregnancyStatus",
        "LastMenstrualDate",
        "PatientState",
        "PatientSexNeutered",
        "Occupation",
        "AdditionalPatientHistory",
        "AdmissionID",
        "IssuerOfAdmissionIDSequence",
        "ServiceEpisodeID",
        "ServiceEpisodeDescription",
    ),
    Level.SERIES: (
        # General Series
        "Laterality",
        "SeriesDate",
        "SeriesTime",
        "PerformingPhysicianName",
        "PerformingPhysicianIdentificationSequence",
        "ProtocolName",
        "SeriesDescriptionCodeSequence",
        "OperatorsName",
        "OperatorIdentificationSequence",
        "ReferencedPerformedProcedureStepSequence",
        "RelatedSeriesSequence",
        "PatientPosition",
        "AnatomicalOrientationType",
        "PerformedProcedureStepID",
        "PerformedProcedureStepEndDate",
        "PerformedProcedureStepEndTime",
        "PerformedProcedureStepDescription",
        "PerformedProtocolCodeSequence",
        "CommentsOnThePerformedProcedureStep",
        # Frame of Reference
        "FrameOfReferenceUID",
        "PositionReferenceIndicator",
        # General Equipment
        "Manufacturer",
        "InstitutionName",
        "InstitutionAddress",
        "StationName",
        "InstitutionalDepartmentName",
        "ManufacturerModelName",
        "DeviceSerialNumber",
        "SoftwareVersions",
        "GantryID",
        "DateOfLastCalibration",
        "TimeOfLastCalibration",
    ),
    Level.INSTANCE: (),
}
"""What else of a Study or Series is the same in all of its Instances, for includefield=all.

Reference: PS3.18 10.6.3.3, PS3.4 C.6.1.1.2 to C.6.1.1.4, and the modules of PS3.3 C.7.1 to C.7.5 that they mean.
"""
