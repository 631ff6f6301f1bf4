r"""Packed batches and projections on a CPU, through oneDNN's dense LSTM layer.

Stock torch runs a PackedSequence step by step, each step some small ops and their autograd nodes. Here the steps are
cut into chunks, and each chunk is one call of the op that stock uses for dense input (`aten.mkldnn_rnn_layer`), with as
many rows as are active at its first step. A row that ends inside its chunk is dead from there on. One more input column
makes that exact: it is 0 where a row lives and 1 where it is dead, and its weights for the gates (i, f, g, o) are
(-1e30, 1e30, 0, -1e30), so that the sigmoids saturate to exactly 0 and 1:

    alive  the layer as it was
    dead   i = 0, f = 1, o = 0:  c_t = c_{t-1}, h_t = 0;   backward: da = 0, dc_{t-1} = dc_t

A dead row so costs its share of a GEMM and nothing else, and c_n stands in the last c of its chunk. This holds while
every weight is finite: 0 times an infinite one is NaN, and so, then, is c_n of a row that ends early. Cutting costs a
call, in which oneDNN, in training, lays out the weights again; `cutting.py` weighs one against the other.

Direction 1 takes each row from its own last step to its first. In that order too all rows begin together and end at
their lengths, so the same cuts serve, filled from other rows of the data.

A projection, which oneDNN has no kernel for either, leaves the recurrence: see `_project`.

This is the wrong tool for dense input without projection where oneDNN has a layer in its dtype (stock makes the very
same call, once; but see `_columns`), for float64, and where MKL's product of a single step is as fast (`cpu_rules.py`).
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm import autocast, autograd, checks, cpu_rules, cutting, packing, tracing
from fastlstm.ops import as_rows, shaped_as
from fastlstm.stock import ONEDNN_LSTM
from fastlstm.weights import DirectionWeights, directions

_autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
_SATURATED = (-1e30, 1e30, 0.0, -1e30)
_GATHERED = 1 << 17  # elements that inference may gather at once in any case


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the D directions of one layer, as `autograd.lstm_layer` does, by oneDNN.

    x is float32, or in 16 bit, which is widened where oneDNN has no layer in it.
    """
    by_direction = directions(weights, len(h0))
    for direction in by_direction:
        checks.check_weights(direction, x.shape[-1], c0.shape[2], h0.shape[2])
    if batch_sizes is None:
        B = h0.shape[1]
        batch_sizes = torch.full((x.shape[:-1].numel() // B,), B, device="cpu")
    if by_direction[0][4] is not None:
        return _project(x, h0, c0, by_direction, batch_sizes)
    flat = [weight for direction in by_direction for weight in direction]
    dtype = x.dtype if cpu_rules.onednn_has(x.dtype) else torch.float32
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, h0, c0, *weights)):
        output, h_n, c_n = _infer(as_rows(x), h0, c0, flat, batch_sizes, dtype)
        return shaped_as(output, x), h_n, c_n
    chunks = cutting.make_chunks(batch_sizes, x.shape[-1], h0.shape[2], len(h0), x.dtype)
    return _PackedLayer.apply(x, h0, c0, batch_sizes, chunks, dtype, *flat)  # pyright: ignore[reportReturnType]


