"""Runs of the sampler of masked Bayesian networks: warm-up, thinning, and as a Pyro kernel."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from uq.inference.checkpoints import Stage, put_back, take
from uq.inference.masked_bnn import (
    MaskedBNN,
    MaskedMoves,
    MaskedState,
    Moved,
    first_step_size,
    log_density,
    transition,
)
from uq.inference.masked_bnn_moves import StepSize
from uq.inference.training import _ONE_THREAD_FLOPS, _own_threads, obey, stops, warn_interrupted
from uq.nn.masked_bnn import MaskedMLP

# Gradients from which the scale of a weight is taken.
_SEEN = 10


class SamplerWarning(UserWarning):
    """A Markov chain cannot be trusted; the message says what to change."""


@dataclass(frozen=True)
class MaskedRun:
    """What a sampler drew after warm-up; axes are (chains, draws, …)."""

    parameters: dict[str, Tensor]
    """Weights of the compacted networks by name, padded by zeros to the widest draw."""
    masks: Tensor
    variance: Tensor | None
    sample_stats: dict[str, np.ndarray]
    """"lp", "log_likelihood", "acceptance_rate", "mask_acceptance_rate", "diverging", "step_size",
    "n_steps": means or counts over the transitions between two draws, or values at the draw."""
    widths: np.ndarray
    """Active nodes of each masked layer, (chains, draws, L)."""
    trace: dict[str, np.ndarray]
    """Of every transition, warm-up included."""
    interrupted: bool


@dataclass
class _Kept:
    """Draws and statistics while a run goes on."""

    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    joint: list[Tensor] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    widths: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def keep(self, model: MaskedBNN, state: MaskedState, log_likelihood: Tensor) -> None:
        self.parameters.append(model.network.compacted(state.weights, state.masks))
        self.masks.append(state.masks)
        if state.variance is not None:
            self.variances.append(state.variance)
        self.joint.append(model.log_joint(state, log_likelihood))

    def state(self) -> dict[str, Any]:
        """All of it as plain data of few tensors, with the draws on axis 1."""
        lists = {k: v for k, v in vars(self).items() if v and k not in ("parameters", "moved")}
        state: dict[str, Any] = {k: torch.stack(v, 1) for k, v in lists.items()}
        state["parameters"] = _stacked(self.parameters) if self.parameters else {}
        moved = [vars(m) for m in self.moved]
        state["moved"] = {k: torch.stack([m[k] for m in moved], 1) for k in moved[0]}
        return state

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> _Kept:
        """What gave this state."""

        def split(table: Any) -> list[Any]:
            if isinstance(table, Tensor):
                return list(table.to(device).unbind(1))
            columns = zip(*map(split, table.values()), strict=True)
            return [dict(zip(table, column, strict=True)) for column in columns]

        lists = {k: split(table) for k, table in state.items()}
        lists["moved"] = [Moved(**m) for m in lists["moved"]]
        return cls(**lists)

    def run(self, first: int, thin: int, n_leapfrog: int, interrupted: bool) -> MaskedRun:
        def table(parts: list[Tensor]) -> np.ndarray:
            return torch.stack(parts, 1).cpu().numpy()

        trace = {
            "acceptance_rate": table([m.acceptance for m in self.moved]),
            "mask_acceptance_rate": table([m.mask_acceptance for m in self.moved]),
            "diverging": table([m.diverged for m in self.moved]),
            "log_likelihood": table([m.log_likelihood for m in self.moved]),
            "step_size": table(self.steps),
            "width": table(self.widths),
        }
        n = len(self.joint)

        def by_draw(name: str) -> np.ndarray:
            values = trace[name][:, first : first + n * thin]
            return values.reshape(len(values), n, -1)

        shape = (len(self.joint[0]), n)
        stats = {
            "lp": table(self.joint),
            "log_likelihood": by_draw("log_likelihood")[:, :, -1],
            "acceptance_rate": by_draw("acceptance_rate").mean(-1),
            "mask_acceptance_rate": by_draw("mask_acceptance_rate").mean(-1),
            "diverging": by_draw("diverging").any(-1),
            "step_size": by_draw("step_size")[:, :, -1],
            "n_steps": np.full(shape, by_draw("step_size").shape[-1] * n_leapfrog),
        }
        widths = trace["width"][:, first + thin - 1 : first + n * thin : thin]
        variance = torch.stack(self.variances, 1) if self.variances else None
        parameters = _stacked(self.parameters)
        return MaskedRun(
            parameters, torch.stack(self.masks, 1), variance, stats, widths, trace, interrupted
        )


def _stacked(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Draws (C, …) of several widths as one tensor (C, draws, …), padded by zeros."""
    stacked = {}
    for name in draws[0]:
        parts = [draw[name] for draw in draws]
        shape = [max(sides) for sides in zip(*(p.shape for p in parts), strict=True)]
        out = parts[0].new_zeros(shape[0], len(parts), *shape[1:])
        for i, part in enumerate(parts):
            out[:, i][tuple(slice(side) for side in part.shape)] = part
        stacked[name] = out
    return stacked


