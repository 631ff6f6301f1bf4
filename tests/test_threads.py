"""Threads, processes and import: training side by side, workers that fork or spawn, shared weights, import time."""

from __future__ import annotations

import copy
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import H, I, make_input
from processes import FRESH
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fastlstm

ROOT = Path(__file__).parent.parent
# bounds a wait for a process that hangs; a passing test waits a few seconds, most of them for torch's import
PATIENCE = 120


def train(seed: int, backend: str, steps: int) -> dict[str, Tensor]:
    """Train a small model from a seed of its own; return its weights."""
    generator = torch.Generator().manual_seed(seed)
    lstm = fastlstm.LSTM(I, H, num_layers=2, backend=backend)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam(lstm.parameters(), lr=0.05)
    forms = ("dense", "unsorted")
    for step in range(steps):
        optimizer.zero_grad()
        output, _ = lstm(make_input(forms[step % 2]))
        output = output if isinstance(output, Tensor) else output.data
        (output - seed / 10).square().mean().backward()
        optimizer.step()
    return {name: value.clone() for name, value in lstm.state_dict().items()}


@pytest.mark.parametrize(("backend", "steps"), [("auto", 40), ("reference", 30), ("torch", 40)])
def test_threads_train_as_if_alone(backend, steps):
    expected = [train(seed, backend, steps) for seed in range(4)]
    results: list[Any] = [None] * 4

    def work(seed: int) -> None:
        results[seed] = train(seed, backend, steps)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, alone in zip(results, expected, strict=True):
        assert got.keys() == alone.keys()
        assert all(torch.equal(got[name], alone[name]) for name in alone)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_threads_share_a_module(backend):
    """Nothing is kept on the module between calls, so calls of one module may overlap."""
    lstm = fastlstm.LSTM(I, H, num_layers=2, backend=backend).requires_grad_(False)
    inputs = [torch.randn(4 + n, 2, I) for n in range(3)]
    expected = [lstm(x)[0] for x in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        results[index] = [lstm(inputs[index])[0] for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, output in zip(results, expected, strict=True):
        assert len(outputs) == 4
        assert all(torch.equal(other, output) for other in outputs)


class Features(Dataset):
    """Runs an LSTM over each item, as a frozen feature extractor in the workers of a DataLoader does."""

    def __init__(self, lstm: nn.Module):
        self.lstm = lstm

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.lstm(torch.full((5, 1, I), float(index)))[0]


# fork in a process that has threads is what DataLoader does by default on Linux
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker:UserWarning")  # where there is one core
@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
def test_workers_of_a_data_loader(method):
    data = Features(fastlstm.LSTM(I, H, backend="reference"))
    data.lstm(torch.randn(5, 1, I))[0].sum().backward()  # the parent has used autograd's threads
    workers = 2 if method == "fork" else 1  # a spawned one imports torch
    loader = DataLoader(data, num_workers=workers, multiprocessing_context=method, timeout=PATIENCE)
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.stack([data[index] for index in range(4)]))


def train_shared(lstm: fastlstm.LSTM) -> None:
    """Make one step on weights that another process holds."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    lstm(make_input("unsorted"))[0].data.sum().backward()
    optimizer.step()


def test_a_module_shared_with_another_process():
    lstm = fastlstm.LSTM(I, H, num_layers=2).share_memory()
    expected = copy.deepcopy(lstm)
    x = make_input("unsorted")
    before = lstm(x)[0].data
    train_shared(expected)
    process: Any = torch.multiprocessing.get_context(FRESH).Process(target=train_shared, args=(lstm,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert not torch.equal(lstm(x)[0].data, before)
    torch.testing.assert_close(lstm.state_dict(), expected.state_dict())


IMPORT = """
import os, sys, time
begin = time.process_time()
import torch
print("torch", time.process_time() - begin, flush=True)
loaded = set(sys.modules)
for _ in range(6):
    if os.fork() == 0:  # each child imports it for the first time
        begin = time.process_time()
        import fastlstm
        print("fastlstm", time.process_time() - begin, flush=True)
        os._exit(0)
    os.wait()
import fastlstm
print("modules", *sorted({name.split(".")[0] for name in set(sys.modules) - loaded}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_import_is_quick_and_loads_nothing_else():
    """Over torch's own import: at most a twentieth of its time, no triton, no package but ours."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=PATIENCE
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    torchs, *times = [float(line[1]) for line in lines if line[0] in ("torch", "fastlstm")]
    assert len(times) == 6
    # the first one may compile the source; a child of fork pays about twice for touching torch's pages
    assert min(times) < torchs / 20, (torchs, times)
    (modules,) = (line[1:] for line in lines if line[0] == "modules")
    assert "fastlstm" in modules
    assert not {name for name in modules if name not in sys.stdlib_module_names} - {"fastlstm"}
