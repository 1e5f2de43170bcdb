"""One of two processes that fit an estimator together; ``test_processes`` starts it."""

import sys

import torch
from sklearn.datasets import load_diabetes

from uq.models.registry import estimator_class


def fit(method, strategy):
    X, y = load_diabetes(return_X_y=True)
    model = estimator_class(method, "regression")(
        hidden=(16,),
        max_epochs=5,
        batch_size=48,  # 442 rows: nine batches and one of ten rows
        patience=None if method == "ivon" else "auto",
        precision="64-true",
        device="cpu",
        strategy=strategy,
        random_state=0,
    )
    return model.fit(X, y), X


if __name__ == "__main__":
    torch.set_num_threads(1)
    for method in sys.argv[2:]:
        model, X = fit(method, "ddp")
        dist = model.predict_distribution(X)
        found = {"mean": dist.mean, "std": dist.stddev, "history": dict(model.history_)}
        torch.save(found, f"{sys.argv[1]}/{method}.{torch.distributed.get_rank()}")
