"""Where the rows of a batch lie: neighbours in time, first and last steps, lengths, on whatever device."""

from __future__ import annotations

import pytest
import torch

from fastlstm import packing

SIZES = ([4, 4, 2, 1, 1], [1], [3], [3, 3], [2, 1])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [None, *SIZES])
def test_previous_and_first_rows(batch_sizes, reverse):
    sizes = batch_sizes or [3, 3, 3, 3]
    B = sizes[0]
    rows = {(t, b): row for row, (t, b) in enumerate((t, b) for t, n in enumerate(sizes) for b in range(n))}
    values = torch.arange(len(rows)).unsqueeze(1) * 1.0
    initial = -1.0 - torch.arange(B).unsqueeze(1)
    packed = None if batch_sizes is None else torch.tensor(batch_sizes)
    step = 1 if reverse else -1
    expected = [rows.get((t + step, b), -1 - b) for t, b in rows]
    assert packing.previous(values, initial, packed, reverse).squeeze(1).tolist() == expected
    lengths = [sum(n > b for n in sizes) for b in range(B)]
    first = [rows[lengths[b] - 1 if reverse else 0, b] for b in range(B)]
    assert packing.first_rows(values, B, packed, reverse).squeeze(1).tolist() == first


@pytest.mark.parametrize("way", ["where they are", "brought over", "in a graph"])
@pytest.mark.parametrize("batch_sizes", SIZES)
def test_spans(batch_sizes, way, monkeypatch):
    B = batch_sizes[0]
    if way == "in a graph":
        monkeypatch.setattr(packing, "capturing", lambda device: True)
    # "cpu:1" is the same device to torch, and to us another one
    device = torch.device("cpu") if way == "where they are" else torch.device("cpu", 1)
    lengths, offsets = packing.spans(torch.tensor(batch_sizes), B, device)
    assert lengths.tolist() == [sum(n > b for n in batch_sizes) for b in range(B)]
    assert offsets.tolist() == [sum(batch_sizes[:t]) for t in range(len(batch_sizes))]
    assert lengths.data_ptr() % 16 == offsets.data_ptr() % 16 == 0  # else triton would compile the kernels anew


def test_sizes_in_a_graph_are_no_memory_of_the_host(monkeypatch):
    monkeypatch.setattr(packing, "capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "to", None)  # no copy
    lengths, _ = packing.spans(torch.tensor([2, 1]), 2, torch.device("cpu", 1))
    assert lengths.tolist() == [2, 1]
