"""Shared by all tests: one thread, and where the real data lies."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the benchmark data: UQ_DATA, or ../shared/data beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("UQ_DATA", default))
    if not folder.is_dir():
        pytest.skip("real data not found: set UQ_DATA to its folder")
    return folder