class Scales:
    """Scale of each weight, from the curvature that its gradient tells: E g² = −E ∂²log p.

    Steps in these scales are what makes weights of stiff and of slack directions move alike.
    """

    def __init__(self, weights: Tensor) -> None:
        self.squares: Tensor = torch.zeros_like(weights, dtype=torch.float64)
        self.count: Tensor = torch.zeros_like(self.squares)
        self.dtype: torch.dtype = weights.dtype

    def update(self, model: MaskedBNN, state: MaskedState) -> None:
        """Add the gradient at a state, where weights are active."""
        part = model.network.restrict(state.masks)
        density = log_density(model, part, model.pull(state.variance))
        gradient = density(part.weights(state.weights))[1]
        none = torch.zeros_like(state.weights)
        self.squares += part.restore(none, gradient.square())
        self.count += part.restore(none, part.active)

    def learned(self) -> Tensor | None:
        """Scales (C, D); that of the chain's median for weights that were seldom active."""
        known = self.count >= _SEEN
        if not bool(known.any(1).all()):
            return None
        scale = (self.squares / self.count.clamp_min(1)).clamp_min(1e-12).rsqrt()
        usual = scale.masked_fill(~known, float("nan")).nanmedian(1, keepdim=True).values
        return (torch.where(known, scale, usual) / usual).clamp(0.02, 3).to(self.dtype)


def _is_small(model: MaskedBNN, state: MaskedState) -> bool:
    """Whether a gradient is too small for two threads to share."""
    flops = 6 * len(model.x) * state.weights.numel()
    dense = isinstance(model.network, MaskedMLP)  # convolutions use a weight many times
    return dense and state.weights.device.type == "cpu" and flops < _ONE_THREAD_FLOPS


