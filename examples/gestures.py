"""Gestures and speech, many frames to one label: which movement, which hand, which speaker?

    frames of B recordings, packed  ->  LSTM, both directions  ->  maximum over time  ->  class
    [N, features]                       [N, 2 * HIDDEN]            [B, 2 * HIDDEN]        [B, classes]

Three small sets, one model. A frame is some samples in a row: GunPoint differs in how a hand moves within a moment.
Each draw of a recording is a random stretch of it with a little noise, so 40 recordings go a long way. Train and test
recordings are the sets' own.

Data, as shipped in aeon: BasicMotions (accelerometer and gyroscope of a watch in four sports), GunPoint (the hand's
position: does it draw a gun or point a finger?), JapaneseVowels (nine speakers say /ae/, 7 to 29 frames).
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from aeon.datasets import load_basic_motions, load_gunpoint, load_japanese_vowels
from common import arguments, explain_and_compare, fit, report, split
from plots import bars, figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN = 32, 64
# name -> loader, samples in a frame, what the labels mean
SETS: dict[str, tuple[Any, int, list[str]]] = {
    "BasicMotions": (load_basic_motions, 1, ["badminton", "running", "standing", "walking"]),
    "GunPoint": (load_gunpoint, 5, ["gun", "point"]),
    "JapaneseVowels": (load_japanese_vowels, 1, [f"man {number}" for number in range(1, 10)]),
}


class Classifier(nn.Module):
    """Reads a recording from both ends."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.lstm = LSTM(features, HIDDEN, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * HIDDEN, classes))

    def forward(self, recordings: list[Tensor]) -> Tensor:
        """Map B recordings [frames, features] to logits [B, classes]."""
        output, _ = self.lstm(pack_sequence(recordings, enforce_sorted=False))
        padded, _ = pad_packed_sequence(output, padding_value=float("-inf"))  # [T, B, 2 * HIDDEN]
        return self.head(padded.amax(0))


def read(name: str, part: str) -> tuple[list[Tensor], Tensor]:
    """Return the recordings [frames, features] of a set's part, and their classes [B]."""
    loader, frame, _ = SETS[name]
    samples, labels = loader(split=part)
    channels = [torch.tensor(sample, dtype=torch.float32) for sample in samples]  # [features / frame, T]
    recordings = [each.unfold(1, frame, frame).transpose(0, 1).flatten(1) for each in channels]
    return recordings, torch.tensor(np.unique(labels, return_inverse=True)[1])


def stretch(recording: Tensor) -> Tensor:
    """Return a random 80 to 100 % of a recording, a little louder or softer, with noise."""
    length = round(len(recording) * random.uniform(0.8, 1))
    begin = random.randint(0, len(recording) - length)
    piece = recording[begin : begin + length]
    return piece * random.gauss(1, 0.05) + 0.05 * torch.randn_like(piece)


def resample(recordings: list[Tensor], length: int) -> Tensor:
    """Bring recordings to one length, [B, length * features], so that they have distances."""
    return torch.cat([nn.functional.interpolate(each.T[None], length, mode="linear").flatten(1) for each in recordings])


def learn(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train on one set; return the accuracy on its test recordings, and the baselines'."""
    (recordings, classes), (test, truth) = read(name, "train"), read(name, "test")
    if options.validate:
        seen, held_out = split(range(len(recordings)), 1 / 3)
        test, truth = [recordings[index] for index in held_out], classes[held_out]
        recordings, classes = [recordings[index] for index in seen], classes[seen]
    frames = torch.cat(recordings)
    recordings, test = ([(each - frames.mean(0)) / frames.std(0) for each in part] for part in (recordings, test))
    model = Classifier(frames.size(1), len(SETS[name][2]))

    def loss(model: nn.Module) -> Tensor:
        batch = random.choices(range(len(recordings)), k=BATCH)
        logits = model([stretch(recordings[index]) for index in batch])
        return nn.functional.cross_entropy(logits, classes[batch], label_smoothing=0.05)

    fit(model, lambda: loss(model), 10 if options.smoke else 250, learning_rate=0.01)
    explain_and_compare(options, model, loss)

    length = max(map(len, recordings + test))
    nearest = torch.cdist(resample(test, length), resample(recordings, length)).argmin(1)
    answers = {"nearest neighbour": classes[nearest], "majority": classes.mode().values}
    baselines = {name: (answer == truth).float().mean().item() for name, answer in answers.items()}
    own = (model.eval()(test).argmax(1) == truth).float().mean().item()
    return report(f"{name}, accuracy on {len(test)} recordings", own, baselines)


def main() -> None:
    """Train one model per set and compare each with the majority and with the nearest neighbour."""
    options = arguments(__doc__, validate=True)
    results = {name: learn(name, options) for name in SETS}
    with figure(options, panels=4, size=(11, 3), ratios=(1, 1, 1, 1.6)) as (*signals, right):
        for axes, (name, (loader, _, kinds)) in zip(signals, SETS.items(), strict=True):
            samples, labels = loader(split="train")
            spread = 8 * np.concatenate([sample[:3] for sample in samples], axis=1).std()
            for row, label in enumerate(np.unique(labels)[:4]):
                sample = samples[int(np.flatnonzero(labels == label)[0])][:3]
                axes.plot((sample - sample.mean()).T / spread - row, color=f"C{row}", linewidth=1)
            axes.set(title=name, xlabel="samples")
            axes.set_yticks([-row for row in range(len(kinds[:4]))], kinds[:4])
        bars(right, results, "Test accuracy")


if __name__ == "__main__":
    main()
