"""Which weights of a network are particles, and the network under all of them at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from uq.errors import ParameterError
from uq.inference.posterior import Weights, _activation_elements
from uq.nn.network import Network

Stochastic = str | Sequence[str] | Callable[[str, nn.Module], bool]
# Layers that act on the last axis alone, so that an axis of particles may stand before it.
_POINTWISE = (
    nn.Linear, nn.ELU, nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU,
    nn.Identity, nn.LayerNorm, nn.Dropout,
)  # fmt: skip


# -- which weights ---------------------------------------------------------------------------------


def stochastic_names(body: nn.Module, stochastic: Stochastic = "penultimate") -> list[str]:
    """Names of the parameters of ``body`` that ``stochastic`` chooses.

    Parameters
    ----------
    body : Module
        Network body.
    stochastic : str, sequence of str or callable, default="penultimate"
        "penultimate", "first", "last" or "all": among the layers that hold a weight matrix or
        kernel, in the order of ``named_modules`` (with a single layer, that one). Otherwise names
        of modules or parameters, or a function ``f(name, module)`` that says which modules.

    Returns
    -------
    list of str
        In the order of ``named_parameters``.

    Raises
    ------
    ParameterError
        If a name is unknown, or nothing is chosen.

    Examples
    --------
    >>> from uq.inference import stochastic_names
    >>> from uq.nn import MLP
    >>> stochastic_names(MLP(2, (100, 20, 5), 1))
    ['4.weight', '4.bias']
    """
    modules = dict(body.named_modules())
    parameters = [name for name, _ in body.named_parameters()]
    layers = [
        name for name, m in modules.items() if any(p.ndim >= 2 for p in m.parameters(recurse=False))
    ]
    if not layers:
        raise ParameterError("stochastic: the network has no layer with weights.")
    if callable(stochastic):
        chosen = [name for name, m in modules.items() if stochastic(name, m)]
        if not chosen:
            raise ParameterError(
                f"stochastic: the function chose no module; there are {_listed(modules)}."
            )
    elif isinstance(stochastic, str) and stochastic in ("penultimate", "first", "last", "all"):
        chosen = {
            "penultimate": layers[-2:][:1],
            "first": layers[:1],
            "last": layers[-1:],
            "all": layers,
        }[stochastic]
    else:
        chosen = [stochastic] if isinstance(stochastic, str) else list(stochastic)
        unknown = [name for name in chosen if name not in modules and name not in parameters]
        if unknown or not chosen:
            raise ParameterError(
                f"stochastic: the network has no module {', '.join(map(repr, unknown))}; there "
                f"are {_listed(modules)}."
                if unknown
                else "stochastic: an empty list chooses nothing; name a module."
            )
    inside = [n for n in parameters if any(_is_in(n, module) for module in chosen)]
    if not inside:
        raise ParameterError(f"stochastic: {_listed(chosen)} hold no parameters.")
    return inside


def _is_in(parameter: str, module: str) -> bool:
    return module in ("", parameter) or parameter.startswith(module + ".")


def _listed(names: Any) -> str:
    return ", ".join(repr(n) for n in names if n) or "none"


# -- likelihood of particles -----------------------------------------------------------------------


class ParticleNetwork(nn.Module):
    """A network some of whose weights have an axis of particles.

    Parameters
    ----------
    network : Network
        Body and likelihood. Its parameters that are named no longer require gradients.
    names : list of str
        Parameters of the body that are φ.
    max_memory_mb : float, default=256
        Bound on the activations of one pass. Beyond it the particles are split, and each part is
        computed a second time in the backward pass; results are the same to rounding.

    Notes
    -----
    Used in eval mode, so that neither dropout nor batch statistics couple particles. Layers before
    the first stochastic one run once for all particles; nothing has the size of S times ψ.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import ParticleNetwork
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> network = Network(MLP(2, (4,), 3), CategoricalLikelihood(3))
    >>> net = ParticleNetwork(network, ["2.weight", "2.bias"])
    >>> particles = torch.randn(100, net.dim)  # 3 · 4 weights and 3 biases
    >>> net(particles, torch.randn(20, 2), torch.arange(20) % 3).shape  # log likelihoods
    torch.Size([100])
    """

    def __init__(self, network: Network, names: list[str], max_memory_mb: float = 256) -> None:
        super().__init__()
        self.network: Network = network.eval()
        self.names = names
        self.max_memory_mb = max_memory_mb
        own = dict(network.body.named_parameters())
        self.shapes = [own[name].shape for name in names]
        self.sizes: list[int] = [own[name].numel() for name in names]
        for name in names:
            own[name].requires_grad_(False)
        self._plain = _is_plain(network.body, names)
        # In a list: they hold the same modules as the network.
        self._parts = [*split_network(network, names)]
        self._per_row: float | None = None

    @property
    def dim(self) -> int:
        """Number of stochastic weights."""
        return sum(self.sizes)

    def psi(self) -> list[nn.Parameter]:
        """Return the deterministic parameters."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def unflatten(self, phi: Tensor) -> Weights:
        """Particles (S, D) as named tensors ``(S, *shape)``."""
        parts = phi.split(self.sizes, -1)
        return {
            name: part.reshape(-1, *shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def outputs(self, phi: Tensor, x: Tensor) -> Tensor:
        """Outputs of the body for each row and particle, (n, S, outputs)."""
        return self._after(phi, self._parts[0](x))

    def _after(self, phi: Tensor, h: Tensor) -> Tensor:
        """Outputs given those of the layers before the first stochastic one."""
        weights = self.unflatten(phi)
        body: Any = self._parts[1].body
        if not self._plain:
            # Only what depends on the particles is batched.
            call = vmap(lambda w: functional_call(body, w, (h,)))
            return call(weights).transpose(0, 1)
        batched = False
        layer: Any
        for name, layer in body._modules.items():  # named_children leaves out what comes again
            w, b = (weights.get(f"{name}.{p}") for p in ("weight", "bias"))
            if w is None and b is None:
                h = layer(h)
                continue
            h = _linear(
                h, batched, layer.weight if w is None else w, layer.bias if b is None else b
            )
            batched = True
        return h

    def log_likelihood_rows(self, phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Log likelihood of each row and particle, (n, S)."""
        self.network.eval()
        return self._rows_after(phi, self._parts[0](x), y)

    def _rows_after(self, phi: Tensor, h: Tensor, y: Tensor) -> Tensor:
        likelihood = self.network.likelihood
        shape = (len(h), len(phi))
        flat = self._after(phi, h).reshape(shape[0] * shape[1], -1)
        nll: Tensor = likelihood.nll(likelihood(flat), y.repeat_interleave(len(phi), 0))
        return -nll.view(shape)

    def forward(self, phi: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Log likelihood of all rows at each particle, (S,), in float64."""

        self.network.eval()
        h = self._parts[0](x)

        def part(phi: Tensor) -> Tensor:
            rows = self._rows_after(phi, h, y).double()
            return rows.sum(0) if weight is None else weight.double() @ rows

        size = self.particles_at_once(x)
        if len(phi) <= size:
            return part(phi)
        return torch.cat([checkpoint(part, p, use_reentrant=False) for p in phi.split(size)])

    def particles_at_once(self, x: Tensor) -> int:
        """Particles whose activations at ``x`` keep the bound on memory."""
        if self._per_row is None:
            with torch.no_grad():
                h = self._parts[0](x[:2])
            self._per_row = _activation_elements(self._parts[1], h) / len(h)
        budget = self.max_memory_mb * 2**20 / x.element_size()
        return max(1, int(budget / (self._per_row * len(x))))


def split_network(network: Network, names: list[str]) -> tuple[nn.Module, Network]:
    """Layers of a chain before the first stochastic one, and the network of the others.

    The others keep their names. Of a body that is no chain, or whose first layer is stochastic,
    nothing is before.
    """
    body = network.body
    if type(body).forward is not nn.Sequential.forward:
        return nn.Identity(), network
    layers = list(body._modules)
    first = min(layers.index(name.partition(".")[0]) for name in names)
    modules = {k: m for k, m in body._modules.items() if m is not None}
    before = nn.Sequential(*(modules[k] for k in layers[:first]))
    after = nn.Sequential(OrderedDict((k, modules[k]) for k in layers[first:]))
    return before.eval(), Network(after, network.likelihood).eval()


def _is_plain(body: nn.Module, names: list[str]) -> bool:
    """Whether the layers are a chain that may have an axis of particles before the last one."""
    if type(body).forward is not nn.Sequential.forward:
        return False
    children = body._modules
    owners = [name.rpartition(".")[0] for name in names]
    if any(type(children.get(owner)) is not nn.Linear for owner in owners):
        return False
    layers = list(children.values())
    if any(layers.count(children[owner]) > 1 for owner in owners):
        return False  # the same layer again, under another name
    first = min(list(children).index(owner) for owner in owners)
    return all(type(layer) in _POINTWISE for layer in layers[first:])


def _linear(h: Tensor, batched: bool, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer with particles: h is (n, in) or (n, S, in), the result (n, S, out)."""
    if weight.ndim == 3 and not batched:
        # One product for all particles.
        out = (h @ weight.flatten(0, 1).T).view(len(h), *weight.shape[:2])
    elif weight.ndim == 3:
        out = (h.transpose(0, 1) @ weight.mT).transpose(0, 1)
    else:
        out = h @ weight.T
        if not batched and bias is not None and bias.ndim == 2:
            out = out[:, None]
    return out if bias is None else out + bias