def _project(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[DirectionWeights],
    batch_sizes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer with projection as one without, on m = o tanh(c): h = m W_hr^T, so h W_hh^T = m (W_hh W_hr)^T.

    h0 has no m; it enters the gates of each row's first step, as input columns with the weights W_hh.
    """
    _, B, P = h0.shape
    shape, x = x.shape[:-1], x.flatten(0, -2)
    if h0.requires_grad or h0.any():
        rows = torch.arange(len(x), device="cpu")
        for d, state in enumerate(h0):
            first_rows = packing.first_rows(rows, B, batch_sizes, reverse=d == 1)
            x = torch.cat((_own_gradient(x), x.new_zeros(len(x), P).index_add(0, first_rows, state)), 1)

    plain: list[Tensor] = []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(weights):
        assert w_hr is not None
        columns = [w_hh if d == e else torch.zeros_like(w_hh) for e in range((x.shape[1] - w_ih.shape[1]) // P)]
        wide = torch.cat((_own_gradient(w_ih), *columns), 1) if columns else w_ih
        plain += [w for w in (wide, w_hh @ w_hr, b_ih, b_hh) if w is not None]

    m, m_n, c_n = lstm_layer(x, torch.zeros_like(c0), c0, plain, batch_sizes)
    w_hr_t = [w_hr.t() for *_, w_hr in weights if w_hr is not None]
    output = [m_d.view(*shape, -1) @ w for m_d, w in zip(m.chunk(len(weights), 1), w_hr_t, strict=True)]
    h_n = [m_d @ w for m_d, w in zip(m_n, w_hr_t, strict=True)]
    return torch.cat(output, -1), torch.stack(h_n), c_n


def _own_gradient(tensor: Tensor) -> Tensor:
    """Return an alias whose gradient is contiguous: to `cat` it would be a view into the gradient of the whole."""
    alias = tensor.view_as(tensor)
    if alias.requires_grad:
        alias.register_hook(Tensor.contiguous)
    return alias


class _PackedLayer(torch.autograd.Function):
    """One layer over packed rows, its backward by oneDNN too, chunk by chunk."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        c0: Tensor,
        batch_sizes: Tensor,
        chunks: list[list[cutting.Chunk]],
        dtype: torch.dtype,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `lstm_layer` does, and save for backward.

        Beyond the inputs and the output that the caller holds anyway, a row and direction cost what oneDNN's forward
        writes into its workspace, about 24H bytes in float32 and 17H in bfloat16, where it is kept (`cutting.py`). Its
        backward writes several times as much into the same workspace, so each is dropped as soon as it is used, and
        made again if the graph is walked twice. The space for that is reserved from the start (64H bytes): torch's
        profiler counts it, but it is no memory until it is written. What was gathered is gathered again. Hooks of saved
        tensors, as a checkpoint has them, see workspaces too (and one that copies them copies the space).
        """
        output, h_n, c_n, states, workspaces = _forward(as_rows(x), h0, c0, flat, chunks, dtype)
        output = shaped_as(output, x)
        ctx.set_materialize_grads(False)
        hooked = _autograd._top_saved_tensors_default_hooks(True) is not None
        ctx.workspaces, shown = (None, workspaces) if hooked else (workspaces, [])
        ctx.save_for_backward(x, h0, c0, batch_sizes, *flat, output, *itertools.chain.from_iterable(states), *shown)
        ctx.chunks = chunks
        return output, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple:
        """Return the gradient of each input that needs one."""
        x, h0, c0, batch_sizes, *saved = ctx.saved_tensors
        flat, output, states = saved[: 5 * len(h0)], saved[5 * len(h0)], saved[5 * len(h0) + 1 :]
        d_output, dh_n, dc_n = (
            torch.zeros_like(like) if cotangent is None else cotangent
            for cotangent, like in zip(cotangents, (output, h0, c0), strict=True)
        )
        needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[6:])
        inputs = (x, h0, c0, *flat)
        if torch.is_grad_enabled() or tracing.need_plain_ops(cotangents):
            gradients = autograd.differentiable_backward((d_output, dh_n, dc_n), inputs, needs, batch_sizes)
        else:
            count = sum(map(len, ctx.chunks))
            around = [states[4 * k : 4 * k + 4] for k in range(count)]
            workspaces = states[4 * count :] if ctx.workspaces is None else ctx.workspaces
            del states[4 * count :]  # none is kept but by the list from which backward drops it
            saved = (as_rows(output), around, workspaces, ctx.chunks)
            with autocast.off(x.device):  # a workspace that is made again is made as forward would
                rows = (as_rows(x), *inputs[1:])
                dx, *gradients = _backward((as_rows(d_output), dh_n, dc_n), rows, needs, *saved)
            gradients = [None if dx is None else dx.view(x.shape), *gradients]
        return *gradients[:3], None, None, None, *gradients[3:]


def _infer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    flat: Sequence[Tensor | None],
    batch_sizes: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer for no backward pass: what is copied is copied for many chunks at once, for here it weighs more."""
    N, I = x.shape  # noqa: E741
    D, B, H = h0.shape
    sizes = batch_sizes.tolist()
    cuts = cutting.choose_cuts(sizes, I, H, x.dtype, training=False)
    offsets = [0, *itertools.accumulate(sizes)]
    edges, by_direction = cutting.lay_places(sizes, batch_sizes, cuts, D)
    row = torch.arange(N, device="cpu")
    is_dead = torch.ones(edges[-1], dtype=torch.bool, device="cpu").index_fill_(0, by_direction[0], False)
    # places gathered at once: a small part of the output's size
    most = max(H * N // 8, _GATHERED) // _columns(I, dtype)

    output = x.new_empty(N, D * H)
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    c_n = torch.empty_like(h_n)
    for d, place in enumerate(by_direction):
        source = row.new_zeros(edges[-1]).index_copy_(0, place, row)
        weights, has_biases = _direction(flat, d, dtype)
        if len(edges) > 2:
            weights[:2] = _laid_out(weights[0], weights[1], H, has_biases)
        output_d = output[:, d * H : (d + 1) * H]
        h, c = h0[d].to(dtype).contiguous(), c0[d].float().contiguous()
        outputs, last_cells, gathered = [], [], x
        origin = until = 0
        for k, ((start, rows), (end, after)) in enumerate(itertools.pairwise(cuts)):
            if edges[k] == until:
                origin, until = until, edges[max(k + 1, bisect.bisect_right(edges, until + most) - 1)]
                gathered = _gather_input(x, source[origin:until], is_dead[origin:until].nonzero().squeeze(1), dtype)
            x_chunk = gathered[edges[k] - origin : edges[k + 1] - origin].view(end - start, rows, -1)
            y, h, c, _ = _run(x_chunk, weights, h[:rows], c[:rows], has_biases, False)
            y = y.view(-1, H).to(x.dtype)
            last_cells.append(c[after:])
            if d:
                outputs.append(y)
            else:  # the chunk's rows of the data lie together
                data = slice(offsets[start], offsets[end])
                torch.index_select(y, 0, place[data] - edges[k], out=output_d[data])
        if d:
            torch.index_select(torch.cat(outputs), 0, place, out=output_d)
        torch.cat(last_cells[::-1], out=c_n[d])
        h_n[d] = packing.first_rows(output_d, B, batch_sizes, reverse=d == 0)
    return output, h_n, c_n


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    flat: Sequence[Tensor | None],
    chunks: list[list[cutting.Chunk]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]], list[Tensor | None]]:
    """Run every chunk of every direction.

    Returns:
        output, h_n and c_n of the layer; and of each chunk the states (h, c) before and after it, and oneDNN's
        workspace where it is kept.
    """
    H = h0.shape[2]
    output = x.new_empty(len(x), len(h0) * H)
    h_n = torch.empty_like(h0, memory_format=torch.contiguous_format)
    c_n = torch.empty_like(h_n)
    states: list[tuple[Tensor, ...]] = []
    workspaces: list[Tensor | None] = []
    for d, chunks_d in enumerate(chunks):
        weights, has_biases = _direction(flat, d, dtype)
        output_d = output[:, d * H : (d + 1) * H]
        # c stays in float32 from chunk to chunk; oneDNN asks for contiguous states but does not check
        h, c = h0[d].to(dtype).contiguous(), c0[d].float().contiguous()
        for chunk in chunks_d:
            before = h, c = h[: chunk.rows], c[: chunk.rows]
            y, h, c, workspace = _run(_input(x, chunk, dtype), weights, *before, has_biases, chunk.keep)
            y = y.view(-1, H).to(x.dtype)
            _scatter(y, chunk, output_d)
            ended = slice(chunk.rows - len(chunk.ends), chunk.rows)
            h_n[d, ended] = y.index_select(0, chunk.ends)
            c_n[d, ended] = c[ended]
            states.append((*before, h, c))
            workspaces.append(workspace if chunk.keep else None)
    return output, h_n, c_n, states, workspaces


