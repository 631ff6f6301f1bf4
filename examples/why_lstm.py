"""Why an LSTM: a plain RNN beside it, on the adding problem (Hochreiter and Schmidhuber 1997).

    number   0.3  0.9  0.1  0.7  0.5  ...  0.2  0.8
    marked    0    1    0    0    0   ...   1    0     ->  RNN or LSTM  ->  0.9 + 0.2 = 1.1
    B sequences of 50 to 100 steps, packed [N, 2]                           [B]

Add the two marked numbers, one in the first half and one in the second. Whoever always says 1 has an error of 1/6.
The plain RNN multiplies its gradient by the same matrix at every step, so it vanishes long before it reaches the first
mark. An LSTM adds to its cell, and its gates, which the picture shows, hold what was added until the end.

Data: random numbers, drawn afresh for every batch.
"""

from __future__ import annotations

import torch
from common import arguments, explain_and_compare, fit, report
from plots import ACCENT_COLOR, BASELINE_COLOR, LSTM_COLOR, figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, HIDDEN, LENGTH = 50, 64, 100
COLORS = {"RNN": ACCENT_COLOR, "LSTM": LSTM_COLOR}
GATES = {"input": LSTM_COLOR, "forget": "#3c6e9f", "output": "#d9a441"}


class Adder(nn.Module):
    """Reads a sequence and says a number."""

    def __init__(self, recurrent: LSTM | nn.RNN):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(HIDDEN, 1)
        if isinstance(recurrent, LSTM):  # forget gates start open: remember, until taught otherwise (Gers et al. 2000)
            nn.init.constant_(recurrent.get_parameter("bias_ih_l0")[HIDDEN : 2 * HIDDEN], 3.0)

    def forward(self, sequences: list[Tensor]) -> Tensor:
        """Map B sequences [T, 2] to B sums."""
        _, state = self.recurrent(pack_sequence(sequences, enforce_sorted=False))
        h_n = state[0] if isinstance(state, tuple) else state
        return self.head(h_n[-1]).squeeze(1)


def draw(batch: int) -> tuple[list[Tensor], Tensor]:
    """Return sequences [T, 2] of different lengths, and the sums of their marked numbers."""
    sequences, sums = [], []
    for length in torch.randint(LENGTH // 2, LENGTH + 1, (batch,)).tolist():
        numbers, marks = torch.rand(length), torch.zeros(length)
        marks[torch.randint(length // 2, ())] = 1
        marks[torch.randint(length // 2, length, ())] = 1
        sequences.append(torch.stack([numbers, marks], dim=1))
        sums.append(numbers @ marks)
    return sequences, torch.stack(sums)


def loss(model: Adder, sequences: list[Tensor], sums: Tensor) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(model(sequences), sums)


def sensitivity(model: Adder) -> list[float]:
    """Return the norm of d(answer) / d(input) for the inputs 0, 1, 2, ... steps before the last, mean over a batch."""
    sequences = torch.stack([torch.rand(BATCH, LENGTH), (torch.rand(BATCH, LENGTH) < 0.02).float()], dim=2)
    (gradients,) = torch.autograd.grad(model(list(sequences.requires_grad_())).sum(), sequences)
    return gradients.norm(dim=2).mean(0).flip(0).tolist()


@torch.no_grad()
def gates(lstm: LSTM, sequence: Tensor) -> Tensor:
    """Return the gates i, f, o of every unit at every step, [3, T, HIDDEN], by stepping through a sequence [T, 2]."""
    weight_ih, weight_hh, bias_ih, bias_hh = lstm.parameters()
    h, state, rows = torch.zeros(HIDDEN), None, []
    for step in sequence:
        i, f, _, o = (weight_ih @ step + bias_ih + weight_hh @ h + bias_hh).view(4, HIDDEN).sigmoid()
        rows.append(torch.stack([i, f, o]))
        (h,), state = lstm(step[None], state)
    return torch.stack(rows, dim=1)


def main() -> None:
    """Train both, and look at their errors, their gradients and the LSTM's gates."""
    options = arguments(__doc__)
    test, sums = draw(1000)
    lstm = LSTM(2, HIDDEN)
    models = {"RNN": Adder(nn.RNN(2, HIDDEN)), "LSTM": Adder(lstm)}
    losses, errors, untrained = {}, {}, {name: sensitivity(model) for name, model in models.items()}
    for name, model in models.items():
        steps = 20 if options.smoke else 1500
        losses[name] = fit(model, lambda: loss(model, *draw(BATCH)), steps, learning_rate=0.01)  # noqa: B023
        errors[name] = loss(model, test, sums).item()
    explain_and_compare(options, models["LSTM"], lambda each: loss(each, test[:BATCH], sums[:BATCH]))
    always_one = nn.functional.mse_loss(torch.ones_like(sums), sums).item()
    baselines = {"always 1": always_one, "RNN": errors["RNN"]}
    report(f"squared error on {len(test)} fresh sequences", errors["LSTM"], baselines, better="lower")

    with figure(options, panels=3, size=(10, 3)) as (left, middle, right):
        for name, model in models.items():
            left.semilogy(torch.tensor(losses[name]).unfold(0, 20, 1).mean(1), color=COLORS[name], label=name)
            middle.semilogy(untrained[name], "--", color=COLORS[name], label=f"{name}, untrained")
            middle.semilogy(sensitivity(model), color=COLORS[name], label=name)
        left.axhline(always_one, color=BASELINE_COLOR, linestyle=":", label="always 1")
        left.set(title="Squared error while learning to add", xlabel="training step")
        middle.set(title="Gradient that reaches an input", xlabel="steps before the answer", ylim=(1e-12, 10))
        marked, activations = test[0][:, 1].nonzero().flatten(), gates(lstm, test[0])
        # the unit whose input gate listens to the marks
        writer = int((activations[0, marked].mean(0) - activations[0].mean(0)).argmax())
        right.vlines(marked, 0, 1, color=ACCENT_COLOR, linestyle=":", label="marked")
        for gate, (name, color) in zip(activations, GATES.items(), strict=True):
            right.plot(gate[:, writer], color=color, label=name)
        right.set(title="Gates of one unit of the LSTM", xlabel="step")
        for axes in (left, middle):
            axes.yaxis.set_major_formatter("{x:g}")
        for axes in (left, middle, right):
            axes.legend(fontsize=7)


if __name__ == "__main__":
    main()
