"""Forward and backward of dense input ask the host for nothing, and so can be captured in a CUDA graph and replayed."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

import fastlstm
from fastlstm.dispatch import interpreting
from fastlstm.kernels import launch

H = 20
# what waits for the device when it is not the CPU
ASKING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._to_copy", "aten.copy_")


class Asked(TorchDispatchMode):
    """Collects ops that would make the host wait, or that bring data from it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        moves = name not in ASKING[-2:] or any(isinstance(a, Tensor) and a.dtype == torch.int64 for a in args)
        if name in ASKING and moves:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def run(batch_sizes: Tensor | None) -> None:
    N, D, B = 12, 2, 4
    rows = len(batch_sizes) * B if batch_sizes is not None else N
    gates_x, w_hh = torch.randn(rows, D * 4 * H), torch.randn(D, 4 * H, H)
    h0, c0 = torch.randn(2, D, B, H)
    output, h_n, c_n, gates, cells = launch.lstm_forward(gates_x, h0, c0, w_hh, None, batch_sizes, True)
    launch.lstm_backward(output, h_n, c_n, gates, cells, c0, w_hh, None, batch_sizes)


@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
def test_dense_input_asks_the_host_for_nothing():
    with Asked() as asked:
        run(None)
    assert asked.found == []
    with Asked() as asked:  # what this test sees: lengths come from the host
        run(torch.tensor([4, 4, 4]))
    assert asked.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("hidden_size", [64, 512], ids=["resident", "persistent"])
def test_capture_and_replay(hidden_size, recompute):
    options = {"num_layers": 2, "device": "cuda", "dtype": torch.bfloat16}
    lstm = fastlstm.LSTM(16, hidden_size, **options, backend="triton", recompute=recompute)
    x = torch.randn(10, 8, 16, device="cuda", dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        output, _ = lstm(x)
        return [output, *torch.autograd.grad(output.float().square().sum(), list(lstm.parameters()))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and fills what is looked up once
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        names = ["output", *(f"d{name}" for name, _ in lstm.named_parameters())]
        replayed = dict(zip(names, (tensor.clone() for tensor in captured), strict=True))
        expected = dict(zip(names, step(), strict=True))
        assert_close(replayed, {name: value.double() for name, value in expected.items()}, dtype=torch.bfloat16)
