"""Kernels on a device: ``python -m benchmarks.gpu`` checks and times all of them.

A module ``benchmarks/gpu/cases_x.py`` contributes the cases of its kernels: a function
``cases() -> list[Check | Repeat | Timing]`` (see :mod:`benchmarks.gpu.protocol`). It is found by
its name, and runs in a process of its own, so that a kernel that brings its CUDA context down
takes no other with it.
"""
