"""The node and the model as the result objects name them: contributing equipment, device observer, algorithm."""

from highdicom import AlgorithmIdentificationSequence
from highdicom.base_content import ContributingEquipment
from highdicom.sr import AlgorithmIdentification, DeviceObserverIdentifyingAttributes

from model import ModelInfo
from node import codes
from node.encode.identity import NodeIdentity

_MAX_LO = 64
"""Characters of a Long String (PS3.5 6.2); a bundle may give its model a longer name."""


def processing_equipment(node: NodeIdentity) -> ContributingEquipment:
    """The node as equipment that processed the images (DCM 109102), as IHE AIR asks for."""
    item = ContributingEquipment(
        manufacturer=node.manufacturer,
        purpose_of_reference=codes.PROCESSING_EQUIPMENT,
        manufacturer_model_name=node.manufacturer_model_name,
        software_versions=node.software_version,
        device_serial_number=node.ae_title,
        contribution_description="Found the cervical vertebrae and judged each for fracture",
    )
    item.DeviceUID = node.device_uid
    return item


def device_observer(node: NodeIdentity) -> DeviceObserverIdentifyingAttributes:
    """The node as the observer of a report; its name says what it must not be taken for."""
    return DeviceObserverIdentifyingAttributes(
        uid=node.device_uid,
        name=f"{node.manufacturer} (research use, not a medical device)",
        manufacturer_name=node.manufacturer,
        model_name=node.manufacturer_model_name,
        serial_number=node.ae_title,
    )


def algorithm_sequence(model: ModelInfo) -> AlgorithmIdentificationSequence:
    """The model in a segment's description."""
    return AlgorithmIdentificationSequence(
        name=model.name[:_MAX_LO], family=codes.ARTIFICIAL_INTELLIGENCE, version=model.version[:_MAX_LO]
    )


def algorithm_template(model: ModelInfo) -> AlgorithmIdentification:
    """The model in a group of a report, with its operating points (TID 4019)."""
    points = {"": model.operating_point} | {f"{name}: ": at for name, at in model.own_operating_points.items()}
    return AlgorithmIdentification(
        name=model.name,
        version=model.version,
        parameters=[f"{name}called present from a probability of {100 * at:g} %" for name, at in points.items()],
        family=codes.ARTIFICIAL_INTELLIGENCE,
    )
