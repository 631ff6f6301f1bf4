"""Hooks of saved tensors, a checkpoint's among them, around oneDNN's chunks of steps."""

from __future__ import annotations

import weakref

import pytest
import torch
from chunked import Chunked, make_packed
from helpers import run_lstm
from torch.utils.checkpoint import checkpoint

from fastlstm import cpu, cpu_rules

pytestmark = pytest.mark.skipif(not cpu_rules.onednn_has(torch.float32), reason="needs oneDNN")


class Checkpointed(Chunked):
    def forward(self, x, hx):
        return checkpoint(super().forward, x, hx, use_reentrant=False)


class Offloaded(Chunked):
    def forward(self, x, hx):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return super().forward(x, hx)


@pytest.mark.parametrize("kind", [Checkpointed, Offloaded])
def test_hooks_of_saved_tensors_see_the_workspaces(kind, cut):
    cut("some")
    stock, x, hx = make_packed(I=3, H=19, D=2)
    plain, hooked = Chunked(stock), kind(stock)
    torch.testing.assert_close(run_lstm(hooked, x, hx), run_lstm(plain, x, hx))
    assert all(workspace is not None for workspace in plain(x, hx)[1][0].grad_fn.workspaces)
    assert hooked(x, hx)[1][0].grad_fn.workspaces is None


def test_workspaces_that_hooks_gave_back_are_dropped_one_by_one(cut, monkeypatch):
    cut("some")
    stock, x, hx = make_packed(I=3, H=19)
    references, alive = [], []
    scatter = cpu._scatter

    def unpack(tensor):
        copy = tensor.clone()
        if tensor.dtype == torch.uint8:
            references.append(weakref.ref(copy))
        return copy

    def count(*given, **options):  # called after each chunk
        alive.append(sum(reference() is not None for reference in references))
        scatter(*given, **options)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        output = Chunked(stock)(x._replace(data=x.data.requires_grad_()), hx)[0].data
    monkeypatch.setattr(cpu, "_scatter", count)
    output.sum().backward()
    assert alive == list(range(len(references), 0, -1))
    assert len(alive) > 1
