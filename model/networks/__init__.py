"""The networks, each in a module of its own: only layers and shapes.

How voxels become inputs is in `model/segment.py` and `model/classify.py`, training is in `training/`. Shape letters:
B batch, C channels, Z Y X voxels of a volume, S slices of a vertebra, F features.
"""

from model.networks.encoders import make_encoder
from model.networks.fracture import FractureAnswer, FractureNet
from model.networks.study import StudyAnswer, StudyNet
from model.networks.unet3d import VertebraUNet
from model.networks.unet25d import RegionAnswer, RegionUNet, SliceUNet, SliceVertebraUNet

__all__ = [
    "FractureAnswer",
    "FractureNet",
    "RegionAnswer",
    "RegionUNet",
    "SliceUNet",
    "SliceVertebraUNet",
    "StudyAnswer",
    "StudyNet",
    "VertebraUNet",
    "make_encoder",
]
