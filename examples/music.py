"""Music, one note to many: a melody in the manner of Bach's chorales, from a single first note.

    first note  ->  embedding  ->  LSTM  ->  next note  ->  embedding  ->  LSTM  ->  next note  ...  ->  END
                                    |___________ the state is carried along ___________|

All notes of B melodies are given in training, packed, and each next one is predicted: a pitch or a rest, with a
duration, in C major or A minor. Settings of one tune (the same six first pitches) stay on one side of the split.

Data: the sopranos of Bach's chorales, as shipped in music21 (408 scores).
"""

from __future__ import annotations

import math
import random
import zipfile
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import torch
from common import arguments, explain_and_compare, fit, report, split
from music21 import note, stream
from ngrams import ngram_bits
from plots import LSTM_COLOR, bars, figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN, END = 16, 128, 0


class Melodist(nn.Module):
    """Predicts the next note; the same matrix embeds notes and scores them."""

    def __init__(self, notes: int):
        super().__init__()
        self.notes = nn.Parameter(torch.randn(notes, HIDDEN) / HIDDEN**0.5)
        self.lstm = LSTM(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.5)

    def loss(self, melodies: list[tuple[int, ...]]) -> Tensor:
        """Cross-entropy of every note that has one before it; a melody is its notes' numbers and END."""
        before = pack_sequence([torch.tensor(melody[:-1]) for melody in melodies], enforce_sorted=False)
        after = pack_sequence([torch.tensor(melody[1:]) for melody in melodies], enforce_sorted=False)
        output, _ = self.lstm(before._replace(data=self.dropout(self.notes[before.data])))
        logits = self.dropout(output.data) @ self.notes.T  # [N, notes]
        return nn.functional.cross_entropy(logits, after.data)

    def compose(self, number: int) -> list[int]:
        """Sample a melody of at most 70 notes, feeding every note back in."""
        melody, state = [], None
        while number != END and len(melody) < 70:
            melody.append(number)
            output, state = self.lstm(self.notes[None, number : number + 1], state)
            logits = output[0, 0] @ self.notes.T
            number = int(torch.multinomial((logits / 0.8).softmax(0), 1))  # a little more cautious than it has learned
        return melody


def read_soprano(path: Path) -> list[tuple[int | None, float]]:
    """Return the soprano's notes: MIDI pitch, None for a rest, and beats. Scores without just one soprano have none."""
    with zipfile.ZipFile(path) as archive:
        member = next(name for name in archive.namelist() if name.endswith("xml") and "META-INF" not in name)
        score = ElementTree.fromstring(archive.read(member))
    sopranos = [part.get("id") for part in score.iterfind("part-list/score-part[part-name='Soprano']")]
    if len(sopranos) != 1:
        return []
    [part], melody = score.findall(f"part[@id='{sopranos[0]}']"), []
    # semitones to C major or A minor, by the shorter way
    shift = (-7 * int(part.findtext(".//fifths", "")) + 5) % 12 - 5
    for element in part.iterfind(".//note[duration]"):  # ornaments have none
        pitch, beats = None, int(element.findtext("duration", "")) / int(part.findtext(".//divisions", ""))
        if step := element.findtext("pitch/step"):
            octave, alter = int(element.findtext("pitch/octave", "")), int(element.findtext("pitch/alter", "0"))
            pitch = 12 * octave + 12 + "C D EF G A B".index(step) + alter + shift
        if element.find("tie[@type='stop']") is not None:
            beats += melody.pop()[1]
        melody.append((pitch, beats))
    return melody


def main() -> None:
    """Train, compare with n-grams, and compose."""
    options = arguments(__doc__, validate=True)
    paths = sorted((Path(str(files("music21"))) / "corpus" / "bach").glob("*.mxl"))
    sopranos = [soprano for soprano in map(read_soprano, paths[: 30 if options.smoke else None]) if soprano]
    alphabet = [END, *sorted({pair for soprano in sopranos for pair in soprano}, key=str)]
    number = {pair: index for index, pair in enumerate(alphabet)}
    tunes = defaultdict(list)
    for soprano in sopranos:
        tunes[tuple(pitch for pitch, _ in soprano if pitch)[:6]].append((*(number[pair] for pair in soprano), END))
    parts = split(tunes.values(), 1 / 8, validate=options.validate)
    seen, held_out = ([melody for tune in part for melody in tune] for part in parts)

    model = Melodist(len(alphabet))
    fit(model, lambda: model.loss(random.sample(seen, BATCH)), 10 if options.smoke else 1000, learning_rate=0.004)
    explain_and_compare(options, model, lambda each: each.loss(seen[:BATCH]))

    model.eval().requires_grad_(False)
    bits = model.loss(held_out).item() / math.log(2)
    ngrams = {f"{order}-grams": ngram_bits(seen, held_out, order, len(alphabet)) for order in (3, 2, 1)}
    scores = report(f"bits per note on {len(held_out)} held-out melodies", bits, ngrams, better="lower")

    played = stream.Stream()
    with figure(options, panels=2, size=(10, 3), ratios=(3.5, 1)) as (left, right):
        for pitch, beats in (alphabet[index] for index in model.compose(number[72, 1.0])):
            if pitch is not None:
                left.barh(pitch, beats - 0.15, left=float(played.highestTime), color=LSTM_COLOR)
            played.append(note.Rest(quarterLength=beats) if pitch is None else note.Note(pitch, quarterLength=beats))
        left.set(title="A melody that goes on from C5", xlabel="quarter notes", ylabel="MIDI pitch")
        bars(right, {"": scores}, "Bits per held-out note")
    print(f"melody: {played.write('midi', options.out / 'music.mid')}")


if __name__ == "__main__":
    main()
