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
from torch import Tensor, nn
from torch.optim import Optimizer

from uq.errors import ParameterError
from uq.inference.ivon_blocks import FlatGroup
from uq.inference.ivon_checks import (
    Diagnostics,
    IVONStateError,
    check_group,
    check_memory,
    check_ranks,
    diagnose,
    warn_about,
)
from uq.inference.ivon_kernels import make_group
from uq.inference.posterior import NormalPosterior
from uq.nn.network import Network


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
    sync : bool, default=False
        Average over the processes of ``torch.distributed``. Each process takes the gradient of
        its own batch at its own noise, so give each a ``generator`` with a seed of its own and
        keep DDP from averaging gradients (``with model.no_sync():`` around forward and backward):
        the noise of one process times a mean gradient would divide the curvature by their number.
    generator : torch.Generator, optional
        Source of the weight noise, on the parameters' device; torch's global one by default. Its
        state is part of ``state_dict``. On CUDA it gives one seed for each group; the noise is then
        counted (:mod:`uq.kernels.philox`), and drawn again where the step needs it.

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

    Whatever changes gradients (norm clipping) belongs inside the context, after ``backward``.
    ``GradScaler.step`` may unscale them later where a step has one sample (it knows the last one
    alone); a capture with gradients that overflowed, whose ``step`` it left out, is dropped.

    A parameter without gradient counts as having gradient zero: its curvature decays and its
    posterior returns to the prior. Without prior (``weight_decay=0``) it has none: an error.
    A group with ``weight_decay=0`` has a flat prior; its standard deviation is unbounded where the
    loss is flat, and a small decay is safer.

    Batch normalisation does not fit: its running statistics are collected under noisy weights and
    are wrong at the mean. Dropout adds gradient noise, which lifts the curvature.

    Memory beside parameters and gradients is three vectors of the parameters' size, and two more
    while a step has several samples or processes. Storages of parameters are never replaced.

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
        sync: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ParameterError(f"IVON: mc_samples must be an integer >= 1, got {mc_samples!r}.")
        self.mc_samples = mc_samples
        self.sync = sync
        self.generator = generator
        self._flat: list[FlatGroup] = []
        # Gradients of the last sample, with their version at capture; not yet in the sums.
        self._pending: list[list[Tensor]] | None = None
        self._versions: list[int] = []
        self._warned = self._ranks_checked = False
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
        """Add a group, with state of its own; frozen parameters are left out."""
        given = param_group["params"]
        listed = [given] if isinstance(given, Tensor) else list(given)
        super().add_param_group(
            {**param_group, "params": [p for p in listed if _parameter(p).requires_grad]}
        )
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_memory([p for g in self.param_groups for p in g["params"]])
        except ParameterError:
            self.param_groups.pop()
            raise
        flat = make_group(group["params"], group["hess_init"], len(self._flat))
        self._flat.append(flat)
        self._publish(group, flat)

    def _publish(self, group: dict[str, Any], flat: FlatGroup) -> None:
        """Show the flat vectors as per-parameter state."""
        for p, h, g in zip(group["params"], flat.hess_views, flat.momentum_views, strict=True):
            self.state[p] = {"hess": h, "momentum": g}

    def _groups(self) -> Iterator[tuple[dict[str, Any], FlatGroup]]:
        return zip(self.param_groups, self._flat, strict=True)

    # -- sampling ----------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Hold a sample from the posterior in the parameters; the mean is restored on exit.

        Parameters
        ----------
        train : bool, default=False
            Take the gradients that are there on exit as one Monte-Carlo sample for ``step``.
            An exception inside restores the mean and takes nothing.

        Raises
        ------
        IVONStateError
            If it is entered twice, or captured gradients were changed since.
        """
        grads = None
        self._open()
        try:
            self._perturb()
            yield
            if train:
                grads = self._gradients()
        finally:
            self._restore()
        if grads is not None:
            self._capture(grads)

    @torch.no_grad()
    def _open(self) -> None:
        """Make room for a sample: add the one before to the sums."""
        if self._holds_sample:
            raise IVONStateError("IVON: sampled_params is already entered; it cannot be nested.")
        if self._pending is not None:
            self._check_versions(self._pending)
            # Where gradients overflowed, a GradScaler left the step out: so do we the capture.
            if all(bool(g.isfinite().all()) for grads in self._pending for g in grads):
                self._accumulate(self._pending)
            self._pending = None

    @property
    def _holds_sample(self) -> bool:
        return any(flat.sampled for flat in self._flat)

    @torch.no_grad()
    def _perturb(self) -> None:
        for group, flat in self._groups():
            flat.perturb(group, self.generator)

    @torch.no_grad()
    def _restore(self) -> None:
        try:
            for flat in self._flat:
                flat.restore()
        except BaseException:  # an interrupt: the rest of the mean first
            for flat in self._flat:
                flat.restore()
            raise

    def _gradients(self) -> list[list[Tensor]]:
        """Gradients by group; zeros where there is none."""
        everything = []
        for group, flat in self._groups():
            grads = []
            for p in flat.parameters:
                grad = p.grad
                if grad is None:
                    self._missing(group)
                    grad = torch.zeros_like(p)
                if grad.is_sparse:
                    raise ParameterError("IVON: gradients must be dense; use sparse=False.")
                grads.append(grad.contiguous() if p.is_contiguous() else grad)
            everything.append(grads)
        return everything

    def _missing(self, group: dict[str, Any]) -> None:
        if group["weight_decay"] == 0:
            raise IVONStateError(
                "IVON: a parameter of a group with weight_decay=0 has no gradient: with neither "
                "data nor prior it has no posterior. Freeze it (requires_grad=False), or give the "
                "group a weight_decay."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "IVON: some parameters have no gradient; they count as unused, and their posterior "
                "returns to the prior. Freeze them (requires_grad=False) to leave them out.",
                UserWarning,
                stacklevel=4,
            )

    def _capture(self, grads: list[list[Tensor]]) -> None:
        # Gradients are kept by reference, which saves a copy of them; their version counters tell
        # whether someone wrote to them before they were used.
        self._pending = grads
        self._versions = [g._version for part in grads for g in part]

    def _check_versions(self, pending: list[list[Tensor]]) -> None:
        if [g._version for part in pending for g in part] != self._versions:
            self._drop()
            raise IVONStateError(
                "IVON: gradients were changed after sampled_params took them. Clip inside the "
                "context, after backward, and zero gradients by zero_grad(set_to_none=True); the "
                "captured samples are dropped."
            )

    def _accumulate(self, pending: list[list[Tensor]]) -> None:
        for flat, grads in zip(self._flat, pending, strict=True):
            flat.accumulate(grads)

    def _drop(self) -> None:
        """Forget the captured samples."""
        self._pending = None
        for flat in self._flat:
            flat.clear()

    # -- step ----------------------------------------------------------------------------------

    @torch.no_grad()
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
            Without closure, if no gradients were taken inside ``sampled_params(train=True)``, or
            if they were changed since.
        """
        if self._holds_sample:
            raise IVONStateError("IVON.step: leave the sampled_params context first.")
        loss = None
        try:
            if closure is not None:
                loss = self._run(closure)
            pending = self._pending
            if pending is not None:
                self._check_versions(pending)
                if self.sync and not self._ranks_checked:
                    check_ranks(pending, self._flat)
                    self._ranks_checked = True
                if self.sync or self._flat[0].n_summed:
                    self._accumulate(pending)
                    pending = None
            elif not self._flat[0].n_summed:
                raise IVONStateError(
                    "IVON.step: no gradient was captured; call backward inside "
                    "`with optimizer.sampled_params(train=True):`, or pass a closure."
                )
            for i, (group, flat) in enumerate(self._groups()):
                if self.sync:
                    flat.reduce()
                flat.update(group, None if pending is None else pending[i])
        finally:
            self._restore()  # after an exception; otherwise there is nothing to restore
            self._drop()
        return loss

    def _run(self, closure: Callable[[], Any]) -> Any:
        """Capture the samples of a step."""
        self._drop()
        loss = None
        for left in reversed(range(self.mc_samples)):
            self._open()
            self._perturb()
            with torch.enable_grad():
                loss = closure()
            grads = self._gradients()
            # A single sample stays in place: the update restores the mean on its way.
            if self.mc_samples > 1 or self.sync:
                self._restore()
            if left:
                self._accumulate(grads)
            else:
                self._capture(grads)
        return loss

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Curvature, momentum, settings and step counts, and the state of a ``generator``.

        Samples that were captured and not yet used are not part of it.
        """
        state = super().state_dict()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; training then resumes bit for bit.

        Without a ``generator``, torch's global random state has to be restored beside it.
        """
        super().load_state_dict(state_dict)
        for group, flat in self._groups():
            for i, p in enumerate(group["params"]):
                flat.hess_views[i].copy_(self.state[p]["hess"])
                flat.momentum_views[i].copy_(self.state[p]["momentum"])
            self._publish(group, flat)
        if self.generator is not None and "generator" in state_dict:
            self.generator.set_state(state_dict["generator"])
        self._drop()

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be pickled or deep-copied: the copy would not share the parameters' buffers."""
        raise TypeError("IVON cannot be pickled or copied; save its state_dict() instead.")

    # -- posterior -----------------------------------------------------------------------------

    def posterior_std(self) -> dict[Tensor, Tensor]:
        """Posterior standard deviation of each parameter, σ = 1/√(λ(h + δ))."""
        return {
            p: torch.rsqrt(group["ess"] * (self.state[p]["hess"] + group["weight_decay"]))
            for group in self.param_groups
            for p in group["params"]
        }

    def sample(
        self, module: nn.Module, n: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Draw weights of ``module`` from the posterior, for ``torch.func.functional_call``.

        Parameters
        ----------
        module : Module
            Holds the parameters that are optimized; gives their names. Nothing in it changes.
        n : int, default=1
            Number of draws.
        generator : torch.Generator, optional
            Source of the noise; by default the optimizer's.

        Returns
        -------
        dict of Tensor
            Draws of each optimized parameter of ``module`` by name, stacked on a first axis of n.

        Examples
        --------
        >>> import torch
        >>> from torch.func import functional_call, vmap
        >>> from uq.inference import IVON
        >>> net = torch.nn.Linear(3, 2)
        >>> weights = IVON(net.parameters(), 0.1, ess=100).sample(net, 5)
        >>> vmap(lambda w: functional_call(net, w, (torch.ones(4, 3),)))(weights).shape
        torch.Size([5, 4, 2])
        """
        self._need_mean("sample")
        generator = self.generator if generator is None else generator
        stds = self.posterior_std()
        draws = {}
        for name, p in module.named_parameters():
            if p in stds:
                noise = torch.empty(n, *p.shape, dtype=p.dtype, device=p.device)
                noise.normal_(generator=generator)
                draws[name] = noise.mul_(stds[p]).add_(p.detach())
        return draws

    def posterior(self, network: Network, seed: int = 0) -> NormalPosterior:
        """Posterior over the weights of ``network``, which predicts and can be saved.

        Parameters
        ----------
        network : Network
            Holds the parameters that are optimized: ``Network(module, likelihood)``. It becomes
            part of the posterior, as its mean.
        seed : int, default=0
            Seed of the draws that a prediction uses.
        """
        self._need_mean("posterior")
        stds = self.posterior_std()
        named = {name: stds[p] for name, p in network.named_parameters() if p in stds}
        return NormalPosterior(network, named, seed)

    def _need_mean(self, what: str) -> None:
        if self._holds_sample:
            raise IVONStateError(f"IVON.{what}: the parameters hold a sample; leave the context.")

    @property
    def curvature(self) -> list[Tensor]:
        """Flat curvature h of each group, the live buffer."""
        return [flat.hess for flat in self._flat]

    def diagnostics(self, *, warn: bool = True) -> list[Diagnostics]:
        """Tell for each group what became of its curvature.

        Parameters
        ----------
        warn : bool, default=True
            Warn where it is not to be trusted.

        Warns
        -----
        CurvatureWarning
            If the curvature hardly moved from ``hess_init``, if most of it is gradient noise, or
            if weights without prior have lost theirs.
        """
        found = [diagnose(group, flat) for group, flat in self._groups()]
        if warn:
            for diagnosis, group in zip(found, self.param_groups, strict=True):
                warn_about(diagnosis, group)
        return found


def _parameter(item: Any) -> Tensor:
    """Tensor of an entry of ``params``, which may be a (name, tensor) pair."""
    tensor: Tensor = item[1] if isinstance(item, tuple) else item
    return tensor