def _backward(
    cotangents: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, ...],
    needs: tuple[bool, ...],
    output: Tensor,
    states: Sequence[Sequence[Tensor]],
    workspaces: list[Tensor | None],
    chunks: list[list[cutting.Chunk]],
) -> list[Tensor | None]:
    """Run the adjoint of every chunk, the last one first; sums over chunks are float32."""
    d_output, dh_n, dc_n = cotangents
    x, h0, c0, *flat = inputs
    H, dtype = h0.shape[2], states[0][0].dtype  # that of forward
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dh0, dc0 = torch.empty_like(h0), torch.empty_like(c0)
    dflat: list[Tensor | None] = []
    for d, chunks_d in enumerate(chunks):
        weights, has_biases = _direction(flat, d, dtype)
        columns = slice(d * H, (d + 1) * H)
        dh = dc = h0.new_empty(0, H, dtype=torch.float32)
        sums: list[Tensor] = []
        for k in reversed(range(len(chunks_d))):
            chunk = chunks_d[k]
            at = d * len(chunks_d) + k
            h_before, c_before, h_after, c_after = states[at]
            x_chunk = _input(x, chunk, dtype)
            workspace, workspaces[at] = workspaces[at], None
            if workspace is None:
                workspace = _run(x_chunk, weights, h_before, c_before, has_biases, True)[3]
            ended = slice(chunk.rows - len(chunk.ends), chunk.rows)
            # rows that go on get theirs from the next chunk; one that ends here from c_n, and from h_n at the end
            dc = torch.cat((dc, dc_n[d, ended]))
            dh = torch.cat((dh, dh.new_zeros(len(chunk.ends), H)))
            dy = _gather(d_output[:, columns], chunk, dtype)
            dy.index_add_(0, chunk.ends, dh_n[d, ended].to(dtype))

            shape = chunk.steps, chunk.rows, H
            dx_chunk, *dweights, dh, dc = torch.ops.aten.mkldnn_rnn_layer_backward.default(
                x_chunk, *weights, h_before, c_before,
                _gather(output[:, columns], chunk, dtype).view(shape), h_after, c_after, dy.view(shape), dh, dc,
                False, ONEDNN_LSTM, H, 1, has_biases, True, False, [], False, workspace,
            )  # fmt: skip
            if dx is not None:
                dx_chunk = dx_chunk.flatten(0, 1)[:, : x.shape[1]].to(x.dtype)
                # written no sooner than a workspace is freed: what is not touched is no memory yet
                _scatter(dx_chunk, chunk, dx, add=d > 0)
            sums = [a.add_(b) for a, b in zip(sums, dweights, strict=True)] if sums else dweights
        dh0[d], dc0[d] = dh, dc
        dw_ih, *others = sums
        dflat += [dw_ih[:, : x.shape[1]].contiguous(), *others, None]
    gradients = zip((dx, dh0, dc0, *dflat), needs, strict=True)
    return [g.to(x.dtype) if g is not None and needed else None for g, needed in gradients]


