"""What may be done to a call beyond backward: twice backward, torch.func, hooks, checkpoints, changes in place."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from pairs import BACKENDS, INTERPRETED, STOCK_LSTM, H, I, make_pair
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves as leaves
from torch.utils.checkpoint import checkpoint

import fastlstm

# forward-mode AD has torch script some decompositions when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated:DeprecationWarning")
# enough steps for "auto" not to leave a packed batch to stock
LENGTHS = (26, 25, 20)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def packed() -> PackedSequence:
    return pack_sequence([inputs(n, I) for n in LENGTHS])


def wide(stock: Any) -> Any:
    """Return a float64 copy of a stock LSTM: oneDNN's op has no forward derivative."""
    copy = STOCK_LSTM(I, H, bidirectional=stock.bidirectional, dtype=torch.float64)
    copy.load_state_dict(stock.state_dict())
    return copy


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_forward_mode_keeps_tangents(frozen, backend):
    """A tangent that gets lost is a derivative of zero that nobody sees."""
    stock, ours = make_pair(backend, bidirectional=True)
    ours.requires_grad_(not frozen)
    x = packed()

    def tangents(lstm, data):
        with forward_ad.dual_level():
            output, states = lstm(x._replace(data=forward_ad.make_dual(data, data.cos())))
            return [forward_ad.unpack_dual(dual).tangent for dual in (output.data, *states)]

    for got, expected in zip(tangents(ours, x.data), tangents(wide(stock), x.data.double()), strict=True):
        close(got, expected)


@pytest.mark.parametrize("backend", ["reference", "auto", pytest.param("triton", marks=INTERPRETED)])
def test_function_transforms(backend):
    stock, ours = make_pair(backend, bidirectional=True)
    weights = {name: parameter.detach() for name, parameter in stock.named_parameters()}
    batch = inputs(3, 4, 2, I)

    def loss(weights, x, lstm=ours):
        return functional_call(lstm, weights, (x,))[0].square().sum()

    outputs = vmap(lambda x: ours(x)[0])(batch)
    for output, x in zip(outputs, batch, strict=True):
        close(output, stock(x)[0])
    each = vmap(grad(loss), in_dims=(None, 0))(weights, batch)
    for index, x in enumerate(batch):
        for name, expected in grad(loss)(weights, x, stock).items():
            close(each[name][index], expected)
    tangent = jvp(ours, (batch[0],), (batch[1],))[1]
    close(tangent[0], jvp(wide(stock), (batch[0].double(),), (batch[1].double(),))[1][0])
    double = {name: weight.double() for name, weight in weights.items()}
    x = batch[0]
    close(jacrev(loss, argnums=1)(weights, x), jacrev(loss, argnums=1)(double, x.double(), wide(stock)))

    def norm_of_gradient(x, weights, lstm):
        return grad(loss, argnums=1)(weights, x, lstm).square().sum()

    close(grad(norm_of_gradient)(x, weights, ours), grad(norm_of_gradient)(x.double(), double, wide(stock)))


@pytest.mark.parametrize("backend", ["reference", "auto", pytest.param("triton", marks=INTERPRETED)])
def test_ensemble_of_weights(backend):
    """Stacked parameters of several models, over one input and over one each; stock's op has no batching rule."""
    pairs = [make_pair(backend, num_layers=2) for _ in range(3)]
    for index, (stock, ours) in enumerate(pairs):
        for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
            mine.data.add_(index / 10)
            theirs.data.add_(index / 10)
    parameters, buffers = stack_module_state([ours for _, ours in pairs])
    model = pairs[0][1]

    def call(parameters, buffers, x):
        return functional_call(model, (parameters, buffers), (x,))[0]

    batch = inputs(3, 5, 2, I)
    for in_dim, xs in ((None, batch[0]), (0, batch)):
        outputs = vmap(call, in_dims=(0, 0, in_dim))(parameters, buffers, xs)
        for index, (stock, _) in enumerate(pairs):
            close(outputs[index], stock(xs if in_dim is None else xs[index])[0])


