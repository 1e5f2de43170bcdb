"""Evidential Turing process: a Dirichlet network whose prior is read from a memory of the data.

From the outputs v(x) of a network, K numbers for K classes, and a memory M of R cells,

    Z = M + κ ε,  ε ~ N(0, 1)                   (drawn anew in each training step; Z = M after it)
    φ(x) = softmax_r( v(x)ᵀ W z_r / √K )        (attention to cell r)
    a(x) = Σ_r φ_r(x) z_r                       (prior of a row:      π ~ Dir(β),  β = exp a)
    f(x) = W_f [v(x), a(x)] + b_f               (posterior of a row:  π ~ Dir(α),  α = exp f)

and the loss of a row, with S = Σ α_k, is the negative evidence bound under a tempered prior,

    ψ(S) − ψ(α_y) + τ KL(Dir(α) ‖ Dir(β)),      the first part being −E log π_y,

plus KL(q(w) ‖ p(w))/N where weights w are drawn (:class:`VariationalLinear`). For one input with
label frequencies η and a given β its minimum is at α = β + η/τ. After each step, and outside the
gradient, the rows i of a context write to the memory,

    M ← tanh( γ M + (1 − γ) Σ_i φ(x_i)ᵀ (onehot(y_i) + softmax v(x_i)) ),

so that −1 < M < 1 and the concentrations of the prior lie in (1/e, e) up to the noise κ.

M. Kandemir, A. Akgül, M. Haussmann, G. Unal. "Evidential Turing processes." ICLR 2022.
arXiv:2106.01216.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uq.errors import DataError, ParameterError
from uq.nn.evidential import DirichletHead

# Of f: concentrations between 3e-7 and 3e6 keep digamma and S² far inside float32.
_MAX_LOGIT = 15.0
_LOG_VAR, _MAX_LOG_VAR = -9.0, 11.0
# Of the prior on weights, as the authors set it.
_PRECISION = 10.0


def dirichlet_kl(alpha: Tensor, beta: Tensor) -> Tensor:
    """KL(Dir(α) ‖ Dir(β)) of each row, in nats.

    Parameters
    ----------
    alpha, beta : Tensor of shape (…, n_classes)
        Concentrations > 0. They should be float64 where they may be large.

    Returns
    -------
    Tensor of shape (…,)
        In nats.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import dirichlet_kl
    >>> dirichlet_kl(torch.tensor([3.0, 1.0, 1.0]), torch.ones(3))
    tensor(0.6251)
    """
    return _kl(alpha, beta, _expected_log(alpha))


def _expected_log(alpha: Tensor) -> Tensor:
    """E log π_k of Dir(α), the same shape as α."""
    return torch.digamma(alpha) - torch.digamma(alpha.sum(-1, keepdim=True))


def _kl(alpha: Tensor, beta: Tensor, expected_log: Tensor) -> Tensor:
    of_totals = torch.lgamma(alpha.sum(-1)) - torch.lgamma(beta.sum(-1))
    of_classes = torch.lgamma(beta) - torch.lgamma(alpha) + (alpha - beta) * expected_log
    return of_totals + of_classes.sum(-1)


class ETPHead(DirichletHead):
    """What the outputs of a network mean for the label, given a memory of the rows seen.

    Parameters
    ----------
    n_classes : int
        Number of classes K, and of outputs.
    memory_size : int, default=20
        Number of cells R.
    memory_decay : float, default=0.99
        γ, what a cell keeps of itself in a step.
    memory_noise : float, default=0.1
        κ, standard deviation of the noise under which the memory is read in training.
    dirichlet_kl_weight : float, default=1e-3
        τ, weight of the divergence from the prior; the evidence for a class is at most about 1/τ.

    Notes
    -----
    The memory is a buffer: saved with the weights, learned by :meth:`write` and not by gradients.
    The defaults are those of the authors' code. A bias on the keys W z_r, as it has there, would
    add the same to all logits of the attention, and so nothing. It starts from W = 1 and f = v.

    ``prior`` of the predictive distribution is the floor of α, exp(−15), as a prior that differs
    from row to row is no single number: ``vacuity`` is that small multiple of 1/S and orders rows.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import ETPHead
    >>> head = ETPHead(3)
    >>> outputs = torch.randn(5, 3, requires_grad=True)  # of any network
    >>> y = torch.tensor([0, 1, 2, 0, 1])
    >>> head.loss(outputs, y).mean().backward()
    >>> head.write(outputs, y)  # after the loss of a step
    >>> head.predictive(outputs.detach()).concentration.shape
    torch.Size([5, 3])
    """

    memory: Tensor

    def __init__(
        self,
        n_classes: int,
        memory_size: int = 20,
        *,
        memory_decay: float = 0.99,
        memory_noise: float = 0.1,
        dirichlet_kl_weight: float = 1e-3,
    ) -> None:
        if memory_size < 1:
            raise ParameterError(f"memory_size must be >= 1, got {memory_size!r}.")
        if not 0 <= memory_decay < 1:
            raise ParameterError(f"memory_decay must be in [0, 1), got {memory_decay!r}.")
        for name, value in (
            ("memory_noise", memory_noise),
            ("dirichlet_kl_weight", dirichlet_kl_weight),
        ):
            if not 0 <= value < math.inf:
                raise ParameterError(f"{name} must be >= 0 and finite, got {value!r}.")
        super().__init__(n_classes, "edl_ce", evidence="exp", prior=math.exp(-_MAX_LOGIT))
        self.memory_decay = memory_decay
        self.memory_noise = memory_noise
        self.dirichlet_kl_weight = dirichlet_kl_weight
        self.key: nn.Parameter = nn.Parameter(torch.eye(n_classes))
        self.fusion: nn.Parameter = nn.Parameter(torch.eye(n_classes, 2 * n_classes))
        self.fusion_bias: nn.Parameter = nn.Parameter(torch.zeros(n_classes))
        self.register_buffer("memory", (0.01 * torch.randn(memory_size, n_classes)).square())

    def read(self) -> Tensor:
        """Memory Z of shape (R, K): with fresh noise in train mode, as it is in eval mode."""
        if not self.training:
            return self.memory.clone()
        return self.memory + self.memory_noise * torch.randn_like(self.memory)

    def attention(self, outputs: Tensor, cells: Tensor) -> Tensor:
        """Share φ of each cell at each row, shape (n, R)."""
        keys = cells.to(outputs.dtype) @ self.key.to(outputs.dtype).T
        return torch.softmax(outputs @ keys.T / self.n_outputs**0.5, -1)

    def log_concentrations(self, outputs: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Log concentrations f of the posterior and a of the prior, each (n, K)."""
        a = self.attention(outputs, cells) @ cells.to(outputs.dtype)
        weight, bias = self.fusion.to(outputs.dtype), self.fusion_bias.to(outputs.dtype)
        f = F.linear(torch.cat([outputs, a], -1), weight, bias)
        return f.clamp(-_MAX_LOGIT, _MAX_LOGIT), a

    def forward(self, outputs: Tensor) -> Tensor:
        """Concentrations α of each row, without noise on the memory, shape (n, K)."""
        # The rounding of exp(−15) must not fall below the prior.
        return self.log_concentrations(outputs, self.memory)[0].exp().clamp_min(self.prior)

    def loss(self, outputs: Tensor, y: Tensor, dirichlet_kl_weight: float | None = None) -> Tensor:
        """Loss of each row, in nats; ``dirichlet_kl_weight`` is τ, by default the head's.

        In float32 also under autocast; the gamma functions in float64, as they nearly cancel.
        """
        self._check(outputs, y)
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            f, a = self.log_concentrations(outputs, self.read())
            alpha, beta = f.double().exp(), a.double().exp()
            expected_log = _expected_log(alpha)
            rows = -expected_log.gather(1, y[:, None]).squeeze(1)
            weight = (
                self.dirichlet_kl_weight if dirichlet_kl_weight is None else dirichlet_kl_weight
            )
            return (rows + weight * _kl(alpha, beta, expected_log)).to(outputs.dtype)

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive probability of each row, without noise on the memory."""
        with torch.autocast(outputs.device.type, enabled=False):
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            return F.cross_entropy(
                self.log_concentrations(outputs, self.memory)[0], y, reduction="none"
            )

    @torch.no_grad()
    def functions(self, outputs: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Draw class probabilities π ~ Dir(α); see :meth:`uq.nn.DirichletHead.functions`."""
        return super().functions(outputs, n, generator)

    @torch.no_grad()
    def write(self, outputs: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Write the given rows to the memory, which is read with noise of its own for it.

        Parameters
        ----------
        outputs : Tensor of shape (n, n_classes)
            What the network gives at the rows to write.
        y : Tensor of shape (n,)
            Class positions.
        weight : Tensor of shape (n,), optional
            How many times each row is written. The authors write 3 to 49 rows in a step; what is
            written is a sum, so many more would drive the cells to 1.
        """
        self._check(outputs, y)
        with torch.autocast(outputs.device.type, enabled=False):
            v = outputs.to(self.memory.dtype)
            new = F.one_hot(y, self.n_outputs) + torch.softmax(v, -1)
            if weight is not None:
                new = new * weight[:, None].to(new.dtype)
            written = self.attention(v, self.read()).T @ new
            kept = self.memory_decay
            self.memory.copy_(torch.tanh(kept * self.memory + (1 - kept) * written))

    def _check(self, outputs: Tensor, y: Tensor) -> None:
        n_classes = self.n_outputs
        if outputs.ndim != 2 or outputs.shape[1] != n_classes or y.shape != outputs.shape[:1]:
            raise DataError(
                f"ETPHead: outputs needs shape (n, {n_classes}) and y shape (n,), got "
                f"{tuple(outputs.shape)} and {tuple(y.shape)}."
            )
        if y.is_floating_point():
            raise DataError(f"ETPHead: y must hold integer class positions, got {y.dtype}.")
        # On a GPU the check would wait for the values; there the loss itself stops.
        if y.device.type == "cpu" and bool(((y < 0) | (y >= n_classes)).any()):
            wrong = y[(y < 0) | (y >= n_classes)]
            raise DataError(
                f"ETPHead: y must hold positions 0 to {n_classes - 1}, got {int(wrong[0])}."
            )


class VariationalLinear(nn.Linear):
    """Linear layer with independent Normals over its weights, N(W, exp s).

    In train mode each call draws weights W + exp(s/2) ε for all of its rows; in eval mode the layer
    is the linear one at the mean weights.

    Parameters
    ----------
    linear : torch.nn.Linear
        Its weight is taken over as the means W, its bias as b, which stays a number.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import VariationalLinear
    >>> layer = VariationalLinear(torch.nn.Linear(3, 2))
    >>> x = torch.ones(4, 3)
    >>> bool((layer(x) == layer(x)).all()), bool((layer.eval()(x) == layer(x)).all())
    (False, True)
    """

    def __init__(self, linear: nn.Linear) -> None:
        has_bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight = linear.weight
        if has_bias:
            self.bias: nn.Parameter = linear.bias
        # exp(−9) is a standard deviation of 0.01: it starts almost as the layer was.
        self.log_var: nn.Parameter = nn.Parameter(torch.full_like(self.weight, _LOG_VAR))
        self.train(linear.training)

    @property
    def variance(self) -> Tensor:
        """Variance of each weight."""
        return self.log_var.clamp(-_MAX_LOG_VAR, _MAX_LOG_VAR).exp()

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of each row, from weights that are drawn in train mode."""
        if not self.training:
            return super().forward(x)
        noise = self.variance.sqrt() * torch.randn_like(self.weight)
        return F.linear(x, self.weight + noise, self.bias)

    def kl(self, precision: float = _PRECISION) -> Tensor:
        """KL divergence of the weights from N(0, 1/precision), in nats."""
        log_var = self.log_var.clamp(-_MAX_LOG_VAR, _MAX_LOG_VAR)
        spread = precision * (self.weight.square() + log_var.exp())
        return 0.5 * (spread - 1 - math.log(precision) - log_var).sum()


def variational(module: nn.Module) -> nn.Module:
    """Make the trained Linear layers of a network variational, in place.

    Parameters
    ----------
    module : torch.nn.Module
        Any network. Layers of other types, subclasses of Linear, and Linear layers whose weight
        does not require a gradient stay as they are.

    Returns
    -------
    torch.nn.Module
        ``module``; or the new layer, where it is itself a Linear layer.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import variational
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [type(layer).__name__ for layer in variational(net)]
    ['VariationalLinear', 'ReLU', 'VariationalLinear']
    """
    # A subclass may be read by its owner in ways of its own, as attention layers do.
    made = {
        layer: VariationalLinear(layer)
        for layer in module.modules()
        if type(layer) is nn.Linear and layer.weight.requires_grad
    }
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in made:
                setattr(parent, name, made[child])
    return made.get(module, module)  # type: ignore[call-overload]
