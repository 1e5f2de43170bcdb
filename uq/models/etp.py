"""Evidential Turing process: classes by a Dirichlet network that keeps a memory of its data.

The head, the memory, the objective and its equations are in :mod:`uq.nn.etp`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from uq.inference.evidential import EvidentialPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_number
from uq.models.documentation import documented
from uq.models.objectives import Objective, TrainingData, weighted_mean
from uq.models.tasks import Classifier
from uq.nn.etp import ETPHead, VariationalLinear, variational

# Rows that a step writes to the memory, at least and at most; the authors'.
_CONTEXT = (3, 49)


class ETPObjective(Objective):
    """Negative evidence bound of a batch, a mean over rows; each step writes to the memory."""

    def __init__(
        self, network: nn.Module, head: ETPHead, n_effective: float, layer_kl_weight: float
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.layer_kl_weight: float = layer_kl_weight / n_effective

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Loss of the batch, after which a share of it is written to the memory."""
        outputs = self.network(x)
        loss = weighted_mean(self.head.loss(outputs, y), weight)
        if self.layer_kl_weight:
            for layer in self.network.modules():
                if isinstance(layer, VariationalLinear):
                    loss = loss + self.layer_kl_weight * layer.kl()
        if self.training:
            self._write(outputs, y, weight)
        return loss

    def _write(self, outputs: Tensor, y: Tensor, weight: Tensor | None) -> None:
        """Write a context of random size to the memory: so many times the mean of the batch.

        That is the expectation over which rows are drawn. With it a row of weight 2 is a row twice,
        and the batch size does not matter.
        """
        low, high = _CONTEXT
        size = int(torch.randint(low, high + 1, ()))
        share = torch.ones_like(outputs[:, 0]) if weight is None else weight
        self.head.write(outputs, y, share * (size / share.sum()))

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive probability of each row, at mean weights and memory."""
        return self.head.nll(self.network(x), y)


@estimator
class _ETP(Estimator):
    memory_size: int = 20
    memory_decay: float = 0.99
    memory_noise: float = 0.1
    dirichlet_kl_weight: float = 1e-3
    layer_kl_weight: float = 1e-3
    patience: int | Literal["auto"] | None = "auto"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number(self, "memory_size", at_least=1, integer=True)
        check_number(self, "memory_decay", at_least=0, below=1)
        for name in ("memory_noise", "dirichlet_kl_weight", "layer_kl_weight"):
            check_number(self, name, at_least=0, below=math.inf)

    def _build_posterior(self, seed: int = 0) -> EvidentialPosterior:
        n_classes = self._likelihood().n_outputs
        head = ETPHead(
            n_classes,
            self.memory_size,
            memory_decay=self.memory_decay,
            memory_noise=self.memory_noise,
            dirichlet_kl_weight=self.dirichlet_kl_weight,
        )
        body = variational(self._body(n_classes, self._width_reason()))
        return EvidentialPosterior(body, head.to(self._dtype), seed)

    def _infer(self, data: TrainingData) -> tuple[EvidentialPosterior, TrainingResult]:
        posterior = self._build_posterior(data.seeds.predict).to(data.fabric.device)
        objective = ETPObjective(
            posterior.network, posterior.head, data.n_effective, self.layer_kl_weight
        )
        trained = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, self.lr, fused=True)
        schedule = cosine_schedule(self._n_epochs(data) * len(data.batches))
        return posterior, self._train(objective, optimizer, data, schedule=schedule)


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="outputs (n, n_classes), with which the memory is read and from which α is made",
)
@estimator
class ETPClassifier(_ETP, Classifier):
    """Classify by a Dirichlet network that reads the prior of each row from a memory of the data.

    The evidential Turing process. A memory of 20 cells is attended to by each row; what it reads is
    the prior Dir(β) of the row's class probabilities and goes, with the network's outputs, into
    their posterior Dir(α). Each training step writes some of its rows to the memory. The network's
    Linear layers have Normals over their weights in training.

    Parameters
    ----------
    {shared}
    memory_size : int, default=20
        Number of cells, each of one number a class.
    memory_decay : float, default=0.99
        What a cell keeps of itself in a step, in [0, 1).
    memory_noise : float, default=0.1
        Standard deviation of the noise under which the memory is read in training. Cells lie in
        (−1, 1). Predictions read it without.
    dirichlet_kl_weight : float, default=1e-3
        τ, weight of KL(Dir(α) ‖ Dir(β)). The loss of a row that is always of one class is least
        where that class has 1/τ more than its prior, so larger gives less confident rows.
    layer_kl_weight : float, default=1e-3
        Weight of KL(q(w) ‖ N(0, 0.1))/N, of the Linear layers. 1 is the bound as the paper writes
        it, 0 what the authors' published code computes. The default tempers both divergences
        alike; 1 costs log score on digits, where the rows are far fewer than the weights.
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Warnings
    --------
    ``epistemic`` ranks rows; its amount is set by ``dirichlet_kl_weight`` and does not shrink to 0
    with more rows, as with every loss that learns a Dirichlet from labels alone (Bengs et al.
    2022). The prior is the row's own, so ``vacuity`` is in units without a meaning and ranks by −S.

    The memory does little by itself. Written at the authors' rate its cells stay close to one
    another, so that β hardly differs between rows; a memory that is forgotten at each step
    (``memory_decay=0``) predicts the digits as well. What tells ETP from EDL in practice is the
    small ``dirichlet_kl_weight``, which leaves probabilities that are far less timid:
    ``EvidentialClassifier(loss="edl_ce", dirichlet_kl_weight=1e-3, evidence="exp")`` does as well
    on digits, at a quarter of the cost of a step (``benchmarks/evidential.py``).

    Notes
    -----
    Prediction is one forward pass at the mean weights and the memory without noise, so that the
    predictive is a Dirichlet in closed form, as with :class:`uq.EvidentialClassifier`. It is no
    ``loss`` of that class: memory and weight distributions are state of their own, and none of
    ``evidence``, ``prior``, annealing and ``logdet_weight`` has a meaning here. For calibration
    use ``uq.Calibrated(model, "temperature")``: scaling evidence changes no probability.

    The authors' code writes to the memory the first n rows of each batch, n uniform in 3 to 49;
    here n times the mean over the batch is written, which is the expectation of that, so that
    weights count rows and the batch size does not matter. It draws the outputs of variational
    layers for each row; here weights are drawn once for a batch, of the same expectation, too. All
    Linear layers are variational, except for frozen ones and subclasses, such as inside attention;
    a pretrained network's weights are the means to start from.

    See Also
    --------
    uq.EvidentialClassifier : evidential losses without memory.
    uq.nn.ETPHead : memory and objective for plain torch.

    References
    ----------
    M. Kandemir, A. Akgül, M. Haussmann, G. Unal. "Evidential Turing processes." ICLR 2022.
    arXiv:2106.01216.

    V. Bengs, E. Hüllermeier, W. Waegeman. "Pitfalls of epistemic uncertainty quantification through
    loss minimisation." NeurIPS 2022.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> import uq
    >>> X, y = load_wine(return_X_y=True)
    >>> model = uq.ETPClassifier(max_epochs=30, random_state=0).fit(X, y)
    >>> model.predict_distribution(X[:2]).second_order.event_shape
    torch.Size([3])
    >>> model.posterior_.head.memory.shape
    torch.Size([20, 3])
    """
