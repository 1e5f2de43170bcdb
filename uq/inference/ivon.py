"""IVON: variational learning at the cost of Adam.

Y. Shen et al., "Variational Learning is Effective for Large Deep Networks", ICML 2024,
arXiv 2402.17641. It fits q(θ) = N(m, diag σ²) with prior N(0, I/(λδ)) by natural-gradient steps on

    λ E_q[ℓ̄(θ)] + KL(q ‖ p),    ℓ̄ = mean negative log likelihood,    σ² = 1/(λ(h + δ)),

where λ is the effective sample size (N gives the ELBO), δ the weight decay and h a running estimate
of the diagonal Hessian of ℓ̄, taken from (noise × gradient) at one weight sample per step:

    ĥ = λ(h + δ) ⊙ (θ − m) ⊙ ĝ                                       (Price's theorem)
    h ← h + ρ(ĥ − h) + ½ρ²(ĥ − h)²/(h + δ),   ρ = 1 − β₂             (keeps h + δ > 0)
    m ← m − α (ĝ_ema + δ m)/(h + δ)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from uq.errors import ParameterError, UQError


class IVONStateError(UQError, RuntimeError):
    """The optimizer was used in an order that cannot work."""


class _Group:
    """Flat buffers of one parameter group; per-parameter tensors are views of them.

    One flat vector makes a step about twenty tensor operations whatever the number of layers.
    Parameters keep their own storage: values are copied in and out, never re-pointed.
    """

    def __init__(self, parameters: list[Tensor], init_hess: float) -> None:
        kinds = {(p.dtype, p.device) for p in parameters}
        if any(not p.dtype.is_floating_point or p.dtype.itemsize < 4 for p in parameters):
            raise ParameterError(
                "IVON: parameters must be float32 or float64 (in fewer bits, steps vanish in the "
                "rounding); train in mixed precision by autocast instead."
            )
        if len(kinds) > 1:
            raise ParameterError(
                "IVON: the parameters of one group must share dtype and device, got "
                f"{sorted(map(str, kinds))}; give each kind a group of its own."
            )
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        like = parameters[0]

        def buffer(fill: float = 0.0) -> Tensor:
            return torch.full((sum(sizes),), fill, dtype=like.dtype, device=like.device)

        def views(flat: Tensor) -> list[Tensor]:
            parts = flat.split(sizes)
            return [v.view(p.shape) for v, p in zip(parts, parameters, strict=True)]

        self.mean, self.hess, self.momentum = buffer(), buffer(init_hess), buffer()
        self.noise, self.scratch = buffer(), buffer()
        self.grad, self.price, self.std = buffer(), buffer(), buffer()
        self.mean_views, self.hess_views = views(self.mean), views(self.hess)
        self.momentum_views, self.scratch_views = views(self.momentum), views(self.scratch)
        self.grad_views = views(self.grad)


class IVON(Optimizer):
    """Improved Variational Online Newton, a drop-in ``torch.optim.Optimizer``.

    Parameters
    ----------
    params : iterable of Tensor or of group dicts
        Parameters to learn; those that do not require gradients are left out.
    lr : float
        Learning rate α. With ``rescale_lr`` the first step is that of SGD with the same ``lr``.
    ess : float
        Effective sample size λ: the number N of training rows gives the Bayesian posterior, more
        a colder one. The loss must be the mean, not the sum, of true log likelihoods in nats.
    weight_decay : float, default=1e-4
        δ, the prior precision divided by λ. It is the exact gradient of the prior, inside the
        preconditioner: values for AdamW do not carry over.
    beta1, beta2 : float, default=0.9, 0.99999
        Momentum of gradient and curvature. The memory of h is 1/(1 − beta2) steps: a run much
        shorter than that leaves the posterior at ``hess_init``; 1 − 2/steps is a good value.
    hess_init : float, default=1.0
        Initial curvature h₀. The initial posterior standard deviation is 1/√(λ(h₀ + δ)).
    mc_samples : int, default=1
        Weight samples per step when a closure is given.
    clip_radius : float, default=inf
        Elementwise bound ξ on the preconditioned update; 1e-3 is used for transformers.
    rescale_lr : bool, default=True
        Multiply ``lr`` by h₀ + δ.
    debias : bool, default=True
        Bias-correct the gradient momentum, as Adam does.
    generator : torch.Generator, optional
        Source of the weight noise, on the parameters' device; torch's global one by default.

    Raises
    ------
    ParameterError
        For a value out of its range.

    Notes
    -----
    With a closure, ``step`` samples weights itself. Without one, gradients are taken inside the
    context :meth:`sampled_params`; several entries before one ``step`` are averaged as so many
    samples. Several ``backward`` calls within one entry add up their gradients (accumulation under
    one noise), so divide the loss by their number.

    A parameter without gradient counts as having gradient zero: its curvature decays and its
    posterior returns to the prior.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import IVON
    >>> w = torch.nn.Parameter(torch.zeros(3))
    >>> opt = IVON([w], lr=0.1, ess=100)
    >>> for _ in range(200):
    ...     with opt.sampled_params(train=True):
    ...         opt.zero_grad()
    ...         loss = 0.5 * (w - 1).square().sum()
    ...         loss.backward()
    ...     opt.step()
    >>> bool((w.detach() - 1).abs().max() < 0.2)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        ess: float,
        weight_decay: float = 1e-4,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        hess_init: float = 1.0,
        mc_samples: int = 1,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        debias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if mc_samples < 1:
            raise ParameterError(f"IVON: mc_samples must be >= 1, got {mc_samples!r}.")
        self.mc_samples = mc_samples
        self.generator = generator
        self._flat: list[_Group] = []
        self._count = 0
        self._sampled = False
        self._warned = False
        defaults = {
            "lr": lr,
            "ess": ess,
            "weight_decay": weight_decay,
            "beta1": beta1,
            "beta2": beta2,
            "hess_init": hess_init,
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
            "debias": debias,
            "step": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with flat buffers of its own; frozen parameters are left out."""
        given = param_group["params"]
        listed = [given] if isinstance(given, Tensor) else list(given)
        super().add_param_group(
            {**param_group, "params": [p for p in listed if _parameter(p).requires_grad]}
        )
        group = self.param_groups[-1]
        try:
            _check_group(group)
            flat = _Group(group["params"], group["hess_init"])
        except ParameterError:
            self.param_groups.pop()
            raise
        self._flat.append(flat)
        self._publish(group, flat)

    def _publish(self, group: dict[str, Any], flat: _Group) -> None:
        """Show the flat buffers as per-parameter state, and refresh what derives from them."""
        for p, h, g in zip(group["params"], flat.hess_views, flat.momentum_views, strict=True):
            self.state[p] = {"hess": h, "momentum": g}
        _update_std(group, flat)

    # -- sampling ----------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Hold a sample from the posterior in the parameters; the mean is restored on exit.

        Parameters
        ----------
        train : bool, default=False
            Take the gradients that are there on exit as one Monte-Carlo sample for ``step``.
            An exception inside restores the mean and takes nothing.
        """
        self._perturb()
        try:
            yield
            if train:
                self._capture()
        finally:
            self._restore()

    @torch.no_grad()
    def _perturb(self) -> None:
        if self._sampled:
            raise IVONStateError("IVON: sampled_params is already entered; it cannot be nested.")
        for flat in self._flat:
            torch._foreach_copy_(flat.mean_views, flat.parameters)
            flat.noise.normal_(generator=self.generator).mul_(flat.std)
            torch.add(flat.mean, flat.noise, out=flat.scratch)
            torch._foreach_copy_(flat.parameters, flat.scratch_views)
        self._sampled = True

    @torch.no_grad()
    def _restore(self) -> None:
        for flat in self._flat:
            torch._foreach_copy_(flat.parameters, flat.mean_views)
        self._sampled = False

    @torch.no_grad()
    def _capture(self) -> None:
        for flat in self._flat:
            grads = [p.grad for p in flat.parameters if p.grad is not None]
            if len(grads) < len(flat.parameters):
                self._warn_missing()
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in flat.parameters]
            if self._count == 0:
                torch._foreach_copy_(flat.grad_views, grads)
                torch.mul(flat.noise, flat.grad, out=flat.price)
            else:
                torch._foreach_copy_(flat.scratch_views, grads)
                flat.grad.add_(flat.scratch)
                flat.price.addcmul_(flat.noise, flat.scratch)
        self._count += 1

    def _warn_missing(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "IVON: some parameters have no gradient; they count as unused, and their posterior "
                "returns to the prior. Freeze them (requires_grad=False) to leave them out.",
                UserWarning,
                stacklevel=4,
            )

    # -- step ----------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update mean and curvature.

        Parameters
        ----------
        closure : callable, optional
            Zeroes gradients, computes the mean loss, calls backward and returns the loss. It is
            called ``mc_samples`` times, each at a fresh weight sample.

        Returns
        -------
        The loss of the last sample, or None without closure.

        Raises
        ------
        IVONStateError
            Without closure, if no gradients were taken inside ``sampled_params(train=True)``.
        """
        loss = None
        if closure is not None:
            self._count = 0
            for _ in range(self.mc_samples):
                with self.sampled_params(train=True), torch.enable_grad():
                    loss = closure()
        if self._count == 0:
            raise IVONStateError(
                "IVON.step: no gradient was captured; call backward inside "
                "`with optimizer.sampled_params(train=True):`, or pass a closure."
            )
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            _update(group, flat, self._count)
        self._count = 0
        return loss

    # -- state ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load curvature, momentum and step counts; training then resumes bit for bit."""
        super().load_state_dict(state_dict)
        for group, flat in zip(self.param_groups, self._flat, strict=True):
            for i, p in enumerate(group["params"]):
                flat.hess_views[i].copy_(self.state[p]["hess"])
                flat.momentum_views[i].copy_(self.state[p]["momentum"])
            self._publish(group, flat)
        self._count = 0

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or deep-copied: the copy would not share the parameters' buffers."""
        raise TypeError("IVON cannot be pickled or copied; save its state_dict() instead.")

    def posterior_std(self) -> dict[Tensor, Tensor]:
        """Posterior standard deviation of each parameter, σ = 1/√(λ(h + δ))."""
        return {
            p: torch.rsqrt(group["ess"] * (self.state[p]["hess"] + group["weight_decay"]))
            for group in self.param_groups
            for p in group["params"]
        }

    @property
    def curvature(self) -> list[Tensor]:
        """Flat curvature h of each group, the live buffer."""
        return [flat.hess for flat in self._flat]


