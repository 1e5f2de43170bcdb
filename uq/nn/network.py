"""A network with a meaning: a body and the likelihood of its outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uq.errors import ParameterError
from uq.nn.likelihoods import Likelihood


class Network(nn.Module):
    """Body and likelihood in one module, so that one set of weights holds both.

    Parameters
    ----------
    body : Module
        Maps inputs (n, …) to outputs (n, likelihood.n_outputs).
    likelihood : Likelihood
        What the outputs mean.

    Examples
    --------
    >>> import torch
    >>> from uq.nn import MLP, CategoricalLikelihood, Network
    >>> network = Network(MLP(4, (16,), 3), CategoricalLikelihood(3))
    >>> loss = network.nll(torch.randn(8, 4), torch.arange(8) % 3).mean()  # nats per row
    >>> loss.backward()
    """

    def __init__(self, body: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.body = body
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Parameters of the distribution of y at inputs ``x``."""
        parameters: tuple[Tensor, ...] = self.likelihood(self.body(x))
        return parameters

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each row, in nats."""
        return self.likelihood.nll(self(x), y)


def probe_outputs(body: nn.Module, x: Tensor, what: str = "module") -> Tensor:
    """Run ``body`` on a few rows, in eval mode; explain what does not fit.

    Raises
    ------
    ParameterError
        If the forward pass fails or does not give one vector a row.
    """
    was_training = body.training
    body.eval()
    try:
        with torch.no_grad():
            out = body(x)
    except Exception as error:
        raise ParameterError(
            f"{what} fails on an input of shape {tuple(x.shape)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        body.train(was_training)
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ParameterError(
            f"{what} must map {tuple(x.shape)} to a tensor ({x.shape[0]}, outputs), got {got}."
        )
    return out


def check_width(body: nn.Module, x: Tensor, n_outputs: int, why: str) -> None:
    """Raise a ParameterError unless ``body`` gives ``n_outputs`` numbers a row."""
    width = probe_outputs(body, x).shape[1]
    if width != n_outputs:
        raise ParameterError(
            f"module has {width} outputs a row, but {n_outputs} are needed ({why}); "
            "change its last layer."
        )
