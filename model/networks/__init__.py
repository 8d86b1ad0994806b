"""The networks, each in a module of its own: only layers and shapes.

How voxels become inputs is in `model/segment.py` and `model/classify.py`, training is in `training/`. Shape letters:
B batch, C channels, Z Y X voxels of a volume, S slices of a vertebra, F features.
"""

from model.networks.fracture import FractureNet
from model.networks.unet3d import VertebraUNet

__all__ = ["FractureNet", "VertebraUNet"]
