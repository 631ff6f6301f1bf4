"""Backward recurrence with W_hh spread over the programs of one launch, for all T.

    dgates_t, dc_{t-1} = adjoint of cell(dy_t + dh_t, dc_t);  dh_{t-1} = dgates_t W_hh       for all t, from the last

The counterpart of forward_persistent.py, split the same way: a program owns BLOCK_H hidden units, so it computes
4 * BLOCK_H columns of dgates_t and holds the rows of W_hh that they multiply. Their product is a part of dh_{t-1} for
*every* unit; the parts go through L2, and each program adds up those of its own units, always in the same order, so
that results are deterministic. One barrier a step. Gathering dgates instead would need a transposed W_hh on chip and
4x the bytes of h through L2.

With STACK all layers of a stack run in one launch (wavefront.py): dgates_t [W_hh | W_ih] gives parts of dh_{t-1} and of
dy_t of the layer below, which the program with the same units adds up and leaves in d_output for that layer to find.
"""

import triton
import triton.language as tl

from .barrier import arrive, slot, wait, wait_unless
from .cell import cell_backward, dot, first_row, gate_rows, join_gates, load_gates, rounded, store_gates


@triton.jit
def load_rows_t(w_ptrs, k0, SIZE: tl.constexpr):
    """Columns [k0, k0 + SIZE) of a tile of rows of W_hh, transposed."""
    return tl.load(w_ptrs + (k0 + tl.arange(0, SIZE))[:, None])


