"""Training on torch's own distributed engines: the gradients of several processes are those of one on the whole batch.

One launch of four processes (gloo, CPU) runs every check: importing torch costs more than all of them.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import TOLERANCES, assert_close, relative_error
from processes import FRESH
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastlstm

ROOT = Path(__file__).parent.parent
WORLD = 4
LENGTHS = (6, 5, 5, 3, 2, 2, 1, 4)
I, H = 3, 4  # noqa: E741

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


class Model(nn.Module):
    """Two stacks of LSTMs and a head; the second stack is used only where asked for."""

    def __init__(self, lstm: type[Any]):
        super().__init__()
        self.lstm = lstm(I, H, num_layers=2, bidirectional=True, proj_size=3)
        self.branch = lstm(6, 5)
        self.head = nn.Linear(11, 2)

    def forward(self, x: Tensor | PackedSequence, branch: bool = True) -> Tensor:
        output, _ = self.lstm(x)
        rows = output.data if isinstance(output, PackedSequence) else output
        extra = self.branch(output)[0] if branch else rows.new_zeros(*rows.shape[:-1], 5)
        extra = extra.data if isinstance(extra, PackedSequence) else extra
        return self.head(torch.cat((rows, extra), -1))


def stock_model() -> Model:
    torch.manual_seed(0)
    return Model(nn.LSTM)


def direct() -> Model:
    model = Model(fastlstm.LSTM)
    model.load_state_dict(stock_model().state_dict())
    return model


def converted() -> Model:
    model = stock_model()
    assert len(fastlstm.convert(model).replaced) == 2
    return model


def sequences(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, I, generator=generator).to(dtype) for n in LENGTHS]


def batch(form: str, part: slice, dtype: torch.dtype = torch.float32) -> Any:
    """Return some of the rows of the whole batch, packed or padded with zeros."""
    rows = sequences(dtype)[part]
    if form == "packed":
        return pack_sequence(rows, enforce_sorted=False)
    longest = max(LENGTHS)
    return torch.stack([torch.cat((row, row.new_zeros(longest - len(row), I))) for row in rows], 1)


def loss_of(model: nn.Module, x: Any, **kwargs: Any) -> Tensor:
    return model(x, **kwargs).square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    def whole(gradient: Any) -> Tensor:
        return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach()

    return {
        name.removeprefix("module."): whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def alone(loss: Callable[[Model, torch.dtype], Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of one process with stock's LSTM: in float64, and in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        model = stock_model().to(dtype)
        loss(model, dtype).backward()
        results.append(gradients(model))
    return results[0], results[1]


def assert_agrees(model: nn.Module, loss: Callable[[Model, torch.dtype], Tensor]) -> None:
    truth, stock = alone(loss)
    assert_close(gradients(model), truth, stock, dtype=torch.float32)


def shard(rank: int, world: int) -> slice:
    return slice(rank, None, world)


def check_ddp(rank: int, make: Callable[[], Model], form: str, **options: Any) -> None:
    """Two steps: gradients of the second include what static_graph and bucket views change."""
    model = DistributedDataParallel(make(), **options)
    group = options.get("process_group")
    world, place = dist.get_world_size(group), dist.get_rank(group)
    for _ in range(2):
        model.zero_grad()
        # DDP averages over processes what one process sums
        (loss_of(model, batch(form, shard(place, world))) * world).backward()
        assert_agrees(model, lambda stock, dtype: loss_of(stock, batch(form, slice(None), dtype)))


def check_unused_parameters(rank: int) -> None:
    """Odd ranks leave one LSTM out, which its gradient must survive."""
    model = DistributedDataParallel(direct(), find_unused_parameters=True)
    (loss_of(model, batch("packed", shard(rank, WORLD)), branch=rank % 2 == 0) * WORLD).backward()

    def loss(stock: Model, dtype: torch.dtype) -> Tensor:
        parts = (loss_of(stock, batch("packed", shard(r, WORLD), dtype), branch=r % 2 == 0) for r in range(WORLD))
        return torch.stack(list(parts)).sum()

    assert_agrees(model, loss)


def check_no_sync(rank: int) -> None:
    """Two micro-batches, of which only the second is followed by an exchange."""
    model = DistributedDataParallel(converted())
    for half in range(2):
        with model.no_sync() if half == 0 else nullcontext():
            (loss_of(model, batch("packed", shard(rank + half * WORLD, 2 * WORLD))) * WORLD).backward()
        if half == 0:
            local = gradients(model)
            sizes = [torch.zeros(1) for _ in range(WORLD)]
            dist.all_gather(sizes, local["lstm.weight_hh_l0"].norm().view(1))
            assert len({size.item() for size in sizes}) == WORLD, "no_sync exchanged gradients"
    assert_agrees(model, lambda stock, dtype: loss_of(stock, batch("packed", slice(None), dtype)))


def check_fsdp(rank: int, make: Callable[[], Model], form: str, mesh: Any, late: bool = False, **options: Any) -> None:
    """Shard every LSTM and the model, as FSDP2 is used; then train and compare the weights after a step."""
    from torch.distributed.fsdp import fully_shard

    model: Any = make()
    for module in (model.lstm, model.branch, model):
        fully_shard(module, mesh=mesh, **options)
    if late:  # FSDP has made a subclass of nn.LSTM
        assert len(fastlstm.convert(model).replaced) == 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    (loss_of(model, batch(form, shard(rank, WORLD))) * WORLD).backward()
    assert model.lstm.weight_hh_l0.to_local().numel() < model.lstm.weight_hh_l0.numel()
    assert_agrees(model, lambda stock, dtype: loss_of(stock, batch(form, slice(None), dtype)))
    optimizer.step()

    alone = stock_model().double()
    loss_of(alone, batch(form, slice(None), torch.float64)).backward()
    torch.optim.SGD(alone.parameters(), lr=0.01).step()
    weights = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    for name, truth in alone.named_parameters():
        assert relative_error(weights[name], truth) < 10 * TOLERANCES[torch.float32].atol, name
    # the output follows the weights
    x = batch(form, slice(None))
    assert relative_error(model(x), alone(batch(form, slice(None), torch.float64))) < 1e-5


def check_fsdp_mixed_precision(rank: int, mesh: Any) -> None:
    """Parameters in bfloat16 for the call only: what stock's LSTM gives under the same policy."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    results = []
    for make in (direct, stock_model):
        model: Any = copy.deepcopy(make())
        for module in (model.lstm, model.branch, model):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        output = model(batch("dense", shard(rank, WORLD)))
        assert output.dtype == torch.bfloat16
        output.float().square().sum().mul(WORLD).backward()
        results.append(gradients(model))
    truth, _ = alone(lambda stock, dtype: loss_of(stock, batch("dense", slice(None), dtype)))
    assert_close(results[0], truth, results[1], dtype=torch.bfloat16)


