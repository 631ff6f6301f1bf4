"""Translation, many to many, encoder to decoder: names of languages, from English to French.

    "Old Irish"  ->  LSTM, both directions  ->  memory [B, S, HIDDEN] and last states
                                                  |  attention
       ">ancien irl"  ->  LSTM, one direction  ->  linear  ->  "ancien irla"   [B, T] to [B, T, alphabet]

The decoder is trained on the right beginnings and attends to the encoder's outputs by dot product (Luong et al. 2015):
letters that stay the same are copied. Translating, it feeds on its own letters, greedily or with a beam of five.

Data: the translations of ISO 639-3 (Debian's iso-codes), as shipped in the package pycountry.
"""

from __future__ import annotations

import gettext
import random

import numpy as np
import pycountry
import torch
from common import arguments, explain_and_compare, fit, report, split
from plots import bars, figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

LANGUAGE, BATCH, HIDDEN, LONGEST = "fr", 64, 256, 60
MARKS = PADDING, START, END = range(3)
State = tuple[Tensor, Tensor]


def read_pairs() -> list[tuple[str, str]]:
    """Return (English, French) for each language in the catalogue."""
    catalogue = gettext.translation("iso639-3", pycountry.LOCALES_DIR, languages=[LANGUAGE])
    pairs = {(language.name, catalogue.gettext(language.name)) for language in pycountry.languages}
    return sorted(pair for pair in pairs if len(max(pair, key=len)) < LONGEST)


class Translator(nn.Module):
    """Encoder, decoder and attention between them, over one alphabet."""

    def __init__(self, alphabet: list[str]):
        super().__init__()
        self.alphabet = [*("" for _ in MARKS), *alphabet]
        self.embedding = nn.Sequential(nn.Embedding(len(self.alphabet), 64), nn.Dropout(0.1))
        self.encoder = LSTM(64, HIDDEN // 2, bidirectional=True)
        self.decoder = LSTM(64, HIDDEN, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * HIDDEN, len(self.alphabet)))

    def letters(self, name: str) -> Tensor:
        """Return a name as numbers, framed by START and END."""
        return torch.tensor([START, *map(self.alphabet.index, name), END])

    def encode(self, names: list[str]) -> tuple[Tensor, Tensor, State]:
        """Return the memory [B, S, HIDDEN], where it is padding [B, 1, S], and the decoder's first state."""
        source = pack_sequence([self.letters(name) for name in names], enforce_sorted=False)
        output, last = self.encoder(source._replace(data=self.embedding(source.data)))
        memory, lengths = pad_packed_sequence(output, batch_first=True)
        h, c = (state.transpose(0, 1).flatten(1).unsqueeze(0) for state in last)  # both directions side by side
        return memory, torch.arange(memory.size(1)) >= lengths.view(-1, 1, 1), (h, c)

    def decode(self, letters: Tensor, memory: Tensor, padding: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Map letters [B, T] to logits of the next ones [B, T, alphabet], attention [B, T, S] and the last state."""
        output, last = self.decoder(self.embedding(letters), state)
        weights = (output @ memory.transpose(1, 2)).masked_fill(padding, -torch.inf).softmax(-1)
        return self.head(torch.cat((output, weights @ memory), dim=-1)), weights, last

    def loss(self, batch: list[tuple[str, str]]) -> Tensor:
        """Cross-entropy of the right translations, each letter after the right beginning."""
        target = pad_sequence([self.letters(french) for _, french in batch], batch_first=True, padding_value=PADDING)
        logits, _, _ = self.decode(target[:, :-1], *self.encode([english for english, _ in batch]))
        return nn.functional.cross_entropy(logits.transpose(1, 2), target[:, 1:], ignore_index=PADDING)

    def translate(self, name: str, width: int) -> str:
        """Beam search: keep the `width` likeliest beginnings, letter by letter; a width of 1 is greedy."""
        memory, padding, state = self.encode([name])
        beam: list[tuple[float, list[int], State]] = [(0.0, [START], state)]
        for _ in range(LONGEST):
            grown = [each for each in beam if each[1][-1] == END]
            for score, letters, state in (each for each in beam if each[1][-1] != END):
                logits, _, last = self.decode(torch.tensor([letters[-1:]]), memory, padding, state)
                best = logits[0, 0].log_softmax(-1).topk(width)
                for value, letter in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                    grown.append((score + value, [*letters, letter], last))
            beam = sorted(grown, key=lambda each: each[0] / len(each[1]), reverse=True)[:width]
        return "".join(self.alphabet[letter] for letter in beam[0][1])


def main() -> None:
    """Train, translate names that were never seen, and compare with copying them."""
    options = arguments(__doc__, validate=True)
    pairs = read_pairs()
    seen, test = split(pairs, 1 / 500 if options.smoke else 1 / 20, validate=options.validate)
    model = Translator(sorted({letter for pair in pairs for name in pair for letter in name}))
    fit(model, lambda: model.loss(random.sample(seen, BATCH)), 12 if options.smoke else 1200, learning_rate=0.004)
    explain_and_compare(options, model, lambda each: each.loss(seen[:BATCH]))

    model.eval().requires_grad_(False)
    english, french = np.array(test).T
    beam, greedy = (np.array([model.translate(name, width) for name in english]) for width in (5, 1))
    new, right = english != french, beam == french
    baselines = {"greedy": float(np.mean(greedy == french)), "copying": float(np.mean(~new))}
    scores = report(f"exact matches on {len(test)} held-out names, beam of 5", float(np.mean(right)), baselines)
    print(f"of the {new.sum()} that change, {right[new].mean():.0%} are right")
    for index in np.flatnonzero(new)[:15]:
        print(f"  {english[index]} -> {beam[index]} (right: {french[index]})")

    shown = int(np.argmax(new & right))
    _, weights, _ = model.decode(model.letters(french[shown])[None, :-1], *model.encode([english[shown]]))
    with figure(options, panels=2, size=(8, 3.4)) as (left, attention):
        bars(left, {"": scores}, "Held-out names, right to the letter")
        attention.imshow(weights[0, :-1, 1:-1].T.numpy(), cmap="Greens", aspect="auto", vmin=0, vmax=1)
        attention.set(title="Where the decoder looked", xlabel="written", ylabel="read")
        attention.set_xticks(range(len(french[shown])), list(french[shown]))
        attention.set_yticks(range(len(english[shown])), list(english[shown]))


if __name__ == "__main__":
    main()
