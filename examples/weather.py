"""Time series, every day to the next seven: how warm will it be, and how sure is that?

    a day's weather  ->  LSTM  ->  the highest temperature of each of the next 7 days, as 3 quantiles
    [T, B, 7]                      [T, B, 7, 3]                                           10, 50 and 90 %

Days are consecutive and every one of them is a training example, so a batch is B stretches of T days. What is
learned is the departure from the climate, the mean of the season. The last year is the test; nothing is fitted to
it, not even the climate. Forecasting it takes one pass, the state carried through all years.

Data: four years of Seattle's weather, as shipped in vega_datasets (from NOAA).
"""

from __future__ import annotations

import numpy as np
import torch
from common import arguments, explain_and_compare, fit, report
from plots import ACCENT_COLOR, BASELINE_COLOR, INK, LSTM_COLOR, figure
from torch import Tensor, nn
from vega_datasets import data

from fastlstm import LSTM  # was: from torch.nn import LSTM

BATCH, STEPS, HIDDEN, HORIZON = 32, 60, 16, 7
QUANTILES = torch.tensor([0.1, 0.5, 0.9])


class Forecaster(nn.Module):
    """Reads day after day; the forecast also sees the present day directly."""

    def __init__(self, features: int):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.lstm = LSTM(features, HIDDEN)
        self.head = nn.Linear(HIDDEN + features, HORIZON * len(QUANTILES))

    def forward(self, days: Tensor) -> Tensor:
        """Map days [T, B, features] to forecasts [T, B, HORIZON, quantiles]."""
        output, _ = self.lstm(self.dropout(days))
        quantiles = self.head(torch.cat([self.dropout(output), days], dim=2))
        return quantiles.unflatten(2, (HORIZON, len(QUANTILES)))


def pinball(forecasts: Tensor, truth: Tensor) -> Tensor:
    """Return the loss that quantiles minimise (Koenker and Bassett 1978); for the median it is half the error."""
    error = truth.unsqueeze(-1) - forecasts
    return torch.maximum(QUANTILES * error, (QUANTILES - 1) * error).mean()


def main() -> None:
    """Train on the years before the last, and compare with three simple forecasts on that one."""
    options = arguments(__doc__, validate=True)
    weather = data.seattle_weather()
    year = 2014 if options.validate else 2015
    weather = weather.loc[weather["date"].dt.year <= year]
    first_test = int((weather["date"].dt.year < year).sum())
    angle = 2 * np.pi * weather["date"].dt.dayofyear.to_numpy() / 365.25
    season = np.stack([np.ones_like(angle), *(f(k * angle) for k in (1, 2) for f in (np.sin, np.cos))], axis=1)
    warmest = weather["temp_max"].to_numpy(copy=True)
    climate = season @ np.linalg.lstsq(season[:first_test], warmest[:first_test])[0]
    skies = [weather["weather"] == sky for sky in ("sun", "rain", "fog")]
    columns = [warmest - climate, weather["temp_min"] - climate, np.log1p(weather["precipitation"]), weather["wind"]]
    table = np.stack([*columns, *skies], axis=1).astype(float)
    mean, deviation = table[:first_test].mean(0), table[:first_test].std(0)
    days = torch.tensor((table - mean) / deviation, dtype=torch.float32)

    def next_days(values: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(values).unfold(0, HORIZON, 1)[1:]  # [day, HORIZON]: the seven after each day

    targets = next_days(days[:, 0])
    last_begin = first_test - HORIZON - STEPS  # no target lies in the test year
    model = Forecaster(days.size(1))

    def loss(model: nn.Module) -> Tensor:
        stretch = torch.randint(last_begin, (BATCH,)) + torch.arange(STEPS).unsqueeze(1)  # [T, B]
        return pinball(model(days[stretch]), targets[stretch])

    fit(model, lambda: loss(model), 10 if options.smoke else 800, learning_rate=0.005)
    explain_and_compare(options, model, loss)

    model.eval().requires_grad_(False)
    today = slice(first_test - 1, len(targets))  # each forecast is made on the day before
    truth, ahead = next_days(warmest)[today], next_days(climate)[today]
    departures = model(days[: len(targets), None])[today, 0]
    quantiles = ahead.unsqueeze(2) + deviation[0] * departures  # [day, HORIZON, quantiles]
    # how much of a departure is left 1, 2, ... days later: one number for each, by least squares
    known = slice(first_test - HORIZON)
    damping = days[known, 0] @ targets[known] / days[known, 0].square().sum()
    forecasts = {
        "LSTM": quantiles[..., 1],
        "damped persistence": ahead + deviation[0] * days[today, :1] * damping,
        "climate": ahead,
        "persistence": torch.tensor(warmest[today, None]),
    }
    errors = {name: (forecast - truth).abs().mean(0) for name, forecast in forecasts.items()}
    means = {name: error.mean().item() for name, error in errors.items()}
    report("error in degrees, mean over 7 days", means.pop("LSTM"), means, better="lower")
    inside = ((truth > quantiles[..., 0]) & (truth < quantiles[..., 2])).float().mean()
    print(f"{inside:.0%} of the days were within the 80 % range")

    with figure(options, panels=2, size=(10, 3.2), ratios=(2.2, 1)) as (forecast, right):
        shown, dates = range(120, 200), weather["date"].to_numpy()[first_test:]
        forecast.plot(dates[shown], truth[shown, 0], ".", color=INK, markersize=4, label="measured", zorder=3)
        forecast.plot(dates[shown], ahead[shown, 0], ":", color=BASELINE_COLOR, label="climate")
        for day in shown[::8]:
            low, median, high = quantiles[day].T
            week = dates[day : day + HORIZON]
            forecast.fill_between(week, low, high, color=LSTM_COLOR, alpha=0.25, linewidth=0)
            forecast.plot(week, median, color=LSTM_COLOR)
        forecast.set(title="Highest temperature: forecasts of a week, with their 80 % range", ylabel="degrees Celsius")
        forecast.legend(ncols=2, loc="lower right", fontsize=7)
        styles = (("-", LSTM_COLOR), ("-.", ACCENT_COLOR), ("--", BASELINE_COLOR), (":", BASELINE_COLOR))
        for (name, error), (style, color) in zip(errors.items(), styles, strict=True):
            right.plot(range(1, HORIZON + 1), error, style, color=color, label=name)
        right.set(title="Mean error of the year", xlabel="days ahead", ylabel="degrees")
        right.legend(fontsize=7)


if __name__ == "__main__":
    main()
