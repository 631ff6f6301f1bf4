"""Tagging, many to many, aligned: what kind of token does each character of Python source belong to?

    d e f   f ( x ) :   # d o u b l e        characters of one function   T, variable, packed
    | | |   | | | | |   | | | | | | |        -> embedding -> LSTM, two layers, both directions -> linear
    k k k . n o n o o . c c c c c c c        one class per character      [T, CLASSES]

Both directions are needed: whether a quote opens or closes a string is told by what comes before, whether a letter
starts a keyword or a longer name by what follows.

Data: functions of Python's own standard library, labelled by its module tokenize; whole modules are held out.
"""

from __future__ import annotations

import ast
import io
import keyword
import random
import sysconfig
import tokenize
from itertools import accumulate
from pathlib import Path

import torch
from common import arguments, explain_and_compare, figure, fit, report
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

TRAINED = "argparse ast calendar configparser datetime difflib doctest gettext inspect mailbox optparse pickle"
HELD_OUT = "csv fractions heapq shelve statistics textwrap zipapp"
CLASSES = ("space", "name", "keyword", "number", "string", "comment", "op")
COLORS = ("#dfe5e2", "#22302b", "#2a7f62", "#d9a441", "#c8553d", "#8a9590", "#3c6e9f")
LONGEST, BATCH, HIDDEN = 600, 16, 64
Sample = tuple[Tensor, Tensor]  # characters [T] and their classes [T]


def read_functions(module: str) -> list[Sample]:
    """Return the functions of a module that are ASCII and not too long."""
    source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
    starts = [0, *accumulate(map(len, io.StringIO(source)))]  # of lines
    kinds = torch.zeros(len(source), dtype=torch.long)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = "keyword" if keyword.iskeyword(token.string) else tokenize.tok_name[token.type].lower()
        kind = "string" if "string" in kind else kind  # FSTRING_START and its kin
        if kind in CLASSES:
            begin, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            kinds[begin:end] = CLASSES.index(kind)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    spans = [slice(starts[node.lineno - 1], starts[node.end_lineno or 0]) for node in functions]
    spans = [span for span in spans if span.stop - span.start <= LONGEST and source[span].isascii()]
    return [(torch.tensor(list(source[span].encode())), kinds[span]) for span in spans]


class Tagger(nn.Module):
    """Scores the classes of every character."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = LSTM(32, HIDDEN, num_layers=2, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, len(CLASSES))

    def forward(self, characters: PackedSequence) -> Tensor:
        """Map N characters in all to logits [N, CLASSES], in packed order."""
        output, _ = self.lstm(characters._replace(data=self.embedding(characters.data)))
        return self.head(output.data)


def pack(samples: list[Sample]) -> tuple[PackedSequence, Tensor]:
    """Pack characters and, in the same order, their classes."""
    characters, kinds = (pack_sequence(list(part), enforce_sorted=False) for part in zip(*samples, strict=True))
    return characters, kinds.data


def table_accuracy(samples: list[Sample], test: list[Sample], reach: int) -> float:
    """Accuracy of a table: the class seen most often for a character between its `reach` neighbours on each side."""
    width = 2 * reach + 1

    def places(sample: Sample) -> Tensor:
        return nn.functional.pad(sample[0], (reach, reach)).unfold(0, width, 1) @ 128 ** torch.arange(width)

    votes = torch.zeros(128**width, len(CLASSES))
    for sample in samples:
        votes.index_put_((places(sample), sample[1]), torch.ones(()), accumulate=True)
    return torch.cat([votes[places(sample)].argmax(1) == sample[1] for sample in test]).float().mean().item()


def widest(sample: Sample) -> int:
    """Length of the longest line."""
    return max(map(len, bytes(sample[0].tolist()).splitlines()))


def paint(axis: Axes, sample: Sample, kinds: Tensor) -> None:
    """Write the characters in the colours of their classes."""
    line = column = 0
    for character, kind in zip(map(chr, sample[0].tolist()), kinds.tolist(), strict=True):
        axis.text(column, -line, character, family="monospace", fontsize=7, color=COLORS[kind])
        line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
    axis.set(title="A function that it never saw", xlim=(0, 66), ylim=(-17, 1))
    axis.axis("off")


def main() -> None:
    """Train, compare with tables of characters and their neighbours, and colour a function."""
    options = arguments(__doc__)
    steps = 12 if options.smoke else 600
    samples = [sample for module in TRAINED.split()[options.smoke * 10 :] for sample in read_functions(module)]
    test = [sample for module in HELD_OUT.split() for sample in read_functions(module)]

    def loss(model: nn.Module, batch: list[Sample]) -> Tensor:
        characters, kinds = pack(batch)
        return nn.functional.cross_entropy(model(characters), kinds)

    model = Tagger()
    fit(model, lambda: loss(model, random.sample(samples, BATCH)), steps, learning_rate=0.01)
    explain_and_compare(model, lambda each: loss(each, samples[:BATCH]))

    with torch.no_grad():
        characters, truth = pack(test)
        right = model(characters).argmax(1) == truth
    baselines = {f"table of {2 * reach + 1}": table_accuracy(samples, test, reach) for reach in (0, 1)}
    report(f"accuracy on {len(truth)} held-out characters", right.float().mean().item(), baselines)

    with figure(options, panels=2, size=(8.5, 3.2)) as (bars, code):
        found = [right[truth == kind].float().mean().item() for kind in range(len(CLASSES))]
        bars.barh(CLASSES, found, color=COLORS)
        bars.set(title="How many of each class are found", xlabel="share of its characters", xlim=(0, 1))
        fitting = [sample for sample in test if len(sample[0]) < 500 and widest(sample) <= 66]
        varied = max(fitting, key=lambda sample: (len(sample[1].unique()), len(sample[0])))
        paint(code, varied, model(pack([varied])[0]).argmax(1))


if __name__ == "__main__":
    main()
