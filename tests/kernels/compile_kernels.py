"""Compile every kernel that a set of calls launches for a GPU that is not there.

Triton's interpreter runs Python; its compiler reads the source, types included, and turns down some
of what the interpreter takes. Here launches are caught and compiled for compute capability 9.0
instead, with the types and specialisations that the arguments would have on a device. Run as a
script, in a process without interpreter: ``compile_kernels.py front`` stops at Triton's own
intermediate code, ``full`` goes on to machine code and looks at the shared memory it asks for.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
# Of a program on GPUs of the last generations, the smallest ones included.
SHARED = 99 * 1024
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.bool: "*i1",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.float16: "*fp16", torch.int16: "*i16",
}  # fmt: skip
seen = set()
full = False


def type_of(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64" if value < 1 << 63 else "u64"
    return "fp32"


def launched(self, *args, grid=None, warmup=False, **kwargs):
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
    values = dict(zip(self.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = values.get(parameter.name, parameter.default)
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or (free and type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = type_of(value)
        if free and (isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)):
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = (self.fn.__name__, str(signature), str(constants), str(options))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(self, signature, constants, attributes)
    if full:
        found = triton.compile(source, target=TARGET, options=options)
        print(self.fn.__name__, found.metadata.shared, flush=True)
        assert found.metadata.shared <= SHARED, (key, found.metadata.shared)
        return
    from triton._C.libtriton import ir

    backend = make_backend(TARGET)
    options = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source.make_ir(TARGET, options, functions, backend.get_module_map(), context)


def calls():
    """Every kernel, in the variants that methods use."""
    from uq.kernels import leapfrog, local_reparam_linear, normal, sampled_linear, sdm

    normal((3, 40), 1 << 40, samples=3)
    types = (torch.float32, torch.bfloat16, torch.float64) if full else (torch.float32,)
    for dtype in types:
        wide = torch.promote_types(dtype, torch.float32)
        for rows, n_in, n_out in ((100, 64, 48), (3, 1, 1)):
            mean, std = (torch.ones(n_out, n_in, dtype=wide, requires_grad=True) for _ in range(2))
            bias, tau = (torch.ones(n_out, dtype=wide, requires_grad=True) for _ in range(2))
            for x in (torch.ones(rows, n_in, dtype=dtype), torch.ones(5, rows, n_in, dtype=dtype)):
                x.requires_grad_()
                for rest in ({}, {"rho": True, "mask": mean > 0, "bias": bias, "bias_std": tau}):
                    for f in (sampled_linear, local_reparam_linear):
                        f(x, mean, std, n_samples=5, seed=1 << 40, **rest).sum().backward()
    support = sdm.Support.of(torch.randn(300, 20))
    q, own, group = torch.randn(5, 20), torch.zeros(5).long(), torch.zeros(300).long()
    _, radius = sdm.scan(q, own, support, group)
    sdm.count(q, support, radius)
    sdm.window(q, support, q[:, 0], q[:, 0], q[:, 0])
    for k in (1, 64) if full else (5,):
        sdm.nearest_keys(q, support, k)
    for dtype in (torch.float32, torch.float64):
        t = torch.ones(3, 40, dtype=dtype)
        for step in (t, t[:, :1]):
            leapfrog.kick_drift(t, t, t, step, 0.5)
            leapfrog.kick_energy(t, t, step)


if __name__ == "__main__":
    from uq.kernels import dispatch

    full = sys.argv[1] == "full"
    dispatch.interpreting = lambda: True
    JITFunction.run = launched
    calls()
    print(f"{len(seen)} kernels")
