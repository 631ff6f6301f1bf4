"""Weights of other packages' LSTMs: a network that loads them computes what the other would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastlstm
from fastlstm.migration import from_flashrnn, from_haste

T, B, I, H = 7, 3, 5, 6  # noqa: E741


def run(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    lstm = fastlstm.LSTM(I, H, dtype=torch.float64)
    lstm.load_state_dict(state)
    output, (_, c_n) = lstm(x)
    return output, c_n[0]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_haste() -> None:
    kernel, recurrent_kernel, bias, x = randn(I, 4 * H), randn(H, 4 * H), randn(4 * H), randn(T, B, I)

    # as haste's kernel does it: columns i, g, f, o
    h = c = x.new_zeros(B, H)
    outputs = []
    for x_t in x:
        i, g, f, o = (x_t @ kernel + h @ recurrent_kernel + bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)

    output, c_n = run(from_haste(kernel, recurrent_kernel, bias), x)
    torch.testing.assert_close(output, torch.stack(outputs))
    torch.testing.assert_close(c_n, c)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_flashrnn(heads: int) -> None:
    weight, R, b, x = (
        randn(4 * H, I),
        randn(4, heads, H // heads, H // heads),
        randn(4, heads, H // heads),
        randn(T, B, I),
    )

    # as FlashRNN states it: gate, head, unit; R is applied head by head to its last dimension
    h = c = x.new_zeros(B, heads, H // heads)
    outputs = []
    for x_t in x:
        gates = (x_t @ weight.T).view(B, *b.shape) + torch.einsum("bhp,ghdp->bghd", h, R) + b
        i, f, z, o = gates.unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h.flatten(1))

    output, c_n = run(from_flashrnn(weight, R, b), x)
    torch.testing.assert_close(output, torch.stack(outputs))
    torch.testing.assert_close(c_n, c.flatten(1))


def test_results_are_new_tensors() -> None:
    parameters = [torch.nn.Parameter(randn(*shape)) for shape in ((4 * H, I), (4, 1, H, H), (4, 1, H))]
    state = from_flashrnn(*parameters)
    addresses = {parameter.data_ptr() for parameter in parameters}
    for name, tensor in state.items():
        assert not tensor.requires_grad, name
        assert tensor.is_contiguous(), name
        assert tensor.data_ptr() not in addresses, name


@pytest.mark.parametrize(
    ("convert", "shapes", "named"),
    [
        (from_haste, ((I, 4 * H), (H, 3 * H), (4 * H,)), "recurrent_kernel"),
        (from_haste, ((I, 3 * H), (H, 4 * H), (4 * H,)), "kernel"),
        (from_haste, ((I, 4 * H), (H, 4 * H), (H,)), "bias"),
        (from_flashrnn, ((4 * H, I), (4, 2, 3, 4), (4, 2, 3)), "R of size"),
        (from_flashrnn, ((4 * H, I), (4, 2, 3, 3), (4, 3, 2)), "b of size"),
        (from_flashrnn, ((3 * H, I), (4, 2, 3, 3), (4, 2, 3)), "weight of size"),
    ],
)
def test_wrong_shapes_are_named(convert, shapes: tuple[tuple[int, ...], ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        convert(*(torch.zeros(shape) for shape in shapes))
