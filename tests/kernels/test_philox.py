"""Philox: known answers, one stream in three implementations, moments, independence of the cut."""

import math

import pytest
import torch

from uq.errors import ParameterError
from uq.kernels import dispatch, philox
from uq.kernels.philox import Purpose, normal, sample_normals, stream, uniform, words

pytest.importorskip("triton")
N = 10**5
# Of Random123: key, counter, words.
KNOWN = [
    (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        0x299F31D0 << 32 | 0xA4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.fixture(scope="module")
def compiled():
    """The integer part, by the eager backend of torch.compile: a C++ build takes half a minute."""
    before = philox._arguments_compiled
    philox._arguments_compiled = torch.compile(
        philox._counted_arguments, backend="eager", dynamic=True
    )
    yield
    philox._arguments_compiled = before


def triton_words(seed, group, at, step, start, n, block=32768):
    from uq.kernels.philox_triton import fill_words

    out = torch.empty(4, n, dtype=torch.int64)
    fill_words[(-(-n // block),)](out, seed, group, at, step, start, n, BLOCK=block)
    return out


@pytest.mark.parametrize(("seed", "counter", "answer"), KNOWN)
def test_known_answers(seed, counter, answer):
    wanted = [int(w, 16) for w in answer.split()]
    c0, *rest = counter
    assert [int(w) for w in words(seed, torch.tensor([c0]), *rest)] == wanted
    found = triton_words(seed, rest[0], rest[1], rest[2], c0, 1, block=16)
    assert found[:, 0].tolist() == wanted


@pytest.mark.parametrize("seed", [0, 1234, 2**31 + 5, 2**40 + 7, -1])
@pytest.mark.parametrize("start", [0, 2**32 - N])
def test_words_are_tritons(seed, start):
    """All words of 10⁵ counters, up to the last there is."""
    index = torch.arange(start, start + N)
    wanted = torch.stack(words(seed, index, 5, stream(Purpose.IVON, 1), 9))
    assert torch.equal(triton_words(seed, 5, stream(Purpose.IVON, 1), 9, start, N), wanted)


def test_words_are_numpys():
    """Another implementation, in unsigned arithmetic."""
    import numpy as np

    k = [np.uint64(77), np.uint64(5)]
    c = [np.arange(100, dtype=np.uint64), *(np.full(100, v, np.uint64) for v in (1, 2, 3))]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high = np.uint64(32)
        c = [(b >> high) ^ c[1] ^ k[0], b & low, (a >> high) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    found = words(5 << 32 | 77, torch.arange(100), 1, 2, 3)
    assert all(np.array_equal(x.numpy(), y.astype(np.int64)) for x, y in zip(found, c, strict=True))


def test_uniforms():
    """The conversions at their ends: [0, 1) for normals, (0, 1) in float64."""
    word = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    assert philox.unit(word).tolist() == pytest.approx([0, 2**-31, 1, 1, 0], abs=1e-7)
    assert (philox.unit(word) < 1).all()
    u = philox.unit64(word)
    assert 0 < float(u[0]) == 2.0**-33
    assert float(u[-1]) == 1 - 2.0**-33 < 1
    found = uniform((2, 3), 5, first=6, offset=4)
    wanted = (words(5, torch.arange(4, 10), 1, Purpose.FREE << 24, 0)[2].double() + 0.5) / 2**32
    assert torch.equal(found.flatten(), wanted)


def test_normals_are_tritons(monkeypatch):
    """A float32 angle up to 2π has half a unit of 2.4e-7, times a radius up to 5.7."""
    args = (2**63 + 9, 5000, 3, 6, stream(Purpose.WEIGHT, 2), 4)
    wanted = sample_normals(*args, offset=2**32 - 5000)
    monkeypatch.setenv("UQ_KERNELS", "triton")
    found = sample_normals(*args, offset=2**32 - 5000)
    assert (found - wanted).abs().max() < 3e-6


@pytest.mark.parametrize("backend", ["reference", "triton", "compiled"])
def test_cut_changes_nothing(backend, request, monkeypatch):
    """Bit by bit: any samples, any elements, any blocks."""
    if backend == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setenv("UQ_KERNELS", backend)
    at, n = stream(Purpose.OUTPUT, 7), 600
    whole = sample_normals(3, n, 0, 11, at, 1)
    for first, count in ((0, 1), (1, 1), (2, 1), (7, 1), (3, 6), (8, 3)):
        part = sample_normals(3, 200, first, count, at, 1, offset=333)
        assert torch.equal(part, whole[first : first + count, 333:533])
    monkeypatch.setattr(philox, "_CPU_BLOCK", 100)
    monkeypatch.setattr(philox, "_BLOCK", 128)
    assert torch.equal(sample_normals(3, n, 0, 11, at, 1), whole)


def test_compiled_reference_is_the_same(compiled):
    index = torch.arange(1000)
    counters = philox._counters(-7, 3, 2**31 + 1, 9)
    u, t = philox._arguments_compiled(index, *counters)
    wanted = philox._arguments(*words(-7, index, 3, 2**31 + 1, 9))
    assert torch.equal(u, wanted[0])
    assert torch.equal(t, wanted[1])


@pytest.mark.slow
def test_compiled_by_cpp_is_the_same():
    args = (5, 3 * 2**16 + 77, 1, 6, 9, 2)
    before = sample_normals(*args)
    state = torch.get_rng_state()
    if not philox.compile_reference():
        pytest.skip("no C++ compiler")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(sample_normals(*args), before)


def test_compiles_when_it_pays(monkeypatch):
    calls = []
    monkeypatch.setattr(philox, "compile_reference", lambda: calls.append(1))
    monkeypatch.setattr(philox, "_arguments_compiled", None)
    monkeypatch.setattr(philox, "_made", 0)
    monkeypatch.setattr(philox, "_BEFORE_COMPILATION", 1000)
    for _ in range(3):
        normal(100, 0, samples=4)
    assert len(calls) == 1


# -- law ---------------------------------------------------------------------------------------


def scores(z):
    """Mean, variance and kurtosis in units of their standard errors."""
    n = z.numel()
    z = z.double().flatten()
    return [
        float(z.mean()) * math.sqrt(n),
        float(z.square().mean() - 1) * math.sqrt(n / 2),
        # The variance of z⁴ is 96.
        float(z.pow(4).mean() - 3) * math.sqrt(n / 96),
    ]


def correlation(a, b):
    """In units of its standard error."""
    a, b = a.double().flatten(), b.double().flatten()
    return float((a * b).mean()) * math.sqrt(a.numel())


@pytest.mark.statistical
def test_moments():
    """10⁷ normals of fixed seeds. A sound generator fails one of these 3 at odds of 2 · 10⁻⁴."""
    total = torch.zeros(3, dtype=torch.float64)
    rounds, largest = 10, 0.0
    for step in range(rounds):
        z = sample_normals(42, 250_000, 0, 4, 7 << 24, step)
        total += torch.tensor(scores(z), dtype=torch.float64)
        largest = max(largest, float(z.abs().max()))
    assert (total / math.sqrt(rounds)).abs().max() < 4
    # √(−2 ln 10⁻⁷): where the uniform is cut.
    assert 5 < largest <= 5.678


@pytest.mark.statistical
def test_neighbours_are_independent():
    """13 correlations, each below four standard errors: false alarm at odds of 8 · 10⁻⁴."""
    n = 200_000
    z = sample_normals(1, n, 0, 8, 5, 0)
    pairs = [(z[i], z[j]) for i in range(4) for j in range(i)]  # lanes
    pairs += [(z[0], z[4]), (z[0, :-1], z[0, 1:]), (z[3, :-1], z[0, 1:])]
    pairs += [
        (z[0], sample_normals(1, n, 0, 1, 5, 1)[0]),  # steps
        (z[0], sample_normals(1, n, 0, 1, 6, 0)[0]),  # tensors
        (z[0], sample_normals(2, n, 0, 1, 5, 0)[0]),  # seeds
        (z[0], sample_normals(1 << 32 | 1, n, 0, 1, 5, 0)[0]),
    ]
    assert len(pairs) == 13
    assert max(abs(correlation(a, b)) for a, b in pairs) < 4
    # The test can fail: an address that is used twice is no new noise.
    assert correlation(z[0], sample_normals(1, n, 0, 1, 5, 0)[0]) > 100


# -- use ---------------------------------------------------------------------------------------


def test_one_operator_to_torch_compile():
    def double(x):
        return x + 2 * normal((3, 5), 2**63 + 1, samples=3)

    x = torch.zeros(3, 3, 5)
    found = torch.compile(double, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, double(x))
    op = torch.ops.uq.sample_normals.default
    args = (1, 20, 2, 3, 5, 0, torch.device("cpu"), 7)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_streams():
    assert [int(p) for p in Purpose] == list(range(8))
    assert stream(Purpose.WEIGHT, 5) == 5
    assert stream(Purpose.FREE, 2**24 - 1) == 0x7FFFFFF
    assert normal(3, 0, dtype=torch.float64).dtype == torch.float64
    assert normal((), 0).shape == ()
    assert normal((2, 0), 0, samples=3).shape == (3, 2, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normal(3, 0, offset=2**32 - 2), "32 bits"),
        (lambda: normal(3, 0, step=2**32), "step"),
        (lambda: normal(3, 0, stream=-1), "stream"),
        (lambda: normal(3, 0, first=-1), "samples"),
        (lambda: uniform(3, 0, step=-1), "step"),
        (lambda: stream(0, 2**24), "tensor"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ParameterError, match=message):
        call()


def test_dispatch(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.delenv("UQ_KERNELS", raising=False)
    assert not dispatch.use_triton(x)  # on the CPU, whether Triton is interpreted or not
    monkeypatch.setenv("UQ_KERNELS", "triton")
    assert dispatch.use_triton(x)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(ParameterError, match="TRITON_INTERPRET"):
        dispatch.use_triton(x)
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with pytest.raises(ParameterError, match="not installed"):
        dispatch.use_triton(x)
    monkeypatch.setenv("UQ_KERNELS", "reference")
    assert not dispatch.use_triton(x)
    monkeypatch.setenv("UQ_KERNELS", "fast")
    with pytest.raises(ParameterError, match="auto, reference, triton"):
        dispatch.use_triton(x)
    with pytest.raises(ParameterError, match="one device"):
        dispatch.use_triton(x, torch.zeros(2, device="meta"))


class OnCuda:
    """A tensor as far as the rule looks at it."""

    device = torch.device("cuda", 0)


def test_dispatch_on_cuda(monkeypatch):
    monkeypatch.delenv("UQ_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    assert dispatch.use_triton(OnCuda())
    monkeypatch.setenv("UQ_KERNELS", "reference")
    assert not dispatch.use_triton(OnCuda())
    monkeypatch.setenv("UQ_KERNELS", "auto")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert not dispatch.use_triton(OnCuda())