def _parameter(item: Any) -> Tensor:
    """Tensor of an entry of ``params``, which may be a (name, tensor) pair."""
    tensor: Tensor = item[1] if isinstance(item, tuple) else item
    return tensor


def _check_group(group: dict[str, Any]) -> None:
    def need(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ParameterError(f"IVON: {name} must be {expected}, got {group[name]!r}.")

    if not group["params"]:
        raise ParameterError("IVON: a group has no parameter that requires gradients.")
    need("lr", group["lr"] >= 0, ">= 0")
    need("ess", group["ess"] > 0, "> 0")
    need("weight_decay", group["weight_decay"] >= 0, ">= 0")
    need("beta1", 0 <= group["beta1"] < 1, "in [0, 1)")
    need("beta2", 0 <= group["beta2"] <= 1, "in [0, 1]")
    need("clip_radius", group["clip_radius"] > 0, "> 0")
    positive = group["hess_init"] + group["weight_decay"] > 0
    need("hess_init", positive and group["hess_init"] >= 0, ">= 0, and > 0 without weight_decay")


def _update_std(group: dict[str, Any], flat: _Group) -> None:
    with torch.no_grad():
        torch.add(flat.hess, group["weight_decay"], out=flat.std)
        flat.std.mul_(group["ess"]).rsqrt_()


@torch.no_grad()
def _update(group: dict[str, Any], flat: _Group, count: int) -> None:
    """Steps 5 to 8 of the algorithm, in place over the flat buffers."""
    lam, delta = group["ess"], group["weight_decay"]
    rho = 1 - group["beta2"]
    group["step"] += 1
    flat.momentum.mul_(group["beta1"]).add_(flat.grad, alpha=(1 - group["beta1"]) / count)

    # With a = h + δ and x = ρ(ĥ − h)/a the update is h + a(x + x²/2); x is formed without adding
    # 1 to it, since ρ near 1e-5 would drown in float32 rounding.
    a = torch.add(flat.hess, delta, out=flat.std)
    torch.div(flat.hess, a, out=flat.scratch)
    x = flat.price.mul_(rho * lam / count).sub_(flat.scratch, alpha=rho)
    x.addcmul_(x, x, value=0.5)
    flat.hess.addcmul_(a, x)

    a = torch.add(flat.hess, delta, out=flat.std)
    bias = 1 - group["beta1"] ** group["step"] if group["debias"] else 1.0
    direction = torch.mul(flat.momentum, 1 / bias, out=flat.scratch)
    direction.add_(flat.mean, alpha=delta)
    lr = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
    if math.isinf(group["clip_radius"]):
        flat.mean.addcdiv_(direction, a, value=-lr)
    else:
        radius = group["clip_radius"]
        flat.mean.add_(direction.div_(a).clamp_(-radius, radius), alpha=-lr)
    a.mul_(lam).rsqrt_()  # flat.std now holds σ
    torch._foreach_copy_(flat.parameters, flat.mean_views)
