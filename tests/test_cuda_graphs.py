"""Forward and backward ask a GPU for nothing and bring nothing to it: a CUDA graph can hold them, and replay them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("triton")

from recurrence import H100
from scheduler import scheduled
from triton.runtime import interpreter

import fastlstm
from fastlstm import functional, ops, packing
from fastlstm.dispatch import interpreting
from fastlstm.kernels import launch

LENGTHS = (1, 2, 2)
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class OnHost(Tensor):
    """What lies in the host's memory, where what lies in the CPU's stands for a GPU's."""

    device: Any = torch.device("cpu", 1)
    __torch_function__: Any = torch._C._disabled_torch_function_impl


class Places(TorchDispatchMode):
    """Collects ops that bring data from the host to the device, or that make the host wait, and kernels on the host's.

    What is computed from the host's tensors alone is the host's, where no device is named. It does not see `tolist`.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastlstm":  # look into it
            run = interpreter.InterpretedFunction.run

            def watched(kernel, *args, **kwargs):
                self.found += [name for name, value in kwargs.items() if isinstance(value, OnHost)]
                run(kernel, *args, **kwargs)

            with OnHost.device, self, patch.object(interpreter.InterpretedFunction, "run", watched):
                return getattr(ops, func._opname)._init_fn(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_host = [isinstance(tensor, OnHost) for tensor in tensors]
        to_host = kwargs["device"] == OnHost.device if kwargs.get("device") else all(from_host)
        if func is torch.ops.aten.lift_fresh.default:  # torch.tensor, of numbers
            to_host = True
        brings = any(from_host) and not to_host and func is not torch.ops.aten.empty_like.default
        if brings or (WAITING & set(func.tags) and not all(from_host) and not told_the_size(func, tensors, kwargs)):
            self.found.append(str(func))
        results = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(OnHost), results) if to_host else results


def told_the_size(func: Any, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether an op whose result may be of any size need not ask for it."""
    if func is torch.ops.aten.index.Tensor:
        return all(index.dtype == torch.int64 for index in tensors[1:])
    return kwargs.get("output_size") is not None


def step(lstm: Any, x: Any, hx: Any) -> list[Tensor]:
    """Return output, states and all gradients, without the graph: the next step, on another stream, has its own."""
    output, states = lstm(x, hx)
    data, rows = (value.data if isinstance(value, PackedSequence) else value for value in (x, output))
    results = [rows, *states]
    gradients = torch.autograd.grad(results, [data, *hx, *lstm.parameters()], results)
    return [*(result.detach() for result in results), *gradients]


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("resident", {}),
        ("resident", {"proj_size": 3}),
        ("resident", {"recompute": True}),
        ("resident", {"recompute": True, "proj_size": 3}),
        ("stepwise", {"bidirectional": False}),
        ("persistent", {}),
        ("wavefront", {"num_layers": 2, "bidirectional": False}),
    ],
    ids=str,
)
def test_nothing_is_brought_or_asked(regime, options, packed, monkeypatch):
    """From the module on, in the layouts of an H100."""
    for module in (functional, launch):
        monkeypatch.setattr(module, "device_of", lambda device: H100)
    H = 20 if regime == "resident" else 130
    lstm: Any = fastlstm.LSTM(5, H, **{"bidirectional": True, **options}, dtype=torch.float16)
    lstm.backend = f"triton {regime}"
    rows = [torch.randn(n, 5, dtype=torch.float16) for n in LENGTHS]
    x: Any = pack_sequence(rows, enforce_sorted=False) if packed else torch.stack([rows[1]] * len(LENGTHS), 1)
    (x.data if packed else x).requires_grad_()
    sizes = lstm.num_layers * (1 + lstm.bidirectional), len(LENGTHS)
    hx = [torch.randn(*sizes, P, dtype=torch.float16, requires_grad=True) for P in (lstm.proj_size or H, H)]
    assert fastlstm.explain(lstm, x, (hx[0], hx[1])).regime == regime

    with scheduled() if regime in ("persistent", "wavefront") else nullcontext():
        expected = step(lstm, x, hx)
        if packed:
            x = x._replace(batch_sizes=x.batch_sizes.as_subclass(OnHost))
            if not options:  # what this test sees, once: batch sizes are not brought
                with OnHost.device, Places() as places:
                    step(lstm, x, hx)
                assert places.found
            monkeypatch.setattr(packing, "capturing", lambda device: True)
        with OnHost.device, Places() as places:
            results = step(lstm, x, hx)
    assert places.found == []
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize(
    "asks",
    [
        lambda values: values.sum().item(),
        lambda values: values.nonzero(),
        lambda values: values[values > 0],
        lambda values: values.long().bincount(),
        lambda values: values.repeat_interleave(torch.ones_like(values).long()),
        lambda values: values + torch.ones(3),
        lambda values: values.index_select(0, torch.tensor([0])),
        lambda values: values.copy_(torch.ones(3)),
    ],
)
def test_what_is_found(asks):
    values = torch.ones(3)
    with OnHost.device, Places() as places:
        asks(values)
    assert places.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 64},
        {"hidden_size": 512},
        {"hidden_size": 512, "bidirectional": True},
        {"hidden_size": 64, "bidirectional": True, "proj_size": 32},
    ],
    ids=["resident", "wavefront", "persistent", "projection"],
)
def test_capture_and_replay(options, recompute, packed):
    """Data change from one replay to the next, lengths do not."""
    placed: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    lstm = fastlstm.LSTM(16, **options, num_layers=2, **placed, backend="triton", recompute=recompute)
    rows = [torch.randn(n, 16, **placed) for n in (10, 4, 7, 10, 1, 9, 9, 3)]
    x: Any = pack_sequence(rows, enforce_sorted=False) if packed else torch.stack([rows[0]] * len(rows), 1)
    inputs = [(x.data if packed else x).requires_grad_()]
    for P in (lstm.proj_size or lstm.hidden_size, lstm.hidden_size):
        inputs.append(torch.randn(2 * (1 + lstm.bidirectional), len(rows), P, **placed, requires_grad=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills what is looked up once
        for _ in range(3):
            step(lstm, x, inputs[1:])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(lstm, x, inputs[1:])
    names = ["output", "h_n", "c_n", "dx", "dh0", "dc0", *(f"d{name}" for name, _ in lstm.named_parameters())]
    for _ in range(2):
        for tensor in inputs:
            tensor.data.copy_(torch.randn_like(tensor))
        graph.replay()
        replayed = dict(zip(names, (tensor.clone() for tensor in captured), strict=True))
        expected = dict(zip(names, step(lstm, x, inputs[1:]), strict=True))
        assert_close(replayed, {name: value.double() for name, value in expected.items()}, dtype=torch.bfloat16)
