"""The codes of results and notifications: what is meant, where it lies, how sure, in SNOMED CT, DCM and UCUM.

From pydicom's dictionaries where they have them. Meanings are what a viewer shows.
"""

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

LEVEL_CODES = {
    "C1": codes.SCT.C1Vertebra,
    "C2": codes.SCT.C2Vertebra,
    "C3": codes.SCT.C3Vertebra,
    "C4": codes.SCT.C4Vertebra,
    "C5": codes.SCT.C5Vertebra,
    "C6": codes.SCT.C6Vertebra,
    "C7": codes.SCT.C7Vertebra,
}
CERVICAL_SPINE = codes.SCT.CervicalSpine

# CID 7150 as of 2025b. Older objects have 123037004 for the same meaning; viewers show the meaning and match labels.
ANATOMICAL_STRUCTURE = codes.SCT.AnatomicalStructure
ABNORMAL_STRUCTURE = codes.SCT.MorphologicallyAbnormalStructure

# Not in pydicom's dictionary. The generic morphology: 269062008 would claim a *closed* fracture.
FRACTURE = Code("72704001", "SCT", "Fracture")

PRESENT = codes.SCT.Present
ABSENT = codes.SCT.Absent
UNDETERMINED = codes.SCT.Undetermined
FINDING_CODES = {"present": PRESENT, "absent": ABSENT, "undetermined": UNDETERMINED}
"""By the values of `Finding`."""

CERTAINTY_OF_FINDING = codes.DCM.CertaintyOfFinding
VOLUME = codes.SCT.Volume
PERCENT = codes.UCUM.Percent
CUBIC_CENTIMETER = codes.UCUM.CubicCentimeter

CT = codes.SCT.ComputedTomography
ARTIFICIAL_INTELLIGENCE = codes.DCM.ArtificialIntelligence
PROCESSING_EQUIPMENT = codes.DCM.ProcessingEquipment
DEVICE = codes.DCM.Device
CONCLUSION = codes.DCM.Conclusion
COMMENT = codes.DCM.Comment
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
IMAGING_MEASUREMENT_REPORT = codes.DCM.ImagingMeasurementReport
STUDY_INSTANCE_UID = codes.DCM.StudyInstanceUID
ALGORITHM_NAME = codes.DCM.AlgorithmName
SOURCE_IMAGE = codes.cid7202.SourceImageForImageProcessingOperation
SEGMENTATION_DERIVATION = codes.cid7203.SegmentationImageDerivation
LEFT: Code = codes.SCT.Left
RIGHT: Code = codes.SCT.Right
CENTRAL = codes.SCT.Central
ANTERIOR = codes.SCT.Anterior
POSTERIOR = codes.SCT.Posterior
VERTEBRAL_BODY = Code("3572006", "SCT", "Structure of body of vertebra")
HEIGHT = codes.DCM.Height
MILLIMETER = codes.UCUM.Millimeter
RATIO = codes.UCUM.Ratio
# No dictionary has it; our own scheme, as PS3.16 8.2 provides for.
BODY_HEIGHT_RATIO = Code("BODY-HT-RATIO", "99CSPINE", "Ratio of anterior to posterior height")

# CID 6047: what became of the analysis.
FINDINGS_SUMMARY = codes.DCM.CADProcessingAndFindingsSummary
ALL_SUCCEEDED_WITH_FINDINGS: Code = codes.DCM.AllAlgorithmsSucceededWithFindings
ALL_SUCCEEDED_WITHOUT_FINDINGS: Code = codes.DCM.AllAlgorithmsSucceededWithoutFindings
NOT_ALL_SUCCEEDED_WITH_FINDINGS: Code = codes.DCM.NotAllAlgorithmsSucceededWithFindings
NOT_ALL_SUCCEEDED_WITHOUT_FINDINGS: Code = codes.DCM.NotAllAlgorithmsSucceededWithoutFindings
NONE_SUCCEEDED: Code = codes.DCM.NoAlgorithmsSucceededWithoutFindings

SALIENCY = codes.DCM.Saliency
OF_INTEREST = codes.DCM.OfInterest
UNIT = codes.UCUM.NoUnits
