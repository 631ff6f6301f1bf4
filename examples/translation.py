"""Translation, many to many, encoder to decoder: names of languages and countries, from English to French.

    "Old Irish"  ->  LSTM, both directions  ->  memory [B, S, 2 * HIDDEN] and last states
                                                  |  attention
       ">ancien irl"  ->  LSTM, one direction  ->  linear  ->  "ancien irla"   [T, B] to [B, T, alphabet]

The decoder is trained on the right beginnings (teacher forcing), so that a whole batch of names is one call of its
LSTM. It attends to the encoder's outputs by dot product (Luong et al. 2015): letters that stay the same are copied.
Translating, it feeds on its own letters, either the likeliest each time (greedy: a beam of one) or with a beam of five.

Data: the translations of ISO 639-3 and ISO 3166-1 (Debian's iso-codes), as shipped in the package pycountry.
"""

from __future__ import annotations

import gettext
import random

import pycountry
import torch
from common import arguments, explain_and_compare, figure, fit, report
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

LANGUAGE, BATCH, HIDDEN, LONGEST = "fr", 64, 128, 60
MARKS = PADDING, START, END = range(3)
State = tuple[Tensor, Tensor]
Pair = tuple[str, str]


def read_pairs() -> list[Pair]:
    """Return (English, French) for each language and country in the catalogues."""
    pairs = set()
    for domain, entries in (("iso639-3", pycountry.languages), ("iso3166-1", pycountry.countries)):
        catalogue = gettext.translation(domain, pycountry.LOCALES_DIR, languages=[LANGUAGE])
        pairs |= {(entry.name, catalogue.gettext(entry.name)) for entry in entries}
    return sorted(pair for pair in pairs if len(max(pair, key=len)) < LONGEST)


