"""Tagging, many to many, aligned: what kind of token does each character of Python source belong to?

    d e f   f ( x ) :   # d o u b l e        characters of one function   T, variable, packed
    | | |   | | | | |   | | | | | | |        -> embedding -> LSTM, two layers, both directions -> linear
    k k k . n o n o o . c c c c c c c        one class per character      [T, CLASSES]

Whether a quote opens or closes a string is told by what comes before, whether a letter starts a keyword or a longer
name by what follows: both directions are needed.

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
from common import arguments, explain_and_compare, fit, report
from plots import figure, page
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

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

    def forward(self, functions: list[Tensor]) -> Tensor:
        """Map functions of N characters in all to logits [N, CLASSES]."""
        packed = pack_sequence(functions, enforce_sorted=False)
        output, _ = self.lstm(packed._replace(data=self.embedding(packed.data)))
        return self.head(torch.cat(unpack_sequence(output)))


def table_accuracy(seen: list[Sample], test: list[Sample], width: int) -> float:
    """Accuracy of a table: the class seen most often for the middle one of `width` characters."""

    def places(samples: list[Sample]) -> Tensor:
        padded = [nn.functional.pad(characters, (width // 2, width // 2)) for characters, _ in samples]
        return torch.cat([each.unfold(0, width, 1) for each in padded]) @ 128 ** torch.arange(width)

    votes = torch.zeros(128**width, len(CLASSES))
    votes.index_put_((places(seen), classes(seen)), torch.ones(()), accumulate=True)
    return (votes[places(test)].argmax(1) == classes(test)).float().mean().item()


def classes(samples: list[Sample]) -> Tensor:
    """Return the right classes of all characters, one sample after the other."""
    return torch.cat([kinds for _, kinds in samples])


def main() -> None:
    """Train, compare with tables of characters and their neighbours, and colour a function."""
    options = arguments(__doc__)
    seen = [sample for module in TRAINED.split()[options.smoke * 10 :] for sample in read_functions(module)]
    test = [sample for module in HELD_OUT.split() for sample in read_functions(module)]

    def loss(model: nn.Module, batch: list[Sample]) -> Tensor:
        return nn.functional.cross_entropy(model([characters for characters, _ in batch]), classes(batch))

    model = Tagger()
    fit(model, lambda: loss(model, random.sample(seen, BATCH)), 12 if options.smoke else 600, learning_rate=0.01)
    explain_and_compare(options, model, lambda each: loss(each, seen[:BATCH]))

    model.requires_grad_(False)
    truth = classes(test)
    right = model([characters for characters, _ in test]).argmax(1) == truth
    baselines = {f"table of {width}": table_accuracy(seen, test, width) for width in (3, 1)}
    report(f"accuracy on {len(truth)} held-out characters", right.float().mean().item(), baselines)

    with figure(options, panels=2, size=(8.5, 3.2)) as (bars, code):
        found = [right[truth == kind].float().mean().item() for kind in range(len(CLASSES))]
        bars.barh(CLASSES, found, color=COLORS)
        bars.set(title="How many of each class are found", xlabel="share of its characters", xlim=(0, 1))
        short = [sample for sample in test if len(sample[0]) < 500]
        function, _ = max(short, key=lambda sample: (len(sample[1].unique()), len(sample[0])))  # of many classes
        colors = [COLORS[kind] for kind in model([function]).argmax(1)]
        page(code, bytes(function.tolist()).decode(), colors, "A function that it never saw")


if __name__ == "__main__":
    main()
