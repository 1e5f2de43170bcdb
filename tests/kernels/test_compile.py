"""Kernels compile for a GPU: what the interpreter cannot tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")


def compiled(how):
    environment = os.environ | {"TRITON_INTERPRET": "0", "UQ_KERNELS": "triton"}
    run = subprocess.run(
        [sys.executable, SCRIPT, how], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_kernels_are_what_the_compiler_takes():
    assert "kernels" in compiled("front")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_machine_code_fits_a_gpu():
    assert "kernels" in compiled("full")
