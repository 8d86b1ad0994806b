"""What every object of a case needs to know: from which Series it was made, by which model, on which node."""

from dataclasses import dataclass
from typing import Any

from model import ModelInfo
from node.encode.identity import NodeIdentity, ResultUids
from node.encode.source import Source


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """The source, the model, the UIDs that follow from the two, and the node."""

    source: Source
    model: ModelInfo
    uids: ResultUids
    node: NodeIdentity

    def identification(self, name: str) -> dict[str, Any]:
        """What highdicom asks of any object: its UIDs, and the equipment. name: of its file, without `.dcm`."""
        return {
            "series_instance_uid": self.uids.uid(f"{name} series"),
            "sop_instance_uid": self.uids.uid(f"{name} instance"),
            "instance_number": 1,
            "manufacturer": self.node.manufacturer,
            "manufacturer_model_name": self.node.manufacturer_model_name,
            "software_versions": self.node.software_version,
            "device_serial_number": self.node.ae_title,
        }
