"""Shared by all tests: one thread, one seed, and where the real data lies."""

import os
import signal

# Kernels run in Triton's interpreter, which looks at this when it is first imported; torch's
# optimizers import it. Only tests that set UQ_KERNELS=triton run kernels on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# A run in the background may have been started with Ctrl-C ignored, and its children would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# NUTS is compiled for each shape of network and data: without optimisation that takes a second or
# two rather than ten.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_multi_thread_eigen=false",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same draws in every run, whichever worker a test lands on."""
    np.random.seed(0)  # noqa: NPY002  (Pyro and scikit-learn draw from it)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the benchmark data: UQ_DATA, or ../shared/data beside the checkout."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("UQ_DATA", default))
    if not folder.is_dir():
        pytest.skip("real data not found: set UQ_DATA to its folder")
    return folder
