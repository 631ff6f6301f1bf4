"""All layers of a stack in one launch: right, race-free, and each fault is seen; where there is no room, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from barriers import MUTANTS, replaced
from helpers import assert_close
from recurrence import FORWARD
from scheduler import scheduled
from shadow_memory import RaceError

from fastlstm import autograd
from fastlstm.dispatch import interpreting
from fastlstm.kernels import backward_persistent, forward_persistent, launch
from fastlstm.plans import Plan

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")

# small enough for the interpreter
PLAN = Plan("wavefront", BLOCK_H=8, BLOCK_B=4, BLOCK_K=16, num_warps=1, TAIL_K=16, AHEAD=1)
LENGTHS = (5, 4, 4, 2, 1, 1)  # rows of one tile and of two


class Stack:
    """The recurrences of L layers with random inputs, to run layer by layer in plain torch or at once by the kernels."""

    def __init__(self, H: int, lengths: Iterable[int], dtype: torch.dtype, L: int, packed: bool = False):
        lengths = list(lengths)
        T, B = max(lengths), len(lengths)
        self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)]) if packed else None
        N = sum(lengths) if packed else T * B
        generator = torch.Generator().manual_seed(H + B + L)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.L, self.H, self.dtype = L, H, dtype
        self.gates_x, self.bias = draw(N, 4 * H), draw(L - 1, 4 * H)
        self.h0, self.c0 = draw(L, B, H), draw(L, B, H)
        self.w_ih, self.w_hh = draw(L - 1, 4 * H, H) / H**0.5, draw(L, 4 * H, H) / H**0.5
        self.cotangents = [draw(N, H), draw(L, B, H), draw(L, B, H)]

    def by_torch(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The layers in turn; layer 0's gates_x come out of a GEMM with the unit matrix."""
        eye = torch.eye(4 * self.H, dtype=dtype)
        tensors = (self.gates_x, self.bias, self.h0, self.c0, self.w_ih, self.w_hh, *self.cotangents)
        gates_x, bias, h0, c0, w_ih, w_hh, *cotangents = (tensor.to(dtype, copy=True) for tensor in tensors)
        zeros = torch.zeros(4 * self.H, dtype=dtype)
        flat = [eye, w_hh[0], zeros, zeros, None]
        for n in range(self.L - 1):
            flat += [w_ih[n], w_hh[n + 1], bias[n], zeros, None]
        forward = autograd._forward_stack(gates_x, h0, c0, flat, self.batch_sizes, True, "reference")
        d_output = torch.cat((gates_x.new_zeros(len(gates_x), (self.L - 1) * self.H), cotangents[0]), 1)
        saved = (*forward[3:], c0, w_ih, w_hh)
        backward = autograd._backward_stack(d_output, *cotangents[1:], *saved, self.batch_sizes, "reference")
        return dict(zip((*FORWARD, "dgates", "dc0"), (*forward, *backward), strict=True))

    def by_kernels(self, seed: int = 0, save: bool = True, **changes: int) -> dict[str, Tensor]:
        """Everything at once, in an order drawn from `seed`."""
        tensors = (self.gates_x, self.bias, self.h0, self.c0, self.w_ih, self.w_hh)
        plan = dataclasses.replace(PLAN, **changes)
        units = -(-self.H // plan.BLOCK_H) * plan.BLOCK_H
        plans = [
            dataclasses.replace(plan, KEPT=(columns - 1) // plan.BLOCK_K, AHEAD=1) for columns in (self.H, 2 * units)
        ]
        with scheduled(seed=seed):
            forward = launch.stack_forward(*tensors, self.batch_sizes, save, plans[0])
            assert forward is not None
            if not save:
                return dict(zip(FORWARD[:3], forward, strict=False))
            d_output = torch.full_like(forward[0], float("nan"))
            d_output[:, -self.H :] = self.cotangents[0]
            saved = (*forward[3:], self.c0, self.w_ih, self.w_hh)
            backward = launch.stack_backward(d_output, *self.cotangents[1:], *saved, self.batch_sizes, plans[1])
        assert backward is not None
        return dict(zip((*FORWARD, "dgates", "dc0"), (*forward, *backward), strict=True))

    def check(self, seed: int = 0, **changes: int) -> None:
        results = self.by_kernels(seed, **changes)
        assert_close(results, self.by_torch(torch.float64), self.by_torch(self.dtype), dtype=self.dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("H", "B", "L"), [(9, 2, 2), (16, 6, 2), (24, 3, 3)], ids=lambda value: str(value))
def test_against_float64(H, B, L, packed):
    for seed in range(2):
        Stack(H, LENGTHS[:B], torch.float32, L, packed).check(seed)
