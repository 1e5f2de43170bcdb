"""Networks under many draws of Gaussian weights, without the draws of linear layers in memory.

:func:`sampled_network` copies a network (its tensors are shared), with each ``Linear`` replaced by
a layer that draws its weights where they are multiplied (:func:`uq.kernels.sampled_linear`). What a
draw of the copy takes by name is then a number for each such layer, the draw's, and values of the
remaining parameters: ``uq.inference.posterior.monte_carlo`` runs it like any other network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uq.kernels.arguments import autocast_input
from uq.kernels.philox import Purpose, sample_normals, stream

Weights = dict[str, Tensor]


@torch.library.custom_op(
    "uq::sampled_linear_at",
    mutates_args=(),
    schema="(Tensor x, Tensor mean, Tensor std, Tensor? bias, Tensor? bias_std, Tensor sample, "
    "SymInt seed, SymInt tensor) -> Tensor",
)
def _at(x, mean, std, bias, bias_std, sample, seed, tensor):  # type: ignore[no-untyped-def]
    """Outputs of one draw; under ``vmap`` over its number, which counts up, of all of them."""
    first, rest = int(sample), (None, 1, seed, 0, tensor)
    return torch.ops.uq.sampled_linear(x, mean, std, bias, bias_std, *rest, first, False)[0]


@_at.register_fake
def _(x, mean, std, bias, bias_std, sample, seed, tensor):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], mean.shape[0])


@_at.register_vmap
def _(  # type: ignore[no-untyped-def]
    info, in_dims, x, mean, std, bias, bias_std, sample, seed, tensor
):
    if in_dims[0] is not None:
        x = x.movedim(in_dims[0], 0)
    rest = (None, info.batch_size, seed, 0, tensor)
    out = torch.ops.uq.sampled_linear(x, mean, std, bias, bias_std, *rest, int(sample[0]), False)
    return out, 0


class SampledLinear(nn.Module):
    """Linear layer with Gaussian weights, evaluated at one draw of them.

    It has no ``weight``: whoever reads that of a ``Linear`` fails here instead of getting the mean.

    Parameters
    ----------
    mean, std : Tensor of shape (N, K)
        Of the weights.
    bias : Tensor of shape (N,), optional
        Mean of the bias.
    bias_std : Tensor of shape (N,), optional
        Standard deviation of the bias, a number without.
    seed : int
        Key of the noise.
    tensor : int
        Number of this weight among those of the seed.

    Attributes
    ----------
    sample : Tensor, scalar, int64
        Number of the draw, on the CPU. Under ``vmap`` numbers that count up by one.
    """

    sample: Tensor

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        bias: Tensor | None,
        bias_std: Tensor | None,
        seed: int,
        tensor: int,
    ) -> None:
        super().__init__()
        parts = (mean, std, bias, bias_std)
        self._parts = tuple(None if t is None else t.detach() for t in parts)
        self._seed, self._tensor = seed, tensor
        self.register_buffer("sample", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (…, K)."""
        rows = autocast_input(x.reshape(-1, x.shape[-1]))
        out: Tensor = torch.ops.uq.sampled_linear_at(
            rows, *self._parts, self.sample, self._seed, self._tensor
        )
        return out.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class SampledNetwork:
    """A network whose linear layers draw their own weights, and how to draw the rest.

    Attributes
    ----------
    network : Module
        The copy.
    """

    network: nn.Module
    _layers: tuple[str, ...]
    _rest: Mapping[str, tuple[Tensor, Tensor, int]]
    _seed: int

    def sampler(self) -> Callable[[int], Weights]:
        """Return a function that gives the next k draws, stacked on a first axis, by name."""
        position = 0

        def draw(k: int) -> Weights:
            nonlocal position
            first, position = position, position + k
            numbers = torch.arange(first, first + k)
            drawn = dict.fromkeys(self._layers, numbers)
            for name, (mean, std, tensor) in self._rest.items():
                channel = stream(Purpose.WEIGHT, tensor)
                noise = sample_normals(self._seed, mean.numel(), first, k, channel, 0, mean.device)
                drawn[name] = mean + std * noise.to(std.dtype).view(k, *mean.shape)
            return drawn

        return draw


def sampled_network(
    network: nn.Module,
    x: Tensor,
    stds: Mapping[str, Tensor],
    seed: int,
    layers: Mapping[nn.Module, tuple[Tensor, Tensor, Tensor | None]] | None = None,
) -> SampledNetwork | None:
    """Copy a network with independent Normals over its parameters; see the module.

    Parameters
    ----------
    network : Module
        Its parameters are the means.
    x : Tensor
        A few rows of inputs, to try the copy on.
    stds : mapping of str to Tensor
        Standard deviations by parameter name; parameters that are not named stay as they are.
    seed : int
        Key of the noise: parameter i of the network has the streams of number i.
    layers : mapping of Module to (mean, std, bias), optional
        Other modules that are linear layers, of what weights; their bias is a number. By default
        the ``Linear`` ones, with ``stds``.

    Returns
    -------
    SampledNetwork or None
        None where the copy would have no such layer or does not run: where a weight is read, not
        applied.
    """
    named = dict(network.named_parameters())
    numbers = {id(p): i for i, p in enumerate(named.values())}
    by_id = {id(p): stds[name] for name, p in named.items() if name in stds}
    memo: dict[int, Any] = {id(t): t for t in (*named.values(), *network.buffers())}
    drawn: set[int] = set()
    found: list[tuple[nn.Module, SampledLinear]] = []
    if layers is None:
        for m in network.modules():
            if type(m) is not nn.Linear or id(m.weight) not in by_id:
                continue
            bias_std = by_id.get(id(m.bias))
            number = numbers[id(m.weight)]
            new = SampledLinear(m.weight, by_id[id(m.weight)], m.bias, bias_std, seed, number)
            drawn |= {id(m.weight), id(m.bias)}
            found.append((m, new))
    else:
        for i, (m, (mean, std, bias)) in enumerate(layers.items()):
            found.append((m, SampledLinear(mean, std, bias, None, seed, len(named) + i)))
            drawn |= {id(p) for p in m.parameters()}
    if not found:
        return None
    memo |= {id(m): new for m, new in found}
    rest = {
        name: (p.detach(), by_id[id(p)], numbers[id(p)])
        for name, p in named.items()
        if id(p) in by_id and id(p) not in drawn
    }
    try:
        copied = copy.deepcopy(network, memo).eval()
        names = {id(m): name for name, m in copied.named_modules()}
        fields = tuple(f"{names[id(m)]}.sample" for _, m in found)
        left = dict(copied.named_parameters())
        # A weight that another module reads, too, has to be one draw for both.
        if not rest.keys() <= left.keys() or any(id(p) in drawn for p in left.values()):
            return None
        with torch.no_grad():
            copied(x[:2])
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return None
    return SampledNetwork(copied, fields, rest, seed)
