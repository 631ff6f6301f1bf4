"""Gestures and speech, many frames to one label: which movement, which hand, which speaker?

    frames of B recordings, packed  ->  LSTM, both directions  ->  maximum over time  ->  class
    [N, features]                       [N, 2 * HIDDEN]            [B, 2 * HIDDEN]        [B, classes]

Three small sets, one model. A frame is FRAME samples in a row: GunPoint differs in how a hand moves within a moment.
Each draw of a recording is a random stretch of it with a little noise, so 40 recordings go a long way; the recordings
therefore differ in length even where the set's do not. Train and test recordings are the sets' own.

Data, as shipped in aeon: BasicMotions (accelerometer and gyroscope of a watch in four sports), GunPoint (the hand's
position: does it draw a gun or point a finger?), JapaneseVowels (nine speakers say /ae/, 7 to 29 frames).
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from aeon.datasets import load_basic_motions, load_gunpoint, load_japanese_vowels
from common import ACCENT_COLOR, BASELINE_COLOR, LSTM_COLOR, arguments, explain_and_compare, figure, fit, report
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN = 32, 64
# name -> loader, samples in a frame
SETS: dict[str, tuple[Any, int]] = {
    "BasicMotions": (load_basic_motions, 1),
    "GunPoint": (load_gunpoint, 5),
    "JapaneseVowels": (load_japanese_vowels, 1),
}
# what the labels mean, where they are numbers
CLASSES = {"GunPoint": ["gun", "point"], "JapaneseVowels": ["man 1", "man 2", "man 3", "man 4"]}


class Recordings(NamedTuple):
    """Recordings [frames, features] of different lengths, and their classes [B]."""

    frames: list[Tensor]
    classes: Tensor


class Classifier(nn.Module):
    """Reads a recording from both ends."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.lstm = LSTM(features, HIDDEN, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * HIDDEN, classes))

    def forward(self, recordings: list[Tensor]) -> Tensor:
        """Map B recordings to logits [B, classes]."""
        output, _ = self.lstm(pack_sequence(recordings, enforce_sorted=False))
        padded, _ = pad_packed_sequence(output, padding_value=float("-inf"))  # [T, B, 2 * HIDDEN]
        return self.head(padded.amax(0))


def read(loader: Any, frame: int) -> tuple[Recordings, Recordings]:
    """Return the train and test recordings, scaled alike."""

    def split(name: str) -> Recordings:
        samples, labels = loader(split=name)
        rows = [torch.tensor(sample.T, dtype=torch.float32) for sample in samples]
        frames = [row[: len(row) // frame * frame].reshape(-1, frame * row.size(1)) for row in rows]
        return Recordings(frames, torch.tensor(np.unique(labels, return_inverse=True)[1]))

    train, test = split("train"), split("test")
    everything = torch.cat(train.frames)
    mean, deviation = everything.mean(0), everything.std(0)

    def scaled(recordings: Recordings) -> Recordings:
        return recordings._replace(frames=[(frames - mean) / deviation for frames in recordings.frames])

    return scaled(train), scaled(test)


def stretch(recording: Tensor) -> Tensor:
    """Return a random 80 to 100 % of a recording, a little louder or softer, with noise."""
    length = round(len(recording) * random.uniform(0.8, 1))
    begin = random.randint(0, len(recording) - length)
    piece = recording[begin : begin + length]
    return piece * random.gauss(1, 0.05) + 0.05 * torch.randn_like(piece)


def nearest_neighbour(train: Recordings, test: Recordings) -> float:
    """Return the accuracy of the nearest training recording, all resampled to one length."""
    length = max(map(len, train.frames + test.frames))

    def resampled(recordings: Recordings) -> np.ndarray:
        rows = [nn.functional.interpolate(x.T[None], length, mode="linear").flatten() for x in recordings.frames]
        return torch.stack(rows).numpy()

    neighbours = KNeighborsClassifier(1).fit(resampled(train), train.classes)
    return float(neighbours.score(resampled(test), test.classes))


def learn(name: str, smoke: bool) -> dict[str, float]:
    """Train on one set; return the accuracy on its test recordings, and the baselines'."""
    train, test = read(*SETS[name])
    model = Classifier(train.frames[0].size(1), int(train.classes.max()) + 1)

    def loss(model: nn.Module) -> Tensor:
        batch = random.choices(range(len(train.classes)), k=BATCH)
        logits = model([stretch(train.frames[index]) for index in batch])
        return nn.functional.cross_entropy(logits, train.classes[batch], label_smoothing=0.05)

    fit(model, lambda: loss(model), 10 if smoke else 500, learning_rate=0.01)
    explain_and_compare(model, loss, rounds=3 if smoke else 15)

    model.eval()
    with torch.no_grad():
        accuracy = (model(test.frames).argmax(1) == test.classes).float().mean().item()
    majority = (test.classes == train.classes.mode().values).float().mean().item()
    baselines = {"majority": majority, "nearest neighbour": nearest_neighbour(train, test)}
    report(f"{name}, accuracy on {len(test.classes)} test recordings", accuracy, baselines)
    return {**baselines, "LSTM": accuracy}


def main() -> None:
    """Train one model per set and compare each with the majority and with the nearest neighbour."""
    options = arguments(__doc__)
    results = {name: learn(name, options.smoke) for name in SETS}

    colors = (BASELINE_COLOR, ACCENT_COLOR, LSTM_COLOR)
    with figure(options, panels=4, size=(10, 3)) as (*signals, bars):
        for axes, (name, (loader, _)) in zip(signals, SETS.items(), strict=True):
            samples, labels = loader(split="train")
            spread = 8 * np.concatenate([sample[:3] for sample in samples], axis=1).std()
            kinds = np.unique(labels)[:4]
            for row, kind in enumerate(kinds):
                sample = samples[int(np.flatnonzero(labels == kind)[0])][:3]
                axes.plot((sample - sample.mean()).T / spread - row, color=f"C{row}", linewidth=1)
            axes.set(title=name, xlabel="samples", yticks=[-row for row in range(len(kinds))])
            axes.set_yticklabels(CLASSES.get(name, kinds))
        for place, (kind, color) in enumerate(zip(next(iter(results.values())), colors, strict=True)):
            values = [result[kind] for result in results.values()]
            bars.bar([x + 0.27 * (place - 1) for x in range(3)], values, 0.25, color=color, label=kind)
        bars.set(
            title="Test accuracy", xticks=range(3), xticklabels=["Basic\nMotions", "Gun\nPoint", "Japanese\nVowels"]
        )
        bars.set(ylim=(0, 1.4), yticks=[0, 0.5, 1], yticklabels=["0", "50 %", "100 %"])
        bars.legend(fontsize=7, loc="upper left")


if __name__ == "__main__":
    main()