def sample_masked(
    model: MaskedBNN,
    state: MaskedState,
    *,
    moves: MaskedMoves | None = None,
    n_warmup: int = 500,
    n_draws: int = 100,
    thin: int = 5,
    target_accept: float = 0.8,
    generator: torch.Generator,
    checkpoint: Stage | None = None,
    verbose: int = 0,
    description: str = "MaskedBNN",
) -> MaskedRun:
    """Run the chains of ``state`` as one batch.

    Parameters
    ----------
    model : MaskedBNN
        The posterior.
    state : MaskedState
        Where the chains start.
    moves : MaskedMoves, optional
        Settings of a transition.
    n_warmup : int, default=500
        Transitions that adapt the sampler, thrown away. Halfway, where the widths have settled,
        each weight gets a scale from its gradients, and the step size is adapted anew.
    n_draws : int, default=100
        Draws of each chain.
    thin : int, default=5
        Transitions for each draw.
    target_accept : float, default=0.8
        Acceptance probability of a trajectory that the step size is adapted to.
    generator : torch.Generator
        Source of everything random, on the device of the model.
    checkpoint : Stage, optional
        Where to write the chains now and then, and to go on from, to the same bits.
    verbose : int, default=0
        1 shows a progress bar.
    description : str
        Name on the progress bar and in messages.

    Returns
    -------
    MaskedRun
        After an interrupt, the draws so far, or where warm-up had not ended, the current states.

    Raises
    ------
    NonFiniteLossError
        If the log density is not finite where a chain starts.
    """
    from tqdm.auto import tqdm

    moves = moves or MaskedMoves()
    saved, _ = (None, False) if checkpoint is None else checkpoint.load()
    device = state.weights.device
    step = first_step_size(model, state, generator) if saved is None else saved["step"].to(device)
    adapt = StepSize(step, target_accept)
    scales, scale = Scales(state.weights), None
    kept = _Kept()
    running = {"adapt": adapt, "scales": scales, "generator": generator}
    if saved is not None:
        weights, masks, variance = saved["at"]
        state = MaskedState(
            weights.to(device), masks.to(device), None if variance is None else variance.to(device)
        )
        scale = None if saved["scale"] is None else saved["scale"].to(device)
        kept = _Kept.of(saved["kept"], device)
        put_back(running, saved["running"])

    def now() -> dict[str, Any]:
        own = {"step": step, "scale": scale, "at": [*vars(state).values()], "kept": kept.state()}
        return own | {"running": take(running)}

    total, interrupted = n_warmup + n_draws * thin, False
    progress = tqdm(
        total=total,
        initial=len(kept.moved),
        desc=description,
        unit="transition",
        disable=verbose < 1,
    )
    try:
        with _own_threads() as use_threads, stops(checkpoint) as stop:
            if _is_small(model, state):
                use_threads(1)
            for i in range(len(kept.moved), total):
                if i == n_warmup // 2 and i:
                    scale = scales.learned()
                    step = first_step_size(model, state, generator, scale)
                    adapt.restart(step)
                if i == n_warmup:
                    step = adapt.final()
                state, moved = transition(model, state, step, moves, generator, scale)
                if n_warmup // 4 <= i < n_warmup // 2:
                    scales.update(model, state)
                kept.moved.append(moved)
                kept.steps.append(step)
                kept.widths.append(model.width_prior.widths(state.masks))
                if i < n_warmup:
                    step = adapt.update(moved.acceptance)
                elif (i + 1 - n_warmup) % thin == 0:
                    kept.keep(model, state, moved.log_likelihood)
                progress.update()
                if checkpoint is not None and (stop.asked or checkpoint.due(i + 1)):
                    checkpoint.save(i + 1, now())
                obey(stop, description)
        if checkpoint is not None:
            checkpoint.finish(now())
    except KeyboardInterrupt:
        interrupted = True
        done = min(len(kept.moved), len(kept.steps), len(kept.widths))
        if not done:
            raise
        for part in (kept.moved, kept.steps, kept.widths):
            del part[done:]
        n = min(len(kept.joint), len(kept.masks), len(kept.parameters))
        warn_interrupted(
            f"{description}, after {done} of {total} transitions",
            f"the {n} draws of each chain so far are kept"
            if n
            else "no draw was due yet, so the states that the chains had reached are kept",
        )
        if not n:
            kept = replace(kept, parameters=[], masks=[], variances=[], joint=[])
            kept.keep(model, state, kept.moved[-1].log_likelihood)
            return kept.run(done - 1, 1, moves.n_leapfrog, True)
        for values in (kept.parameters, kept.masks, kept.variances, kept.joint):
            del values[n:]
    finally:
        progress.close()
    return kept.run(n_warmup, thin, moves.n_leapfrog, interrupted)


