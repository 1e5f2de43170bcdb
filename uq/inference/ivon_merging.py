"""Merging Gaussian posteriors over the weights of one network.

N. Daheim et al., "Model Merging by Uncertainty-Based Gradient Matching", ICLR 2024, arXiv
2310.12808. With base (m₀, H₀), models (m_t, ·) and the curvature H_t that each one's data adds, all
diagonal,

    m = m₀ + α Σ_t H̄⁻¹ (H₀ + H_t)(m_t − m₀),    H̄ = H₀ + α Σ_t H_t.

For quadratic losses and α = 1 that is the minimiser of Σ_t ℓ_t + ½‖θ − m₀‖²_{H₀}, where m_t
minimises ℓ_t + ½‖θ − m₀‖²_{H₀}: training on all the data at once. With all H equal it is task
arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from uq.errors import ParameterError
from uq.inference.posterior import NormalPosterior
from uq.nn.priors import NormalPrior


@torch.no_grad()
def merge(
    base: NormalPosterior | NormalPrior,
    posteriors: Sequence[NormalPosterior],
    *,
    scale: float = 1.0,
) -> NormalPosterior:
    """Merge posteriors of one network that were trained apart, without data.

    Parameters
    ----------
    base : NormalPosterior or NormalPrior
        A posterior: the pre-trained model that all were fine-tuned from; m₀ and H₀ are its mean and
        precision, H_t the precision of model t. A prior: that under which each was trained on data
        of its own; then m₀ = 0, H₀ is the prior's precision and H_t what the data added to it, so
        that the result is the product of the posteriors with the prior counted once.
    posteriors : sequence of NormalPosterior
        At least one, over networks of the same architecture. Weights of networks trained from
        different initialisations do not correspond: start them from the same.
    scale : float, default=1.0
        α, the weight of the fine-tuned models against the base.

    Returns
    -------
    NormalPosterior
        Mean m, precision H̄. Frozen weights and buffers are those of the first model.

    Raises
    ------
    ParameterError
        If there is nothing to merge, the architectures differ or ``scale`` is not above 0.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import NormalPosterior, merge
    >>> from uq.nn import CategoricalLikelihood, Network, NormalPrior
    >>> def trained(value, std):
    ...     net = Network(torch.nn.Linear(1, 2, bias=False), CategoricalLikelihood(2))
    ...     torch.nn.init.constant_(net.body.weight, value)
    ...     return NormalPosterior(net, {"body.weight": torch.full((2, 1), std)})
    >>> merged = merge(NormalPrior(1e3), [trained(0.0, 0.1), trained(1.0, 0.05)])
    >>> merged.network.body.weight[0].item()  # weighted by precision: 400 to 100
    0.8
    """
    if not posteriors:
        raise ParameterError("merge: posteriors must hold at least one posterior, got none.")
    if not scale > 0:
        raise ParameterError(f"merge: scale must be > 0, got {scale!r}.")
    others = [*posteriors] if isinstance(base, NormalPrior) else [base, *posteriors]
    shapes = [{k: s.shape for k, s in p.stds.items()} for p in others]
    if any(s != shapes[0] for s in shapes):
        raise ParameterError(
            "merge: the posteriors must be over one architecture, but names or shapes of their "
            "weights differ."
        )
    network = copy.deepcopy(posteriors[0].network)
    means = [dict(p.network.named_parameters()) for p in posteriors]
    stds = {}
    for name, p in network.named_parameters():
        learned = torch.stack([q.stds[name] > 0 for q in others]).all(0)
        if isinstance(base, NormalPrior):
            origin, start = torch.zeros_like(p), torch.full_like(p, base.precision)
            added = [q.stds[name].pow(-2) - start for q in posteriors]
        else:
            origin = dict(base.network.named_parameters())[name]
            start = base.stds[name].pow(-2)
            added = [q.stds[name].pow(-2) for q in posteriors]
        total = start + scale * sum(added)
        # A curvature that came out slightly negative takes no certainty from the base.
        total = total.clamp(min=start)
        pull = sum((start + h) * (m[name] - origin) for h, m in zip(added, means, strict=True))
        merged = origin + scale * pull / total
        stds[name] = torch.where(learned, total.rsqrt(), 0.0)
        p.copy_(torch.where(learned, merged, p))
    return NormalPosterior(network, stds, int(posteriors[0].seed))