@pytest.mark.parametrize("backend", ["reference", "auto", pytest.param("triton", marks=INTERPRETED)])
def test_vjp(backend):
    stock, ours = make_pair(backend)
    x = inputs(5, 2, I)
    runs: Any = [vjp(lambda x, lstm=lstm: lstm(x)[0], x) for lstm in (ours, stock)]
    (output, pull), (expected, stock_pull) = runs
    close(output, expected)
    close(pull(output)[0], stock_pull(output)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed", "projection"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_double_backward(form, backend):
    """A penalty on the gradient, differentiated: stock in float64 is the truth."""
    options: dict[str, Any] = {"proj_size": 2} if form == "projection" else {}
    stock, ours = make_pair(backend, bidirectional=True, **options)
    truth = STOCK_LSTM(I, H, bidirectional=True, dtype=torch.float64, **options)
    truth.load_state_dict(stock.state_dict())

    def second(lstm):
        dtype = next(lstm.parameters()).dtype
        x = packed() if form == "packed" else inputs(17, 3, I)
        data = (x.data if isinstance(x, PackedSequence) else x).to(dtype).requires_grad_()
        states = tuple(inputs(2, 3, width).to(dtype).requires_grad_() for width in (lstm.proj_size or H, H))
        output, (h_n, c_n) = lstm(x._replace(data=data) if isinstance(x, PackedSequence) else data, states)
        rows = output.data if isinstance(output, PackedSequence) else output
        loss = rows.square().sum() + h_n.sum() + c_n.square().sum()
        wanted = [data, *states, *lstm.parameters()]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return torch.autograd.grad(penalty, wanted)

    for got, expected in zip(second(ours), second(truth), strict=True):
        close(got / expected.abs().max(), expected / expected.abs().max())


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("form", ["dense", "packed", "projection"])
def test_first_and_second_derivatives_are_those_of_differences(form, backend):
    _, ours = make_pair(backend, torch.float64, proj_size=1 if form == "projection" else 0)
    # 17 steps: over fewer auto leaves it to stock
    x = pack_sequence([inputs(n, I).double() for n in (17, 2)]) if form == "packed" else inputs(17, 1, I).double()
    names = [name for name, _ in ours.named_parameters()]

    def call(data, *weights):
        given = x._replace(data=data) if isinstance(x, PackedSequence) else data
        output, states = functional_call(ours, dict(zip(names, weights, strict=True)), (given,))
        return output.data if isinstance(output, PackedSequence) else output, *states

    data = x.data if isinstance(x, PackedSequence) else x
    wanted = (data.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in ours.parameters()))
    assert torch.autograd.gradcheck(call, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, wanted, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_backward_again_and_again(form, backend):
    """A retained graph, accumulation, hooks, anomaly mode, and saved tensors kept elsewhere change no gradient."""
    _, ours = make_pair(backend, num_layers=2)
    weights = list(ours.parameters())
    x = packed() if form == "packed" else inputs(5, 3, I)

    def loss():
        output, states = ours(x)
        rows = output.data if isinstance(output, PackedSequence) else output
        return rows.square().sum() + states[1].sum()

    expected = torch.autograd.grad(loss(), weights)
    retained = loss()
    seen: list[torch.Tensor] = []
    handle = weights[1].register_hook(seen.append)
    for times in (1, 2, 3):
        retained.backward(retain_graph=True)
        for weight, gradient in zip(weights, expected, strict=True):
            close(weight.grad, times * gradient)
    handle.remove()
    assert len(seen) == 3
    close(seen[-1], expected[1])
    with torch.autograd.graph.save_on_cpu():
        moved = loss()
    again = checkpoint(lambda x, _: loss(), x, inputs(1).requires_grad_(), use_reentrant=True)
    assert isinstance(again, torch.Tensor)
    for value in (moved, again):
        ours.zero_grad()
        value.backward()
        for weight, gradient in zip(weights, expected, strict=True):
            close(weight.grad, gradient)
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        for got, gradient in zip(torch.autograd.grad(loss(), weights), expected, strict=True):
            close(got, gradient)


# "auto" is stock's op for this input, which refuses
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=INTERPRETED)])
def test_batched_cotangents(backend):
    stock, ours = make_pair(backend)
    x = inputs(2, 1, I).requires_grad_()
    cotangents = torch.eye(2 * H).view(-1, 2, 1, H)
    (got,) = torch.autograd.grad(ours(x)[0], x, cotangents, is_grads_batched=True)
    for cotangent, gradient in zip(cotangents, got, strict=True):
        close(gradient, torch.autograd.grad(stock(x)[0], x, cotangent)[0])


