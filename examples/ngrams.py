"""The baseline of the examples that predict what comes next: counts of what came after the last few symbols."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence


def ngram_bits(seen: Collection[Sequence], held_out: Collection[Sequence], order: int, symbols: int) -> float:
    """Return the bits per held-out symbol of n-grams of that order, the first symbol of each sequence being given.

    Shorter n-grams are interpolated by the rule of Witten and Bell (1991), the shortest with one chance in `symbols`.
    Slices of a sequence must be hashable, as those of strings and tuples are.
    """
    counts: defaultdict[Hashable, Counter] = defaultdict(Counter)
    for sequence in seen:
        for end in range(1, len(sequence)):
            for length in range(min(order, end + 1)):
                counts[sequence[end - length : end]][sequence[end]] += 1

    bits = []
    for sequence in held_out:
        for end in range(1, len(sequence)):
            probability = 1 / symbols
            for length in range(min(order, end + 1)):
                if after := counts.get(sequence[end - length : end]):
                    probability = (after[sequence[end]] + len(after) * probability) / (after.total() + len(after))
            bits.append(-math.log2(probability))
    return sum(bits) / len(bits)
