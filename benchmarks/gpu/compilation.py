"""Compile every kernel for an H100, without one: ``python -m benchmarks.gpu.compilation``.

The cases run on the CPU, and each launch compiles the kernel for compute capability 9.0 in place of
running it: what they compute means nothing. That finds what the interpreter does not see (types,
loops whose values change type, names that Triton does not know), and shows what a kernel needs of a
processor. ``--front`` stops at Triton's own intermediate code, which takes a tenth of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

CAPABILITY = 90
# Bytes of shared memory that a program may have on any GPU since 2020; on an H100 it is 227 KiB.
SHARED = 99 * 1024


class _Compiled(Exception):
    """The front end is through."""


class _Driver:
    """Stands in for that of a GPU: it tells what to compile for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(found: dict[str, Any], front: bool) -> Iterator[None]:
    """Every launch compiles; ``found`` gets each variant of a kernel, or its error."""
    from triton.compiler.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from uq.kernels import dispatch

    driver.set_active(_Driver())
    run, make, interpreting = JITFunction.run, ASTSource.make_ir, dispatch.interpreting
    seen: set[Any] = set()

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = self.fn.__name__
        entry = found.setdefault(name, {"variants": 0, "errors": []})
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except _Compiled:
            entry["variants"] += 1
        except Exception as error:
            text = str(error) or repr(error)
            if text not in entry["errors"]:
                entry["errors"].append(text)
        else:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                entry["variants"] += 1
                need = _resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}
                entry.setdefault("resources", []).append(need)
                if need["shared"] > SHARED:
                    entry["errors"].append(f"{need['shared']} B of shared memory a program")

    def front_end(self: Any, *args: Any, **kwargs: Any) -> Any:
        make(self, *args, **kwargs)
        raise _Compiled

    JITFunction.run = launch
    # Programs are as large as on a GPU, but launches are let through for tensors of the CPU.
    dispatch.interpreting = lambda: True
    if front:
        ASTSource.make_ir = front_end
    try:
        yield
    finally:
        JITFunction.run, ASTSource.make_ir, dispatch.interpreting = run, make, interpreting


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack, which is where spilled registers go."""
    from triton import knobs

    tool = Path(knobs.nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", out)}
    return {k.lower(): numbers.get(k, 0) for k in ("REG", "STACK")}


def compile_all(names: list[str], front: bool) -> dict[str, Any]:
    """Variants, errors and resources of every kernel that the cases launch."""
    import torch

    from benchmarks.gpu.protocol import Check, Place, Repeat

    found: dict[str, Any] = {}
    place = Place(torch.device("cpu"), small=True)
    with compiling(found, front):
        for name in names:
            for case in import_module(f"benchmarks.gpu.cases_{name}").cases():
                # Numbers that were never computed may trip what comes after a launch.
                with contextlib.suppress(Exception):
                    if isinstance(case, Check | Repeat):
                        case.run(place)
                    else:
                        case.make(place)["uq"]()
    return found


def main() -> int:
    from benchmarks.gpu.__main__ import modules

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="KERNELS")
    parser.add_argument("--front", action="store_true", help="Triton's front end only")
    args = parser.parse_args()
    os.environ.update(TRITON_INTERPRET="0", UQ_KERNELS="triton")
    found = compile_all(args.modules or modules(), args.front)
    wrong = 0
    for name, entry in found.items():
        worst = entry.get("resources", [])
        about = (
            f"registers <= {max(r['reg'] for r in worst)}, "
            f"stack <= {max(r['stack'] for r in worst)} B, "
            f"shared <= {max(r['shared'] for r in worst)} B"
            if worst
            else ""
        )
        print(f"{name}: {entry['variants']} variants {about}")
        for error in entry["errors"]:
            wrong += 1
            print(f"    {error}")
    print(f"{len(found)} kernels, {wrong} errors")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
