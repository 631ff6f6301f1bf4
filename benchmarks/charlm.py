"""One row that is a real job: a character model trained on text that every Python carries.

The text is the standard library's own source, line by line; batches of lines of different lengths are packed, as a
user would. The same weights are trained on the same batches by the same optimizer with stock and with fastlstm, in
turns step by step, and once more with stock in float64: fastlstm's loss curve must follow the float64 curve as
closely as the tests' table of tolerances asks, which means about as closely as stock's own.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from benchmarks.measure import allowance, route
from benchmarks.peers import OURS, PEERS, STOCK, STOCK_LSTM
from benchmarks.results import Job, JobColumn
from benchmarks.timing import sample_seconds, spread
from tests.helpers import relative_error

NAME = "charlm/packed/fp32/train"
# pure Python in every supported version, large, and with docstrings
MODULES = (
    "argparse",
    "configparser",
    "difflib",
    "doctest",
    "inspect",
    "mailbox",
    "optparse",
    "pdb",
    "pickle",
    "tarfile",
)
ALPHABET = 128
EMBEDDING, HIDDEN = 64, 128
BATCH = 32
LONGEST = 100
HELD_OUT = 256
# plain momentum learns faster than Adam here and, unlike Adam, leaves rounding errors as small as they were: with
# it two correct implementations part by 1e-7 after 300 steps, with Adam at 3e-3 by 1e-3
LEARNING_RATE, MOMENTUM = 0.5, 0.9


def read_lines() -> list[bytes]:
    """The ASCII lines of the chosen modules, with their indentation, none empty, none over LONGEST."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join((folder / f"{module}.py").read_bytes() for module in MODULES)
    lines = (line.rstrip()[:LONGEST] for line in text.splitlines())
    return [line for line in lines if line and line.isascii()]


class CharacterModel(nn.Module):
    """Embedding, LSTM, linear: predicts each next character of a line."""

    def __init__(self, make_lstm: Callable[..., nn.RNNBase]):
        super().__init__()
        self.embedding = nn.Embedding(ALPHABET, EMBEDDING)
        self.lstm = make_lstm(EMBEDDING, HIDDEN)
        self.head = nn.Linear(HIDDEN, ALPHABET)

    def loss(self, batch: tuple[PackedSequence, Tensor]) -> Tensor:
        """Mean cross-entropy in nats per character; batch is (characters, next characters in packed order)."""
        characters, targets = batch
        output, _ = self.lstm(characters._replace(data=self.embedding(characters.data)))
        return nn.functional.cross_entropy(self.head(output.data), targets)


def make_batch(lines: list[bytes], device: torch.device) -> tuple[PackedSequence, Tensor]:
    """Pack lines: each starts from a newline and is to be continued up to its closing newline."""
    framed = [torch.tensor(list(b"\n" + line + b"\n")) for line in lines]
    inputs = pack_sequence([line[:-1] for line in framed], enforce_sorted=False)
    targets = pack_sequence([line[1:] for line in framed], enforce_sorted=False)
    # torch's type stub knows only the overload that takes a dtype
    return inputs.to(device), targets.data.to(device)  # pyright: ignore[reportArgumentType]


class Trainee:
    """A model in training with one implementation."""

    def __init__(self, make_lstm: Callable[..., nn.RNNBase], device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        weights = CharacterModel(STOCK_LSTM).state_dict()
        self.model = CharacterModel(make_lstm)
        self.model.load_state_dict(weights)
        self.model.to(device=device, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self.losses: list[Tensor] = []

    def step(self, batch: tuple[PackedSequence, Tensor]) -> None:
        """One step of the optimizer; the loss is kept on the device, so that none is waited for."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def curve(self) -> Tensor:
        """The losses so far, [steps]."""
        return torch.stack(self.losses).double().cpu()


def train(
    steps: int,
    device: torch.device,
    *,
    make_lstm: Callable[..., nn.RNNBase] = PEERS[OURS].make,
    advance: Callable[[], object] = lambda: None,
) -> Job:
    """Train the three models and compare.

    Args:
        steps: optimizer steps.
        device: where.
        make_lstm: the class trained beside stock.
        advance: called after each step, for a progress bar.
    """
    lines = read_lines()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lines), generator=generator).tolist()
    held_out = make_batch([lines[index] for index in order[:HELD_OUT]], device)
    drawn = [order[HELD_OUT + k % (len(order) - HELD_OUT)] for k in range(steps * BATCH)]

    trainees = {STOCK: Trainee(STOCK_LSTM, device, torch.float32), OURS: Trainee(make_lstm, device, torch.float32)}
    truth = Trainee(STOCK_LSTM, device, torch.float64)
    with torch.no_grad():
        untrained = truth.model.loss(held_out).item() / math.log(2)

    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for step in range(steps):
        batch = make_batch([lines[index] for index in drawn[step * BATCH : (step + 1) * BATCH]], device)
        turns = list(trainees.items())
        for name, trainee in turns if step % 2 else reversed(turns):
            seconds[name].append(sample_seconds(partial(trainee.step, batch), device))
        truth.step(batch)
        advance()

    expected = truth.curve()
    error = relative_error(trainees[OURS].curve(), expected)
    allowed = allowance(torch.float32, relative_error(trainees[STOCK].curve(), expected))
    columns: dict[str, JobColumn] = {}
    for name, trainee in trainees.items():
        with torch.no_grad():
            bits = trainee.model.loss(held_out).item() / math.log(2)
        # the first steps compile and prepare
        paired = list(zip(seconds[STOCK], seconds[name], strict=True))[min(5, steps - 1) :]
        columns[name] = {
            "bits_per_character": bits,
            "seconds": sum(seconds[name]),
            "ratio": spread([stock / own for stock, own in paired]),
            "losses": [round(loss, 6) for loss in trainee.curve().tolist()],
        }
    model = trainees[OURS].model
    embedded = held_out[0]._replace(data=model.embedding(held_out[0].data).detach())
    return {
        "name": NAME,
        "dtype": "fp32",
        "steps": steps,
        "batch": BATCH,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text_sha256": hashlib.sha256(b"\n".join(lines)).hexdigest(),
        "untrained_bits": untrained,
        "status": "ok" if error <= allowed else f"loss curve is off by {error:.1e}, allowed is {allowed:.1e}",
        "error": error,
        "allowed": allowed,
        "route": route(model.lstm, embedded, training=True),
        "columns": columns,
    }
