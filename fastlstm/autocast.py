"""Mixed precision: what autocast makes of an LSTM call that is not one of its own ops.

Inside a region of `torch.autocast` a call computes in the region's dtype, on copies of its inputs and weights in that
dtype, and gives results in the dtypes that stock gives. Its backward computes as its forward did, wherever it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from fastlstm import cpu_rules


def dtype_for(data: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast asks for on the device of `data`, or None; it leaves float64 alone."""
    if not _is_on(data.device) or not torch.is_autocast_enabled(data.device.type):
        return None
    return None if data.dtype == torch.float64 else torch.get_autocast_dtype(data.device.type)


def _is_on(device: torch.device) -> bool:
    """Whether some region is entered, and the device may have one: the meta device has none, and torch raises."""
    return torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device.type)


@contextmanager
def off(device: torch.device) -> Iterator[None]:
    """Leave every dtype as it is."""
    if not _is_on(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in the dtype of autocast, the same copy throughout a region where autocast would keep one.

    Autocast keeps copies of float32 leaves that want a gradient, until the outermost region ends, and shows them to
    its own ops alone. So one of those, over no rows, is asked what it saved for its backward.
    """
    kept = weight.dim() == 2 and weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()
    if not kept or torch.compiler.is_compiling():
        return weight.to(dtype)
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):  # or a checkpoint would see it
        product: Any = F.linear(weight.new_empty(0, weight.shape[1], dtype=dtype, requires_grad=True), weight)
        copy = getattr(product.grad_fn, "_saved_mat2", None)
    return weight.to(dtype) if copy is None else copy.t()


def result_dtypes(
    data: Tensor, c0: Tensor, packed: bool, projected: bool, dtype: torch.dtype
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of (output and h_n, c_n) that stock gives for a call in a region of `dtype`.

    On a CPU without oneDNN it steps through ops of which autocast knows the GEMMs only, so that the cell stays in the
    dtype of c0, and with it what no GEMM follows. `packed` is false where all rows are as long: stock sees that, too.
    """
    if data.device.type != "cpu":
        return dtype, dtype
    onednn = cpu_rules.onednn_has(data.dtype, torch.is_grad_enabled())
    if onednn and not packed and not projected and c0.shape[1] > 0:
        return dtype, dtype
    cell = torch.promote_types(dtype, c0.dtype)
    return dtype if projected else cell, cell
