"""How the node names itself to peers when an association is negotiated (PS3.7 D.3.3.2), as SCU and as SCP."""

from functools import cache
from importlib.metadata import version

from pydicom.uid import UID
from pynetdicom import AE

IMPLEMENTATION_CLASS_UID = UID("2.25.105220929895605672514587324471579752884")  # of a UUID of our own (PS3.5 B.2)


@cache  # reading it from the installed package takes a quarter of a millisecond, and every stored file names it
def implementation_version_name() -> str:
    """1 to 16 characters."""
    return f"CSPINE_{version('cspine-node')}"[:16]


def make_ae(ae_title: str) -> AE:
    """An application entity under our name."""
    ae = AE(ae_title=ae_title)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = implementation_version_name()
    return ae
