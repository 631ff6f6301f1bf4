"""Weights of other packages' LSTMs in torch's layout. `docs/migration.md` says how to use them.

torch stacks the gates i, f, g, o along the rows of weight_ih [4H, I] and weight_hh [4H, H]. What other packages keep is
stated with each function, and comes from their sources.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_haste(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Return the state_dict of a one-layer `fastlstm.LSTM` that computes what a `haste_pytorch.LSTM` does.

    haste multiplies from the right and orders the gates i, g, f, o. Its zoneout and DropConnect are no part of the
    weights; in eval mode haste's DropConnect is off, and so is what remains to be compared.

    Args:
        kernel: [I, 4H], haste's parameter of that name.
        recurrent_kernel: [H, 4H], likewise.
        bias: [4H], likewise; it holds the forget gate's bias.

    Returns:
        weight_ih_l0 [4H, I], weight_hh_l0 [4H, H], bias_ih_l0 [4H] and a bias_hh_l0 [4H] of zeros: new tensors.

    Raises:
        ValueError: the shapes are not those of one layer.

    Example:
        >>> import torch, fastlstm
        >>> from fastlstm.migration import from_haste
        >>> state = from_haste(torch.randn(3, 16), torch.randn(4, 16), torch.zeros(16))
        >>> fastlstm.LSTM(3, 4).load_state_dict(state)
        <All keys matched successfully>
    """
    H = recurrent_kernel.shape[0]
    for name, tensor, expected in (
        ("kernel", kernel, (*kernel.shape[:1], 4 * H)),
        ("recurrent_kernel", recurrent_kernel, (H, 4 * H)),
        ("bias", bias, (4 * H,)),
    ):
        if tensor.shape != expected:
            raise ValueError(f"Expected {name} of size {expected} for hidden_size={H}, got {tuple(tensor.shape)}")

    def reorder(columns: Tensor) -> Tensor:
        i, g, f, o = columns.detach().chunk(4, -1)
        return torch.cat([i, f, g, o], -1)

    return _state(reorder(kernel).t().contiguous(), reorder(recurrent_kernel).t().contiguous(), reorder(bias))


def from_flashrnn(weight: Tensor, R: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return the state_dict of a one-layer `fastlstm.LSTM` that computes what FlashRNN's function="lstm" does.

    `flashrnn(Wx, R, b)` takes the input's part of the gates, Wx [B, T, 4, heads, head_dim], from a linear layer of the
    caller's, whose weight is wanted here. Its gates are in torch's order (z is torch's g). Several heads are a
    block-diagonal recurrent matrix: the result has H = heads * head_dim and zeros between the heads, which training
    would fill.

    Args:
        weight: [4H, I], the linear layer's weight, its rows ordered as Wx is: gate, head, unit.
        R: [4, heads, head_dim, head_dim], the second last dimension that of the result ("GHDP").
        b: [4, heads, head_dim], with a bias of the linear layer's added to it.

    Returns:
        weight_ih_l0 [4H, I], weight_hh_l0 [4H, H], bias_ih_l0 [4H] and a bias_hh_l0 [4H] of zeros: new tensors.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> import torch, fastlstm
        >>> from fastlstm.migration import from_flashrnn
        >>> state = from_flashrnn(torch.randn(24, 3), torch.randn(4, 2, 3, 3), torch.zeros(4, 2, 3))
        >>> fastlstm.LSTM(3, 6).load_state_dict(state)
        <All keys matched successfully>
    """
    if R.dim() != 4 or R.shape[0] != 4 or R.shape[2] != R.shape[3]:
        raise ValueError(f"Expected R of size (4, heads, head_dim, head_dim), got {tuple(R.shape)}")
    _, heads, head_dim, _ = R.shape
    rows = 4 * heads * head_dim
    if b.shape != R.shape[:3]:
        raise ValueError(f"Expected b of size {tuple(R.shape[:3])} beside R, got {tuple(b.shape)}")
    if weight.dim() != 2 or weight.shape[0] != rows:
        raise ValueError(f"Expected weight of size ({rows}, input_size) beside R, got {tuple(weight.shape)}")
    w_hh = torch.cat([torch.block_diag(*gate) for gate in R.detach()])
    return _state(weight.detach().clone(), w_hh, b.detach().flatten().clone())


def _state(w_ih: Tensor, w_hh: Tensor, bias: Tensor) -> dict[str, Tensor]:
    tensors = (w_ih, w_hh, bias, torch.zeros_like(bias))
    return dict(zip(("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"), tensors, strict=True))