def _run(
    x: Tensor, weights: list[Tensor], h: Tensor, c: Tensor, has_biases: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call oneDNN's layer on a dense batch: output, h, c and, with `save`, the workspace that its backward reads."""
    options = False, [], ONEDNN_LSTM, h.shape[1], 1, has_biases, False, False, save
    with torch.set_grad_enabled(save):  # grad mode is how the op is asked for a workspace
        return torch.ops.aten.mkldnn_rnn_layer.default(x, *weights, h, c, *options)


def _direction(flat: Sequence[Tensor | None], d: int, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """Return one direction's weights as the op takes them, and whether it has biases.

    w_ih gets the column for dead rows.
    """
    w_ih, w_hh, *biases = (None if w is None else w.detach().to(dtype) for w in flat[5 * d : 5 * d + 4])
    assert w_ih is not None
    assert w_hh is not None
    H, I = w_hh.shape[1], w_ih.shape[1]  # noqa: E741
    columns = w_ih.new_tensor(_SATURATED).view(4, 1, 1).expand(4, H, _columns(I, dtype) - I)
    w_ih = torch.cat((w_ih.unflatten(0, (4, H)), columns), 2).flatten(0, 1)
    none = w_ih.new_empty(0)
    # the op would make w_hh contiguous in each call, what lays it out beforehand would not
    return [w_ih, w_hh.contiguous(), *(none if b is None else b for b in biases)], biases[0] is not None


def _laid_out(w_ih: Tensor, w_hh: Tensor, H: int, has_biases: bool) -> list[Tensor]:
    """Return a direction's weights as oneDNN reads them without a backward pass, or every chunk's call would do it."""
    lay_out: Any = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight.default
    return lay_out(w_ih, w_hh, H, False, has_biases, False)


def _gather(rows: Tensor, chunk: cutting.Chunk, dtype: torch.dtype) -> Tensor:
    """Return the chunk's rows [steps * rows, K] out of packed ones [N, K], 0 at dead places."""
    return rows.index_select(0, chunk.source).to(dtype).index_fill_(0, chunk.dead, 0)


def _input(x: Tensor, chunk: cutting.Chunk, dtype: torch.dtype) -> Tensor:
    """Return a chunk's input [steps, rows, _columns(I)]."""
    return _gather_input(x, chunk.source, chunk.dead, dtype).view(chunk.steps, chunk.rows, -1)


def _gather_input(x: Tensor, source: Tensor, dead: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows `source` of x [N, I] as input [places, _columns(I)], what tells dead places last."""
    I = x.shape[1]  # noqa: E741
    gathered = x.new_empty(len(source), _columns(I, dtype), dtype=dtype)
    if x.dtype == dtype:
        torch.index_select(x.detach(), 0, source, out=gathered[:, :I])
    else:
        gathered[:, :I] = x.detach().index_select(0, source)
    gathered[:, I:] = 0
    if len(dead):
        gathered.index_fill_(0, dead, 0)
        gathered[:, I:].index_fill_(0, dead, 1)
    return gathered


def _columns(I: int, dtype: torch.dtype) -> int:  # noqa: E741
    """Return how many columns an input has with those that tell dead places: one more, or two to be even.

    oneDNN multiplies bfloat16 by pairs; where one is left over it does without AMX and takes up to five times as long.
    """
    return I + 2 - I % 2 if dtype == torch.bfloat16 else I + 1


def _scatter(places: Tensor, chunk: cutting.Chunk, rows: Tensor, add: bool = False) -> None:
    """Bring what stands at the live places [steps * rows, K] of a chunk to its rows of packed ones [N, K]."""
    if isinstance(chunk.data, slice):
        torch.index_select(places, 0, chunk.alive, out=rows[chunk.data])
    elif add:
        rows.index_add_(0, chunk.data, places.index_select(0, chunk.alive))
    else:
        rows.index_copy_(0, chunk.data, places.index_select(0, chunk.alive))
