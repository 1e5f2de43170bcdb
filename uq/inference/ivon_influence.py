"""What a single training example does to a Gaussian posterior over weights, without refitting.

P. Nickl et al., "The Memory Perturbation Equation: Understanding Model's Sensitivity to Data",
NeurIPS 2023, arXiv 2310.19273. Taking example i out of the loss moves the mean, to first order, by

    Δm_i = σ² ⊙ ∇ℓ_i(m),

and the outputs f at its own input by J_i Δm_i, where ∇ℓ_i = J_iᵀ e_i, e_i = ∂ℓ_i/∂f. The paper's
code keeps the diagonal of J_i diag(σ²) J_iᵀ; here all of it acts, by one backward and one forward
derivative an example in place of one backward for each output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from uq.errors import ParameterError
from uq.inference.posterior import NormalPosterior

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class LeaveOneOut:
    """First-order leave-one-out estimates for n training examples, at the posterior mean.

    See Also
    --------
    leave_one_out : makes one; it has an example.
    """

    shift: Tensor
    """Move of the network's outputs at example i when i is left out, shape (n, n_outputs)."""
    parameters: tuple[Tensor, ...]
    """Parameters of the distribution of y_i without i, as the likelihood takes them."""
    nll: Tensor
    """−log p(y_i) without i, in nats, shape (n,). Its mean estimates the test loss."""

    @property
    def sensitivity(self) -> Tensor:
        """Σ_k |shift|, shape (n,): large for influential, atypical or mislabelled examples."""
        return self.shift.abs().sum(-1)


def leave_one_out(
    posterior: NormalPosterior,
    x: Tensor,
    y: Tensor,
    *,
    weight: float | Tensor = 1.0,
    max_memory_mb: float = 256,
) -> LeaveOneOut:
    """Estimate what each training example's prediction would be without it.

    Parameters
    ----------
    posterior : NormalPosterior
        Fitted to data that holds the examples, by IVON or otherwise.
    x : Tensor of shape (n, …)
        Inputs of training examples.
    y : Tensor of shape (n,) or (n, m)
        Their targets, as the likelihood takes them.
    weight : float or Tensor of shape (n,), default=1.0
        How many times an example counts in the posterior: λ/N, times its sample weight. The
        default is the Bayesian posterior, λ = N.
    max_memory_mb : float, default=256
        Bound on the per-example gradients that are held at a time.

    Returns
    -------
    LeaveOneOut
        Tensors on the CPU. Outputs are linearised in the weights; the likelihood is not.

    Notes
    -----
    The estimate leaves the curvature alone, which is of second order: in linear regression with
    orthogonal features its relative error is the leverage of the example.

    Examples
    --------
    >>> import torch
    >>> from uq.inference import IVON, leave_one_out
    >>> from uq.nn import CategoricalLikelihood, MLP, Network
    >>> network = Network(MLP(2, (8,), 3), CategoricalLikelihood(3))
    >>> posterior = IVON(network.parameters(), 0.1, ess=20).posterior(network)
    >>> found = leave_one_out(posterior, torch.randn(20, 2), torch.arange(20) % 3)
    >>> found.shift.shape, found.nll.shape
    (torch.Size([20, 3]), torch.Size([20]))
    """
    network = posterior.network.eval()
    weights = {k: p.detach() for k, p in network.named_parameters()}
    variances = {k: s.square() for k, s in posterior.stds.items()}

    def loss(w: Weights, row: Tensor, target: Tensor) -> Tensor:
        parameters = functional_call(network, w, (row[None],))
        return network.likelihood.nll(parameters, target[None])[0]

    def without(row: Tensor, target: Tensor, times: Tensor) -> tuple[Tensor, ...]:
        gradient = grad(loss)(weights, row, target)
        move = {k: times * variances[k] * g for k, g in gradient.items()}

        def outputs(w: Weights) -> Tensor:
            value: Tensor = functional_call(network.body, w, (row[None],))
            return value

        derivative = jvp(outputs, (_part(weights, "body"),), (_part(move, "body"),))
        value, shift = derivative[0], derivative[1]
        # Weights of the likelihood itself (a noise scale) move as they are.
        moved = {k: weights[k] + move[k] for k in weights}
        parameters = functional_call(
            network.likelihood, _part(moved, "likelihood"), (value + shift,)
        )
        nll = network.likelihood.nll(parameters, target[None])
        return shift[0], nll[0], *(p[0] for p in parameters)

    times = torch.as_tensor(weight, dtype=posterior.dtype, device=x.device).expand(len(x))
    size = 4 * posterior.dtype.itemsize * sum(p.numel() for p in weights.values())
    rows = max(1, int(max_memory_mb * 2**20 / max(1, size)))
    try:
        parts = [
            tuple(t.detach().cpu() for t in vmap(without)(*chunk))
            for chunk in zip(x.split(rows), y.split(rows), times.split(rows), strict=True)
        ]
    except (RuntimeError, NotImplementedError) as error:
        raise ParameterError(
            "leave_one_out: the network has an operation without a per-example derivative "
            f"(recurrent layers are such): {error}"
        ) from error
    shift, nll, *parameters = (torch.cat(ts) for ts in zip(*parts, strict=True))
    return LeaveOneOut(shift, tuple(parameters), nll)


def _part(weights: Weights, owner: str) -> Weights:
    """Weights of one submodule, by their names in it."""
    start = owner + "."
    return {k.removeprefix(start): w for k, w in weights.items() if k.startswith(start)}
