"""Counter-based random numbers: the same noise on every device, however the work is cut.

Philox 4x32-10 (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a
64-bit key and four 32-bit counters to four words. Nothing else is remembered, so a number is
addressed by what it is for:

    key  seed
    c0   element: row-major index in the logical tensor
    c1   sample // 4
    c2   stream: purpose · 2²⁴ + tensor, see :func:`stream`
    c3   step: number of the call

and the four normals that two Box–Muller pairs make of the words belong to samples 4c1 … 4c1 + 3.

**Contract.** (seed, step, stream, sample, element) fixes the number. It depends on neither device,
launch grid, tiles, chunks of rows or samples, nor on how many samples are drawn: sample 5 of 8 is
sample 5 of 64. Words are equal bit for bit; normals are equal bit for bit on one device, and to a
few units in the last place between devices, whose logarithm and cosine differ. Two uses of one
address get the same noise, so give each tensor a stream and each call a step.

Normals come from 31-bit uniforms and end at |z| = 5.678: the tails beyond have probability
1.4 · 10⁻⁸. Uniforms are (word + ½)/2³² in float64, strictly inside (0, 1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from uq.errors import ParameterError
from uq.kernels.dispatch import cdiv, use_triton

MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_SMALLEST = 1e-7
_TWO_PI = 6.283185307179586
# Elements that a kernel's program fills.
_BLOCK = 1024


class Purpose(IntEnum):
    """What noise is for: the upper eight bits of a stream, so that no two uses share a number.

    ``FREE``, the default of :func:`normal` and :func:`uniform`, is for noise of your own.

    Examples
    --------
    >>> from uq.kernels import Purpose, stream
    >>> Purpose.IVON.value, stream(Purpose.IVON) >> 24  # no two purposes share a number
    (6, 6)
    """

    WEIGHT = 0
    BIAS = 1
    OUTPUT = 2
    RESAMPLING = 3
    MOMENTUM = 4
    ACCEPT = 5
    IVON = 6
    FREE = 7


def stream(purpose: Purpose | int, tensor: int = 0) -> int:
    """Counter c2 of a tensor: its number (below 2²⁴) beside what the noise is for.

    Parameters
    ----------
    purpose : Purpose or int
        What the noise is for, below 256.
    tensor : int, default=0
        Number of the tensor, below 2²⁴.

    Returns
    -------
    int
        The argument ``stream`` of :func:`normal` and :func:`uniform`.

    Raises
    ------
    ParameterError
        If a number is out of its range.

    Examples
    --------
    >>> from uq.kernels.philox import Purpose, stream
    >>> hex(stream(Purpose.IVON, 3))
    '0x6000003'
    """
    if not 0 <= purpose < 1 << 8 or not 0 <= tensor < 1 << 24:
        raise ParameterError(
            "stream: purpose must be from 0 to 255 and tensor from 0 to 2^24 − 1, got "
            f"{int(purpose)} and {tensor}."
        )
    return int(purpose) << 24 | tensor


def normal(
    shape: int | tuple[int, ...],
    seed: int,
    *,
    stream: int = Purpose.FREE << 24,
    step: int = 0,
    samples: int | None = None,
    first: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals of the addresses.

    Parameters
    ----------
    shape : int or tuple of int
        Of the logical tensor, or of the part of it that starts at ``offset``.
    seed : int
        64 bits; a negative one stands for its two's complement.
    stream, step : int, default=free use, 0
        Which tensor and which call, each below 2³².
    samples : int, optional
        Number of samples, stacked on a first axis; by default one, without the axis. Four samples
        cost as much as one.
    first : int, default=0
        Number of the first sample.
    offset : int, default=0
        Element at which to start.
    device : device, optional
        CPU by default.
    dtype : dtype, default=torch.float32
        The numbers are made in float32 and converted.

    Returns
    -------
    Tensor of shape ``(samples, *shape)``, or ``shape``

    Raises
    ------
    ParameterError
        If a counter does not fit its 32 bits.

    Examples
    --------
    >>> from uq.kernels import normal
    >>> many = normal((3, 4), seed=1, samples=9)
    >>> bool((normal((3, 4), seed=1, first=7) == many[7]).all())  # sample 7 of any number
    True
    >>> bool((normal(4, seed=1, samples=9, offset=8) == many[:, 2]).all())  # row 2 alone
    True
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    n = math.prod(shape)
    found = sample_normals(
        seed, n, first, 1 if samples is None else samples, stream, step, device, offset
    )
    return found.to(dtype).view(shape if samples is None else (samples, *shape))


def uniform(
    shape: int | tuple[int, ...],
    seed: int,
    *,
    stream: int = Purpose.FREE << 24,
    step: int = 0,
    first: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms of the addresses, float64 and strictly inside (0, 1).

    Parameters
    ----------
    shape, seed, stream, step, offset, device
        As of :func:`normal`.
    first : int, default=0
        Number of the sample.

    Returns
    -------
    Tensor of shape ``shape``
        In float64.

    Examples
    --------
    >>> from uq.kernels import uniform
    >>> uniform(3, seed=0)
    tensor([0.5009, 0.8626, 0.4099], dtype=torch.float64)
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    n = math.prod(shape)
    check_counters(n, offset, first, 1, stream, step)
    index = torch.arange(offset, offset + n, device=device)
    word = words(seed, index, first // 4, stream, step)[first % 4]
    return unit64(word).view(shape)


def check_counters(n: int, offset: int, first: int, count: int, stream: int, step: int) -> None:
    """Raise a ParameterError where a counter would wrap, so that two addresses met."""
    if n < 0 or offset < 0 or offset + n > 1 << 32:
        raise ParameterError(
            f"philox: elements are counted in 32 bits, got {n} from {offset}; split the tensor "
            "into streams."
        )
    if count < 0 or first < 0 or first + count > 1 << 34:
        raise ParameterError(
            f"philox: samples must be from 0 to 2^34 − 1, got {count} from {first}."
        )
    for name, value in (("stream", stream), ("step", step)):
        if not 0 <= value < 1 << 32:
            raise ParameterError(f"philox: {name} must be from 0 to 2^32 − 1, got {value!r}.")


# -- reference ---------------------------------------------------------------------------------


def words(
    seed: int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words at each counter, as int64 tensors of the counters' common shape."""
    seed &= (1 << 64) - 1
    b, c, d = (torch.as_tensor(x, dtype=torch.int64, device=c0.device) & MASK for x in (c1, c2, c3))
    return _rounds(seed & MASK, seed >> 32, c0 & MASK, b, c, d)


