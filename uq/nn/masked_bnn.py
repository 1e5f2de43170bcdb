"""Networks whose hidden nodes can be switched off, evaluated for many chains at once.

    h_l = m_l ⊙ relu(W_l h_{l−1} + b_l),   m_l ∈ {0, 1}^{P_l},   f = W_{L+1} h_L + b_{L+1}

The weights of all layers are one flat vector θ for each chain, the masks of all layers another, so
that a sampler works on two matrices (C, D) and (C, M). A network whose nodes are mostly off is
computed on those that are on: the cost follows the active width, not the allocated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from uq.kernels.leapfrog import Pull, mlp_backward, mlp_layers

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Evaluation:
    """A network at given weights and masks."""

    outputs: Tensor
    """(C, n, K)."""
    value: Tensor
    """Log likelihood (C,), in nats, float64."""
    mask_gradient: Tensor
    """∂ log likelihood / ∂m of the relaxed masks, (C, M); 0 at inactive nodes unless asked for."""


class Restricted(Protocol):
    """The weights that the outputs depend on, given the masks."""

    active: Tensor
    """(C, D′) of 0 and 1: entries that are padding, or of nodes that are off, are 0."""

    def weights(self, theta: Tensor) -> Tensor:
        """Gather these weights, 0 where inactive: (C, D′) from (C, D)."""
        ...

    def gradient(self, weights: Tensor, x: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
        """Log likelihood (C,) and its gradient (C, D′) at weights that are 0 where inactive."""
        ...

    def restore(self, theta: Tensor, weights: Tensor) -> Tensor:
        """Put these weights in their place in ``theta`` (C, D), whose others stay."""
        ...


class MaskedNetwork(Protocol):
    """What the sampler asks of a network."""

    groups: tuple[int, ...]
    """Number of nodes of each masked layer; their sum is M."""
    n_weights: int

    def restrict(self, masks: Tensor) -> Restricted:
        """Weights that matter at these masks."""
        ...

    def evaluate(
        self, theta: Tensor, masks: Tensor, x: Tensor, pull: Pull, everywhere: bool = False
    ) -> Evaluation:
        """Outputs, log likelihood and mask gradient; ``everywhere`` for inactive nodes, too."""
        ...

    def compacted(self, theta: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Parameters of a network without masks of the same outputs, by name, (C, …)."""
        ...


