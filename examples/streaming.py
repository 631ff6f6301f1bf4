"""Streaming, one value in and one forecast out: a live signal, one step at a time with the state carried along.

    sample now, state  ->  LSTM  ->  sample 10 steps ahead, state
    [1, 1, 1]                        [1, 1, 1]

The model is trained on windows of a recording and then listens to what comes after it, sample by sample, as a monitor
would. Carrying the state makes that equal to one pass over the whole sequence, which is checked, and each step costs
the same however long the stream has run. Where the signal does what no heart does, the forecast error shows it.

Data: the UCR anomaly archive's "InternalBleeding16", as shipped in the package aeon: 7,501 samples of a pulse, the
first 1,200 of them for training; samples 4187 to 4198 are labelled as an anomaly.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from aeon.datasets import load_kdd_tsad_135
from common import arguments, explain_and_compare, fit, report
from plots import ACCENT_COLOR, BASELINE_COLOR, figure
from torch import Tensor, nn

from fastlstm import LSTM  # was: from torch.nn import LSTM

AHEAD, WINDOW, BATCH = 10, 400, 16
HISTORY = 256  # samples, more than a beat
State = tuple[Tensor, Tensor]


class Forecaster(nn.Module):
    """Predicts the value AHEAD samples from now, as a change from the value now."""

    def __init__(self, hidden_size: int = 48):
        super().__init__()
        self.lstm = LSTM(1, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, signal: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map signal [T, B, 1] to forecasts [T, B, 1] and the state after the last sample."""
        output, last = self.lstm(signal, state)
        return signal + self.head(output), last


def rms(errors: Tensor) -> float:
    """Root mean square."""
    return errors.square().mean().sqrt().item()


def main() -> None:
    """Train on the start of the recording, then follow the rest of it live."""
    options = arguments(__doc__)
    steps = 40 if options.smoke else 2000
    values, anomaly = load_kdd_tsad_135(split="test")
    scale = values[:1200].std()
    recording = torch.tensor((values - values[:1200].mean()) / scale, dtype=torch.float32)
    past, stream = recording[:1200], recording[1200:]

    model = Forecaster()
    windows = past.unfold(0, WINDOW + AHEAD, 1)

    def draw() -> Tensor:
        return windows[torch.randint(len(windows), (BATCH,))].T.unsqueeze(-1)

    def loss(model: nn.Module, windows: Tensor) -> Tensor:
        forecast, _ = model(windows[:-AHEAD])
        return nn.functional.mse_loss(forecast, windows[AHEAD:])

    fit(model, lambda: loss(model, draw()), steps, learning_rate=0.005)

    explain_and_compare(options, model, lambda each: loss(each, past.view(-1, 1, 1)))

    model.requires_grad_(False)
    at_once, _ = model(stream.view(-1, 1, 1))
    state, forecasts, milliseconds = None, [], []
    for sample in stream:  # the live loop: one sample in, one forecast out
        begin = time.perf_counter()
        forecast, state = model(sample.view(1, 1, 1), state)
        milliseconds.append(1e3 * (time.perf_counter() - begin))
        forecasts.append(forecast.item())
    live = torch.tensor(forecasts)
    p50, p99 = np.percentile(milliseconds, [50, 99])
    difference = (live - at_once.flatten()).abs().max()
    print(f"live against at once: largest difference {difference:.1e} over {len(live)} steps")
    print(f"latency of a step: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    explain_and_compare(options, model, lambda each: each(stream[:1].view(1, 1, 1))[0], rounds=500)

    # least squares over the last HISTORY samples; all are scored where no sample they see or foretell was anomalous
    lags, target = past.unfold(0, HISTORY, 1)[:-AHEAD], past[HISTORY - 1 + AHEAD :, None]
    weights = torch.linalg.lstsq(lags, target, driver="gelsd").solution
    seen, target = stream.unfold(0, HISTORY, 1)[:-AHEAD], stream[HISTORY - 1 + AHEAD :]
    forecasts_of = {
        "LSTM": live[HISTORY - 1 : -AHEAD],
        "no change": seen[:, -1],
        "straight line": 2 * seen[:, -1] - seen[:, -1 - AHEAD],
        f"linear in {HISTORY} samples": (seen @ weights).flatten(),
    }
    clean = torch.tensor(anomaly[1200:]).unfold(0, HISTORY + AHEAD, 1).sum(1) == 0
    errors = {name: scale * rms((forecast - target)[clean]) for name, forecast in forecasts_of.items()}
    report(f"error {AHEAD} samples ahead", errors.pop("LSTM"), errors, better="lower")

    surprise = scale * (live[:-AHEAD] - stream[AHEAD:]).abs()
    print(
        f"largest surprise at sample {1200 + AHEAD + int(surprise.argmax())}, the anomaly is labelled from 4187 to 4198"
    )
    shown = slice(2700, 3300)
    clock = np.arange(1200, len(values))[shown]
    with figure(options, panels=2) as (left, right):
        left.plot(clock, values[1200:][shown], color=BASELINE_COLOR, label="signal")
        left.plot(clock + AHEAD, scale * live[shown] + values[:1200].mean(), label=f"forecast {AHEAD} samples before")
        left.set(title="A pulse and its forecast", xlabel="sample", ylabel="signal")
        left.set_ylim(50, 130)
        left.legend(loc="upper left")
        right.plot(np.arange(1200 + AHEAD, len(values)), surprise, color=ACCENT_COLOR, linewidth=0.8)
        right.set(title="Where the signal surprises", xlabel="sample", ylabel="forecast error")


if __name__ == "__main__":
    main()
