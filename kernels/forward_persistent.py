"""Forward recurrence with W_hh spread over the programs of one launch, for all T.

    gates_t = gates_x_t + h_{t-1} W_hh^T;  c_t, h_t = cell(gates_t, c_{t-1})        for all t

A program owns BLOCK_H hidden units with their four gates: its 4 * BLOCK_H rows of W_hh are read once, its c stays in
registers. It needs all of h, and gives a part of it, each step: h goes through L2, with one barrier a step between
the programs of the same batch tile and direction. This is the regime for W_hh too large for one program but not for
the chip. Of a W_hh too large for the chip as well, KEPT chunks stay and the others are read from L2 each step.
The wrong tool where the grid cannot be on the chip at once: the launch must be cooperative.

With STACK all layers of a stack run in one launch (wavefront.py). A program then holds its rows of W_ih as well, and

    gates_t = bias + below_t W_ih^T + h_{t-1} W_hh^T

where below_t is the h_t of the layer below, which is a step or more ahead.
"""

import triton
import triton.language as tl

from .barrier import arrive, slot, wait, wait_unless
from .cell import activate, dot, first_row, gate_rows, rounded, split_gates, tanh


@triton.jit
def load_columns(w_ptrs, k0, SIZE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Columns [k0, k0 + SIZE) of a tile of rows of a weight; [SPLIT, rows, SIZE / SPLIT] if split."""
    w = rounded(tl.load(w_ptrs + (k0 + tl.arange(0, SIZE))[None, :]), PRECISION)
    if SPLIT > 1:
        # in the order in which `load_h` has the units
        WORD: tl.constexpr = 32 // w.dtype.primitive_bitwidth
        VECTOR: tl.constexpr = min(4 * WORD, SIZE // SPLIT // 4)
        w = tl.reshape(w, (w.shape[0], SPLIT, SIZE // SPLIT // (4 * VECTOR), 4, VECTOR // WORD, WORD))
        w = tl.reshape(tl.permute(w, (1, 0, 2, 4, 3, 5)), (SPLIT, w.shape[0], SIZE // SPLIT))
    return w


@triton.jit
def load_rows(
    w_ptrs,
    CHUNKS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of rows of a weight: the chunks of its columns that stay on the chip."""
    w = ()
    for n in tl.static_range(CHUNKS):
        w = w + (load_columns(w_ptrs, n * BLOCK_K, BLOCK_K if n < KEPT else TAIL_K, SPLIT, PRECISION),)
    return w


@triton.jit
def columns_of_h(BLOCK_B: tl.constexpr, SPLIT: tl.constexpr):
    """A tile's batch rows as `load_h` wants them beside the units of h: [1, BLOCK_B], or in two dimensions if split."""
    if SPLIT > 1:
        EIGHT: tl.constexpr = min(8, BLOCK_B)
        eights = tl.arange(0, BLOCK_B // EIGHT) * EIGHT
        b = eights[:, None, None, None, None, None] + tl.arange(0, EIGHT)[None, None, None, :, None, None]
    else:
        b = tl.arange(0, BLOCK_B)[None, :]
    return b


@triton.jit
def load_h(h_ptrs, k0, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Units [k0, k0 + SIZE) of h, [SIZE, BLOCK_B]; if split [SPLIT, SIZE / SPLIT, BLOCK_B], units in another order.

    The order of units is free, as long as W_hh has the same. The one here lets a thread load from L2 the very elements
    that it feeds to mma.sync, where they would change hands in shared memory, with two barriers a chunk. Four threads
    share a row of the batch, and the instruction takes a word (4 bytes) from each in turn. Each loads VECTOR elements
    that lie together, so the first words of all four are counted first, then the second ones.
    """
    # L1 would only be polluted: each value is read once. That it is fresh is the work of the barrier, whose acquire
    # comes before these loads; .cg alone would not order them
    if SPLIT > 1:
        WORD: tl.constexpr = 32 // h_ptrs.dtype.element_ty.primitive_bitwidth
        VECTOR: tl.constexpr = min(4 * WORD, SIZE // SPLIT // 4)
        RUNS: tl.constexpr = SIZE // SPLIT // (4 * VECTOR)
        tl.static_assert(VECTOR >= WORD, "a chunk has at least 4 words for each of SPLIT warps")
        # the compiler deals the dimensions out from the last on: a vector to a thread, to 4 * 8 threads, to SPLIT warps
        k = tl.arange(0, VECTOR)[None, None, None, None, None, :]
        k += tl.arange(0, 4)[None, None, None, None, :, None] * VECTOR
        k += tl.arange(0, SPLIT)[None, None, :, None, None, None] * (SIZE // SPLIT)
        k += tl.arange(0, RUNS)[None, :, None, None, None, None] * (4 * VECTOR)
        h = tl.load(h_ptrs + (k0 + k), cache_modifier=".cg")
        B: tl.constexpr = h.shape[0] * h.shape[3]
        h = tl.reshape(h, (h.shape[0], RUNS, SPLIT, h.shape[3], 4, VECTOR // WORD, WORD))
        h = tl.reshape(tl.permute(h, (2, 1, 5, 4, 6, 0, 3)), (SPLIT, SIZE // SPLIT, B))
    else:
        h = tl.load(h_ptrs + (k0 + tl.arange(0, SIZE))[:, None], cache_modifier=".cg")
    return h


@triton.jit
def load_hidden(
    h_ptrs, CHUNKS: tl.constexpr, KEPT: tl.constexpr, BLOCK_K: tl.constexpr, TAIL_K: tl.constexpr, SPLIT: tl.constexpr
):
    """All of h, in the same chunks."""
    h = ()
    for n in tl.static_range(CHUNKS):
        h = h + (load_h(h_ptrs, n * BLOCK_K, BLOCK_K if n < KEPT else TAIL_K, SPLIT),)
    return h


@triton.jit
def add_dots(parts, w, h, PRECISION: tl.constexpr):
    """Add the product of each chunk."""
    for n in tl.static_range(len(w)):
        parts += dot(w[n], h[n], PRECISION)
    return parts


@triton.jit
def place(step, STACK: tl.constexpr):
    """Slot of what was stored in `step`. In a stack each step has its own: the layer above may be any number behind."""
    return step if STACK else slot(step)


@triton.jit
def fold(parts, SPLIT: tl.constexpr):
    """Add up [SPLIT, rows, columns] over the first dimension, pair by pair.

    Unlike tl.sum it leaves the result dealt out over all warps: a split wants both halves in one thread, so that each
    thread fetches every part of its own elements, where a reduction would give every warp all of the sum.
    """
    parts = tl.permute(parts, (1, 2, 0))
    for n in tl.static_range(5):
        if 2**n < SPLIT:
            halves = tl.reshape(parts, (parts.shape[0], parts.shape[1], SPLIT // 2 ** (n + 1), 2))
            even, odd = tl.split(halves)
            parts = even + odd
    return tl.reshape(parts, (parts.shape[0], parts.shape[1]))


@triton.jit(do_not_specialize=["T", "B", "D", "first"])
def forward_persistent(
    gates_x_ptr,  # [N, D*4H]; of a stack [N, 4H], of its first layer
    w_hh_ptr,  # [D, 4, UNITS, WIDTH]: W_hh, zeros beside it; of a stack [D, 4, UNITS, 2*WIDTH]: then W_ih likewise
    h0_ptr,  # [D, B, H]
    c0_ptr,  # [D, B, H]
    output_ptr,  # [N, D*H]
    h_n_ptr,  # [D, B, H]
    c_n_ptr,  # [D, B, H]
    gates_ptr,  # [N, D*4H], activated; not touched without SAVE
    cells_ptr,  # [N, D*H], float32; not touched without SAVE
    exchange_ptr,  # [2, groups, BLOCK_B, WIDTH], zeros; of a stack [T + 1, ...]; holds h as the dots take it
    counters_ptr,  # [groups, 32] int32, zeros; a line each, for they are polled
    lengths_ptr,  # [B] int64, falling; not touched without VARLEN
    offsets_ptr,  # [T] int64; not touched without VARLEN
    bias_ptr,  # [D - 1, 4H], of the layers above the first; not touched without STACK
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
    SAVE: tl.constexpr,
    VARLEN: tl.constexpr,
    KEPT: tl.constexpr,
    STREAM: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
    STACK: tl.constexpr,
    HIP: tl.constexpr,
):
    """One program runs BLOCK_H units of BLOCK_B rows of one direction. Grid: (blocks of units, groups).

    Programs of the same rows and direction are a group, number D * tile + direction of all; a launch runs those from
    `first` on. WIDTH is H rounded up to whole chunks, UNITS to whole programs. With STACK, D counts layers and not
    directions; W_ih of the first is zeros.
    The dot's inner dimension comes in KEPT chunks of BLOCK_K, which stay on chip, and a tail: one chunk of TAIL_K that
    stays as well, or, with STREAM, as many as it takes, read each step. AHEAD chunks of h are on their way at once.
    SPLIT > 1 deals each chunk out over SPLIT warps, for tiles too small to give every warp rows of its own.
    """
    tl.static_assert(BLOCK_K % BLOCK_H == 0 and TAIL_K % BLOCK_H == 0)
    pid_h = tl.program_id(0)
    group = tl.program_id(1)
    programs = tl.num_programs(0)
    part = (first + group) % D  # direction, or layer of a stack
    direction = 0 if STACK else part
    b0 = ((first + group) // D * BLOCK_B).to(tl.int64)
    UNITS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H * BLOCK_H
    TAIL: tl.constexpr = KEPT * BLOCK_K  # its first column
    WIDTH: tl.constexpr = TAIL + (H - TAIL + TAIL_K - 1) // TAIL_K * TAIL_K
    tl.static_assert(TAIL < H and (STREAM or WIDTH == TAIL + TAIL_K))
    CHUNKS: tl.constexpr = KEPT if STREAM else KEPT + 1
    dtype = gates_x_ptr.dtype.element_ty

    b = tl.arange(0, BLOCK_B)
    j = pid_h * BLOCK_H + tl.arange(0, BLOCK_H)
    # plain order: the four gates of a unit lie in several warps whatever the order, and one exchange brings all
    gate, unit = gate_rows(H, BLOCK_H, RUN=BLOCK_H)
    unit += pid_h * BLOCK_H
    mask_b = b0 + b < B
    mask = (j < H)[:, None] & mask_b[None, :]
    mask_gates = (unit < H)[:, None] & mask_b[None, :]

    # offsets of this tile: in a state [D, B, H], in a row of h or c [D*H], in a row of gates [D*4H]
    offs_state = (part * B + b0) * H + j[:, None] + b[None, :] * H
    offs_h = part * H + j[:, None] + b[None, :] * (D * H)
    offs_gates = part * 4 * H + (gate * H + unit)[:, None] + b[None, :] * (D * 4 * H)
    x_ptr = gates_x_ptr
    stride_x = D * 4 * H
    offs_x = offs_gates
    if STACK:
        # the first layer adds gates_x, the others the same bias in every row
        x_ptr = tl.where(part > 0, bias_ptr, gates_x_ptr)
        stride_x = tl.where(part > 0, 0, 4 * H)
        offs_x = tl.maximum(part - 1, 0) * 4 * H + (gate * H + unit)[:, None] + b[None, :] * stride_x

    # h changes hands at exchange[slot, group]
    slot_size = tl.num_programs(1) * (BLOCK_B * WIDTH)
    counter = counters_ptr + group * 32
    if STACK:
        slot_size = slot_size.to(tl.int64)
        # the first layer has none below: it reads its own last h again, against zeros, and never waits for it
        up = tl.minimum(part, 1)
        counter_below = counter - up * 32
        below_all = exchange_ptr + (group - up) * (BLOCK_B * WIDTH) + columns_of_h(BLOCK_B, SPLIT) * WIDTH
    h_all = exchange_ptr + group * (BLOCK_B * WIDTH) + columns_of_h(BLOCK_B, SPLIT) * WIDTH
    h_own = exchange_ptr + group * (BLOCK_B * WIDTH) + j[:, None] + b[None, :] * WIDTH

    PITCH: tl.constexpr = 2 * WIDTH if STACK else WIDTH
    w_ptrs = w_hh_ptr + part.to(tl.int64) * (4 * UNITS * PITCH) + ((gate * UNITS + unit) * PITCH)[:, None]
    w = load_rows(w_ptrs, CHUNKS, KEPT, BLOCK_K, TAIL_K, SPLIT, PRECISION)
    if STREAM:
        w_tail = load_columns(w_ptrs, TAIL, TAIL_K, SPLIT, PRECISION)

    if STACK:
        w_below = load_rows(w_ptrs + WIDTH, CHUNKS, KEPT, BLOCK_K, TAIL_K, SPLIT, PRECISION)

    h = tl.load(h0_ptr + offs_state, mask=mask, other=0.0)
    c = tl.load(c0_ptr + offs_state, mask=mask, other=0.0).to(tl.float32)
    tl.store(h_own, rounded(h, PRECISION))
    arrive(counter, HIP)

    if VARLEN:
        lengths = tl.load(lengths_ptr + b0 + b, mask=mask_b, other=0).to(tl.int32)
        T = tl.load(lengths_ptr + b0).to(tl.int32)  # lengths fall: no row of this tile is longer
    t = direction * (T - 1)
    step = 1 - 2 * direction
    t_next = tl.minimum(tl.maximum(t + step, 0), T - 1)
    row = first_row(t, B, offsets_ptr, VARLEN) + b0
    row_next = first_row(t_next, B, offsets_ptr, VARLEN) + b0
    mask_gates_t = mask_gates & (t < lengths)[None, :] if VARLEN else mask_gates
    x = tl.load(x_ptr + row * stride_x + offs_x, mask=mask_gates_t, other=0.0)

    if STACK:
        seen = (1 + up) * programs
        wait(counter_below, seen)
        below = load_hidden(below_all + up * slot_size, CHUNKS, KEPT, BLOCK_K, TAIL_K, SPLIT)

    for s in range(T):
        # gates_x arrives one step ahead of its use, its row number two; past the end the last row is read again
        t_after = tl.minimum(tl.maximum(t_next + step, 0), T - 1)
        row_after = first_row(t_after, B, offsets_ptr, VARLEN) + b0
        mask_gates_next = mask_gates & (t_next < lengths)[None, :] if VARLEN else mask_gates
        x_next = tl.load(x_ptr + row_next * stride_x + offs_x, mask=mask_gates_next, other=0.0)

        parts = tl.zeros((SPLIT, 4 * BLOCK_H, BLOCK_B), tl.float32) if SPLIT > 1 else x.to(tl.float32)
        if STACK:
            parts = add_dots(parts, w_below, below, PRECISION)
        wait(counter, (s + 1) * programs)
        h_ptrs = h_all + place(s, STACK) * slot_size
        h_k = ()
        for n in tl.static_range(min(AHEAD, CHUNKS)):
            h_k = h_k + (load_h(h_ptrs, n * BLOCK_K, BLOCK_K if n < KEPT else TAIL_K, SPLIT),)
        if STREAM:
            h_tail = load_h(h_ptrs, TAIL, TAIL_K, SPLIT)
        if STACK:
            # the next step's h of the layer below, while h is on its way
            step_below = tl.minimum(s + 2 * up, T)
            seen = wait_unless(counter_below, up * (step_below + 1) * programs, seen)
            below = load_hidden(below_all + step_below * slot_size, CHUNKS, KEPT, BLOCK_K, TAIL_K, SPLIT)
        for n in tl.static_range(CHUNKS):
            parts += dot(w[n], h_k[n], PRECISION)
            if n + AHEAD < CHUNKS:
                h_n = load_h(h_ptrs, (n + AHEAD) * BLOCK_K, BLOCK_K if n + AHEAD < KEPT else TAIL_K, SPLIT)
                h_k = h_k + (h_n,)
        if STREAM:
            for k0 in range(TAIL, WIDTH, TAIL_K):
                # one ahead; after the last comes the first, for the next step
                k_next = tl.where(k0 + TAIL_K < WIDTH, k0 + TAIL_K, TAIL)
                w_next = load_columns(w_ptrs, k_next, TAIL_K, SPLIT, PRECISION)
                h_next = load_h(h_ptrs, k_next, TAIL_K, SPLIT)
                parts += dot(w_tail, h_tail, PRECISION)
                w_tail = w_next
                h_tail = h_next
        a = fold(parts, SPLIT) + x.to(tl.float32) if SPLIT > 1 else parts

        # activated before they are split: in `gates` they lie as they do here
        activated = activate(a, gate)
        i, f, g, o = split_gates(activated, BLOCK_H, BLOCK_B, RUN=BLOCK_H)
        c_new = f * c + i * g
        h_new = o * tanh(c_new)
        mask_t = mask & (t < lengths)[None, :] if VARLEN else mask
        c = tl.where((t < lengths)[None, :], c_new, c) if VARLEN else c_new
        h = tl.where((t < lengths)[None, :], h_new.to(dtype), h) if VARLEN else h_new.to(dtype)
        tl.store(h_own + place(s + 1, STACK) * slot_size, rounded(h, PRECISION))
        arrive(counter, HIP)

        # nobody waits for these
        tl.store(output_ptr + row * (D * H) + offs_h, h, mask=mask_t)
        if SAVE:
            tl.store(gates_ptr + row * (D * 4 * H) + offs_gates, activated.to(dtype), mask=mask_gates_t)
            tl.store(cells_ptr + row * (D * H) + offs_h, c, mask=mask_t)
        t = t_next
        t_next = t_after
        row = row_next
        row_next = row_after
        mask_gates_t = mask_gates_next
        x = x_next

    tl.store(h_n_ptr + offs_state, h, mask=mask)
    tl.store(c_n_ptr + offs_state, c.to(dtype), mask=mask)