@triton.jit
def store_part(ptrs, k0, part, PROGRAMS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Store this program's part of dh for units from k0, [units, BLOCK_B], where the owner of each will read it."""
    k = k0 + tl.arange(0, part.shape[0])
    b = tl.arange(0, part.shape[1])
    offs = (k // BLOCK_H * (PROGRAMS * part.shape[1] * BLOCK_H) + k % BLOCK_H)[:, None] + b[None, :] * BLOCK_H
    tl.store(ptrs + offs, part.to(ptrs.dtype.element_ty))


@triton.jit
def add_parts(ptrs, p, PROGRAMS: tl.constexpr, PARTS: tl.constexpr):
    """The sum [BLOCK_H, BLOCK_B] of all programs' parts, which lie one after the other; PARTS of them are a tile."""
    PART: tl.constexpr = ptrs.shape[1] * ptrs.shape[2]
    # tiles are added up before their parts are, so that each thread sums only what it loads
    total = tl.zeros(ptrs.shape, tl.float32)
    for p0 in tl.static_range(0, PROGRAMS, PARTS):
        # L1 would only be polluted: a part is read once; that it is fresh is the barrier's work
        parts = tl.load(ptrs + p0 * PART, mask=p0 + p < PROGRAMS, other=0.0, cache_modifier=".cg")
        total += parts.to(tl.float32)
    return tl.trans(tl.sum(total, 0))


@triton.jit
def load_parts(ptrs, p, PROGRAMS: tl.constexpr, PARTS: tl.constexpr):
    """The tiles of parts that `add_parts` adds up, all on their way before the first is needed."""
    PART: tl.constexpr = ptrs.shape[1] * ptrs.shape[2]
    tiles = ()
    for p0 in tl.static_range(0, PROGRAMS, PARTS):
        tile = tl.load(ptrs + p0 * PART, mask=p0 + p < PROGRAMS, other=0.0, cache_modifier=".cg")
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def add_tiles(tiles):
    """The sum of parts that have been loaded, in the order of `add_parts`."""
    total = tiles[0].to(tl.float32)
    for n in tl.static_range(1, len(tiles)):
        total += tiles[n].to(tl.float32)
    return tl.trans(tl.sum(total, 0))


@triton.jit(do_not_specialize=["T", "B", "D", "first"])
def backward_persistent(
    d_output_ptr,  # [N, D*H]; of a stack only the last layer's is given
    dh_n_ptr,  # [D, B, H]
    dc_n_ptr,  # [D, B, H]
    gates_ptr,  # [N, D*4H], activated
    cells_ptr,  # [N, D*H], float32
    c0_ptr,  # [D, B, H]
    w_hh_ptr,  # [D, 4, UNITS, WIDTH]: W_hh, zeros beside it; of a stack W_ih from column UNITS on
    dgates_ptr,  # [N, D*4H]
    dc0_ptr,  # [D, B, H]
    partials_ptr,  # [2, groups, OWNERS, PROGRAMS, BLOCK_B, BLOCK_H]
    counters_ptr,  # [groups, 32] int32, zeros; a line each, for they are polled
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    T,
    B,
    D,
    first,  # group of this launch's first programs
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,
    PRECISION: tl.constexpr,
    VARLEN: tl.constexpr,
    KEPT: tl.constexpr,
    STREAM: tl.constexpr,
    THREADS: tl.constexpr,
    STACK: tl.constexpr,
    HIP: tl.constexpr,
):
    """One program runs BLOCK_H units of BLOCK_B rows of one direction back. Grid: (blocks of units, groups).

    Groups are numbered, and UNITS given, as in forward_persistent, and so is WIDTH, in a stack from twice UNITS.
    Columns of W_hh come in KEPT chunks of BLOCK_K, which stay on chip, and a tail: one chunk of TAIL_K that stays as
    well, or, with STREAM, as many as it takes, read each step.
    """
    tl.static_assert(BLOCK_K % BLOCK_H == 0 and TAIL_K % BLOCK_H == 0)
    pid_h = tl.program_id(0)
    group = tl.program_id(1)
    part = (first + group) % D  # direction, or layer of a stack
    direction = 0 if STACK else part
    b0 = ((first + group) // D * BLOCK_B).to(tl.int64)
    PROGRAMS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    UNITS: tl.constexpr = PROGRAMS * BLOCK_H
    TAIL: tl.constexpr = KEPT * BLOCK_K  # its first column
    COLUMNS: tl.constexpr = 2 * UNITS if STACK else H
    WIDTH: tl.constexpr = TAIL + (COLUMNS - TAIL + TAIL_K - 1) // TAIL_K * TAIL_K
    tl.static_assert(TAIL < COLUMNS and (STREAM or WIDTH == TAIL + TAIL_K))
    CHUNKS: tl.constexpr = KEPT if STREAM else KEPT + 1
    OWNERS: tl.constexpr = WIDTH // BLOCK_H
    PART: tl.constexpr = BLOCK_B * BLOCK_H
    PARTS: tl.constexpr = 16  # in one tile
    dtype = gates_ptr.dtype.element_ty

    b = tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_H)
    j = pid_h * BLOCK_H + u
    gate, unit = gate_rows(H, BLOCK_H, RUN=BLOCK_H)
    unit += pid_h * BLOCK_H
    mask_b = b0 + b < B
    mask = (j < H)[:, None] & mask_b[None, :]

    # offsets of this tile: in a state [D, B, H], in a row of h or c [D*H], in a row of gates [D*4H]
    offs_state = (part * B + b0) * H + j[:, None] + b[None, :] * H
    offs_h = part * H + j[:, None] + b[None, :] * (D * H)
    offs_gates = part * 4 * H + j[:, None] + b[None, :] * (D * 4 * H)

    # parts of dh change hands at partials[slot, group, owner, program]
    slot_size = tl.num_programs(1) * (OWNERS * PROGRAMS * PART)
    counter = counters_ptr + group * 32
    partials = partials_ptr + group.to(tl.int64) * (OWNERS * PROGRAMS * PART)
    part_ptrs = partials + pid_h * PART
    p = tl.arange(0, PARTS)[:, None, None]
    own_ptrs = partials + (pid_h * PROGRAMS + p) * PART + b[None, :, None] * BLOCK_H + u[None, None, :]
    # no wider vectors than deal one tile out over all threads: then each thread has every part of its own elements,
    # the sum stays inside it, and its result lies as gates, c and dy do
    own_ptrs = tl.max_contiguous(own_ptrs, (1, 1, max(1, PART // THREADS)))

    w_ptrs = w_hh_ptr + part.to(tl.int64) * (4 * UNITS * WIDTH) + ((gate * UNITS + unit) * WIDTH)[None, :]
    w_t = ()
    for n in tl.static_range(CHUNKS):
        w_t = w_t + (load_rows_t(w_ptrs, n * BLOCK_K, BLOCK_K if n < KEPT else TAIL_K),)
    if STREAM:
        w_tail = load_rows_t(w_ptrs, TAIL, TAIL_K)

    dh = tl.load(dh_n_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)
    dc = tl.load(dc_n_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)
    c0 = tl.load(c0_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)

    if VARLEN:
        lengths = tl.load(lengths_ptr + b0 + b, mask=mask_b, other=0).to(tl.int32)
        zeros = tl.zeros_like(lengths)  # a comparison joins a mask only as a tensor of its shape
        T = tl.load(lengths_ptr + b0).to(tl.int32)  # lengths fall: no row of this tile is longer
    # direction 0 went up in time, so back means down
    t = (1 - direction) * (T - 1)
    step = 2 * direction - 1
    t_next = tl.minimum(tl.maximum(t + step, 0), T - 1)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    row_next = first_row(t_next, B, offsets_ptr, VARLEN) + b0
    mask_t = mask & (t < lengths)[None, :] if VARLEN else mask
    i, f, g, o = load_gates(gates_ptr + row * (D * 4 * H) + offs_gates, mask_t, H)
    if STACK:
        # dy come from the layer above, two steps ahead of their use; the last layer has none above, and never waits
        up = tl.minimum(D - 1 - part, 1)
        counter_above = counter + up * 32
        mask_below = mask & (part * H + j >= H)[:, None]  # the first layer has none below
        dy_below_ptrs = own_ptrs + PROGRAMS * PROGRAMS * PART
        seen = up * tl.minimum(3, T + 1) * PROGRAMS
        wait(counter_above, seen)
        mask_next = mask & (t_next < lengths)[None, :] if VARLEN else mask
        dy_next = tl.load(d_output_ptr + row_next * (D * H) + offs_h, mask=mask_next, other=0.0, cache_modifier=".cg")
    dy = tl.load(d_output_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0)
    c = tl.load(cells_ptr + row * (D * H) + offs_h, mask=mask_t, other=0.0)

    for s in range(T):
        # what was saved arrives one step ahead of its use, its row number two; past the end the last is read again
        t_after = tl.minimum(tl.maximum(t_next + step, 0), T - 1)
        row_after = first_row(t_after, B, offsets_ptr, VARLEN) + b0
        mask_next = mask & (t_next < lengths)[None, :] if VARLEN else mask
        i_next, f_next, g_next, o_next = load_gates(gates_ptr + row_next * (D * 4 * H) + offs_gates, mask_next, H)
        if not STACK:
            dy_next = tl.load(d_output_ptr + row_next * (D * H) + offs_h, mask=mask_next, other=0.0)
        c_next = tl.load(cells_ptr + row_next * (D * H) + offs_h, mask=mask_next, other=0.0)

        # the cell before a row's first step is c0
        has_prev = t + step == t_next
        if VARLEN:
            has_prev = (t + step == t_next + zeros) & (t_next < lengths)
            has_prev = has_prev[None, :]
        c_prev = tl.where(has_prev, c_next, c0)
        dh += dy.to(tl.float32)
        i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
        di, df, dg, do, dc_new = cell_backward(dh, dc, i, f, g, o, c_prev, c)
        di, df, dg, do = di.to(dtype), df.to(dtype), dg.to(dtype), do.to(dtype)
        da = rounded(join_gates(di, df, dg, do, BLOCK_H, BLOCK_B, RUN=BLOCK_H), PRECISION)

        part_ptrs_s = part_ptrs + slot(s) * slot_size
        for n in tl.static_range(CHUNKS):
            store_part(part_ptrs_s, n * BLOCK_K, dot(w_t[n], da, PRECISION), PROGRAMS, BLOCK_H)
        if STREAM:
            for k0 in range(TAIL, WIDTH, TAIL_K):
                # one ahead; after the last comes the first, for the next step
                k_next = tl.where(k0 + TAIL_K < WIDTH, k0 + TAIL_K, TAIL)
                w_next = load_rows_t(w_ptrs, k_next, TAIL_K)
                store_part(part_ptrs_s, k0, dot(w_tail, da, PRECISION), PROGRAMS, BLOCK_H)
                w_tail = w_next
        arrive(counter, HIP)

        # nobody waits for this
        store_gates(dgates_ptr + row * (D * 4 * H) + offs_gates, di, df, dg, do, mask_t, H)

        wait(counter, (s + 1) * PROGRAMS)
        if STACK:
            dh_parts = load_parts(own_ptrs + slot(s) * slot_size, p, PROGRAMS, PARTS)
            dy_parts = load_parts(dy_below_ptrs + slot(s) * slot_size, p, PROGRAMS, PARTS)
            # the dy of the step after next, while both are on their way: one latency instead of three
            seen = wait_unless(counter_above, up * tl.minimum(s + 4, T + 1) * PROGRAMS, seen)
            mask_after = mask & (t_after < lengths)[None, :] if VARLEN else mask
            dy_ptrs = d_output_ptr + row_after * (D * H) + offs_h
            dy_after = tl.load(dy_ptrs, mask=mask_after, other=0.0, cache_modifier=".cg")
            dh_new = add_tiles(dh_parts)
            dy_below = add_tiles(dy_parts).to(dtype)
            tl.store(d_output_ptr + row * (D * H) + offs_h - H, dy_below, mask=mask_t & mask_below)
        else:
            # tile by tile: streaming, the tiles of W_hh leave no registers to hold all parts
            dh_new = add_parts(own_ptrs + slot(s) * slot_size, p, PROGRAMS, PARTS)
        # dy is 0 where a row is not active
        dh = tl.where((t < lengths)[None, :], dh_new, dh) if VARLEN else dh_new
        dc = tl.where((t < lengths)[None, :], dc_new, dc) if VARLEN else dc_new
        t = t_next
        t_next = t_after
        row = row_next
        row_next = row_after
        mask_t = mask_next
        i, f, g, o = i_next, f_next, g_next, o_next
        dy = dy_next
        if STACK:
            dy_next = dy_after
        c = c_next

    if STACK:
        arrive(counter, HIP)  # publishes the last dy
    tl.store(dc0_ptr + offs_state, dc.to(dtype), mask=mask)
