"""Kernels compile for a GPU that is not there: what the interpreter cannot tell."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiled(*how):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.compilation", *how]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def test_the_compiler_takes_every_kernel():
    assert "0 errors" in compiled("--front")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_machine_code_fits_a_gpu():
    """Shared memory of a program within 99 KiB."""
    assert "0 errors" in compiled()