def _rounds(
    k0: Any, k1: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Torch has no unsigned 32-bit arithmetic. A product of two words wraps modulo 2⁶⁴ in int64;
    # its halves, masked, are right all the same.
    for _ in range(10):
        p, q = _ROUND_A * a, _ROUND_B * c
        a, b, c, d = (q >> 32 & MASK) ^ b ^ k0, q & MASK, (p >> 32 & MASK) ^ d ^ k1, p & MASK
        k0, k1 = k0 + _KEY_A & MASK, k1 + _KEY_B & MASK
    return a, b, c, d


def unit(word: Tensor) -> Tensor:
    """Word → float32 in [0, 1): the 31 bits of a signed word, folded at zero."""
    return torch.where(word >> 31 == 1, MASK - word, word).float() * 4.6566127342e-10


def unit64(word: Tensor) -> Tensor:
    """Word → float64 strictly inside (0, 1)."""
    return (word.double() + 0.5) * 2.0**-32


def normals(seed: int, c0: Tensor, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int) -> Tensor:
    """Four normals at each counter, stacked on a first axis."""
    w0, w1, w2, w3 = words(seed, c0, c1, c2, c3)
    return _box_muller(*_arguments(w0, w1, w2, w3))


def _arguments(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments of the logarithm and of cosine and sine, each for the two pairs."""
    u = torch.stack((unit(w0), unit(w2))).clamp_min(_SMALLEST)
    return u, _TWO_PI * torch.stack((unit(w1), unit(w3)))


def _box_muller(u: Tensor, t: Tensor, out: Tensor | None = None) -> Tensor:
    """Normals of the two pairs, in the order of the samples. Takes over u and t."""
    if out is None:
        out = u.new_empty(4, *u.shape[1:])
    r = u.log_().mul_(-2).sqrt_()
    torch.mul(r, t.cos(), out=out[0::2])
    torch.mul(r, t.sin_(), out=out[1::2])
    return out


def sample_normals(
    seed: int,
    n: int,
    first: int,
    count: int,
    stream: int,
    step: int,
    device: torch.device | str | None = None,
    offset: int = 0,
) -> Tensor:
    """Noise of ``count`` samples from ``first`` for n elements from ``offset``: (count, n) float32.

    Kernel on CUDA, reference elsewhere. To ``torch.compile`` it is one operator.
    """
    check_counters(n, offset, first, count, stream, step)
    seed &= (1 << 64) - 1
    seed -= seed >> 63 << 64  # operators take signed integers
    if torch.compiler.is_compiling():
        return torch.ops.uq.sample_normals(
            seed, n, first, count, stream, step, torch.device(device or "cpu"), offset
        )
    return _sample_normals(seed, n, first, count, stream, step, device, offset)


def _sample_normals(
    seed: int,
    n: int,
    first: int,
    count: int,
    stream: int,
    step: int,
    device: torch.device | str | None,
    offset: int,
) -> Tensor:
    out = torch.empty(count, n, device=device)
    if not out.numel():
        return out
    low, groups = first // 4, cdiv(first + count, 4) - first // 4
    if use_triton(out):
        from uq.kernels.philox_triton import fill_normals

        fill_normals[(cdiv(n, _BLOCK), groups)](
            out, seed, low, stream, step, offset, n, first % 4, count, BLOCK=_BLOCK
        )
        return out
    on_cpu = out.device.type == "cpu"
    blocks = _CPU_BLOCK if on_cpu else n
    arguments = _compiled(4 * groups * n) if on_cpu else None
    for start in range(0, n, blocks):
        stop = min(start + blocks, n)
        index = torch.arange(offset + start, offset + stop, device=out.device)
        for group in range(low, low + groups):
            if arguments is None:
                u, t = _arguments(*words(seed, index, group, stream, step))
            else:
                u, t = arguments(index, *_counters(seed, group, stream, step))
            begin, end = max(first, 4 * group), min(first + count, 4 * group + 4)
            place = out[begin - first : end - first, start:stop]
            if len(place) == 4:
                _box_muller(u, t, place)
            elif len(place) == 1:
                pair, sine = divmod(begin % 4, 2)
                angle = t[pair].sin_() if sine else t[pair].cos_()
                torch.mul(u[pair].log_().mul_(-2).sqrt_(), angle, out=place[0])
            else:
                place.copy_(_box_muller(u, t)[begin - 4 * group : end - 4 * group])
    return out


@torch.library.custom_op("uq::sample_normals", mutates_args=())
def _operator(
    seed: int,
    n: int,
    first: int,
    count: int,
    stream: int,
    step: int,
    device: torch.device,
    offset: int,
) -> Tensor:
    return _sample_normals(seed, n, first, count, stream, step, device, offset)


@_operator.register_fake
def _(
    seed: int,
    n: int,
    first: int,
    count: int,
    stream: int,
    step: int,
    device: torch.device,
    offset: int,
) -> Tensor:
    return torch.empty(count, n, device=device)


# -- compiled reference ------------------------------------------------------------------------
#
# The integer part is compiled: a loop over vectors of words in place of eighty passes through
# memory. Logarithm, cosine and sine stay torch's own, so that a number does not change its last
# bit with the moment of compilation.

# Elements of a block on the CPU: what it works on stays in the second-level cache.
_CPU_BLOCK = 2**16
# Numbers made before the reference is compiled. The usual rule for renting or buying: by then as
# long was spent on them as compilation takes, some ten seconds.
_BEFORE_COMPILATION = 2**28

_made = 0
_arguments_compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
_cannot_compile = False


def compile_reference() -> bool:
    """Compile the CPU path now; by default that waits until 2²⁸ numbers were drawn.

    Returns
    -------
    bool
        Whether that worked; it needs a C++ compiler. The numbers are the same either way.
    """
    global _arguments_compiled, _cannot_compile
    if _arguments_compiled is None and not _cannot_compile:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled = torch.compile(_counted_arguments, dynamic=True)
                for n in (2, _CPU_BLOCK):
                    compiled(torch.arange(n), *_counters(1, 2, 3, 4))
            _arguments_compiled = compiled
        except Exception:  # whatever the compiler's trouble is, the slower path is right
            _cannot_compile = True
    return _arguments_compiled is not None


def _compiled(n: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The compiled reference, where there is one; counts n more numbers towards having it."""
    global _made
    _made += n
    if _arguments_compiled is None and _made >= _BEFORE_COMPILATION:
        compile_reference()
    return _arguments_compiled


def _counters(seed: int, group: int, stream: int, step: int) -> tuple[Tensor, ...]:
    """Key and counters as tensors: numbers would be compiled in."""
    seed &= (1 << 64) - 1
    values = torch.tensor([seed & MASK, seed >> 32, group, stream, step])
    return values.unbind()


def _counted_arguments(
    c0: Tensor, k0: Tensor, k1: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor]:
    return _arguments(*_rounds(k0, k1, c0, c1, c2, c3))