class MaskedBNNKernel(MCMCKernel):
    """The sampler as a kernel of :class:`pyro.infer.MCMC`.

    Its sites "weights" (C, D), "masks" (C, M) and, in regression, "variance" (C, K) hold all chains
    of ``state``: leave ``num_chains`` of Pyro at 1.

    Parameters
    ----------
    model : MaskedBNN
        The posterior.
    state : MaskedState
        Where the chains start.
    moves : MaskedMoves, optional
        Settings of a transition.
    target_accept : float, default=0.8
        Acceptance probability that warm-up adapts the step size to.
    generator : torch.Generator
        Source of everything random.

    Examples
    --------
    >>> import torch
    >>> from pyro.infer import MCMC
    >>> from uq.inference import MaskedBNN, MaskedBNNKernel, WidthPrior
    >>> from uq.nn.masked_bnn import MaskedMLP
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.linspace(-1, 1, 20)[:, None]
    >>> model = MaskedBNN(MaskedMLP((1, 8, 1)), x, x.square(), WidthPrior([8], [0.1], [1]))
    >>> kernel = MaskedBNNKernel(model, model.draw_state(4, g), generator=g)
    >>> mcmc = MCMC(kernel, num_samples=10, warmup_steps=10, disable_progbar=True)
    >>> mcmc.run()
    >>> mcmc.get_samples()["masks"].shape
    torch.Size([10, 4, 8])
    """

    def __init__(
        self,
        model: MaskedBNN,
        state: MaskedState,
        *,
        moves: MaskedMoves | None = None,
        target_accept: float = 0.8,
        generator: torch.Generator,
    ) -> None:
        self.target = model
        self.start: MaskedState = state
        self.moves: MaskedMoves = moves or MaskedMoves()
        self.target_accept = target_accept
        self.generator = generator
        self.model: None = None  # of a Pyro function there is none
        self.transforms: dict[str, Any] = {}

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Find first step sizes."""
        self.n_warmup: int = warmup_steps
        self.t: int = 0
        self.step: Tensor = first_step_size(self.target, self.start, self.generator)
        self.adapt: StepSize = StepSize(self.step, self.target_accept)
        self.scales: Scales = Scales(self.start.weights)
        self.scale: Tensor | None = None
        self.moved: list[Moved] = []

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Sites of the state that the chains start from."""
        state = self.start
        sites = {"weights": state.weights, "masks": state.masks}
        return sites if state.variance is None else sites | {"variance": state.variance}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self.start = MaskedState(params["weights"], params["masks"], params.get("variance"))

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition of all chains."""
        state = MaskedState(params["weights"], params["masks"], params.get("variance"))
        if self.t == self.n_warmup // 2 and self.t:
            self.scale = self.scales.learned()
            self.step = first_step_size(self.target, state, self.generator, self.scale)
            self.adapt.restart(self.step)
        state, moved = transition(
            self.target, state, self.step, self.moves, self.generator, self.scale
        )
        if self.n_warmup // 4 <= self.t < self.n_warmup // 2:
            self.scales.update(self.target, state)
        self.t += 1
        if self.t <= self.n_warmup:
            self.step = self.adapt.update(moved.acceptance)
            if self.t == self.n_warmup:
                self.step = self.adapt.final()
        else:
            self.moved.append(moved)
        new = {"weights": state.weights, "masks": state.masks}
        return new if state.variance is None else new | {"variance": state.variance}

    def logging(self) -> dict[str, str]:
        """Step size and acceptance on the progress bar."""
        rate = f"{float(self.moved[-1].acceptance.mean()):.2f}" if self.moved else "-"
        return {"step size": f"{float(self.step.mean()):.2e}", "acc. prob": rate}

    def diagnostics(self) -> dict[str, Any]:
        """Acceptance rates and divergences of each chain after warm-up."""
        if not self.moved:
            return {}
        return {
            "acceptance rate": torch.stack([m.acceptance for m in self.moved]).mean(0),
            "mask acceptance rate": torch.stack([m.mask_acceptance for m in self.moved]).mean(0),
            "divergences": torch.stack([m.diverged for m in self.moved]).sum(0),
        }
