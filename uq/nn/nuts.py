"""A torch network as a pure JAX function of its weights, for samplers that run in JAX.

The forward pass is recorded by ``torch.fx`` and replayed with JAX operations; parameters and
buffers keep the names of the torch module, so that a draw of the weights fits both. JAX is imported
when a network is replayed, not before.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from uq.errors import ParameterError
from uq.nn.likelihoods import SCALE_FLOOR, CategoricalLikelihood, NormalLikelihood
from uq.nn.network import Network

Array = Any  # of jax
Arrays = Mapping[str, Array]


class JaxNetwork:
    """A :class:`Network` in JAX. Two of the same architecture are equal, whatever their weights.

    Parameters
    ----------
    network : Network
        A body of Linear, Conv1d, Conv2d, GroupNorm, LayerNorm, AvgPool2d, Flatten and activation
        layers, and a Normal or categorical likelihood.

    Raises
    ------
    ParameterError
        If the body has a layer or an operation that is not among those above.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> from uq.nn.nuts import JaxNetwork
    >>> network = Network(MLP(4, (8,), 3), CategoricalLikelihood(3))
    >>> weights = {k: p.detach().numpy() for k, p in network.named_parameters()}
    >>> JaxNetwork(network).outputs(weights, torch.zeros(2, 4).numpy()).shape
    (2, 3)
    """

    def __init__(self, network: Network) -> None:
        if type(network.likelihood) not in (CategoricalLikelihood, NormalLikelihood):
            raise ParameterError(
                f"JaxNetwork knows the categorical and the Normal likelihood, got "
                f"{type(network.likelihood).__name__}."
            )
        self.likelihood: Any = network.likelihood
        # In a container: names are then the network's, and a body may be a single layer.
        body = nn.Sequential(OrderedDict(body=network.body)).eval()
        try:
            self._graph = fx.Tracer().trace(body)
        except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
            raise ParameterError(
                "the network cannot be translated to JAX: its forward pass branches on its input "
                f"({error}). Use a plain stack of layers, such as torch.nn.Sequential."
            ) from error
        self._modules = dict(body.named_modules())
        self._operations = {
            node: _operation(node, self._modules)  # raises where there is none
            for node in self._graph.nodes
            if node.op not in ("placeholder", "get_attr", "output")
        }
        likelihood = network.likelihood
        noise = getattr(likelihood, "raw_scale", None) is None
        self._key = str(self._graph), repr(body), type(likelihood), likelihood.n_outputs, noise

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JaxNetwork) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def outputs(self, weights: Arrays, x: Array) -> Array:
        """Outputs of the body at inputs ``x`` (n, …); ``weights`` by the names of the network."""
        values: dict[fx.Node, Any] = {}

        def value(argument: Any) -> Any:
            return fx.node.map_arg(argument, lambda node: values[node])

        for node in self._graph.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = weights[str(node.target)]
            elif node.op == "output":
                return value(node.args[0])
            else:
                operation = self._operations[node]
                arguments, options = value(node.args), value(node.kwargs)
                if node.op == "call_module":
                    prefix = f"{node.target}."
                    own = {
                        k.removeprefix(prefix): v
                        for k, v in weights.items()
                        if k.startswith(prefix)
                    }
                    layer = self._modules[str(node.target)]
                    values[node] = operation(layer, own, *arguments)
                else:
                    values[node] = operation(*arguments, **options)
        raise AssertionError("a graph ends with its output")

    def log_likelihood(self, weights: Arrays, x: Array, y: Array) -> Array:
        """Log likelihood of each row, in nats: that of the torch network."""
        import jax
        from jax import numpy as jnp

        outputs = self.outputs(weights, x)
        if isinstance(self.likelihood, CategoricalLikelihood):
            return jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1)[:, 0]
        m, offset = self.likelihood.n_targets, self.likelihood.offset
        raw = weights.get("likelihood.raw_scale")
        loc = outputs if raw is not None else outputs[:, :m]
        scale = jax.nn.softplus((outputs[:, m:] if raw is None else raw) + offset) + SCALE_FLOOR
        z = (y - loc) / scale
        return -(0.5 * z**2 + jnp.log(scale) + 0.5 * math.log(2 * math.pi)).sum(-1)


def _linear(layer: Any, own: Arrays, x: Array) -> Array:
    out = x @ own["weight"].T
    return out + own["bias"] if layer.bias is not None else out


def _conv(layer: Any, own: Arrays, x: Array) -> Array:
    from jax import lax

    if layer.padding_mode != "zeros":
        raise ParameterError(f"padding_mode {layer.padding_mode!r} is not translated to JAX.")
    padding = layer.padding.upper() if isinstance(layer.padding, str) else None
    out = lax.conv_general_dilated(
        x,
        own["weight"],
        layer.stride,
        padding or [(p, p) for p in layer.padding],
        rhs_dilation=layer.dilation,
        feature_group_count=layer.groups,
    )
    if layer.bias is None:
        return out
    return out + own["bias"].reshape(-1, *[1] * len(layer.kernel_size))


def _group_norm(layer: Any, own: Arrays, x: Array) -> Array:
    grouped = x.reshape(len(x), layer.num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    scaled = centred / ((centred**2).mean(-1, keepdims=True) + layer.eps) ** 0.5
    shape = (-1, *[1] * (x.ndim - 2))
    out = scaled.reshape(x.shape)
    return out * own["weight"].reshape(shape) + own["bias"].reshape(shape) if layer.affine else out


def _layer_norm(layer: Any, own: Arrays, x: Array) -> Array:
    axes = tuple(range(-len(layer.normalized_shape), 0))
    centred = x - x.mean(axes, keepdims=True)
    out = centred / ((centred**2).mean(axes, keepdims=True) + layer.eps) ** 0.5
    return out * own.get("weight", 1.0) + own.get("bias", 0.0)


def _average_pool(layer: Any, _own: Arrays, x: Array) -> Array:
    from jax import lax

    size, step = ((v, v) if isinstance(v, int) else v for v in (layer.kernel_size, layer.stride))
    if layer.padding not in (0, (0, 0)) or layer.ceil_mode:
        raise ParameterError("AvgPool2d with padding or ceil_mode is not translated to JAX.")
    total = lax.reduce_window(x, 0.0, lax.add, (1, 1, *size), (1, 1, *step), "VALID")
    return total / (size[0] * size[1])


def _flat(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    end = end_dim % x.ndim
    return x.reshape(*x.shape[:start_dim], -1, *x.shape[end + 1 :])


def _nn(name: str) -> Callable[..., Array]:
    """Look an activation up in jax.nn, at the call."""

    def call(x: Array, *arguments: Any, **options: Any) -> Array:
        import jax

        options.pop("inplace", None)
        return getattr(jax.nn, name)(x, *arguments, **options)

    return call


def _gelu(x: Array, approximate: str = "none") -> Array:
    return _nn("gelu")(x, approximate=approximate == "tanh")


_MODULES: dict[type[nn.Module], Callable[..., Array]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.AvgPool2d: _average_pool,
    nn.Flatten: lambda layer, _, x: _flat(x, layer.start_dim, layer.end_dim),
    nn.Identity: lambda _layer, _, x: x,
    nn.Dropout: lambda _layer, _, x: x,  # a network is replayed in eval mode
    nn.ReLU: lambda _layer, _, x: _nn("relu")(x),
    nn.ELU: lambda layer, _, x: _nn("elu")(x, layer.alpha),
    nn.LeakyReLU: lambda layer, _, x: _nn("leaky_relu")(x, layer.negative_slope),
    nn.Tanh: lambda _layer, _, x: _nn("tanh")(x),
    nn.Sigmoid: lambda _layer, _, x: _nn("sigmoid")(x),
    nn.SiLU: lambda _layer, _, x: _nn("silu")(x),
    nn.GELU: lambda layer, _, x: _gelu(x, layer.approximate),
    nn.Softplus: lambda layer, _, x: _nn("softplus")(layer.beta * x) / layer.beta,
}
_FUNCTIONS: dict[Any, Callable[..., Array]] = {
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.truediv: operator.truediv,
    operator.matmul: operator.matmul,
    operator.neg: operator.neg,
    torch.add: operator.add,
    torch.mul: operator.mul,
    torch.flatten: _flat,
    torch.relu: _nn("relu"),
    torch.tanh: _nn("tanh"),
    torch.sigmoid: _nn("sigmoid"),
    F.relu: _nn("relu"),
    F.elu: _nn("elu"),
    F.silu: _nn("silu"),
    F.gelu: _gelu,
}
_METHODS: dict[str, Callable[..., Array]] = {
    "unsqueeze": lambda x, dim: (
        x.reshape(*x.shape[:dim], 1, *x.shape[dim:])
        if dim >= 0
        else x.reshape(*x.shape[: x.ndim + 1 + dim], 1, *x.shape[x.ndim + 1 + dim :])
    ),
    "flatten": _flat,
    "reshape": lambda x, *shape: x.reshape(*shape),
    "view": lambda x, *shape: x.reshape(*shape),
    "relu": _nn("relu"),
    "tanh": _nn("tanh"),
    "sigmoid": _nn("sigmoid"),
}


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[..., Array]:
    found: Callable[..., Array] | None
    if node.op == "call_module":
        layer = modules[str(node.target)]
        found, what = _MODULES.get(type(layer)), type(layer).__name__
    elif node.op == "call_method":
        found, what = _METHODS.get(str(node.target)), f"Tensor.{node.target}"
    else:
        found, what = (
            _FUNCTIONS.get(node.target),
            getattr(node.target, "__name__", str(node.target)),
        )
    if found is None:
        known = ", ".join(sorted(kind.__name__ for kind in _MODULES))
        raise ParameterError(
            f"the network holds {what}, which is not translated to JAX. These layers are: {known}."
        )
    return found


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Weights as NumPy arrays in float64, by the same names."""
    return {
        name: t.detach().cpu().double().numpy() if t.is_floating_point() else t.cpu().numpy()
        for name, t in tensors.items()
    }
