"""Sentiment, many characters to one label: is a word or an emoticon good or bad?

    "g r e a t"  ->  embedding  ->  LSTM, both directions  ->  its two last states  ->  good or bad
    B words of different lengths, packed      [B, 2 * HIDDEN]                           [B]

One word in five is held out. Most of those have a relative left ("foolish", "foolishly"), and finding it is the task:
n-grams of characters, the usual tool for that, are the baseline to reach.

Data: the lexicon of vaderSentiment, as shipped in that package: 7,500 words, emoticons and bits of slang, each rated
by ten people (Hutto and Gilbert 2014); those rated within 0.5 of neutral are left out.
"""

from __future__ import annotations

import random
from importlib.resources import files

import torch
from common import arguments, explain_and_compare, fit, report, split
from plots import ACCENT_COLOR, LSTM_COLOR, figure
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN = 64, 64


class Polarity(nn.Module):
    """Reads words character by character, from both ends."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Sequential(nn.Embedding(256, 32), nn.Dropout(0.2))
        self.lstm = LSTM(32, HIDDEN, bidirectional=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2 * HIDDEN, 1))

    def forward(self, words: list[str]) -> Tensor:
        """Map B words to B logits of being good."""
        # pack_sequence sorts by length and remembers the order; h_n comes back in the order of `words`
        packed = pack_sequence([torch.tensor(list(word.encode())) for word in words], enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed._replace(data=self.embedding(packed.data)))
        return self.head(h_n.transpose(0, 1).flatten(1)).squeeze(1)  # [2, B, HIDDEN] to [B, 2 * HIDDEN]


def read_lexicon() -> tuple[list[str], list[bool]]:
    """Return the words, and whether people rated them good."""
    lines = (files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    rated = [(word, float(rating)) for word, rating, *_ in (line.split("\t") for line in lines)]
    clear = {word: rating > 0 for word, rating in rated if abs(rating) >= 0.5}
    return list(clear), list(clear.values())


def main() -> None:
    """Train, compare with the majority and with n-grams, and judge words that were never seen."""
    options = arguments(__doc__, validate=True)
    steps = 40 if options.smoke else 3000
    words, labels = read_lexicon()
    good = torch.tensor(labels, dtype=torch.float32)
    seen, held_out = split(range(len(words)), 1 / 5, validate=options.validate)
    test_words, test_good = [words[index] for index in held_out], good[held_out]

    model = Polarity()

    def loss(model: nn.Module, batch: list[int]) -> Tensor:
        logits = model([words[index] for index in batch])
        return nn.functional.binary_cross_entropy_with_logits(logits, good[batch])

    fit(model, lambda: loss(model, random.sample(seen, BATCH)), steps, learning_rate=0.005)
    explain_and_compare(options, model, lambda each: loss(each, seen[:BATCH]))

    model.eval().requires_grad_(False)
    probabilities = model(test_words).sigmoid()
    ngrams = make_pipeline(CountVectorizer(analyzer="char_wb", ngram_range=(1, 5)), LogisticRegression(max_iter=1000))
    ngrams.fit([words[index] for index in seen], [labels[index] for index in seen])
    majority = float(good[seen].mean() > 0.5)
    baselines = {
        "majority": (test_good == majority).float().mean().item(),
        "n-grams": ngrams.score(test_words, [labels[index] for index in held_out]),
    }
    own = ((probabilities > 0.5) == test_good.bool()).float().mean().item()
    report(f"accuracy on {len(held_out)} held-out words", own, baselines)

    with figure(options, panels=2) as (left, right):
        for rated, name, color in ((1, "rated good", LSTM_COLOR), (0, "rated bad", ACCENT_COLOR)):
            values = probabilities[test_good == rated].tolist()
            left.hist(values, bins=20, range=(0, 1), color=color, alpha=0.7, label=name)
        left.set(title="Held-out words", xlabel="probability of being good", ylabel="words")
        left.legend()
        shown = sorted(random.sample(range(len(held_out)), 16), key=lambda index: probabilities[index].item())
        colors = [LSTM_COLOR if test_good[index] else ACCENT_COLOR for index in shown]
        right.barh(
            [test_words[index] for index in shown], (probabilities[shown] - 0.5).tolist(), left=0.5, color=colors
        )
        right.set(title="Some of them", xlabel="probability of being good", xlim=(0, 1))


if __name__ == "__main__":
    main()
