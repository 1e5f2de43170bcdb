"""One of two processes of data-parallel IVON; ``test_ivon`` starts it and reads what it saves."""

import contextlib
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from uq.inference import IVON
from uq.inference.ivon_checks import IVONStateError


def problem():
    """Network, the batch of each rank, and settings: the same in every process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batches = [(torch.randn(6, 3).double(), torch.randn(6, 1).double()) for _ in range(2)]
    return net, batches, {"lr": 0.1, "ess": 12.0, "beta2": 0.9, "hess_init": 0.5}


def noise(rank):
    return torch.Generator().manual_seed(100 + rank)


def loss_of(net, batch):
    x, y = batch
    return 0.5 * (net(x) - y).square().mean()


def train(rank, average):
    net, batches, settings = problem()
    ddp = DistributedDataParallel(net)
    optimizer = IVON(net.parameters(), **settings, sync=True, generator=noise(rank))
    for _ in range(3):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            with contextlib.nullcontext() if average else ddp.no_sync():
                loss_of(ddp, batches[rank]).backward()
        optimizer.step()
    return {"mean": net.state_dict(), "state": optimizer.state_dict()["state"]}


def main(rank, store, out):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    result = train(rank, average=False)
    try:
        train(rank, average=True)
    except IVONStateError as error:
        result["error_of_averaged"] = str(error)
    torch.save(result, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
