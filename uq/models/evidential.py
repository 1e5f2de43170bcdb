"""Evidential networks: one forward pass gives a distribution over distributions.

The heads, their losses and equations are in :mod:`uq.nn.evidential` (Dirichlet, classes) and
:mod:`uq.nn.evidential_regression` (Normal-inverse-Gamma, reals). The network is trained by Adam; a
linear head on frozen features is found by L-BFGS, as the authors of I-EDL do for few shots.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from uq.errors import ParameterError
from uq.inference.data import ArrayBatches
from uq.inference.evidential import EvidentialPosterior
from uq.inference.training import TrainingResult, cosine_schedule
from uq.models.base import Estimator, estimator
from uq.models.checks import check_choice, check_number
from uq.models.documentation import documented
from uq.models.objectives import Objective, TrainingData, weighted_mean
from uq.models.tasks import Classifier, Regressor
from uq.nn.evidential import EVIDENCE, LOSSES, DirichletHead, Loss
from uq.nn.evidential_regression import PENALTIES, NormalInverseGammaHead, Penalty
from uq.nn.network import probe_outputs

# The I-EDL authors' few-shot training: 10 steps of 10 L-BFGS iterations.
_FROZEN_EPOCHS = 10
_LBFGS: dict[str, Any] = {
    "lr": 1.0,
    "max_iter": 10,
    "history_size": 20,
    "line_search_fn": "strong_wolfe",
    "tolerance_grad": 1e-5,
    "tolerance_change": 1e-9,
}


class _EvidentialObjective(Objective):
    """Loss of a network under a head, which knows how many epochs have passed."""

    def __init__(self, network: nn.Module, head: nn.Module, n_batches: int) -> None:
        super().__init__()
        self.network = network
        self.head: Any = head
        self.n_batches = n_batches
        self.steps = 0

    def count(self, *_: Any) -> None:
        """Count a step of the optimizer."""
        self.steps += 1

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.steps // self.n_batches

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean loss of the batch."""
        return weighted_mean(self.head.loss(self.network(x), y), weight)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log predictive density of each row."""
        rows: Tensor = self.head.nll(self.network(x), y)
        return rows


class _DirichletObjective(_EvidentialObjective):
    """Adds the divergence from the prior, whose weight grows from epoch to epoch."""

    dirichlet_kl_weight: float
    kl_warmup_epochs: int

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean loss of the batch at the weight that this epoch has."""
        share = min(1.0, self.epoch / self.kl_warmup_epochs) if self.kl_warmup_epochs else 1.0
        rows = self.head.loss(
            self.network(x), y, dirichlet_kl_weight=share * self.dirichlet_kl_weight
        )
        return weighted_mean(rows, weight)

    def held_out_nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each row with the divergence in full: its log score alone would stop early on."""
        rows: Tensor = self.head.loss(
            self.network(x), y, dirichlet_kl_weight=self.dirichlet_kl_weight
        )
        return rows


@estimator
class _Evidential(Estimator):
    features: Literal["trained", "frozen"] = "trained"
    patience: int | Literal["auto"] | None = "auto"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "features", ("trained", "frozen"))
        if self.features == "frozen" and self.module is None:
            raise ParameterError(
                f"{type(self).__name__}: features='frozen' needs module=, a trained network that "
                "maps inputs to features."
            )

    @abstractmethod
    def _head(self) -> nn.Module:
        """Head for the targets that were fitted."""

    def _objective(
        self, network: nn.Module, head: nn.Module, n_batches: int
    ) -> _EvidentialObjective:
        return _EvidentialObjective(network, head, n_batches)

    def _build_posterior(self, seed: int = 0) -> EvidentialPosterior:
        head: Any = self._head()
        if self.features == "trained":
            body = self._body(head.n_outputs, self._width_reason())
            return EvidentialPosterior(body, head, seed)
        body = self._body(None)
        n_features = probe_outputs(body, self._example()).shape[1]
        linear = nn.Linear(n_features, head.n_outputs, dtype=self._dtype)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return EvidentialPosterior(nn.Sequential(body, linear), head, seed)

    def _n_epochs(self, data: TrainingData) -> int:
        if self.features == "frozen" and self.max_epochs is None:
            return _FROZEN_EPOCHS
        return super()._n_epochs(data)

    @property
    def _trains_in_processes(self) -> bool:
        return True

    def _infer(self, data: TrainingData) -> tuple[EvidentialPosterior, TrainingResult]:
        posterior = self._build_posterior(data.seeds.predict).to(data.fabric.device)
        network: Any = posterior.network
        optimizer: Optimizer
        schedule = None
        if self.features == "frozen":
            data = _on_features(network[0], data)
            network = network[1]
            optimizer = torch.optim.LBFGS(network.parameters(), **_LBFGS)
        else:
            trained = [p for p in network.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, self.lr, fused=True)
            schedule = cosine_schedule(self._n_epochs(data) * len(data.batches))
        objective = self._objective(network, posterior.head, len(data.batches))
        optimizer.register_step_post_hook(objective.count)
        return posterior, self._train(objective, optimizer, data, schedule=schedule)


def _on_features(body: nn.Module, data: TrainingData) -> TrainingData:
    """Replace inputs by their features, all in one batch; nothing is held out from it."""
    body.eval()
    with torch.no_grad():
        parts = [(body(x), *rest) for x, *rest in data.batches]
        if data.held_out is not None:
            x, *rest = data.held_out
            parts.append((body(x), *rest))
    features, y, *weight = (torch.cat(columns) for columns in zip(*parts, strict=True))
    if weight:
        weight = [weight[0] / weight[0].mean()]
    batches = ArrayBatches(
        features, y, *weight, batch_size=None, generator=data.generator(data.seeds.shuffle)
    )
    return TrainingData(batches, data.n_effective, None, data.fabric, data.seeds)


_FEATURES = """\
features : {"trained", "frozen"}, default="trained"
        "frozen" keeps ``module``, which maps inputs to features (n, D), and finds a linear head on
        them by L-BFGS on all rows: for a few rows a class on a pretrained network. An epoch is 10
        iterations then, of which it takes 10; ``lr``, ``batch_size`` and ``patience`` do not
        apply."""


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="outputs (n, n_classes), of which softplus makes the evidence",
    own=_FEATURES,
)
@estimator
class EvidentialClassifier(_Evidential, Classifier):
    """Classify by a network that gives each row a Dirichlet distribution over probabilities.

    Parameters
    ----------
    {shared}
    loss : {"iedl", "edl", "edl_nll", "edl_ce", "redl"}, default="iedl"
        "edl" is the expected squared error, "edl_ce" the expected and "edl_nll" the marginal
        negative log likelihood; "iedl" weighs squared errors by the Fisher information, which in
        its authors' tables ranks OOD inputs best; "redl" drops the variance, with a prior of 0.1.
    dirichlet_kl_weight : float, default=1.0
        Weight of the divergence from the prior, which removes evidence for wrong classes. Smaller
        (0.001 to 0.1) makes probabilities less timid.
    kl_warmup_epochs : int, default=10
        Epochs in which that weight grows from 0, so that the network first learns the classes.
    logdet_weight : float, default=0.05
        Weight of −log |Fisher information| in "iedl", which holds evidence back; 0.005 to 0.1 in
        the paper.
    prior : float, optional
        Concentration of a class without evidence; by default 1, or 0.1 for "redl".
    evidence : {"softplus", "exp", "relu"}, default="softplus"
        Turns outputs into evidence. ReLU, the original, stops learning on rows that it cuts to 0.
    {own}
    {tail}

    Attributes
    ----------
    {fitted}
    classes_ : ndarray of shape (n_classes,)
        Labels.

    Warnings
    --------
    What is called evidence is set by the regulariser as much as by the data: ``epistemic`` (the
    mutual information), ``vacuity`` and ``differential_entropy()`` do not shrink to 0 with more
    rows, and no loss on labels alone could make them (Bengs et al. 2022; Shen et al. 2024). Use
    them to rank rows, not as amounts, and do not count on far-away inputs to rank high.

    Probabilities are too timid by construction: at equal accuracy, confidence lies far below it.
    ``uq.Calibrated(model, "evidence_scale")`` mends that and keeps the ranking.

    Notes
    -----
    Early stopping watches the training loss with the divergence in full, since the log score is
    best before it has come in.

    Whether evidence ranks OOD inputs better than the entropy of a softmax depends on the data: with
    networks of this package it does a little on digits, and does not on Fashion-MNIST against MNIST
    (``benchmarks/evidential.py``).

    See Also
    --------
    uq.distributions.DirichletCategorical : the predictive distribution.

    References
    ----------
    M. Sensoy, L. Kaplan, M. Kandemir. "Evidential deep learning to quantify classification
    uncertainty." NeurIPS 2018. arXiv:1806.01768.

    D. Deng et al. "Uncertainty estimation by Fisher information-based evidential deep learning."
    ICML 2023. arXiv:2303.02045.

    M. Chen, J. Gao, C. Xu. "R-EDL: relaxing nonessential settings of evidential deep learning."
    ICLR 2024.

    V. Bengs, E. Hüllermeier, W. Waegeman. "Pitfalls of epistemic uncertainty quantification through
    loss minimisation." NeurIPS 2022.

    M. Shen et al. "Are uncertainty quantification capabilities of evidential deep learning a
    mirage?" NeurIPS 2024. arXiv:2402.06160.

    Examples
    --------
    >>> from sklearn.datasets import load_wine
    >>> import uq
    >>> X, y = load_wine(return_X_y=True)
    >>> model = uq.EvidentialClassifier(max_epochs=30, random_state=0).fit(X, y)
    >>> dist = model.predict_distribution(X[:2])
    >>> dist.vacuity.shape, dist.second_order.event_shape
    (torch.Size([2]), torch.Size([3]))
    """

    loss: Loss = "iedl"
    dirichlet_kl_weight: float = 1.0
    kl_warmup_epochs: int = 10
    logdet_weight: float = 0.05
    prior: float | None = None
    evidence: Literal["softplus", "exp", "relu"] = "softplus"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "loss", LOSSES)
        check_number(self, "dirichlet_kl_weight", at_least=0, below=math.inf)
        check_number(self, "kl_warmup_epochs", at_least=0, integer=True)
        check_number(self, "logdet_weight", at_least=0, below=math.inf)
        check_number(self, "prior", above=0, below=math.inf, optional=True)
        check_choice(self, "evidence", tuple(EVIDENCE))

    def _head(self) -> nn.Module:
        return DirichletHead(
            len(self.classes_),
            self.loss,
            evidence=self.evidence,
            prior=self.prior,
            logdet_weight=self.logdet_weight,
        )

    def _objective(
        self, network: nn.Module, head: nn.Module, n_batches: int
    ) -> _EvidentialObjective:
        objective = _DirichletObjective(network, head, n_batches)
        objective.dirichlet_kl_weight = self.dirichlet_kl_weight
        objective.kl_warmup_epochs = self.kl_warmup_epochs
        return objective


@documented(
    lr="3e-3",
    patience='"auto"',
    outputs="outputs (n, 4m): for m targets all γ, then ν, α and β before softplus",
    own=_FEATURES,
)
@estimator
class EvidentialRegressor(_Evidential, Regressor):
    """Predict a Student-t by a network that gives a Normal-inverse-Gamma over mean and variance.

    Parameters
    ----------
    {shared}
    penalty : {"evidence", "normalised", "kl"}, default="evidence"
        What evidence costs where the prediction is wrong: |y − γ| (2ν + α), as in the paper; the
        same with the error in units of the Student-t's scale; or |y − γ| times the divergence from
        a Normal-inverse-Gamma of next to no evidence.
    penalty_weight : float, default=0.01
        Its weight; the paper's.
    {own}
    {tail}

    Attributes
    ----------
    {fitted}

    Warnings
    --------
    The likelihood cannot tell ``aleatoric`` = E σ² = β/(α − 1) from ``epistemic`` = Var μ =
    β/(ν (α − 1)): it is the same along β = c ν/(1 + ν), and the penalty drives ν down. The total is
    meaningful, the split is not: on y = x³ + N(0, 3²) the square root of ``aleatoric`` comes out
    near 1.7, the scale of the Student-t near the true 3 (see Meinert et al. 2023). ``epistemic``
    need not grow away from the data, nor shrink with more of it. For a split to rely on use an
    ensemble or VBLL.

    References
    ----------
    A. Amini, W. Schwarting, A. Soleimany, D. Rus. "Deep evidential regression." NeurIPS 2020.
    arXiv:1910.02600.

    N. Meinert, J. Gawlikowski, A. Lavin. "The unreasonable effectiveness of deep evidential
    regression." AAAI 2023. arXiv:2205.10060, eq. 11 (the penalty "normalised").

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> import uq
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = uq.EvidentialRegressor(max_epochs=30, random_state=0).fit(X, y)
    >>> dist = model.predict_distribution(X[:2])
    >>> dist.base.df.shape, bool((dist.mutual_information() > 0).all())
    (torch.Size([2]), True)
    """

    penalty: Penalty = "evidence"
    penalty_weight: float = 0.01

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "penalty", PENALTIES)
        check_number(self, "penalty_weight", at_least=0, below=math.inf)

    def _width_reason(self) -> str:
        return f"four for each of the {len(self.y_mean_)} targets"

    def _head(self) -> nn.Module:
        return NormalInverseGammaHead(
            len(self.y_mean_), self.penalty, penalty_weight=self.penalty_weight
        )