# "auto" runs this input by chunks or by the loop; stock's dense op is refused by its own vmap
@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=INTERPRETED)])
def test_torch_func_over_a_backward_pass(backend):
    """The forward pass lies outside of the transform."""
    stock, ours = make_pair(backend)
    x = packed()
    data = x.data.requires_grad_()
    output, expected = ours(x._replace(data=data))[0].data, stock(x._replace(data=data))[0].data
    cotangents = torch.randn(3, *output.shape)

    def pull(output, cotangent):
        return torch.autograd.grad(output, [data], cotangent, retain_graph=True)[0]

    got = vmap(lambda cotangent: pull(output, cotangent))(cotangents)
    for cotangent, gradient in zip(cotangents, got, strict=True):
        close(gradient, pull(expected, cotangent))
    # a gradient is linear in its cotangent, so its own derivative is the gradient of the tangent
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(pull(output, forward_ad.make_dual(*cotangents[:2])))
    close(tangent, pull(expected, cotangents[1]))
    if backend == "reference":
        derived = jvp(lambda cotangent: pull(output, cotangent), tuple(cotangents[:1]), tuple(cotangents[1:2]))
        close(derived[1], pull(expected, cotangents[1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed", "projection"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_cotangents_of_any_stride(form, backend):
    options: dict[str, Any] = {"proj_size": 2} if form == "projection" else {}
    stock, ours = make_pair(backend, bidirectional=True, **options)
    x = packed() if form == "packed" else inputs(5, 3, I)

    def gradients(lstm, expand):
        output, states = lstm(x)
        values = [output.data if form == "packed" else output, *states]
        if expand:
            cotangents = [torch.ones(()).expand_as(value) for value in values]
        else:
            cotangents = [inputs(*value.shape[::-1]).permute(*range(value.dim())[::-1]) for value in values]
        return torch.autograd.grad(values, list(lstm.parameters()), cotangents)

    for expand in (False, True):
        for got, expected in zip(gradients(ours, expand), gradients(stock, expand), strict=True):
            close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed", "projection"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_output_is_no_view(form, backend):
    """As stock's are none: of a view fully_shard warns that a change in place would lose its hooks."""
    _, ours = make_pair(backend, num_layers=2, bidirectional=True, proj_size=2 if form == "projection" else 0)
    output, states = ours(packed() if form == "packed" else inputs(26, 3, I))
    assert not any(result._is_view() for result in (output.data if form == "packed" else output, *states))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_results_share_no_memory(form, backend):
    """Whatever is changed in place, nothing else changes, and a backward pass that needs the old value says so."""
    _, ours = make_pair(backend)
    x = inputs(1, 3, I) if form == "dense" else packed()
    hx = (torch.ones(1, 3, H), torch.ones(1, 3, H))
    with torch.no_grad():
        output, (h_n, c_n) = ours(x, hx)
    results = [output.data if form == "packed" else output, h_n, c_n]
    kept = [result.clone() for result in results]
    results[0].zero_()
    assert torch.equal(h_n, kept[1])
    h_n.zero_()
    assert torch.equal(c_n, kept[2])
    assert all((state == 1).all() for state in hx)

    output, _ = ours(x, hx)
    data = output.data if form == "packed" else output
    loss = data.square().sum()
    data.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_saved_tensors_may_be_moved_and_made_again(form, backend):
    _, ours = make_pair(backend, num_layers=2)
    weights = list(ours.parameters())
    x = packed() if form == "packed" else inputs(5, 3, I)

    def loss(x):
        output, (h_n, c_n) = ours(x)
        return (output.data if form == "packed" else output).square().sum() + h_n.sum() + c_n.sum()

    expected = torch.autograd.grad(loss(x), weights)
    # as a hook that offloads may give them back: values kept, strides not
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.clone() if t.dim() > 1 else t, restored):
        hooked = loss(x)
    again = checkpoint(loss, x, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    for value in (hooked, again):
        for got, wanted in zip(torch.autograd.grad(value, weights), expected, strict=True):
            close(got, wanted)


def restored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT if tensor.dim() > 1 else tensor


# triton's interpreter is of one thread
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_two_threads(backend):
    _, ours = make_pair(backend, num_layers=2)
    batches = [packed(), packed()._replace(data=packed().data.cos())]
    results: dict[int, Any] = {}

    def run(index):
        for _ in range(3):
            output, _ = ours(batches[index])
            results[index] = torch.autograd.grad(output.data.sum(), list(ours.parameters()))

    alone = []
    for index in range(2):
        run(index)
        alone.append(results.pop(index))
    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert all(map(torch.equal, results[index], alone[index]))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_a_recorded_call_takes_other_sizes(options, training):
    class Pack(torch.nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths):
            output, (h_n, c_n) = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
            return pad_packed_sequence(output)[0], h_n, c_n

    stock, ours = make_pair("auto", **options)
    with torch.set_grad_enabled(training):
        for T in (1, 5, 60):  # one step, few, and enough for "auto" to run them itself, were it not recorded
            recorded: Any = torch.jit.trace(ours, (inputs(T, 2, I),))
            for got, expected in zip(leaves(recorded(inputs(7, 3, I))), leaves(stock(inputs(7, 3, I))), strict=True):
                close(got, expected)
        recorded = torch.jit.trace(Pack(ours), (inputs(60, 2, I), torch.tensor([60, 30])))
        arguments = inputs(60, 3, I), torch.tensor([20, 60, 7])
        for got, expected in zip(recorded(*arguments), Pack(stock)(*arguments), strict=True):
            close(got, expected)


def test_symbolic_tracing_keeps_the_modules():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.lstm = fastlstm.LSTMCell(I, H), fastlstm.LSTM(H, H)

        def forward(self, x, hx):
            h, c = self.cell(x, hx)
            output, _ = self.lstm(h.unsqueeze(0))
            return self.lstm(output, (h.unsqueeze(0), c.unsqueeze(0)))[0]

    model = Model()
    graph: Any = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["cell", "lstm", "lstm"]
    x, hx = inputs(2, I), (inputs(2, H), inputs(2, H))
    assert torch.equal(graph(x, hx), model(x, hx))
