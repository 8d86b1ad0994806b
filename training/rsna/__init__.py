"""The RSNA 2022 data, ready to train on: the folder as downloaded, the cache made of it once, and how to read that.

`prepare` makes the cache, `cut` adds stacks of slices by vertebra, `Cache` reads both; `demo.generate` writes a data
set of the same shape from the phantom. No training here, and no patient data.
"""

from training.files import dicom_files
from training.rsna.boxes import Box
from training.rsna.cache import NUM_FOLDS, Cache, CacheError, Study, read_volume
from training.rsna.cuts import cut, cut_fingerprint, cut_settings, cut_study
from training.rsna.masks import Mask, MaskError, labels_on, read_mask
from training.rsna.preparation import NoStudiesError, prepare
from training.rsna.processes import ProcessDiedError
from training.rsna.source import Source, SourceError, SourceStudy, read_images, read_source
from training.rsna.stacks import CutSettings, Stacks
from training.rsna.study import Settings, source_fingerprint

__all__ = [
    "NUM_FOLDS",
    "Box",
    "Cache",
    "CacheError",
    "CutSettings",
    "Mask",
    "MaskError",
    "NoStudiesError",
    "ProcessDiedError",
    "Settings",
    "Source",
    "SourceError",
    "SourceStudy",
    "Stacks",
    "Study",
    "cut",
    "cut_fingerprint",
    "cut_settings",
    "cut_study",
    "dicom_files",
    "labels_on",
    "prepare",
    "read_images",
    "read_mask",
    "read_source",
    "read_volume",
    "source_fingerprint",
]
