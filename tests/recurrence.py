"""A layer's recurrence with random inputs, run by the reference or by the kernels under any plan."""

from __future__ import annotations

import torch
from helpers import assert_close
from torch import Tensor

from fastlstm import reference
from fastlstm.kernels import launch
from fastlstm.plans import Plan, choose
from fastlstm.problem import Device, Problem

H100 = Device("cuda", "sm_90", processors=132)
FORWARD = ("output", "h_n", "c_n", "gates", "cells")
BACKWARD = ("dgates", "dc0", "dh")


class Run:
    """A layer's recurrence with random inputs, to run by any implementation.

    Args:
        H: hidden size.
        lengths: length of each row; dense unless `packed`, and then of the longest.
        dtype: of every tensor.
        D: directions.
        P: projection size, 0 for none.
        packed: whether `lengths` count.
    """

    def __init__(self, H, lengths, dtype, D=2, P=0, packed=False):
        T, B, hidden = max(lengths), len(lengths), P or H
        self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(T)]) if packed else None
        N = sum(lengths) if packed else T * B
        generator = torch.Generator().manual_seed(H + B)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.gates_x = draw(N, D * 4 * H)
        self.h0, self.c0 = draw(D, B, hidden), draw(D, B, H)
        self.w_hh = draw(D, 4 * H, hidden) / H**0.5
        self.w_hr = draw(D, P, H) / H**0.5 if P else None
        self.cotangents = [draw(N, D * hidden), draw(D, B, hidden), draw(D, B, H)]

    def plan(self, regime: str | Plan, backward: bool) -> Plan:
        """What an H100 would run in a regime; any size will do for the stepwise kernels."""
        if isinstance(regime, Plan):
            return regime
        _, B, H = self.c0.shape
        size = H if regime == "resident" else 4096
        plan = choose(Problem(1, B, size, size, dtype=self.c0.dtype), H100, backward)
        assert plan.regime == regime
        return plan

    def to(self, *args) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return copies of what forward takes and of the cotangents, in another dtype or on another device."""
        inputs = (self.gates_x, self.h0, self.c0, self.w_hh, self.w_hr)
        copies = [None if tensor is None else tensor.to(*args, copy=True) for tensor in inputs]
        return copies, [tensor.to(*args, copy=True) for tensor in self.cotangents]

    def by_reference(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        inputs, cotangents = self.to(device, dtype)
        forward = reference.lstm_forward(*inputs, self.batch_sizes, True)  # pyright: ignore
        results: dict[str, Tensor] = dict(zip(FORWARD, forward, strict=True))
        backward = reference.lstm_backward(*cotangents, *forward[3:], *inputs[2:], self.batch_sizes)  # pyright: ignore
        results |= dict(zip(BACKWARD, backward, strict=True))
        return {name: tensor.cpu() for name, tensor in results.items()}

    def by_kernels(self, regime: str | Plan, device: torch.device) -> dict[str, Tensor]:
        inputs, cotangents = self.to(device)
        plans = self.plan(regime, False), self.plan(regime, True)
        forward = launch.lstm_forward(*inputs, self.batch_sizes, True, plans[0])  # pyright: ignore
        results = {name: tensor.clone() for name, tensor in zip(FORWARD, forward, strict=True)}
        saved = (*forward[3:], *inputs[2:])
        backward = launch.lstm_backward(*cotangents, *saved, self.batch_sizes, plans[1])  # pyright: ignore
        results |= dict(zip(BACKWARD, backward, strict=True))
        return {name: tensor.cpu() for name, tensor in results.items()}

    def check_digits(self, scale: float, regime: str | Plan, device: torch.device) -> None:
        """Assert that results of numbers of that size are right to some units in the last place of their own size."""
        for tensor in (self.gates_x, self.h0, self.c0):
            tensor *= scale
        results, expected = self.by_kernels(regime, device), self.by_reference(torch.float64)
        for name, tensor in results.items():
            if not tensor.numel():
                continue
            error = (tensor.double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-6, f"{name}: {error}"

    def check(self, regime: str | Plan, device: torch.device) -> dict[str, Tensor]:
        """Assert that the kernels are as near the float64 truth as plain torch in the same dtype on the same device."""
        dtype = self.c0.dtype
        results = self.by_kernels(regime, device)
        assert_close(results, self.by_reference(torch.float64), self.by_reference(dtype, device), dtype=dtype)
        for name, tensor in results.items():
            assert tensor.dtype == (torch.float32 if name == "cells" else dtype), name
        # the state is never rounded to 16 bit
        assert dtype == torch.float32 or not torch.equal(results["cells"], results["cells"].to(dtype).float())
        return results