class Translator(nn.Module):
    """Encoder, decoder and attention between them, over one alphabet."""

    def __init__(self, alphabet: list[str]):
        super().__init__()
        self.alphabet = [*("" for _ in MARKS), *alphabet]
        self.embedding = nn.Sequential(nn.Embedding(len(self.alphabet), 64), nn.Dropout(0.1))
        self.encoder = LSTM(64, HIDDEN, bidirectional=True)
        self.decoder = LSTM(64, 2 * HIDDEN)
        self.attention = nn.Linear(2 * HIDDEN, 2 * HIDDEN, bias=False)
        self.mix = nn.Sequential(nn.Linear(4 * HIDDEN, 2 * HIDDEN), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(2 * HIDDEN, len(self.alphabet))

    def letters(self, name: str) -> Tensor:
        """Return a name as numbers, framed by START and END."""
        return torch.tensor([START, *map(self.alphabet.index, name), END])

    def encode(self, source: PackedSequence) -> tuple[Tensor, Tensor, State]:
        """Return the memory [B, S, 2 * HIDDEN], where it is padding [B, 1, S], and the decoder's first state."""
        output, last = self.encoder(source._replace(data=self.embedding(source.data)))
        memory, lengths = pad_packed_sequence(output, batch_first=True)
        padding = torch.arange(memory.size(1)) >= lengths.view(-1, 1, 1)
        h, c = (state.transpose(0, 1).flatten(1).unsqueeze(0) for state in last)  # both directions side by side
        return memory, padding, (h, c)

    def decode(self, letters: Tensor, memory: Tensor, padding: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Map letters [T, B] to logits of the next ones [B, T, alphabet], attention [B, T, S] and the last state."""
        output, last = self.decoder(self.embedding(letters), state)
        queries = output.transpose(0, 1)
        scores = self.attention(queries) @ memory.transpose(1, 2)
        weights = scores.masked_fill(padding, -torch.inf).softmax(-1)
        return self.head(self.mix(torch.cat((queries, weights @ memory), dim=-1))), weights, last

    def loss(self, batch: list[Pair]) -> Tensor:
        """Cross-entropy of the right translations, each letter after the right beginning."""
        source = pack_sequence([self.letters(english) for english, _ in batch], enforce_sorted=False)
        target = pad_sequence([self.letters(french) for _, french in batch], padding_value=PADDING)  # [T + 1, B]
        logits, _, _ = self.decode(target[:-1], *self.encode(source))
        return nn.functional.cross_entropy(logits.transpose(1, 2), target[1:].T, ignore_index=PADDING)

    @torch.no_grad()
    def translate(self, name: str, width: int) -> str:
        """Beam search: keep the `width` likeliest beginnings, letter by letter; a width of 1 is greedy."""
        memory, padding, state = self.encode(pack_sequence([self.letters(name)]))
        beginnings, scores, finished = torch.tensor([[START]]), torch.zeros(1), []
        for length in range(1, LONGEST + 1):
            spread = memory.expand(len(beginnings), -1, -1)
            logits, _, (h, c) = self.decode(beginnings[:, -1:].T, spread, padding, state)
            total = scores.unsqueeze(1) + logits[:, 0].log_softmax(-1)  # [beginnings, alphabet]
            scores, best = total.flatten().topk(width)
            rows, letters = best // total.size(1), best % total.size(1)
            grown, ends = torch.cat((beginnings[rows], letters.unsqueeze(1)), dim=1), letters == END
            finished += zip((scores[ends] / length).tolist(), grown[ends].tolist(), strict=True)
            if len(finished) >= width:
                break
            beginnings, scores, state = grown[~ends], scores[~ends], (h[:, rows[~ends]], c[:, rows[~ends]])
        _, likeliest = max(finished, default=(0.0, beginnings[0].tolist()))
        return "".join(self.alphabet[letter] for letter in likeliest)


def main() -> None:
    """Train, translate names that were never seen, and compare with copying them."""
    options = arguments(__doc__)
    steps, trials = (12, 4) if options.smoke else (2000, 400)
    pairs = read_pairs()
    alphabet = sorted({letter for pair in pairs for name in pair for letter in name})
    random.shuffle(pairs)
    test, seen = pairs[:trials], pairs[trials:]

    model = Translator(alphabet)
    fit(model, lambda: model.loss(random.sample(seen, BATCH)), steps, learning_rate=0.004)
    explain_and_compare(model, lambda each: each.loss(seen[:BATCH]))

    model.eval()
    names = {"copying": [english for english, _ in test]}
    for way, width in (("greedy", 1), ("beam of 5", 5)):
        names[way] = [model.translate(english, width) for english, _ in test]
    exact = {way: torch.tensor([a == b for a, (_, b) in zip(names[way], test, strict=True)]) for way in names}
    changed = (~exact["copying"]).nonzero().flatten().tolist()
    for index in changed[:15]:
        print(f"  {test[index][0]} -> {names['beam of 5'][index]} (right: {test[index][1]})")
    shares = {way: hits.float().mean().item() for way, hits in exact.items()}
    among = {way: hits[changed].float().mean().item() for way, hits in exact.items()}
    for values, label in ((among, f"the {len(changed)} that change"), (shares, f"{len(test)} held-out names")):
        baselines = {way: values[way] for way in ("greedy", "copying")}
        report(f"exact matches, {label}, beam of 5", values["beam of 5"], baselines)

    english = "Chokri Naga"
    french = model.translate(english, 5)
    with torch.no_grad():
        letters = model.letters(french)[:-1].unsqueeze(1)
        _, weights, _ = model.decode(letters, *model.encode(pack_sequence([model.letters(english)])))
    with figure(options, panels=2, size=(8, 3.4)) as (left, right):
        left.barh(list(shares), list(shares.values()), height=0.4, align="edge", label=f"all {len(test)} names")
        left.barh(list(among), list(among.values()), height=-0.4, align="edge", label=f"the {len(changed)} that change")
        left.set(title="Held-out names, right to the letter", xlabel="share", xlim=(0, 1))
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        right.imshow(weights[0, : len(french), 1:-1].T.numpy(), cmap="Greens", aspect="auto", vmin=0, vmax=1)
        right.set(title="Where the decoder looked", xlabel="written", ylabel="read")
        right.set_xticks(range(len(french)), list(french))
        right.set_yticks(range(len(english)), list(english))


if __name__ == "__main__":
    main()
