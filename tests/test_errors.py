"""A wrong call fails as it does with torch: same type of error, same words where torch's are good ones."""

from __future__ import annotations

import re

import pytest
import torch
from pairs import BACKENDS, INTERPRETED, STOCK_CELL, STOCK_LSTM, H, I, make_pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import fastlstm
from fastlstm import cpu
from fastlstm.dispatch import has_triton

SIZES = {"input_size": I, "hidden_size": H}


def failure(run) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.type, str(caught.value)


def states(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 1.5, "num_layers": 2},
        {"dropout": -0.1},
        {"dropout": True},
        {"dropout": "half"},
        {"hidden_size": 0},
        {"hidden_size": 4.0},
        {"input_size": 0},
        {"input_size": "3"},
        {"num_layers": 0},
        {"proj_size": H},
        {"proj_size": -1},
        {"bias": 1},
        {"batch_first": None},
        {"layers": 2},
    ],
    ids=str,
)
def test_constructor(arguments):
    kind, message = failure(lambda: fastlstm.LSTM(**SIZES | arguments))
    stock_kind, stock_message = failure(lambda: STOCK_LSTM(**SIZES | arguments))
    assert kind is stock_kind
    assert message.replace("LSTM", "RNNBase") == stock_message.replace("LSTM", "RNNBase")


def test_dropout_with_one_layer_warns():
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1") as ours:
        fastlstm.LSTM(I, H, dropout=0.5)
    with pytest.warns(UserWarning, match="non-zero dropout") as theirs:
        STOCK_LSTM(I, H, dropout=0.5)
    assert [str(warning.message) for warning in ours] == [str(warning.message) for warning in theirs]


