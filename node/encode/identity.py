"""Who made a result, and the UIDs that make a repeat replace itself. Used by the encoders; reads and writes nothing."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

from model import ModelInfo


@dataclass(frozen=True, kw_only=True)
class NodeIdentity:
    """The node as it signs its results; two nodes of a hospital differ in AE title, and so in device UID."""

    ae_title: str = "CSPINE"
    manufacturer: str = "C-Spine Node"
    manufacturer_model_name: str = "cspine-node"
    software_version: str = field(default_factory=lambda: version("cspine-node"))

    @property
    def device_uid(self) -> str:
        """The same for the same maker, model and AE title, whatever the software version."""
        return derive_uid("device", self.manufacturer, self.manufacturer_model_name, self.ae_title)


@dataclass(frozen=True, kw_only=True)
class ResultUids:
    """UIDs of what is made from one set of Instances with one model version. refusal: why there are no findings."""

    sop_instance_uids: frozenset[str]
    model_name: str
    model_version: str
    refusal: str = ""

    @classmethod
    def of(cls, sop_instance_uids: Iterable[str], model: ModelInfo) -> "ResultUids":
        """The UIDs for these input Instances, in any order."""
        return cls(sop_instance_uids=frozenset(sop_instance_uids), model_name=model.name, model_version=model.version)

    def uid(self, kind: str) -> str:
        """The UID of one thing, e.g. `report.sr instance`; the same for the same input, model version and kind."""
        refusal = [self.refusal] if self.refusal else []
        return derive_uid(kind, self.model_name, self.model_version, *sorted(self.sop_instance_uids), *refusal)

    def tracking_uid(self, what: str) -> str:
        """The Tracking UID that the segments of a level (or the patient) and its group in the report share."""
        return self.uid(f"tracking {what}")


def derive_uid(*parts: str) -> str:
    """A UID that is the same for the same parts and for no others: 2.25 and the first 128 bits of their SHA-256.

    Reference: PS3.5 B.2.
    """
    digest = hashlib.sha256("\n".join(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16])}"
