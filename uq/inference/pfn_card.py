"""Model cards of prior-data fitted networks, written from what their files say."""

from __future__ import annotations

from typing import Any

from uq.nn.pfn import PFN

_LIMITS = {
    "regression": (
        "Targets are standardised by the mean and the standard deviation of the context. A target "
        "that is constant in the context has no scale, and there the network has learned nothing.",
        "Bars narrower than {narrowest:.2g} standard deviations of the context's targets do not "
        "exist: noise far below that cannot be predicted.",
    ),
    "classification": (
        "A class that is not in the context has no probability.",
        "At most {n_outputs} classes at a time.",
    ),
}


def model_card(model: PFN, meta: dict[str, Any], *, name: str) -> str:
    """Describe a network in Markdown: what it is, how it was made, how good it was, its limits.

    Parameters
    ----------
    model : PFN
        Network.
    meta : dict
        From :func:`uq.nn.load_pfn` or :func:`uq.inference.pretrain_pfn`.
    name : str
        Title.

    Returns
    -------
    str
        Markdown; every figure in it comes from the arguments.
    """
    config, runs = model.config, meta.get("runs", [])
    last = runs[-1] if runs else {}
    sizes = (
        f"{config.n_layers} layers, width {config.d_model}, {config.n_heads} heads, MLPs of "
        f"{config.d_ff}, {config.context_tokens} learned context rows"
    )
    head = (
        f"{config.n_outputs} bars with half-normal tails"
        if config.task == "regression"
        else f"up to {config.n_outputs} classes"
    )
    n_weights = sum(p.numel() for p in model.parameters())
    lines = [
        f"# {name}",
        "",
        f"Prior-data fitted network for {config.task} on tables: one forward pass maps a context "
        "(rows with targets) and query rows to predictive distributions. Trained on synthetic data "
        "alone.",
        "",
        "| what | value |",
        "| --- | --- |",
        f"| network | set transformer, {sizes} |",
        f"| weights | {n_weights:,} |",
        f"| output | {head} |",
        f"| columns | up to {config.max_features} |",
        f"| contexts in training | {last.get('min_context')} to {last.get('max_context')} rows, "
        f"{str(last.get('context_sampling')).replace('_', '-')} |",
        f"| prior | {meta.get('prior')} ({meta.get('prior_settings', {}).get('prior')}) |",
    ]
    for key, value in meta.get("prior_settings", {}).items():
        if key != "prior":
            lines.append(f"| prior: {key.replace('_', ' ')} | {value} |")
    lines += ["| licence | that of the package; the training data are synthetic |"]
    lines += ["", "## Runs", ""]
    lines += [
        "Each run starts from the weights of the one before; `uq pretrain --init` adds one. All "
        "randomness of a step comes from the seed and the step's number. The weights are "
        "exponential averages over steps, stored in half precision.",
        "",
    ]
    for i, run in enumerate(runs, 1):
        lines += _run(i, run)
    lines += ["## Limits", ""]
    narrowest = float(model.borders.diff().min()) if model.borders is not None else 0.0
    for text in _LIMITS[config.task]:
        lines.append("- " + text.format(narrowest=narrowest, n_outputs=config.n_outputs))
    lines += [
        "- Outside the sizes above, and on data unlike any that the prior draws, it extrapolates: "
        "the answer is that of a network, not of a Bayesian model.",
        "- The predictive distribution is of each query alone. It is not split into aleatoric and "
        "epistemic parts.",
        "",
    ]
    return "\n".join(lines)


def _run(number: int, run: dict[str, Any]) -> list[str]:
    lines = [
        f"### Run {number}",
        "",
        "```",
        run.get("command") or "(started from Python)",
        "```",
        "",
        f"Seed {run.get('random_state')}; {run.get('steps_done'):,} of {run.get('steps'):,} steps "
        f"of about {run.get('rows_per_step'):,} rows, learning rate {run.get('lr')}; "
        f"{run.get('seconds', 0) / 60:.1f} min, {run.get('cpu_seconds', 0) / 3600:.2f} CPU hours, "
        f"{run.get('threads')} thread(s) on {run.get('device')} ({run.get('machine')}); "
        f"torch {run.get('torch')}, uq {run.get('uq')}.",
        "",
        "Loss in nats per query row, by rows of the context; the same held-out data sets in every "
        "line. Single training steps with an extreme target can dominate the training column.",
        "",
    ]
    log = run.get("log", [])
    if not log:
        return lines
    sizes = list(log[-1]["held_out"])
    lines += [
        "| step | training | " + " | ".join(f"held out, {s}" for s in sizes) + " |",
        "| --- " * (len(sizes) + 2) + "|",
    ]
    shown = log[:: max(1, len(log) // 12)]
    if shown[-1] is not log[-1]:
        shown.append(log[-1])
    for entry in shown:
        cells = " | ".join(f"{entry['held_out'][s]:.3f}" for s in sizes)
        lines.append(f"| {entry['step']:,} | {entry['loss']:.3f} | {cells} |")
    names = {"trivial": "trivial rule", "exact": "exact posterior"}
    for key, by_size in run.get("reference", {}).items():
        cells = " | ".join(f"{by_size[s]:.3f}" for s in sizes)
        lines.append(f"| {names.get(key, key)} | | {cells} |")
    rule = (
        "class frequencies of the context, with one row more of each class"
        if run.get("task") == "classification"
        else "a normal with the mean and standard deviation of the context"
    )
    return [*lines, "", f"The trivial rule is {rule}.", ""]
