"""Generators of network weights: small noise in, all weights of a network out.

A generator g maps z ~ N(0, I_d) to the m weights of a network, and so makes an implicit
distribution over them: correlated across layers and possibly with several modes. The variational
bounds of :mod:`uq.inference.implicit_vi` need its Jacobian J = ∂g/∂z (m × d), of which a generator
gives JᵀJ and products without ever forming J.

A matrix-multiplication layer maps a matrix X (a × b) to Y (c × e) by

    Y = (W_l X + B_l) W_r + B_r,        ca + be + cb + ce parameters instead of ab·ce,

with Jacobian W_l ⊗ W_rᵀ (row-major). For a last layer of that kind behind tangents T_1 … T_d,

    (JᵀJ)_pq = ⟨T_p, A T_q B⟩,          A = W_lᵀ W_l,  B = W_r W_rᵀ,

so that no tangent is ever as large as the network.

References
----------
A. Uppal, K. Stensbo-Smidt, W. Boomsma, J. Frellsen, "Implicit Variational Inference for
High-Dimensional Posteriors", NeurIPS 2023, arXiv 2310.06643.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jvp, vjp, vmap
from torch.nn import functional as F

from uq.errors import ParameterError

Product = Callable[[Tensor], Tensor]


# -- how weights lie in matrices -----------------------------------------------------------------


@dataclass(frozen=True)
class WeightBlock:
    """Parameters of one layer that share their first axis, side by side in one matrix."""

    layer: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (the shared axis) and columns of the matrix."""
        rows = self.shapes[0][0] if self.shapes[0] else 1
        return rows, sum(self.columns)

    @property
    def columns(self) -> list[int]:
        """Columns of each parameter."""
        return [math.prod(shape[1:]) for shape in self.shapes]


