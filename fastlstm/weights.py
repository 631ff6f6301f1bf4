"""How the flat list of an LSTM's weights becomes what the ops and kernels take: by direction, by kind, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import checks

# w_ih [4H, I], w_hh [4H, P], b_ih [4H], b_hh [4H], w_hr [P, H] of one direction
DirectionWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def directions(weights: Sequence[Any], count: int) -> list[DirectionWeights]:
    """Return the weights of each of `count` directions of layers, in torch's flat order, with None for the missing."""
    found: list[DirectionWeights] = []
    for w_ih, w_hh, *rest in checks.groups(weights, count):
        b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
        found.append((w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None))
    return found


def spread(weights: Sequence[Any], D: int) -> list[Any]:
    """Return the weights of one layer in a flat list, five a direction, with None for the missing."""
    return [weight for direction in directions(weights, D) for weight in direction]


def by_kind(flat: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Return the directions' w_ih, each [4H, I], their w_hh, each [4H, P], and their w_hr, each [P, H], or none."""
    w_ih, w_hh, w_hr = flat[0::5], flat[1::5], flat[4::5]
    return w_ih, w_hh, [] if w_hr[0] is None else w_hr


def biases(flat: Sequence[Any]) -> Tensor | None:
    """Return the sum of both biases of each direction, [D*4H], or None."""
    b_ih, b_hh = flat[2::5], flat[3::5]
    return None if b_ih[0] is None else join(b_ih) + join(b_hh)


def by_layer(flat: Sequence[Any]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return a stack's weights: w_ih of the first layer, w_ih [L-1, 4H, H] of the rest, w_hh of all, each [4H, H]."""
    return flat[0], stack_tensors(flat[5::5]), flat[1::5]


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return `torch.cat` of them, without a copy where there is one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def stack_tensors(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """Return `torch.stack` of them, without a copy where there is one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
