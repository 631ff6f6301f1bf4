"""One step of the backward recurrence, any size: dh from the step before, then the adjoint of the cell, one launch.

    dh_t = dgates_{t+1} W_hh;  dgates_t, dc_{t-1} = adjoint of cell(dy_t + dh_t, dc_t)      for one t a direction

The counterpart of forward_stepwise.py; (t+1 and t-1 change places in direction 1, which runs time backwards).
"""

import triton
import triton.language as tl

from .cell import cell_backward, dot_apart, first_row, load_gates, rounded, store_gates


@triton.jit(do_not_specialize=["s", "T", "B"])
def backward_stepwise(
    d_output_ptr,  # [N, D*H]
    dh_n_ptr,  # [D, B, H]
    dc_ptr,  # [D, B, H] float32, dc_n before the first step, updated in place
    gates_ptr,  # [N, D*4H], activated
    cells_ptr,  # [N, D*H], float32
    c0_ptr,  # [D, B, H]
    w_hh_ptr,  # [D, 4H, H]
    dgates_ptr,  # [N, D*4H]
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    s,
    T,
    B,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """One program takes BLOCK_H hidden units of BLOCK_B rows one step back. Grid: (units, rows, D), in blocks."""
    pid_h = tl.program_id(0)
    pid_b = tl.program_id(1)
    direction = tl.program_id(2)
    D = tl.num_programs(2)

    b = tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    j = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_b = pid_b * BLOCK_B + b < B
    mask = (j < H)[:, None] & mask_b[None, :]

    # s counts from the last step of the forward pass; `after` is the time it visited after t, `before` before t
    t = T - 1 - s + direction * (2 * s - T + 1)
    after = t + 1 - 2 * direction
    before = t - 1 + 2 * direction
    b0 = (pid_b * BLOCK_B).to(tl.int64)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    row_after = first_row(tl.minimum(tl.maximum(after, 0), T - 1), B, offsets_ptr, VARLEN) + b0
    row_before = first_row(tl.minimum(tl.maximum(before, 0), T - 1), B, offsets_ptr, VARLEN) + b0
    # a row's end in time is its own length
    length = tl.full((BLOCK_B,), 0, tl.int32) + T
    if VARLEN:
        length = tl.load(lengths_ptr + pid_b * BLOCK_B + b, mask=mask_b, other=0).to(tl.int32)
    has_after = ((after >= 0) & (after < length))[None, :]
    has_before = ((before >= 0) & (before < length))[None, :]
    mask_t = mask & (t < length)[None, :]

    # first element of this tile of a state [D, B, H]
    state = (direction * B + b0) * H
    offs_state = j[:, None] + b[None, :] * H
    offs_h = direction * H + j[:, None] + b[None, :] * (D * H)
    offs_gates = direction * 4 * H + j[:, None] + b[None, :] * (D * 4 * H)
    w_ptrs = w_hh_ptr + direction.to(tl.int64) * 4 * H * H + k[None, :] * H + j[:, None]
    da_ptrs = dgates_ptr + row_after * (D * 4 * H) + direction * 4 * H + k[:, None] + b[None, :] * (D * 4 * H)

    dh = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    mask_after = has_after & mask_b[None, :]
    for k0 in range(0, 4 * H, BLOCK_K):
        w_t = tl.load(w_ptrs + k0 * H, mask=(j < H)[:, None] & (k0 + k < 4 * H)[None, :], other=0.0)
        da = tl.load(da_ptrs + k0, mask=(k0 + k < 4 * H)[:, None] & mask_after, other=0.0)
        dh += dot_apart(rounded(w_t, PRECISION), rounded(da, PRECISION), PRECISION)
    dh_n = tl.load(dh_n_ptr + state + offs_state, mask=mask, other=0.0).to(tl.float32)
    dh = tl.where(has_after, dh, dh_n)
    dh += tl.load(d_output_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0).to(tl.float32)
    dc = tl.load(dc_ptr + state + offs_state, mask=mask, other=0.0)

    i, f, g, o = load_gates(gates_ptr + row * (D * 4 * H) + offs_gates, mask_t, H)
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    c = tl.load(cells_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0)
    c_before = tl.load(cells_ptr + row_before * (D * H) + offs_h, mask=mask & has_before, other=0.0)
    c0 = tl.load(c0_ptr + state + offs_state, mask=mask, other=0.0).to(tl.float32)

    di, df, dg, do, dc = cell_backward(dh, dc, i, f, g, o, tl.where(has_before, c_before, c0), c)

    store_gates(dgates_ptr + row * (D * 4 * H) + offs_gates, di, df, dg, do, mask_t, H)
    tl.store(dc_ptr + state + offs_state, dc, mask=mask_t)
