"""The GEMMs over all rows of a layer, and what becomes of them where torch is slow in 16 bit."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from fastlstm import cpu_rules, gemms

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
N, M, K = 700, 48, 40  # three blocks of rows, the last one not full


def make_products(dtype, rows=N):
    """Return the three products, in float64 what they should be, and the sums of what is added in each, unsigned."""
    x, d, w, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((rows, K), (rows, M), (M, K), (M,)))
    x, d, w, b = (tensor.to(dtype) for tensor in (x, d, w, b))
    products = gemms.linear(x, w, b), gemms.linear(x, w, None), gemms.times_weights(d, [w]), gemms.sum_of_outer(d, x)

    def in_float64(x, d, w, b):
        return x @ w.t() + b, x @ w.t(), d @ w, d.t() @ x

    wide = [tensor.double() for tensor in (x, d, w, b)]
    return products, in_float64(*wide), in_float64(*(tensor.abs() for tensor in wide))


@pytest.fixture(params=[False, True], ids=["as they are", "widened"])
def widened(request, monkeypatch):
    monkeypatch.setattr(cpu_rules, "is_widened", lambda dtype: dtype.itemsize == 2 and request.param)
    monkeypatch.setattr(gemms, "_BLOCK_ELEMENTS", 300 * (M + K))
    return request.param


@pytest.mark.parametrize("rows", [N, 60], ids=["many rows", "few rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_rounded_once(dtype, rows, widened):
    narrow = dtype.itemsize == 2
    roundings = (1 if widened else 4) if narrow else 0  # torch's own product may round more than once
    added = 4 * torch.finfo(torch.float32 if narrow else dtype).eps
    for product, true, unsigned in zip(*make_products(dtype, rows), strict=True):
        assert product.dtype == dtype
        assert product.is_contiguous()
        rounded = true.abs() if widened else unsigned
        bound = roundings * torch.finfo(dtype).eps / 2 * rounded + added * unsigned
        assert int(((product.double() - true).abs() > bound).sum()) == 0


def test_few_rows_pay_for_no_transposition():
    """The order of factors that is faster over many rows gives the product by columns, to be laid out anew."""

    def copies(product, *arguments):
        profiler = profile()
        with profiler:
            product(*arguments)
        return sum(average.count for average in profiler.key_averages() if average.key == "aten::clone")

    for rows, dtype, expected in (
        (6 * K, torch.float32, [1, 0, 0]),
        (6 * K - 1, torch.float32, [0, 0, 0]),
        (6 * K, torch.float64, [1, 1, 0]),
        (6 * K - 1, torch.float64, [1, 0, 0]),
        (2 * K, torch.float64, [1, 0, 0]),
        (2 * K - 1, torch.float64, [0, 0, 0]),
    ):
        d, x, w = (torch.randn(*shape, dtype=dtype) for shape in ((rows, M), (rows, K), (M, K)))
        narrow = d[:, : K - 1].contiguous(), [w[: K - 1]]
        calls = (gemms.sum_of_outer, d, x), (gemms.times_weights, d, [w]), (gemms.times_weights, *narrow)
        assert [copies(*call) for call in calls] == expected


@pytest.mark.usefixtures("widened")
def test_products_of_no_rows():
    for product, true, _ in zip(*make_products(torch.bfloat16, rows=0), strict=True):
        assert torch.equal(product.double(), true)


def test_a_block_at_a_time_is_held_in_float32(widened, monkeypatch):
    sizes = []
    widen = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: sizes.append(tensor.numel()) or widen(tensor))
    make_products(torch.bfloat16)
    assert max(sizes, default=0) == (300 * M if widened else 0)


@pytest.mark.usefixtures("widened")
def test_a_tracer_sees_no_blocks():
    with FlopCounterMode(display=False) as counter:
        make_products(torch.bfloat16)
    assert counter.get_total_flops() == 3 * 4 * 2 * N * M * K  # four products, and what is expected of them
    with FakeTensorMode():
        for product, shape in zip(make_products(torch.bfloat16)[0], ((N, M), (N, M), (N, K), (M, K)), strict=True):
            assert product.shape == shape
    assert len(gemms._blocks(torch.ones(N, M + K))[0]) == 3
    with FakeTensorMode():
        assert len(gemms._blocks(torch.ones(N, M + K))[0]) == 1
