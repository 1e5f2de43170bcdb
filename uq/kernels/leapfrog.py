"""Hamiltonian trajectories of many chains at once, for small networks.

A trajectory of L steps is some 20 L launches of small kernels, which take longer to launch than to
run. Three remedies, each usable alone:

- :func:`mlp_gradient`: log density and gradient of all chains' networks by batched products,
  written by hand, as automatic differentiation would launch several times as many;
- :func:`leapfrog`: kick and drift in one kernel, the last kick and the kinetic energy in another;
- :class:`Recorded`: the whole trajectory recorded as a CUDA graph, launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from uq.kernels.dispatch import cdiv, use_triton

Density = Callable[[Tensor], tuple[Tensor, Tensor]]
Pull = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps outputs (C, n, K) to the log likelihood of each chain (C,) and its gradient (C, n, K)."""
_BLOCK = 1024

# -- a network of each chain ---------------------------------------------------------------------


def mlp_layers(flat: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Views of weights (C, out, in) and biases (C, 1, out) in flat vectors (C, D)."""
    parts, start = [], 0
    for width_in, width_out in pairwise(sizes):
        end = start + width_in * width_out
        weight = flat[:, start:end].view(-1, width_out, width_in)
        start = end + width_out
        parts.append((weight, flat[:, end:start].view(-1, 1, width_out)))
    return parts


def mlp_backward(
    layers: list[tuple[Tensor, Tensor]], x: Tensor, pull: Pull
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Outputs, log likelihood, and its gradient by weights and biases, of ReLU networks."""
    inputs = [x.expand(len(layers[0][0]), *x.shape)]
    for weight, bias in layers[:-1]:
        inputs.append(torch.baddbmm(bias, inputs[-1], weight.mT).relu_())
    weight, bias = layers[-1]
    outputs = torch.baddbmm(bias, inputs[-1], weight.mT)
    value, delta = pull(outputs)
    gradients = []
    for i in range(len(layers) - 1, -1, -1):
        gradients.append((torch.bmm(delta.mT, inputs[i]), delta.sum(1)))
        if i:
            delta = torch.ops.aten.threshold_backward(torch.bmm(delta, layers[i][0]), inputs[i], 0)
    return outputs, value, gradients[::-1]


def mlp_gradient(
    theta: Tensor, sizes: Sequence[int], x: Tensor, pull: Pull
) -> tuple[Tensor, Tensor]:
    """Log likelihood of the networks of all chains, and its gradient.

    Parameters
    ----------
    theta : Tensor of shape (C, D)
        Weights (out × in) and biases of each layer in turn, one chain a row.
    sizes : sequence of int
        Inputs, hidden widths (ReLU), outputs.
    x : Tensor of shape (n, inputs)
        Inputs, the same for all chains.
    pull : callable
        Maps outputs (C, n, K) to the log likelihood (C,) and its gradient (C, n, K).

    Returns
    -------
    value : Tensor of shape (C,)
    gradient : Tensor of shape (C, D)

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.leapfrog import mlp_gradient
    >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
    >>> def normal(outputs):
    ...     error = y - outputs
    ...     return -0.5 * error.square().sum((1, 2)), error
    >>> value, gradient = mlp_gradient(torch.randn(8, 3 * 5 + 5 + 5 + 1), (3, 5, 1), x, normal)
    >>> value.shape, gradient.shape
    (torch.Size([8]), torch.Size([8, 26]))
    """
    _, value, gradients = mlp_backward(mlp_layers(theta, sizes), x, pull)
    return value, torch.cat([t for w, b in gradients for t in (w.flatten(1), b)], 1)


# -- trajectories --------------------------------------------------------------------------------


def kick_drift(
    position: Tensor, momentum: Tensor, gradient: Tensor, step: Tensor, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """p′ = p + share · ε g, then θ′ = θ + ε p′, in one pass.

    Parameters
    ----------
    position, momentum, gradient : Tensor of shape (C, D)
        Chains a row.
    step : Tensor of shape (C, 1) or (C, D)
        Step size ε of each chain, or of each entry.
    share : float, default=1.0
        ½ for the first kick of a trajectory.

    Returns
    -------
    position, momentum : Tensor of shape (C, D)
        New tensors.
    """
    if not use_triton(position):
        momentum = torch.addcmul(momentum, step, gradient, value=share)
        return torch.addcmul(position, step, momentum), momentum
    from uq.kernels.leapfrog_triton import kick_drift_kernel

    position, momentum, gradient = (t.contiguous() for t in (position, momentum, gradient))
    chains, n = position.shape
    moved, kicked = torch.empty_like(position), torch.empty_like(momentum)
    kick_drift_kernel[(chains, cdiv(n, _BLOCK))](
        position, momentum, gradient, step, moved, kicked, n, *_strides(step),
        SHARE=share, BLOCK=_BLOCK,
    )  # fmt: skip
    return moved, kicked


def kick_energy(momentum: Tensor, gradient: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """p′ = p + ½ ε g, and the kinetic energy ½ ‖p′‖² of each chain.

    Parameters
    ----------
    momentum, gradient, step
        As for :func:`kick_drift`.

    Returns
    -------
    momentum : Tensor of shape (C, D)
    energy : Tensor of shape (C,), float64
    """
    if not use_triton(momentum):
        momentum = torch.addcmul(momentum, step, gradient, value=0.5)
        return momentum, 0.5 * momentum.square().sum(1, dtype=torch.float64)
    from uq.kernels.leapfrog_triton import kick_energy_kernel

    momentum, gradient = momentum.contiguous(), gradient.contiguous()
    chains, n = momentum.shape
    kicked = torch.empty_like(momentum)
    energy = momentum.new_empty(chains, dtype=torch.float64)
    kick_energy_kernel[(chains,)](
        momentum, gradient, step, kicked, energy, n, *_strides(step), BLOCK=_BLOCK
    )
    return kicked, energy


def _strides(step: Tensor) -> tuple[int, int]:
    """Strides of the step sizes, 0 along an axis that they do not have."""
    rows, columns = step.stride()
    return rows if len(step) > 1 else 0, columns if step.shape[1] > 1 else 0


def leapfrog(
    position: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    step: Tensor,
    density: Density,
    n_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Integrate Hamilton's equations of all chains.

    Parameters
    ----------
    position, momentum, gradient : Tensor of shape (C, D)
        Start, and the gradient of the log density there.
    step : Tensor of shape (C,) or (C, D)
        Step size of each chain, or of each entry: a mass of 1/step².
    density : callable
        Maps (C, D) to the log density (C,) and its gradient (C, D).
    n_steps : int
        Steps, each of one gradient; at least 1.

    Returns
    -------
    position, momentum : Tensor of shape (C, D)
        End.
    energy : Tensor of shape (C,), float64
        Kinetic energy ½ ‖p‖² there.
    value : Tensor of shape (C,)
        Log density there.
    gradient : Tensor of shape (C, D)
        And its gradient.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.leapfrog import leapfrog
    >>> normal = lambda q: (-0.5 * q.square().sum(1), -q)
    >>> q, p = torch.randn(4, 3), torch.randn(4, 3)
    >>> end = leapfrog(q, p, -q, torch.full((4,), 0.1), normal, 20)
    >>> back = leapfrog(end[0], -end[1], end[4], torch.full((4,), 0.1), normal, 20)
    >>> torch.allclose(back[0], q, atol=1e-5)  # trajectories are reversible
    True
    """
    step = step.to(position.dtype)
    step = step[:, None] if step.ndim == 1 else step
    for i in range(n_steps):
        share = 1.0 if i else 0.5
        position, momentum = kick_drift(position, momentum, gradient, step, share)
        value, gradient = density(position)
    momentum, energy = kick_energy(momentum, gradient, step)
    return position, momentum, energy, value, gradient


class Recorded:
    """A function of tensors of fixed shapes: on a GPU a graph, replayed by one launch.

    Parameters
    ----------
    function : callable
        Takes tensors, gives a tuple of tensors. It must read nothing that changes but its
        arguments, wait for no value, and draw no random numbers.
    *inputs : Tensor
        Of the shapes, types and device of all later calls.

    Examples
    --------
    >>> import torch
    >>> from uq.kernels.leapfrog import Recorded
    >>> double = Recorded(lambda t: (2 * t,), torch.zeros(3))
    >>> double(torch.ones(3))
    (tensor([2., 2., 2.]),)
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self.function = function
        self.inputs: list[Tensor] = [t.detach().clone() for t in inputs]
        self.outputs: tuple[Tensor, ...] = ()
        self.graph: Any = None
        if self.inputs[0].is_cuda:
            self._record()

    @torch.no_grad()
    def _record(self) -> None:
        # Kernels are compiled and libraries set up before recording, on a stream of its own.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.function(*self.inputs)
        self.graph = graph

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate at other inputs."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        if self.graph is None:
            self.outputs = self.function(*self.inputs)
        else:
            self.graph.replay()
        return tuple(t.clone() for t in self.outputs)