def train(rank: int, path: str) -> None:
    """Run every check in one of the processes."""
    from datetime import timedelta

    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for make in (direct, converted):
        for form in ("dense", "packed"):
            check_ddp(rank, make, form)
    check_ddp(rank, direct, "packed", process_group=pairs[rank // 2])
    check_ddp(rank, direct, "packed", static_graph=True)
    check_ddp(rank, converted, "dense", gradient_as_bucket_view=True, bucket_cap_mb=0.0001)
    check_unused_parameters(rank)
    check_no_sync(rank)

    four = init_device_mesh("cpu", (WORLD,))
    two_by_two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    check_fsdp(rank, direct, "dense", four)
    check_fsdp(rank, converted, "packed", four, reshard_after_forward=False)
    check_fsdp(rank, stock_model, "packed", four, late=True)
    check_fsdp(rank, direct, "packed", two_by_two)
    check_fsdp_mixed_precision(rank, four)
    dist.destroy_process_group()


def test_gradients_of_four_processes_are_those_of_one(tmp_path):
    from torch.multiprocessing.spawn import start_processes

    # a failed check raises here with the traceback of its process; a hang ends below
    processes: Any = start_processes(
        train, args=(str(tmp_path / "rendezvous"),), nprocs=WORLD, join=False, start_method=FRESH
    )
    deadline = time.monotonic() + 240
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("the processes did not finish")


def test_torchrun_example(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(ROOT / "examples/distributed.py"), "--smoke"],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes hold the same weights" in done.stdout