def relu_mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Fully connected network with ReLU between layers, of the given sizes from input to output."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MaskedMLP:
    """ReLU network of given sizes, with a mask on every hidden node and, if asked, every input.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, allocated width of each hidden layer, outputs.
    select_features : bool, default=False
        Mask the inputs, too; they are then the first group.

    Examples
    --------
    >>> import torch
    >>> from uq.nn.masked_bnn import MaskedMLP
    >>> network = MaskedMLP((3, 8, 8, 1))
    >>> network.n_weights, network.groups
    (113, (8, 8))
    """

    def __init__(self, sizes: Sequence[int], select_features: bool = False) -> None:
        self.sizes: tuple[int, ...] = tuple(sizes)
        self.select_features = select_features
        self.groups: tuple[int, ...] = self.sizes[0 if select_features else 1 : -1]
        self.n_weights: int = sum((a + 1) * b for a, b in pairwise(self.sizes))

    def _nodes(self, masks: Tensor, everywhere: bool) -> list[tuple[Tensor, Tensor]]:
        """Of each layer of nodes, positions that are kept and whether they are on, (C, p)."""
        c, parts = len(masks), list(masks.split(self.groups, 1)) if self.groups else []
        if not self.select_features:
            parts.insert(0, masks.new_ones(c, self.sizes[0]))
        parts.append(masks.new_ones(c, self.sizes[-1]))
        nodes = []
        for i, on in enumerate(parts):
            width = on.shape[1]
            if 0 < i < len(parts) - 1 and not everywhere:
                width = max(1, int(on.sum(1).max()))
                if on.is_cuda:  # fewer shapes, for each of which a trajectory is recorded
                    width = min(on.shape[1], -(-width // 8) * 8)
            if width < on.shape[1]:
                kept = on.argsort(dim=1, descending=True, stable=True)[:, :width]
                on = on.gather(1, kept)
            else:
                kept = torch.arange(width, device=on.device).expand(c, width)
            nodes.append((kept, on))
        return nodes

    def restrict(self, masks: Tensor, everywhere: bool = False) -> _Narrow:
        """Return the network on its active nodes, padded to the widest chain."""
        return _Narrow(self, masks, self._nodes(masks, everywhere), everywhere)

    def evaluate(
        self, theta: Tensor, masks: Tensor, x: Tensor, pull: Pull, everywhere: bool = False
    ) -> Evaluation:
        """See :class:`MaskedNetwork`. The gradient costs no more than one by the activations."""
        part = self.restrict(masks, everywhere)
        raw = theta.gather(1, part.index) if everywhere else part.weights(theta)
        layers = mlp_layers(raw * part.active if everywhere else raw, part.sizes)
        outputs, value, gradients = mlp_backward(layers, x, pull)
        found = []
        first = 0 if self.select_features else 1
        rows = zip(mlp_layers(raw, part.sizes), gradients, part.nodes, self.sizes, strict=False)
        for (weight, _), (gradient, _), (kept, _), width in list(rows)[first:]:
            # f depends on m_j and on column j of the next weights by their product alone.
            by_node = (weight * gradient).sum(1)
            found.append(by_node.new_zeros(len(masks), width).scatter(1, kept, by_node))
        empty = masks[:, :0]
        return Evaluation(outputs, value, torch.cat(found, 1) if found else empty)

    def compacted(self, theta: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Parameters of a :func:`relu_mlp` as wide as the widest chain, by name."""
        part = self.restrict(masks)
        named = {}
        for i, (weight, bias) in enumerate(mlp_layers(part.weights(theta), part.sizes)):
            named[f"{2 * i}.weight"], named[f"{2 * i}.bias"] = weight, bias[:, 0]
        return named

    def embedded(self, bodies: Sequence[nn.Module], theta: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and masks that start as networks of lesser widths; the rest is of ``theta``."""
        masks = theta.new_zeros(len(bodies), sum(self.groups))
        theta = theta.clone()
        parameters = [list(body.parameters()) for body in bodies]
        start = self.sizes[0] if self.select_features else 0
        masks[:, :start] = 1
        for i, (weight, bias) in enumerate(mlp_layers(theta, self.sizes)):
            for c, own in enumerate(parameters):
                out, width_in = own[2 * i].shape
                weight[c, :out, :width_in] = own[2 * i].detach()
                bias[c, 0, :out] = own[2 * i + 1].detach()
            if i < len(self.sizes) - 2:
                masks[:, start : start + out] = 1
                start += self.sizes[i + 1]
        return theta, masks


class _Narrow:
    """:class:`Restricted` of a MaskedMLP."""

    def __init__(
        self,
        network: MaskedMLP,
        masks: Tensor,
        nodes: list[tuple[Tensor, Tensor]],
        everywhere: bool,
    ) -> None:
        self.nodes = nodes
        self.sizes: list[int] = [kept.shape[1] for kept, _ in nodes]
        index, active, start = [], [], 0
        for ((cols, cols_on), (rows, rows_on)), (width_in, width_out) in zip(
            pairwise(nodes), pairwise(network.sizes), strict=True
        ):
            end = start + width_in * width_out
            index += [(start + rows[:, :, None] * width_in + cols[:, None]).flatten(1), end + rows]
            # With gradients everywhere, an inactive node is computed, but nothing reads it.
            if everywhere:
                rows_on = torch.ones_like(rows_on)
            active += [(rows_on[:, :, None] * cols_on[:, None]).flatten(1), rows_on]
            start = end + width_out
        self.index: Tensor = torch.cat(index, 1)
        self.active: Tensor = torch.cat(active, 1)

    def weights(self, theta: Tensor) -> Tensor:
        return theta.gather(1, self.index) * self.active

    def gradient(self, weights: Tensor, x: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
        _, value, gradients = mlp_backward(mlp_layers(weights, self.sizes), x, pull)
        flat = [t for weight, bias in gradients for t in (weight.flatten(1), bias)]
        return value, torch.cat(flat, 1) * self.active

    def restore(self, theta: Tensor, weights: Tensor) -> Tensor:
        kept = torch.where(self.active > 0, weights, theta.gather(1, self.index))
        return theta.scatter(1, self.index, kept)


class MaskedModule:
    """Any module, with a mask on the output nodes or channels of its Linear and Conv layers.

    A node that is off has its weights and its bias at 0, so that an activation with f(0) = 0
    passes nothing on. The layer that comes last among the modules is the output, never masked.
    The module runs in eval mode; frozen parameters stay as they are.

    Parameters
    ----------
    module : Module
        Maps inputs (n, …) to outputs (n, K).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: nn.Module = module.eval()
        self.trained: dict[str, nn.Parameter] = {
            k: p for k, p in module.named_parameters() if p.requires_grad
        }
        self.fixed: dict[str, nn.Parameter | Tensor] = {
            k: t
            for k, t in (*module.named_parameters(), *module.named_buffers())
            if k not in self.trained
        }
        found = [(f"{n}." if n else "", m) for n, m in module.named_modules()]
        layers = [(n, m) for n, m in found if isinstance(m, _LAYERS)][:-1]
        self.layers: list[tuple[str, int]] = [(n, m.weight.shape[0]) for n, m in layers]
        self.groups: tuple[int, ...] = tuple(width for _, width in self.layers)
        self.n_weights: int = sum(p.numel() for p in self.trained.values())

    def flat(self, modules: Sequence[nn.Module]) -> Tensor:
        """Trained weights of modules of this architecture, (C, D)."""
        return torch.stack(
            [
                torch.cat(
                    [p.detach().flatten() for k, p in m.named_parameters() if k in self.trained]
                )
                for m in modules
            ]
        )

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        """Weights by name, of one chain (D,) or several (C, D)."""
        parts = flat.split([p.numel() for p in self.trained.values()], -1)
        return {
            k: t.reshape(*flat.shape[:-1], *p.shape)
            for (k, p), t in zip(self.trained.items(), parts, strict=True)
        }

    def _masked(self, flat: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Weights of one chain by name, times the masks of their nodes."""
        named = self._named(flat)
        for (name, _), m in zip(self.layers, mask.split(self.groups), strict=True):
            for k in (f"{name}weight", f"{name}bias"):
                if k in named:
                    named[k] = named[k] * m.view(-1, *[1] * (named[k].ndim - 1))
        return named

    def _outputs(self, flat: Tensor, masks: Tensor, x: Tensor) -> Tensor:
        def one(theta: Tensor, mask: Tensor) -> Tensor:
            named = self._masked(theta, mask) if self.groups else self._named(theta)
            out: Tensor = functional_call(self.module, self.fixed | named, (x,))
            return out

        try:
            return vmap(one)(flat, masks)
        except RuntimeError as error:
            # Recurrent layers have no batching rule: go through the chains one by one.
            if "atching rule" not in str(error):
                raise
            return torch.stack([one(*pair) for pair in zip(flat, masks, strict=True)])

    def restrict(self, masks: Tensor) -> _Rows:
        """Return the weights of the active nodes: all of them, zeros for the others."""
        return _Rows(self, masks)

    def evaluate(
        self, theta: Tensor, masks: Tensor, x: Tensor, pull: Pull, everywhere: bool = False
    ) -> Evaluation:
        """See :class:`MaskedNetwork`; the gradient is always everywhere."""
        found: Any = vjp(lambda m: self._outputs(theta, m, x), masks)
        outputs, back = found
        value, delta = pull(outputs)
        return Evaluation(outputs.detach(), value, back(delta)[0])

    def compacted(self, theta: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Weights with zeros for what is off, by name: the shapes stay."""
        each = [
            self._masked(t, m) if self.groups else self._named(t)
            for t, m in zip(theta, masks, strict=True)
        ]
        return {k: torch.stack([named[k] for named in each]).detach() for k in self.trained}


class _Rows:
    """:class:`Restricted` of a MaskedModule."""

    def __init__(self, network: MaskedModule, masks: Tensor) -> None:
        self.network = network
        self.ones: Tensor = torch.ones_like(masks)
        ones = masks.new_ones(len(masks), network.n_weights)
        named = network.compacted(ones, masks)
        self.active: Tensor = torch.cat([t.flatten(1) for t in named.values()], 1)

    def weights(self, theta: Tensor) -> Tensor:
        return theta * self.active

    def gradient(self, weights: Tensor, x: Tensor, pull: Pull) -> tuple[Tensor, Tensor]:
        found: Any = vjp(lambda t: self.network._outputs(t, self.ones, x), weights)
        outputs, back = found
        value, delta = pull(outputs)
        return value, back(delta)[0] * self.active

    def restore(self, theta: Tensor, weights: Tensor) -> Tensor:
        return torch.where(self.active > 0, weights, theta)
