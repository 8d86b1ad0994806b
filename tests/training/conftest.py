"""Fixtures of the training tests; `rsna_data` says what is in them."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from training.rsna import Cache


@pytest.fixture(scope="session")
def rsna_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.training.rsna_data import make_rsna  # not where no test asks for it: it imports torch

    return make_rsna(tmp_path_factory.mktemp("rsna") / "rsna-2022")


@pytest.fixture(scope="session")
def rsna_cache(rsna_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "Cache":
    from tests.training.rsna_data import make_cache
    from training.rsna import Cache

    return Cache.open(make_cache(rsna_folder, tmp_path_factory.mktemp("rsna-cache")))