class WeightLayout:
    """Trainable parameters of a module as one flat vector of matrices, one block after another.

    A Linear or Conv layer is the block [weight | bias], of shape (outputs, inputs + 1); any other
    module's own parameters are grouped by the length of their first axis.

    Parameters
    ----------
    module : Module
        Any; parameters that do not require gradients are left out.

    Raises
    ------
    ParameterError
        If nothing is trainable.

    Examples
    --------
    >>> from uq.nn import MLP
    >>> [block.shape for block in WeightLayout(MLP(4, (16,), 3)).blocks]
    [(16, 5), (3, 17)]
    """

    def __init__(self, module: nn.Module) -> None:
        groups: dict[tuple[str, int], list[tuple[str, tuple[int, ...]]]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad and p.numel():
                layer = name.rpartition(".")[0]
                groups.setdefault((layer, p.shape[0] if p.ndim else 1), []).append(
                    (name, tuple(p.shape))
                )
        if not groups:
            raise ParameterError(
                f"{type(module).__name__} has no trainable parameters, so there are no weights to "
                "generate; pass a module with layers whose parameters require gradients."
            )
        self.blocks: list[WeightBlock] = [
            WeightBlock(layer, tuple(n for n, _ in found), tuple(s for _, s in found))
            for (layer, _), found in groups.items()
        ]
        self.n_weights: int = sum(math.prod(block.shape) for block in self.blocks)
        # Other modules that hold one of the parameters (weight tying), and its name here.
        known = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        self.aliases: dict[str, str] = {
            alias: known[id(p)]
            for prefix, part in module.named_modules()
            for alias, p in (
                (f"{prefix}.{k}" if prefix else k, v) for k, v in part._parameters.items()
            )
            if p is not None and alias != known.get(id(p), alias)
        }

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut (S, m) into parameters by name, each (S, …): views of ``flat``."""
        weights = {}
        sizes = [math.prod(block.shape) for block in self.blocks]
        for block, part in zip(self.blocks, flat.split(sizes, -1), strict=True):
            columns = part.unflatten(-1, block.shape).split(block.columns, -1)
            for name, shape, t in zip(block.names, block.shapes, columns, strict=True):
                weights[name] = (
                    t.unflatten(-1, shape[1:]) if len(shape) > 1 else t.reshape(len(flat), *shape)
                )
        return weights

    def flatten(self, weights: dict[str, Tensor]) -> Tensor:
        """Inverse of :meth:`unflatten`, for one set of weights: (m,)."""
        parts = []
        for block in self.blocks:
            rows = [weights[name].reshape(block.shape[0], -1) for name in block.names]
            parts.append(torch.cat(rows, 1).reshape(-1))
        return torch.cat(parts)


# -- generators ----------------------------------------------------------------------------------


class Generator(nn.Module, ABC):
    """Map from noise (S, d) to weights (S, m), row by row, with what its Jacobian is needed for.

    A subclass writes ``forward``; the methods on the Jacobian here differentiate it by
    ``torch.func`` and may be replaced by faster ones. Activations should be smooth: with ReLU the
    Jacobian is piecewise constant and the entropy has no gradient with respect to its pattern.

    Parameters
    ----------
    noise_dim : int
        Length d of the noise.
    n_weights : int
        Number m of weights.
    """

    def __init__(self, noise_dim: int, n_weights: int) -> None:
        super().__init__()
        if noise_dim < 1 or n_weights < 1:
            raise ParameterError(
                f"{type(self).__name__}: noise_dim and n_weights must be >= 1, got {noise_dim} and "
                f"{n_weights}."
            )
        self.noise_dim = noise_dim
        self.n_weights = n_weights

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Weights (S, m) at noise (S, d)."""

    def jacobian(self, z: Tensor) -> Tensor:
        """J at each row of ``z``, (S, m, d): for small networks."""
        return vmap(jacfwd(self._one))(z)

    def gram(self, z: Tensor) -> Tensor:
        """JᵀJ at each row of ``z``, (S, d, d), differentiable."""
        jacobian = self.jacobian(z)
        return jacobian.mT @ jacobian

    def push(self, z: Tensor, v: Tensor) -> Tensor:
        """Jv for directions (S, k, d), (S, k, m), differentiable."""
        one = vmap(lambda at, along: jvp(self._one, (at,), (along,))[1], (None, 0))
        return vmap(one)(z, v)

    def energy(self, z: Tensor, v: Tensor) -> Tensor:
        """‖Jv‖² of directions (S, k, d), (S, k), differentiable."""
        return self.push(z, v).square().sum(-1)

    def normal_product(self, z: Tensor) -> Product:
        """Return the function V ↦ JᵀJV of directions (S, k, d); for use without gradients."""

        def one(at: Tensor, along: Tensor) -> Tensor:
            image = jvp(self._one, (at,), (along,))[1]
            pulled: Tensor = vjp(self._one, at)[1](image)[0]
            return pulled

        return lambda v: vmap(vmap(one, (None, 0)))(z, v)

    def center(self, weights: Tensor, std: float, draws: int = 64) -> None:
        """Move and scale the last layer: mean ``weights`` (m,), mean standard deviation ``std``."""
        raise NotImplementedError(f"{type(self).__name__} has no last layer to set.")

    def _one(self, z: Tensor) -> Tensor:
        out: Tensor = self(z[None])[0]
        return out


class MLPGenerator(Generator):
    """Fully connected generator with ELU between layers; for up to about 50,000 weights.

    Parameters
    ----------
    noise_dim : int
        Length d of the noise.
    hidden : sequence of int
        Widths; none makes an affine generator, whose distribution is a Gaussian.
    n_weights : int
        Number m of weights.

    Examples
    --------
    >>> import torch
    >>> MLPGenerator(8, (20,), 105)(torch.randn(3, 8)).shape
    torch.Size([3, 105])
    """

    def __init__(self, noise_dim: int, hidden: Sequence[int], n_weights: int) -> None:
        super().__init__(noise_dim, n_weights)
        widths = [noise_dim, *hidden, n_weights]
        self.layers: nn.ModuleList = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def _trunk(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Input of the last layer, and slopes of the activations on the way."""
        slopes = []
        for layer in self.layers[:-1]:
            z = layer(z)
            slopes.append(_elu_slope(z))
            z = F.elu(z)
        return z, slopes

    def forward(self, z: Tensor) -> Tensor:
        """Weights (S, m)."""
        out: Tensor = self.layers[-1](self._trunk(z)[0])
        return out

    def _matrices(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # type: ignore[misc]

    def gram(self, z: Tensor) -> Tensor:
        """JᵀJ through the last layer's WᵀW, which all rows share."""
        *inner, last = self._matrices()
        if not inner:
            return (last.mT @ last).expand(len(z), -1, -1)
        slopes = self._trunk(z)[1]
        tangent = inner[0] * slopes[0][:, :, None]
        for w, slope in zip(inner[1:], slopes[1:], strict=True):
            tangent = (w @ tangent) * slope[:, :, None]
        return tangent.mT @ ((last.mT @ last) @ tangent)

    def push(self, z: Tensor, v: Tensor) -> Tensor:
        """Jv, layer by layer."""
        *inner, last = self._matrices()
        for w, slope in zip(inner, self._trunk(z)[1], strict=True):
            v = (v @ w.mT) * slope[:, None]
        return v @ last.mT

    def energy(self, z: Tensor, v: Tensor) -> Tensor:
        """‖Jv‖² through the last layer's WᵀW."""
        *inner, last = self._matrices()
        for w, slope in zip(inner, self._trunk(z)[1], strict=True):
            v = (v @ w.mT) * slope[:, None]
        return ((v @ (last.mT @ last)) * v).sum(-1)

    def normal_product(self, z: Tensor) -> Product:
        """V ↦ JᵀJV through the last layer's WᵀW."""
        *inner, last = self._matrices()
        slopes, middle = self._trunk(z)[1], last.mT @ last

        def product(v: Tensor) -> Tensor:
            for w, slope in zip(inner, slopes, strict=True):
                v = (v @ w.mT) * slope[:, None]
            v = v @ middle
            for w, slope in zip(reversed(inner), reversed(slopes), strict=True):
                v = (v * slope[:, None]) @ w
            return v

        return product

    @torch.no_grad()
    def center(self, weights: Tensor, std: float, draws: int = 64) -> None:
        """Set the last layer's bias, and scale its matrix."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        z = torch.randn(draws, self.noise_dim, dtype=weights.dtype, device=weights.device)
        spread = self(z).std(0).square().mean().sqrt()
        last.weight.mul_(std / spread)
        last.bias.copy_(weights)


class MatrixLinear(nn.Module):
    """Matrix-multiplication layer, Y = (W_l X + B_l) W_r + B_r.

    Parameters
    ----------
    shape_in, shape_out : tuple of two int
        Shapes a × b of X and c × e of Y.

    Notes
    -----
    W_l and W_r start uniform with variance 1/fan-in, so that the layer keeps the size of X and its
    singular values do not spread over orders of magnitude; biases within 1/√fan-in.
    """

    def __init__(self, shape_in: tuple[int, int], shape_out: tuple[int, int]) -> None:
        super().__init__()
        (a, b), (c, e) = shape_in, shape_out
        self.left: nn.Parameter = _uniform((c, a), (3 / a) ** 0.5)
        self.left_bias: nn.Parameter = _uniform((c, b), a**-0.5)
        self.right: nn.Parameter = _uniform((b, e), (3 / b) ** 0.5)
        self.right_bias: nn.Parameter = _uniform((c, e), b**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, a, b) to (S, c, e)."""
        n, _, b = x.shape
        inner = torch.matmul(self.left, x) + self.left_bias
        out = (inner.reshape(-1, b) @ self.right).view(n, -1, self.right.shape[1])
        return out + self.right_bias

    def push(self, tangent: Tensor) -> Tensor:
        """Map tangents (…, a, b) to W_l T W_r, (…, c, e)."""
        return self.left @ tangent @ self.right

    def pull(self, cotangent: Tensor) -> Tensor:
        """Map cotangents (…, c, e) to W_lᵀ C W_rᵀ, (…, a, b)."""
        return self.left.mT @ cotangent @ self.right.mT


class MatrixGenerator(Generator):
    """Matrix-multiplication network (MMNN): a shared trunk and one matrix of weights per head.

    z, as a matrix, runs through layers of ``MatrixLinear`` and ELU; every head maps the last
    of them to the weights of one block. All heads see the same noise, so that weights are
    correlated across layers.

    Parameters
    ----------
    noise_shape : tuple of two int
        Shape a × b of the noise, d = ab.
    hidden : sequence of tuples of two int
        Shapes of the trunk's layers, at least one.
    heads : sequence of tuples of two int
        Shapes of the weight blocks.
    n_weights : int, optional
        Weights to keep, where the last head makes less than a row too many.

    Examples
    --------
    >>> import torch
    >>> MatrixGenerator((4, 4), [(8, 8)], [(16, 5), (3, 17)])(torch.randn(3, 16)).shape
    torch.Size([3, 131])
    """

    def __init__(
        self,
        noise_shape: tuple[int, int],
        hidden: Sequence[tuple[int, int]],
        heads: Sequence[tuple[int, int]],
        n_weights: int | None = None,
    ) -> None:
        total = sum(c * e for c, e in heads)
        n_weights = total if n_weights is None else n_weights
        if not hidden or not heads:
            raise ParameterError("MatrixGenerator: hidden and heads need one shape each at least.")
        if not 0 <= total - n_weights < heads[-1][1]:
            raise ParameterError(
                f"MatrixGenerator: the heads make {total} weights for n_weights={n_weights}; they "
                "must make as many, or less than one row of the last head more."
            )
        super().__init__(math.prod(noise_shape), n_weights)
        self.noise_shape = noise_shape
        self.surplus: int = total - n_weights
        self.trunk: nn.ModuleList = nn.ModuleList(
            MatrixLinear(a, b) for a, b in pairwise([noise_shape, *hidden])
        )
        self.heads: nn.ModuleList = nn.ModuleList(
            MatrixLinear(hidden[-1], shape) for shape in heads
        )

    @classmethod
    def for_layout(
        cls, layout: WeightLayout, noise_dim: int = 64, width: int | None = None, depth: int = 2
    ) -> MatrixGenerator:
        """Size a generator to a network: one head per block.

        Parameters
        ----------
        layout : WeightLayout
            Of the network.
        noise_dim : int, default=64
            Length d of the noise; made as square a matrix as its factors allow.
        width : int, optional
            Side of the trunk's square layers; by default 2 m^(1/3), within 16 and 512.
        depth : int, default=2
            Layers of the trunk.
        """
        side = max(k for k in range(1, math.isqrt(noise_dim) + 1) if noise_dim % k == 0)
        if width is None:
            width = min(512, max(16, round(2 * layout.n_weights ** (1 / 3))))
        shapes = [block.shape for block in layout.blocks]
        return cls((side, noise_dim // side), [(width, width)] * depth, shapes)

    def _run(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Output of the trunk (S, c, e), and slopes of its activations."""
        x, slopes = z.unflatten(-1, self.noise_shape), []
        for layer in self.trunk:
            x = layer(x)
            slopes.append(_elu_slope(x))
            x = F.elu(x)
        return x, slopes

    def forward(self, z: Tensor) -> Tensor:
        """Weights (S, m): the heads' matrices, row-major, one after another."""
        x, _ = self._run(z)
        flat = torch.cat([head(x).flatten(1) for head in self.heads], 1)
        return flat[:, : self.n_weights]

    def _squares(self) -> list[tuple[Tensor, Tensor]]:
        """A = W_lᵀW_l and B = W_rW_rᵀ of each head."""
        return [(h.left.mT @ h.left, h.right @ h.right.mT) for h in self._heads()]

    def _cut(self) -> tuple[Tensor, Tensor]:
        """Return what the surplus adds: the last row of W_l, and B of its columns."""
        head = self._heads()[-1]
        columns = head.right[:, head.right.shape[1] - self.surplus :]
        return head.left[-1], columns @ columns.mT

    def gram(self, z: Tensor) -> Tensor:
        """JᵀJ, with tangents no larger than the trunk.

        The tangent of noise (i, j) behind the first layer is a product of a column and a row,
        D ∘ (u_i w_jᵀ), so that the second layer needs d products of vectors with matrices, in two
        large matrix products, rather than d products of matrices.
        """
        _, slopes = self._run(z)
        n, (rows, columns) = len(z), self.noise_shape
        first, *rest = (layer for layer in self._layers())
        u, w = first.left, first.right  # (k, i), (j, l)
        if rest:
            second = rest.pop(0)
            left = torch.einsum("ck,ki->ick", second.left, u).flatten(0, 1)
            right = torch.einsum("jl,le->lje", w, second.right).flatten(1)
            t = ((left @ slopes[0]).flatten(0, 1) @ right).view(
                n, rows, second.left.shape[0], columns, second.right.shape[1]
            )
            t = t * slopes[1][:, None, :, None]
            slopes = slopes[2:]
        else:
            t = torch.einsum("ki,jl,skl->sikjl", u, w, slopes[0])
            slopes = slopes[1:]
        for layer, slope in zip(rest, slopes, strict=True):
            t = (layer.left @ t.flatten(3)).unflatten(-1, t.shape[3:]) @ layer.right
            t = t * slope[:, None, :, None]
        # Tangents (S, i, c, j, e): noise (i, j), trunk (c, e).
        image = reduce(
            add, ((a @ t.flatten(3)).unflatten(-1, t.shape[3:]) @ b for a, b in self._squares())
        )
        if self.surplus:
            row, b = self._cut()
            cut = torch.einsum("c,sicje->sije", row, t) @ b
            image = image - row[:, None, None] * cut[:, :, None]
        t, image = (x.transpose(2, 3).reshape(n, self.noise_dim, -1) for x in (t, image))
        return t @ image.mT

    def _push_trunk(self, v: Tensor, slopes: list[Tensor]) -> Tensor:
        t = v.unflatten(-1, self.noise_shape)
        for layer, slope in zip(self._layers(), slopes, strict=True):
            t = layer.push(t) * slope[:, None]
        return t

    def push(self, z: Tensor, v: Tensor) -> Tensor:
        """Jv, layer by layer."""
        t = self._push_trunk(v, self._run(z)[1])
        flat = torch.cat([head.push(t).flatten(2) for head in self._heads()], 2)
        return flat[..., : self.n_weights]

    def _head_product(self) -> Product:
        """Return T ↦ Σ_heads A T B for tangents (S, k, c, e) of the trunk."""
        squares = self._squares()
        cut = self._cut() if self.surplus else None

        def product(t: Tensor) -> Tensor:
            image = reduce(add, (a @ t @ b for a, b in squares))
            if cut is not None:
                row, b = cut
                image = image - row[:, None] * ((row @ t) @ b)[..., None, :]
            return image

        return product

    def energy(self, z: Tensor, v: Tensor) -> Tensor:
        """‖Jv‖² through A and B of the heads."""
        t = self._push_trunk(v, self._run(z)[1])
        return (self._head_product()(t) * t).sum((-2, -1))

    def normal_product(self, z: Tensor) -> Product:
        """V ↦ JᵀJV through A and B of the heads."""
        slopes, heads = self._run(z)[1], self._head_product()

        def product(v: Tensor) -> Tensor:
            image = heads(self._push_trunk(v, slopes))
            for layer, slope in zip(reversed(self._layers()), reversed(slopes), strict=True):
                image = layer.pull(image * slope[:, None])
            return image.flatten(-2)

        return product

    @torch.no_grad()
    def center(self, weights: Tensor, std: float, draws: int = 64) -> None:
        """Set the heads' B_r, and scale their W_l."""
        z = torch.randn(draws, self.noise_dim, dtype=weights.dtype, device=weights.device)
        x, _ = self._run(z)
        padded = F.pad(weights, (0, self.surplus))
        sizes = [head.right_bias.numel() for head in self._heads()]
        for head, part in zip(self._heads(), padded.split(sizes), strict=True):
            head.left_bias.zero_()
            spread = head(x).std(0).square().mean().sqrt()
            head.left.mul_(std / spread)
            # The trunk's mean is not zero; nor is then what it adds to the mean.
            head.right_bias.copy_(part.view_as(head.right_bias))
            head.left_bias.copy_(-(head.left @ x).mean(0))

    def _layers(self) -> list[MatrixLinear]:
        return [layer for layer in self.trunk if isinstance(layer, MatrixLinear)]

    def _heads(self) -> list[MatrixLinear]:
        return [head for head in self.heads if isinstance(head, MatrixLinear)]


def _uniform(shape: tuple[int, int], bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _elu_slope(x: Tensor) -> Tensor:
    """Derivative of ELU: 1 above 0, exp(x) below; continuous, and with gradients of its own."""
    return x.clamp(max=0).exp()
