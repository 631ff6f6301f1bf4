"""Text generation, one character in and the next one out: text in the manner of Python's own documentation strings.

    "A return t"  ->  embedding  ->  LSTM  ->  linear  ->  " return th"     [T, B] to [T, B, 128]

For training the text is cut into B long streams, read T characters at a time; the state goes on from piece to piece,
the gradient does not (truncated backpropagation). For writing, T and B are 1: each character that is drawn is fed back.
The temperature divides the logits: low is cautious, high is wild.

Data: the documentation strings of Python's own standard library; whole modules are held out.
"""

from __future__ import annotations

import ast
import math
import sysconfig
import textwrap
from pathlib import Path

import torch
from common import arguments, explain_and_compare, fit, report
from ngrams import ngram_bits
from plots import ACCENT_COLOR, BASELINE_COLOR, INK, figure, page
from torch import Tensor, nn

from fastlstm import LSTM  # was: from torch.nn import LSTM

HELD_OUT = "calendar configparser csv fractions heapq shutil statistics textwrap zipfile"
ALPHABET, STREAMS, PIECE, HIDDEN = 128, 32, 128, 256
State = tuple[Tensor, Tensor]


def read_docstrings(modules: list[Path]) -> str:
    """Return the documentation strings in modules, cleaned of their indentation, ASCII only."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for path in modules for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    found = filter(None, map(ast.get_docstring, nodes))
    return "\n\n".join(text for text in dict.fromkeys(found) if text.isascii())


class Writer(nn.Module):
    """Scores every character as the next one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(ALPHABET, 64)
        self.lstm = LSTM(64, HIDDEN)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(HIDDEN, ALPHABET))

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map characters [T, B] to logits [T, B, ALPHABET] and the state after the last of them."""
        output, last = self.lstm(self.embedding(characters), state)
        return self.head(output), last


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in bits per character."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


def write(model: Writer, prompt: str, length: int, temperature: float) -> str:
    """Continue a prompt, one character at a time."""
    written = list(prompt.encode())
    logits, state = model(torch.tensor(written).unsqueeze(1))
    for _ in range(length):
        drawn = torch.multinomial((logits[-1, 0] / temperature).softmax(-1), 1)
        written.append(int(drawn))
        logits, state = model(drawn.unsqueeze(1), state)
    return bytes(written).decode()


def main() -> None:
    """Train on streams of text, score text of other modules, and write some."""
    options = arguments(__doc__)
    steps = 12 if options.smoke else 1500
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kept, away = ([path for path in library if (path.stem in HELD_OUT.split()) == held] for held in (False, True))
    text = read_docstrings(kept[:20] if options.smoke else kept)
    held_out = read_docstrings(away[:1] if options.smoke else away)
    length = len(text) // STREAMS
    streams = torch.tensor(list(text.encode()))[: length * STREAMS].view(STREAMS, length).T  # [length, STREAMS]

    model = Writer()
    place, state = 0, None

    def next_loss() -> Tensor:
        nonlocal place, state
        if place + PIECE >= length:
            place, state = 0, None
        piece = streams[place : place + PIECE + 1]
        logits, state = model(piece[:-1], state)
        place, state = place + PIECE, (state[0].detach(), state[1].detach())
        return bits(logits, piece[1:])

    curve = fit(model, next_loss, steps, learning_rate=4e-3)
    explain_and_compare(options, model, lambda each: bits(each(streams[:PIECE])[0], streams[1 : PIECE + 1]))

    model.eval().requires_grad_(False)
    characters = torch.tensor(list(held_out.encode())).unsqueeze(1)
    own = bits(model(characters[:-1])[0], characters[1:]).item()
    ngrams = {f"{order}-grams": ngram_bits([text], [held_out], order, ALPHABET) for order in (5, 3)}
    report(f"bits per character of {len(held_out)} held-out ones", own, ngrams, better="lower")

    samples = {temperature: write(model, "Return ", 400, temperature) for temperature in (0.3, 0.7, 1.0)}
    print(*(f"--- temperature {temperature}\n{sample}" for temperature, sample in samples.items()), sep="\n")
    with figure(options, panels=2) as (left, right):
        left.plot(curve, linewidth=0.8, label="training")
        left.axhline(own, color=ACCENT_COLOR, label=f"held out, LSTM: {own:.2f}")
        for name, value in ngrams.items():
            left.axhline(value, color=BASELINE_COLOR, linestyle="--", label=f"held out, {name}: {value:.2f}")
        left.set(title="Learning to write", xlabel="training step", ylabel="bits per character", ylim=(1, 6))
        left.legend()
        wrapped = "\n".join(textwrap.fill(line, 60) for line in samples[0.7].splitlines())
        page(right, wrapped, [INK] * len(wrapped), "Written at temperature 0.7")


if __name__ == "__main__":
    main()