@pytest.mark.parametrize("make", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_unknown_backend(make):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, torch, got 'cudnn'"):
        make(I, H, backend="cudnn")


X = torch.zeros(5, 2, I)
# calls whose error is torch's own, word for word
CALLS = {
    "input of 1 dimension": (torch.zeros(I), None),
    "input of 4 dimensions": (torch.zeros(5, 2, 1, I), None),
    "input size": (torch.zeros(5, 2, I + 1), None),
    "input dtype": (X.double(), None),
    "input of integers": (X.long(), None),
    "input that is no tensor": ([1.0, 2.0], None),
    "no steps": (torch.zeros(0, 2, I), None),
    "hidden size": (X, states(1, 2, H + 1)),
    "hidden layers": (X, states(2, 2, H)),
    "hidden batch": (X, states(1, 3, H)),
    "cell size": (X, (torch.zeros(1, 2, H), torch.zeros(1, 2, H + 1))),
    "hidden without batch": (X, states(1, H)),
    "hidden with batch, input without": (X[:, 0], states(1, 1, H)),
    "hidden of an input without batch": (X[:, 0], states(1, H + 1)),
    "one state": (X, (torch.zeros(1, 2, H),)),
    "states that are one tensor": (X, torch.zeros(1, 2, H)),
    "states that are no tensors": (X, "hc"),
    "hidden on another device": (X, states(1, 2, H, device="meta")),
    "input on another device": (X.to("meta"), None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_call(call, backend):
    stock, ours = make_pair(backend)
    kind, message = failure(lambda: ours(*call))
    expected_kind, expected = failure(lambda: stock(*call))
    assert kind is expected_kind
    if backend == "triton" and "on a meta device" in message:
        return  # the kernels cannot start, which is said before devices are compared
    assert message == expected


# calls where torch's words say less than they could (what torch says is in the comment)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        # get_mkldnn_dtype: unsupported data type
        (X, states(1, 2, H, dtype=torch.float64), "not the same dtype, found input tensor with torch.float32"),
        # lstm expects two hidden states
        (X, (*states(1, 2, H), torch.zeros(1)), "lstm expects two hidden states, got 3"),
        # lstm() received an invalid combination of arguments
        (X, torch.zeros(2, 1, 2, H), "hx must be a tuple of two tensors (h_0, c_0), got Tensor"),
    ],
)
def test_call_where_torch_says_less(x, hx, message, backend):
    stock, ours = make_pair(backend)
    kind, words = failure(lambda: ours(x, hx))
    assert kind is failure(lambda: stock(x, hx))[0]
    assert message in words


ROWS = pack_sequence([torch.zeros(5, I), torch.zeros(3, I)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (ROWS.double(), None, "RNN input dtype (torch.float64) does not match weight dtype (torch.float32)"),
        (
            ROWS._replace(data=torch.zeros(8, I + 1)),
            None,
            "input.size(-1) must be equal to input_size. Expected 3, got 4",
        ),
        (PackedSequence(torch.zeros(8, 1, I), ROWS.batch_sizes), None, "input must have 2 dimensions, got 3"),
        (ROWS, states(1, 3, H), "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        (ROWS, states(2, 2, H), "Expected hidden[0] size (1, 2, 4), got [2, 2, 4]"),
        (ROWS, (torch.zeros(1, 2, H), torch.zeros(1, 2, H + 1)), "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
    ],
)
def test_packed_call(x, hx, message, backend):
    # torch does not check packed input: the same type of error comes from somewhere inside its op
    stock, ours = make_pair(backend)
    kind, words = failure(lambda: ours(x, hx))
    assert kind is RuntimeError
    assert issubclass(failure(lambda: stock(x, hx))[0], RuntimeError)
    assert message in words


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_states_are_checked_before_they_are_sorted(backend):
    # sorting picks rows, and would hide that there are too many: torch computes something here
    _, ours = make_pair(backend)
    x = pack_sequence([torch.zeros(3, I), torch.zeros(5, I)], enforce_sorted=False)
    with pytest.raises(RuntimeError, match=re.escape("Expected hidden[0] size (1, 2, 4), got [1, 3, 4]")):
        ours(x, states(1, 3, H))


# "torch" is stock's own op, which reads what it reads
@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("batch_sizes", [[30, 20], [30, 20, 10, 11], [20, 30, 10]], ids=str)
def test_batch_sizes_that_point_outside_the_rows(batch_sizes, backend):
    _, ours = make_pair(backend)
    batch_sizes = [*batch_sizes, *[1] * 20]  # as many steps as auto wants before it leaves them to oneDNN
    x = PackedSequence(torch.zeros(80, I), torch.tensor(batch_sizes))
    with pytest.raises(RuntimeError, match=re.escape(f"must fall and sum to its 80 rows, got {batch_sizes}")):
        ours(x)


@INTERPRETED
@pytest.mark.parametrize("change", ["hidden_size", "weight"])
def test_kernels_read_no_further_than_the_weights(change):
    _, ours = make_pair("triton")
    if change == "hidden_size":
        ours.hidden_size = 2 * H
    else:
        ours.weight_hh_l0 = nn.Parameter(torch.zeros(4 * H, H - 1))
    with pytest.raises(RuntimeError, match=r"Expected weight_hh of size \("):
        ours(X)


@pytest.mark.parametrize(
    ("name", "size"),
    [("weight_ih", (16, 4)), ("weight_hh", (15, 2)), ("bias_ih", (1,)), ("bias_hh", (16, 1)), ("weight_hr", (3, 4))],
)
def test_onednn_reads_no_further_than_the_weights(name, size):
    sizes = {"weight_ih": (16, 3), "weight_hh": (16, 2), "bias_ih": (16,), "bias_hh": (16,), "weight_hr": (2, 4)}
    message = re.escape(f"Expected {name} of size {sizes[name]} in a layer of hidden_size=4, got {list(size)}")
    sizes[name] = size
    weights = [torch.zeros(size) for size in sizes.values()]
    x, h0, c0 = torch.zeros(5, 2, 3), torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)
    with pytest.raises(RuntimeError, match=message):
        cpu.lstm_layer(x, h0, c0, weights, None)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_weights_that_disagree(backend):
    _, ours = make_pair(backend, torch.float64)
    x = X.double().repeat(8, 1, 1)  # over few steps auto leaves it to stock
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.detach().float())
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not the same dtype"):
        ours(x)
    ours.weight_hh_l0 = nn.Parameter(ours.weight_hh_l0.detach().double().to("meta"))
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same device"):
        ours(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.zeros(2, 2, I), None),
        (torch.zeros(2, I + 1), None),
        (torch.zeros(2, I), states(3, H)),
        (torch.zeros(2, I), states(2, H + 1)),
        (torch.zeros(2, I), (torch.zeros(2, H), torch.zeros(2, H + 1))),
        (torch.zeros(2, I), (torch.zeros(2, H), torch.zeros(3, H))),
        (torch.zeros(2, I), states(H)),
        (torch.zeros(2, I), states(1, 2, H)),
        (torch.zeros(I), states(1, H)),
        (torch.zeros(I + 1), None),
    ],
)
def test_cell_call(x, hx, backend):
    ours, stock = fastlstm.LSTMCell(I, H, backend=backend), STOCK_CELL(I, H)
    assert failure(lambda: ours(x, hx)) == failure(lambda: stock(x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.zeros(2, I), (torch.zeros(2, H),)),
        (torch.zeros(2, I), torch.zeros(2, 2, H)),
        (torch.zeros(2, I).double(), None),
        (torch.zeros(2, I), states(2, H, dtype=torch.float64)),
        (torch.zeros(2, I, device="meta"), None),
        (torch.zeros(2, I), states(2, H, device="meta")),
    ],
)
def test_cell_call_where_torch_says_less(x, hx, backend):
    ours, stock = fastlstm.LSTMCell(I, H, backend=backend), STOCK_CELL(I, H)
    assert failure(lambda: ours(x, hx))[0] is failure(lambda: stock(x, hx))[0]


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_triton_without_its_interpreter_or_a_gpu(monkeypatch):
    _, ours = make_pair("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    # a shape of its own: what was decided for a shape is remembered
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: the tensors are on the CPU"):
        ours(torch.zeros(11, 1, I))
