"""Pre-training of prior-data fitted networks on data sets drawn from a prior.

The loss of a step is −log q(y | x, D), averaged over the query rows of fresh data sets. It equals
the expected Kullback-Leibler divergence between the exact predictive distribution of the prior and
the network's, plus a constant (S. Müller et al., "Transformers Can Do Bayesian Inference", ICLR
2022, Insight 1). Data never repeat, so the training loss is the loss on new data.

All randomness of a step comes from a generator that is seeded by the run's seed and the step's
number: a run that was stopped goes on from its checkpoint to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from uq.distributions.bar import BORDER_RULES, BorderRule, bar_borders
from uq.errors import NonFiniteLossError, ParameterError
from uq.inference.pfn_priors import GPPrior, pfn_prior
from uq.inference.pfn_run import BORDERS, INIT, Contexts, PretrainingState, Run
from uq.inference.training import isolated_rng, make_fabric
from uq.nn.pfn import PFN, PFNConfig, PFNScaling, load_pfn, save_pfn

_SIZES = ("d_model", "n_layers", "n_heads", "d_ff", "context_tokens")
_DEFAULT_SIZES = {"d_model": 64, "n_layers": 6, "n_heads": 4, "context_tokens": 1}


def pretrain_pfn(
    prior: Any,
    *,
    steps: int,
    d_model: int | None = None,
    n_layers: int | None = None,
    n_heads: int | None = None,
    d_ff: int | None = None,
    context_tokens: int | None = None,
    n_buckets: int = 200,
    border_rule: BorderRule | None = None,
    min_context: int = 0,
    max_context: int = 40,
    context_sampling: Literal["uniform", "log_uniform"] = "uniform",
    n_queries: int = 10,
    rows_per_step: int = 3200,
    lr: float = 4e-3,
    warmup: float = 0.1,
    average: float = 0.999,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    init: str | Path | None = None,
    log_entries: int = 40,
    device: str = "auto",
    precision: str = "32-true",
    random_state: int = 0,
    callbacks: Sequence[Callable[[PretrainingState], Any]] = (),
    command: str = "",
    verbose: int = 0,
) -> tuple[PFN, dict[str, Any]]:
    """Train a prior-data fitted network on data sets drawn from ``prior``.

    Parameters
    ----------
    prior : str or callable
        Name for :func:`uq.inference.pfn_priors.pfn_prior`, or ``sample(batch, n, d, generator) ->
        X, y``; see that module.
    steps : int
        Optimiser steps.
    d_model, n_layers, n_heads, d_ff, context_tokens : int, optional
        Sizes of the network, see :class:`uq.nn.PFNConfig`. By default those of ``init``, or 64, 6,
        4, twice the width, and 1: on a CPU many steps of a narrow network beat few of a wide one.
    n_buckets : int, default=200
        Bars, for regression: enough where noise is at least 1/60 of the targets' range.
    border_rule : {"equal_width", "equal_mass", "fine_tails"}, optional
        See :func:`uq.distributions.bar.bar_borders`. By default "fine_tails" where the context
        scales the targets, as contexts of a few rows make them heavy-tailed and equal widths
        coarse, and "equal_width" for priors with ``scaled = False``.
    min_context, max_context : int
        Smallest and largest context, in rows.
    context_sampling : {"uniform", "log_uniform"}, default="uniform"
        Law of the context size, one for all data sets of a step. "uniform": data sets have
        ``max_context + n_queries`` rows and those beyond the context are queries. "log_uniform":
        most contexts are short and some are as long as ``max_context``; ``n_queries`` and a quarter
        of the context are queries. For contexts up to 1,000.
    n_queries : int, default=10
        Fewest queries of a data set.
    rows_per_step : int, default=3200
        Rows of a step, over all of its data sets: the number of data sets follows.
    lr : float, default=4e-3
        Peak learning rate of Adam, for width 64; 1e-3 to 2e-3 for 128, 3e-4 for 256.
    warmup : float, default=0.1
        Share of the steps over which the learning rate rises; it then falls to 0 as a cosine.
    average : float, default=0.999
        Decay of the exponential average of the weights, which is what is saved. 0 saves the last.
    out : str or Path, optional
        File for the finished network; an intermediate one goes there at every checkpoint.
    checkpoint : str or Path, optional
        File for the state of the run. By default ``out`` with the suffix ``.state``; no ``out``, no
        checkpoints.
    checkpoint_seconds : float, default=60
        Time between checkpoints.
    resume : bool, default=False
        Go on from ``checkpoint``, if it exists; the settings must be the same. The result is the
        same to the bit as that of a run which was not stopped, on the same machine.
    init : str or Path, optional
        Finished network whose weights to start from, with a new schedule; its sizes, bars and list
        of runs are kept.
    log_entries : int, default=40
        Evaluations on held-out data sets over the run.
    device : str, default="auto"
        "auto", "cpu", "cuda" or "cuda:1". Priors are drawn there, too.
    precision : {"32-true", "64-true", "bf16-mixed"}, default="32-true"
        bf16-mixed is for CUDA; the loss is in float32 always.
    random_state : int, default=0
        Seed.
    callbacks : sequence of callable
        Called with a :class:`PretrainingState` at each log entry; True ends the run there.
    command : str, optional
        How the run was started, for the model card.
    verbose : int, default=0
        Above 0 prints a line at each log entry.

    Returns
    -------
    model : PFN
        In eval mode on the CPU, in float32.
    meta : dict
        Prior, settings and log, as stored in ``out``.

    Raises
    ------
    ParameterError
        If a setting cannot be used, or differs from that of the checkpoint or of ``init``.
    DataError
        If the prior returns something else than its protocol says.
    NonFiniteLossError
        If the loss is NaN or infinite; the last checkpoint is kept.

    Examples
    --------
    >>> from uq.inference import pretrain_pfn
    >>> model, meta = pretrain_pfn(
    ...     "gp", steps=2, d_model=16, n_layers=2, n_buckets=20, rows_per_step=200, log_entries=1
    ... )
    >>> model.config.n_outputs, meta["runs"][0]["steps"]
    (20, 2)

    A prior of one's own is a function, here straight lines with noise. ``out="lines.safetensors"``
    would keep the network for ``PFNRegressor(prior="lines.safetensors")``.

    >>> import torch
    >>> def lines(batch, n, d, generator):
    ...     x = torch.randn(batch, n, d, generator=generator)
    ...     slope = torch.randn(batch, d, 1, generator=generator)
    ...     noise = torch.randn(batch, n, generator=generator)
    ...     return x, (x @ slope).squeeze(-1) + 0.1 * noise
    >>> lines.max_features = 3
    >>> model, meta = pretrain_pfn(
    ...     lines, steps=2, d_model=16, n_layers=2, n_buckets=20, min_context=2, rows_per_step=200,
    ...     log_entries=1,
    ... )
    >>> meta["prior"], model.config.max_features
    ('lines', 3)
    """
    name = prior if isinstance(prior, str) else getattr(prior, "__name__", type(prior).__name__)
    prior = pfn_prior(prior) if isinstance(prior, str) else prior
    sizes = {k: v for k, v in locals().items() if k in _SIZES and v is not None}
    _check(locals())
    contexts = Contexts(
        prior, min_context, max_context, context_sampling, n_queries, rows_per_step, random_state
    )
    if border_rule is None:
        border_rule = "fine_tails" if contexts.scaled else "equal_width"
    settings = {
        "prior": name,
        "task": contexts.task,
        "steps": steps,
        "min_context": min_context,
        "max_context": max_context,
        "context_sampling": context_sampling,
        "n_queries": n_queries,
        "rows_per_step": rows_per_step,
        "lr": lr,
        "warmup": warmup,
        "average": average,
        "precision": precision,
        "random_state": random_state,
        **({"n_buckets": n_buckets, "border_rule": border_rule} if init is None else {}),
        **({"init": Path(init).name} if init is not None else {}),
        **sizes,
    }
    if checkpoint is None and out is not None:
        checkpoint = Path(out).with_suffix(".state")
    if resume and checkpoint is None:
        raise ParameterError("pretrain_pfn: resume=True needs checkpoint= or out=.")
    fabric = make_fabric(device, precision)

    before: list[dict[str, Any]] = []
    model: PFN
    if init is not None:
        model, known = load_pfn(init)
        before = list(known.get("runs", []))
        _check_init(model, contexts, sizes)
        model.requires_grad_(True)
    else:
        model = _new_model(contexts, sizes, n_buckets, border_rule)
    run = Run(model, contexts, settings, steps, lr, warmup, average, fabric)
    resumed = resume and checkpoint is not None and Path(checkpoint).is_file()
    if resumed:
        assert checkpoint is not None
        run.load(Path(checkpoint))

    def meta() -> dict[str, Any]:
        described = prior.describe() if hasattr(prior, "describe") else {"prior": name}
        this = {**settings, "command": command, "steps_done": run.step, **run.facts()}
        return {"prior": name, "prior_settings": described, "runs": [*before, this]}

    def write() -> dict[str, Any]:
        told = meta()
        if checkpoint is not None:
            run.save(Path(checkpoint))
        if out is not None:
            save_pfn(out, run.averaged, told)
        return told

    marks = {round((i + 1) * steps / log_entries) for i in range(log_entries)} | {steps}
    written = time.monotonic()
    stopped = False
    try:
        while run.step < steps and not stopped:
            loss = run.advance()
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"pretrain_pfn: the loss became NaN or infinite in step {run.step}. Lower lr "
                    f"(a tenth of {lr:g} is a good next try), and look at what the prior draws."
                )
            if run.step in marks:
                state = run.log_entry()
                asked = [callback(state) is True for callback in callbacks]
                stopped = any(asked)
                if verbose > 0:
                    _print(state)
            if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
                write()
                written = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None:
            write()
        raise
    told = write()
    return run.averaged.cpu().float().requires_grad_(False).eval(), told


def pretrain_gp(
    prior: GPPrior | None = None, *, steps: int = 8000, random_state: int = 0, **options: Any
) -> tuple[PFN, dict[str, Any]]:
    """Train the small network whose distance from the exact posterior can be measured.

    Ten minutes on two CPU cores: width 64, 6 layers, 200 bars of equal width, 64 data sets of 50
    rows a step with contexts of 0 to 40 rows, peak learning rate 4e-3. These are the defaults of
    :func:`pretrain_pfn`, stated here so that the run stays what it is.

    Parameters
    ----------
    prior : GPPrior, optional
        By default ℓ = 0.2, σ² = 0.01 on [0, 1].
    steps : int, default=8000
        Optimiser steps; the gap to the exact posterior falls with them.
    random_state : int, default=0
        Seed.
    **options
        Further arguments of :func:`pretrain_pfn`, such as ``verbose`` or ``out``.

    Returns
    -------
    model, meta
        As :func:`pretrain_pfn`; measure with :func:`uq.inference.pfn_losses.gp_gap`.
    """
    recipe: dict[str, Any] = {
        "d_model": 64,
        "n_layers": 6,
        "n_heads": 4,
        "d_ff": 128,
        "context_tokens": 1,
        "n_buckets": 200,
        "border_rule": "equal_width",
        "min_context": 0,
        "max_context": 40,
        "context_sampling": "uniform",
        "n_queries": 10,
        "rows_per_step": 3200,
        "lr": 4e-3,
        "warmup": 0.1,
    }
    return pretrain_pfn(
        GPPrior() if prior is None else prior,
        steps=steps,
        random_state=random_state,
        **(recipe | options),
    )


def _new_model(
    contexts: Contexts, sizes: dict[str, int], n_buckets: int, border_rule: BorderRule
) -> PFN:
    sizes = _DEFAULT_SIZES | sizes
    sizes.setdefault("d_ff", 2 * sizes["d_model"])
    regression = contexts.task == "regression"
    borders = _prior_borders(contexts, n_buckets, border_rule) if regression else None
    config = PFNConfig(
        task=contexts.task,
        max_features=max(1, contexts.max_features),
        n_outputs=contexts.max_classes if borders is None else len(borders) - 1,
        scaled=contexts.scaled,
        **sizes,
    )
    seed = int(contexts.rng(INIT, 0).integers(2**63))
    with isolated_rng(seed, torch.device("cpu")):
        return PFN(config, borders)


def _prior_borders(contexts: Contexts, n_buckets: int, rule: BorderRule) -> Tensor:
    """Borders for targets as the network sees them: scaled by contexts of all sizes."""
    config = PFNConfig("regression", max(1, contexts.max_features), 2, scaled=contexts.scaled)
    wanted, found, parts, number = 1000 * n_buckets, 0, [], 0
    while found < wanted:
        X, y, n = contexts.draw(BORDERS, number, torch.device("cpu"))
        scaling = PFNScaling.fit(X[:, :n], y[:, :n], config)
        parts.append(scaling.targets(y[:, n:]).reshape(-1))
        found += len(parts[-1])
        number += 1
    return bar_borders(torch.cat(parts), n_buckets, rule)


def _check(given: dict[str, Any]) -> None:
    def refuse(name: str, wanted: str) -> ParameterError:
        return ParameterError(f"pretrain_pfn: {name} must be {wanted}, got {given[name]!r}.")

    for name in ("steps", "n_queries", "rows_per_step", "log_entries", "n_buckets", "max_context"):
        if not isinstance(given[name], int) or given[name] < 1:
            raise refuse(name, "a whole number from 1 on")
    if not isinstance(given["min_context"], int) or given["min_context"] < 0:
        raise refuse("min_context", "a whole number from 0 on")
    if given["min_context"] > given["max_context"]:
        raise refuse("min_context", f"at most max_context={given['max_context']}")
    if given["context_sampling"] not in ("uniform", "log_uniform"):
        raise refuse("context_sampling", "'uniform' or 'log_uniform'")
    if given["context_sampling"] == "log_uniform" and given["min_context"] < 1:
        raise refuse("min_context", "at least 1 with log_uniform sampling")
    if given["border_rule"] not in (None, *BORDER_RULES):
        raise refuse("border_rule", f"one of {BORDER_RULES} or None")
    if not given["lr"] > 0:
        raise refuse("lr", "a number > 0")
    for name in ("warmup", "average"):
        if not 0 <= given[name] < 1:
            raise refuse(name, "in [0, 1)")
    if not isinstance(given["random_state"], int) or given["random_state"] < 0:
        raise refuse("random_state", "a whole number from 0 on")


def _check_init(model: PFN, contexts: Contexts, sizes: dict[str, int]) -> None:
    config = model.config
    if config.task != contexts.task:
        raise ParameterError(
            f"pretrain_pfn: init is for {config.task}, the prior for {contexts.task}."
        )
    if config.scaled != contexts.scaled:
        raise ParameterError("pretrain_pfn: init and prior differ in whether data are scaled.")
    if contexts.max_features > config.max_features:
        raise ParameterError(
            f"pretrain_pfn: the prior draws up to {contexts.max_features} features, init has "
            f"{config.max_features}."
        )
    if config.task == "classification" and contexts.max_classes > config.n_outputs:
        raise ParameterError(
            f"pretrain_pfn: the prior draws up to {contexts.max_classes} classes, init has "
            f"{config.n_outputs}."
        )
    for name, value in sizes.items():
        if getattr(config, name) != value:
            raise ParameterError(
                f"pretrain_pfn: {name}={value}, but init has {getattr(config, name)}; leave it out."
            )


def _print(state: PretrainingState) -> None:
    import sys

    sizes = "  ".join(f"{k}: {v:.3f}" for k, v in state.held_out.items())
    print(
        f"step {state.step}/{state.steps}  loss {state.loss:.4f}  held out by context  {sizes}",
        file=sys.stderr,
        flush=True,
    )
