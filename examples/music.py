"""Music, one note to many: a melody in the manner of Bach's chorales, from a single seed note.

    seed note  ->  embedding  ->  LSTM  ->  next note  ->  embedding  ->  LSTM  ->  next note  ...  ->  END
                                   |___________ the state is carried along ___________|

In training all notes of B melodies of different lengths are given, packed, and each next note is predicted. A note is
a pitch (or a rest) with a duration; melodies are moved to C major or A minor. Tunes that Bach set several times open
alike: all melodies with the same six first pitches stay on one side of the held-out split.

Data: the sopranos of Bach's chorales, as shipped in music21 (408 scores).
"""

from __future__ import annotations

import math
import random
import zipfile
from collections import Counter, defaultdict
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import torch
from common import ACCENT_COLOR, BASELINE_COLOR, LSTM_COLOR, arguments, explain_and_compare, figure, fit, report
from music21 import note, stream
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN, END = 16, 192, 0
Note = tuple[int | None, float]  # MIDI pitch, None for a rest, and duration in quarter notes


class Melodist(nn.Module):
    """Predicts the next note; the same matrix embeds notes and scores them."""

    def __init__(self, notes: int):
        super().__init__()
        self.embedding = nn.Embedding(notes, HIDDEN)
        nn.init.normal_(self.embedding.weight, std=HIDDEN**-0.5)
        self.lstm = LSTM(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.5)

    def forward(self, melodies: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [N, notes] for the N notes that have one before them, and those notes [N]."""
        before = pack_sequence([melody[:-1] for melody in melodies], enforce_sorted=False)
        after = pack_sequence([melody[1:] for melody in melodies], enforce_sorted=False)
        output, _ = self.lstm(before._replace(data=self.dropout(self.embedding(before.data))))
        return self.dropout(output.data) @ self.embedding.weight.T, after.data

    @torch.no_grad()
    def compose(self, seed: int, temperature: float = 0.8, limit: int = 70) -> list[int]:
        """Sample a melody that begins with `seed`, feeding every note back in."""
        melody, state = [seed], None
        while melody[-1] != END and len(melody) < limit:
            output, state = self.lstm(self.embedding(torch.tensor([melody[-1:]])), state)
            logits = output[0, 0] @ self.embedding.weight.T
            melody.append(int(torch.multinomial((logits / temperature).softmax(0), 1)))
        return [number for number in melody if number != END]


def read_soprano(path: Path) -> list[Note]:
    """Return the notes of the soprano in a score, or none if there is not exactly one soprano."""
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith("xml") and "META-INF" not in name)
        score = ElementTree.fromstring(archive.read(member))
    parts = [part.get("id") for part in score.iter("score-part") if part.findtext("part-name") == "Soprano"]
    part = score.find(f"part[@id='{parts[0]}']") if len(parts) == 1 else None
    if part is None:
        return []
    division = int(part.findtext(".//divisions", ""))
    # semitones to C major or A minor, by the shorter way
    shift = (-7 * int(part.findtext(".//fifths", "")) + 5) % 12 - 5
    melody: list[Note] = []
    for element in part.iterfind(".//note[duration]"):  # ornaments have none
        pitch, quarters = element.find("pitch"), int(element.findtext("duration", "")) / division
        midi = None
        if pitch is not None:
            step, alter = "C D EF G A B".index(pitch.findtext("step", "")), int(pitch.findtext("alter", "0"))
            midi = 12 * int(pitch.findtext("octave", "")) + 12 + step + alter + shift
        if melody and element.find("tie[@type='stop']") is not None:
            quarters += melody.pop()[1]
        melody.append((midi, quarters))
    return melody


def ngram_bits(seen: list[Tensor], held_out: list[Tensor], order: int, notes: int) -> float:
    """Return bits per note of a model that knows `order` - 1 notes before, smoothed (Witten and Bell 1991)."""
    table: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for melody in map(Tensor.tolist, seen):
        for end in range(1, len(melody)):
            for length in range(min(order, end + 1)):
                table[tuple(melody[end - length : end])][melody[end]] += 1
    bits = []
    for melody in map(Tensor.tolist, held_out):
        for end in range(1, len(melody)):
            probability = 1 / notes
            for length in range(min(order, end + 1)):
                if found := table.get(tuple(melody[end - length : end])):
                    probability = (found[melody[end]] + len(found) * probability) / (found.total() + len(found))
            bits.append(-math.log2(probability))
    return sum(bits) / len(bits)


def main() -> None:
    """Train, compare with n-grams, and compose."""
    options = arguments(__doc__)
    paths = sorted((Path(str(files("music21"))) / "corpus" / "bach").glob("*.mxl"))
    melodies = [melody for melody in map(read_soprano, paths[: 30 if options.smoke else None]) if melody]
    alphabet = sorted({pair for melody in melodies for pair in melody}, key=str)
    number = {pair: index for index, pair in enumerate(alphabet, start=1)}
    tunes: defaultdict[tuple, list[Tensor]] = defaultdict(list)
    for melody in melodies:
        opening = tuple(pitch for pitch, _ in melody if pitch is not None)[:6]
        tunes[opening].append(torch.tensor([number[pair] for pair in melody] + [END]))
    held: set[tuple] = set(random.sample(sorted(tunes), len(tunes) // 8))
    held_out = [melody for opening in tunes if opening in held for melody in tunes[opening]]
    seen = [melody for opening in tunes if opening not in held for melody in tunes[opening]]

    model = Melodist(len(alphabet) + 1)

    def loss(model: Melodist, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(*model(batch))

    fit(model, lambda: loss(model, random.sample(seen, BATCH)), 10 if options.smoke else 1000, learning_rate=0.004)
    explain_and_compare(model, lambda each: loss(each, seen[:BATCH]), rounds=3 if options.smoke else 15)

    model.eval()
    with torch.no_grad():
        bits = loss(model, held_out).item() / math.log(2)
    names = ("unigram", "bigram", "trigram")
    baselines = {name: ngram_bits(seen, held_out, order, len(alphabet) + 1) for order, name in enumerate(names, 1)}
    report(f"bits per note on {len(held_out)} held-out melodies", bits, baselines, better="lower")

    composed = [alphabet[index - 1] for index in model.compose(number[72, 1.0])]
    score = stream.Stream()
    for pitch, quarters in composed:
        score.append(note.Rest(quarterLength=quarters) if pitch is None else note.Note(pitch, quarterLength=quarters))
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"melody: {score.write('midi', options.out / 'music.mid')}")

    with figure(options, panels=2, size=(10, 3), ratios=(3.5, 1)) as (left, right):
        begin = 0.0
        for place, (pitch, quarters) in enumerate(composed):
            if pitch is not None:
                color = LSTM_COLOR if place else ACCENT_COLOR
                left.barh(pitch, quarters - 0.15, left=begin, height=0.9, align="center", color=color)
            begin += quarters
        for key in range(57, 84):
            if key % 12 in (1, 3, 6, 8, 10):  # the black ones
                left.axhspan(key - 0.5, key + 0.5, color="0.95", zorder=0)
        left.set(title="A melody from its first note (red)", xlabel="quarter notes", yticks=[60, 64, 67, 72, 76, 79])
        left.set(yticklabels=["C4", "E4", "G4", "C5", "E5", "G5"], xlim=(-0.5, begin + 0.5), ylim=(56.5, 83.5))
        scores = {**baselines, "LSTM": bits}
        bars = right.bar(list(scores), list(scores.values()), color=[BASELINE_COLOR] * 3 + [LSTM_COLOR])
        right.bar_label(bars, fmt="%.2f")
        right.tick_params("x", labelsize=8)
        right.set(title="Bits per held-out note")


if __name__ == "__main__":
    main()
