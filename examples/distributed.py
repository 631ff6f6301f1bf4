"""Train one LSTM in several processes with torch's own engines: DDP, or FSDP2 with --fsdp.

    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/distributed.py

`fastlstm.LSTM` is an ordinary module, so nothing about it is distributed: DistributedDataParallel averages its
gradients, `fully_shard` cuts its parameters. The task is to recall a symbol that was shown a number of steps ago. Runs
on GPUs (nccl) where there are enough of them, otherwise on the CPU (gloo). Every process draws its own batches.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

import fastlstm

SYMBOLS, DELAY = 8, 5


class Recall(nn.Module):
    """Says at each step which symbol came DELAY steps before."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 16)
        self.lstm = fastlstm.LSTM(16, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits [B, T, SYMBOLS] for symbols [B, T]."""
        return self.head(self.lstm(self.embedding(symbols))[0])


def train(options: argparse.Namespace) -> None:
    """Train, and check that every process ends with the same weights."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    kind = "cuda" if torch.cuda.device_count() >= world_size else "cpu"
    device = torch.device(kind, rank if kind == "cuda" else 0)
    mesh = init_device_mesh(kind, (world_size,))

    torch.manual_seed(0)  # the same initial weights everywhere
    model: nn.Module = Recall(16 if options.smoke else 64).to(device)
    if options.fsdp:
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    torch.manual_seed(1 + rank)  # other batches everywhere
    steps = 5 if options.smoke else 300
    for step in range(steps):
        symbols = torch.randint(SYMBOLS, (32, 40), device=device)
        logits = model(symbols)[:, DELAY:]
        loss = F.cross_entropy(logits.flatten(0, 1), symbols[:, :-DELAY].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 50 == 0 or step == steps - 1):
            accuracy = (logits.argmax(-1) == symbols[:, :-DELAY]).float().mean()
            print(f"step {step:3}: loss {loss:.3f}, accuracy {accuracy:.0%} (chance {1 / SYMBOLS:.0%})")

    # sum of the weights, as each process sees them
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    checksum = torch.stack([weight.detach().double().sum() for weight in weights]).sum()
    checksums = [torch.zeros_like(checksum) for _ in range(world_size)]
    dist.all_gather(checksums, checksum)
    assert len({value.item() for value in checksums}) == 1
    if rank == 0:
        print(f"{world_size} processes hold the same weights")


def main() -> None:
    """Join the other processes, train, and leave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters instead of copying them")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]) else "gloo")
    train(options)
    # the model is gone by now: one that outlives its process group can hang while it lets go of it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
