"""Where a packed batch is cut into chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from fastlstm import cutting
from fastlstm.problem import Device


@pytest.mark.parametrize("lengths", [(21, 20, 20, 13, 7, 7, 1), (5,), (64, 1), tuple(range(200, 0, -1))], ids=len)
@pytest.mark.parametrize("rows_per_cut", [0, 5, 64])
def test_cuts_cover_all_steps_and_bound_waste_and_size(lengths, rows_per_cut, monkeypatch):
    batch_sizes = pack_sequence([torch.zeros(n, 1) for n in lengths]).batch_sizes
    T, I, H = len(batch_sizes), 64, 64  # noqa: E741
    monkeypatch.setattr(cutting, "_CHUNK_BYTES", 0)
    most = cutting._most_places(sum(lengths), I, H, torch.float32, roomy=False)
    cuts = cutting._cut(batch_sizes.tolist(), most, rows_per_cut)
    assert cuts[0] == (0, len(lengths))
    assert cuts[-1] == (T, 0)
    for (start, rows), (end, _) in pairwise(cuts):
        assert start < end
        assert rows == batch_sizes[start]
        places, alive = rows * (end - start), int(batch_sizes[start:end].sum())
        assert places - alive <= rows_per_cut
        assert end - start == 1 or places <= sum(lengths) * 6 / 20


@pytest.mark.parametrize("target", ["intel", "avx2"])
def test_a_chunk_is_longer_where_there_is_memory_left(target, monkeypatch):
    """What training would cut for want of memory stays whole without a graph, and partly without AVX-512."""
    monkeypatch.setattr(cutting, "device_of", lambda _: Device("cpu", target))
    monkeypatch.setattr(cutting.cpu_rules, "onednn_has", lambda _: True)

    def count(sizes, I, H, training):  # noqa: E741
        return len(cutting.choose_cuts(sizes, I, H, torch.float32, training)) - 1

    sizes = [16] * 35 + [10] * 38 + [3] * 27  # 16 lines of 25 to 100 steps
    for I in (64, 128):  # noqa: E741
        assert count(sizes, I, 128, True) == (5 if target == "intel" else 3)
        assert count(sizes, I, 128, False) == 3
    # large weights beside few rows leave less, and without a graph no more than elsewhere
    few = [3] * 300 + [1] * 50
    assert count(few, 300, 208, True) == (5 if target == "intel" else 4)
    assert count(few, 300, 208, False) == 5
    assert count([16] * 400, 1024, 64, False) > 10  # of a wide input stock holds no copy
