"""What the tests share: the one tolerance table, assert_close, and an LSTM run that returns every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastlstm.autograd import lstm_layer

LENGTHS = (6, 4, 4, 1)  # a run of equal batch sizes, a tie, and a row of one step


@dataclass(frozen=True)
class Tolerance:
    """How far from the float64 truth a result may be.

    The error may be at most `factor` times the error of plain torch in the same dtype, plus `atol`; errors are
    maxima over the tensor, relative to the largest magnitude in the float64 truth (or to 1 where that is smaller).
    """

    factor: float
    atol: float


# atol is about one unit in the last place for the 16-bit types, and what a few hundred additions cost for the others
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(factor=2.0, atol=1e-12),
    torch.float32: Tolerance(factor=2.0, atol=2e-6),
    torch.float16: Tolerance(factor=2.0, atol=1e-3),
    torch.bfloat16: Tolerance(factor=2.0, atol=8e-3),
}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, relative to the largest magnitude in `truth` or to 1 where that is smaller."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - truth.detach().double()).abs().max().item()
    return difference / max(1.0, truth.detach().double().abs().max().item())


def assert_close(
    actual: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    stock: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Assert that every named tensor in `actual` is as near to `truth` as the tolerance of `dtype` asks.

    Args:
        actual: name -> tensor under test.
        truth: name -> float64 result; must hold exactly the same names and shapes.
        stock: name -> plain torch's result in the same dtype, whose own error sets the allowance. None allows
            `atol` only.
        dtype: the row of the tolerance table.
    """
    tolerance = TOLERANCES[dtype]
    assert actual.keys() == truth.keys(), f"names differ: {sorted(actual)} against {sorted(truth)}"
    failures = []
    for name, expected in truth.items():
        got = actual[name]
        assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        error = relative_error(got, expected)
        allowed = tolerance.atol + (tolerance.factor * relative_error(stock[name], expected) if stock else 0.0)
        if not error <= allowed:  # a NaN fails too
            failures.append(f"{name}: error {error:.3e} exceeds {allowed:.3e}")
    assert not failures, f"{dtype}:\n  " + "\n  ".join(failures)


def run_lstm(lstm: torch.nn.Module, x: Tensor | PackedSequence, hx=None, seed: int = 0) -> dict[str, Tensor]:
    """Run `lstm` forward and backward; return output, h_n, c_n and the gradient of everything, by name.

    The cotangents of output, h_n and c_n are random, from `seed`, drawn in float64 and so equal across dtypes.
    Gradients are named dx, dh0, dc0 (when hx is given) and d<parameter>.
    """
    data = (x.data if isinstance(x, PackedSequence) else x).detach().clone().requires_grad_()
    inputs = x._replace(data=data) if isinstance(x, PackedSequence) else data
    if hx is not None:
        hx = tuple(state.detach().clone().requires_grad_() for state in hx)
    output, (h_n, c_n) = lstm(inputs, hx)
    output_data = output.data if isinstance(output, PackedSequence) else output

    generator = torch.Generator().manual_seed(seed)
    results = {"output": output_data, "h_n": h_n, "c_n": c_n}
    cotangents = [
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
        for value in results.values()
    ]
    wanted = {"dx": data, **({"dh0": hx[0], "dc0": hx[1]} if hx else {})}
    wanted |= {f"d{name}": parameter for name, parameter in lstm.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), cotangents)
    return {name: value.detach() for name, value in results.items()} | dict(zip(wanted, gradients, strict=True))


class Layer(nn.Module):
    """One layer through `lstm_layer`, with nn.LSTM's parameters and call."""

    def __init__(self, stock: nn.LSTM, backend: str = "reference"):
        super().__init__()
        for name, parameter in stock.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        self.backend = backend

    def run(self, data: Tensor, hx: tuple[Tensor, Tensor], batch_sizes: Tensor | None):
        rows = data.reshape(-1, data.shape[-1])
        output, h_n, c_n = lstm_layer(rows, *hx, list(self.parameters()), batch_sizes, self.backend)
        return output.reshape(*data.shape[:-1], -1), (h_n, c_n)

    def forward(self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor]):
        if not isinstance(x, PackedSequence):
            return self.run(x, hx, None)
        output, states = self.run(x.data, hx, x.batch_sizes)
        return x._replace(data=output), states


def make_layer_inputs(I, H, P=0, D=1, bias=True, lengths=LENGTHS, packed=False, dtype=torch.float64):  # noqa: E741
    """Return a one-layer nn.LSTM, an input (of `lengths` if packed, else of the longest), and (h0, c0)."""
    torch.manual_seed(1)
    stock = nn.LSTM(I, H, bias=bias, bidirectional=D == 2, proj_size=P, dtype=dtype)
    if packed:
        x = pack_sequence([torch.randn(n, I, dtype=dtype) for n in lengths])
    else:
        x = torch.randn(max(lengths), len(lengths), I, dtype=dtype)
    hx = (torch.randn(D, len(lengths), P or H, dtype=dtype), torch.randn(D, len(lengths), H, dtype=dtype))
    return stock, x, hx
