"""The phantom: a procedural cervical spine CT with ground truth, on any grid, and as a DICOM Series.

The demo, the self-test, the tests and training stand on it. It holds no patient data and needs no network. Door:
`Anatomy.random` draws a patient, `render` samples it, `write_series` writes it as a scanner would.
"""

from model.phantom.anatomy import Anatomy, Place
from model.phantom.dicom import write_series
from model.phantom.fracture import FRACTURE_KINDS, Fracture, kinds_at
from model.phantom.render import Phantom, default_grid, render

__all__ = [
    "FRACTURE_KINDS",
    "Anatomy",
    "Fracture",
    "Phantom",
    "Place",
    "default_grid",
    "kinds_at",
    "render",
    "write_series",
]
