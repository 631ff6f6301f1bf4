"""`convert` on published architectures with random weights: speech, audio, forecasting and language.

The packages are the extra `models`; a test whose package is absent is skipped.
"""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import assert_close
from pairs import INTERPRETED
from torch import Tensor, nn

import fastlstm

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may look for weights to download

# what the packages and their own dependencies deprecate is theirs to answer
pytestmark = pytest.mark.filterwarnings("ignore")

Run = Callable[[nn.Module], dict[str, Tensor]]


def package(name: str) -> Any:
    """Import one of the extra's modules, or skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name.partition(".")[0])
        return importlib.import_module(name)


def like(model: nn.Module, *shape: int) -> Tensor:
    """Draw an input in the dtype of a model; the same values for every dtype."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)


def tokens(high: int, *shape: int) -> Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(3))


def parakeet() -> tuple[nn.Module, list[str], Run]:
    """NVIDIA Parakeet RNN-T (speech recognition): a conformer, and an LSTM that predicts the next token."""
    transformers = package("transformers")
    encoder = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "subsampling_conv_channels": 4,
        "num_mel_bins": 16,
        "layerdrop": 0.0,
    }
    config = transformers.ParakeetRNNTConfig(
        encoder_config=encoder, vocab_size=32, decoder_hidden_size=12, blank_token_id=31
    )

    def run(model: Any) -> dict[str, Tensor]:
        encoded = model.get_audio_features(input_features=like(model, 2, 64, 16)).pooler_output
        predicted = model.decoder(tokens(31, 2, 7))
        joint = model.joint(
            encoder_hidden_states=encoded[:, :, None, :], decoder_hidden_states=predicted[:, None, :, :]
        )
        return {"encoded": encoded, "predicted": predicted, "joint": joint}

    return transformers.ParakeetForRNNT(config), ["decoder.lstm"], run


def encodec() -> tuple[nn.Module, list[str], Run]:
    """Meta EnCodec (neural audio codec): LSTMs at the bottom of a convolutional encoder and decoder."""
    transformers = package("transformers")
    config = transformers.EncodecConfig(num_filters=2, hidden_size=8, upsampling_ratios=[4, 2], codebook_dim=8)

    def run(model: Any) -> dict[str, Tensor]:
        latent = model.encoder(like(model, 2, 1, 160))
        return {"latent": latent, "audio": model.decoder(latent)}

    return transformers.EncodecModel(config), ["encoder.layers.7.lstm", "decoder.layers.1.lstm"], run


def demucs() -> tuple[nn.Module, list[str], Run]:
    """Hybrid Demucs (music source separation): bidirectional LSTMs, two layers, in both branches."""
    hdemucs = package("demucs.hdemucs")
    model = hdemucs.HDemucs(["drums", "other"], channels=4, nfft=1024, depth=5, dconv_lstm=3, segment=1)
    lstms = [name for name, module in model.named_modules() if isinstance(module, nn.LSTM)]

    return model, lstms, lambda model: {"sources": model(like(model, 1, 2, 4096))}


def deepar() -> tuple[nn.Module, list[str], Run]:
    """Amazon DeepAR (probabilistic forecasting): an LSTM over lags and features, the parameters of a distribution."""
    module = package("gluonts.torch.model.deepar.module")
    model = module.DeepARModel("D", context_length=12, prediction_length=4, hidden_size=10, lags_seq=[1, 2, 7])

    def run(model: Any) -> dict[str, Tensor]:
        past = model._past_length
        parameters, scale, output, _, (h_n, c_n) = model.unroll_lagged_rnn(
            torch.zeros(3, 1, dtype=torch.long),
            like(model, 3, 1),
            like(model, 3, past, 1),
            like(model, 3, past),
            like(model, 3, past).abs().ceil().clamp(max=1),
            like(model, 3, 4, 1),
            like(model, 3, 4),
        )
        named = {f"parameter {index}": parameter for index, parameter in enumerate(parameters)}
        return {**named, "scale": scale, "output": output, "h_n": h_n, "c_n": c_n}

    return model, ["rnn"], run


def temporal_fusion_transformer() -> tuple[nn.Module, list[str], Run]:
    """Temporal Fusion Transformer (forecasting): an encoder and a decoder LSTM that starts from its states."""
    module = package("gluonts.torch.model.tft.module")
    model = module.TemporalFusionTransformerModel(context_length=9, prediction_length=4, d_hidden=8, d_var=8)
    lstms = [name for name, module in model.named_modules() if isinstance(module, nn.LSTM)]

    def run(model: Any) -> dict[str, Tensor]:
        values = (like(model, 3, 9), torch.ones_like(like(model, 3, 9)), like(model, 3, 1))
        (quantiles, *_), _, _ = model(*values, torch.zeros(3, 1, dtype=torch.long), like(model, 3, 13, 1))
        return {"quantiles": quantiles}

    return model, lstms, run


def stanza_lemmatizer() -> tuple[nn.Module, list[str], Run]:
    """Stanza's lemmatizer (language): a packed bidirectional encoder, and an LSTMCell with attention as decoder."""
    seq2seq = package("stanza.models.common.seq2seq_model")
    args = {"vocab_size": 30, "emb_dim": 6, "hidden_dim": 8, "num_layers": 2, "dropout": 0.3, "emb_dropout": 0.2}
    model = seq2seq.Seq2SeqModel(args | {"max_dec_len": 5, "attn_type": "soft"})

    def run(model: Any) -> dict[str, Tensor]:
        source = tokens(30, 3, 6)
        lengths = torch.tensor([6, 4, 1])
        padding = torch.arange(6) >= lengths[:, None]
        log_probabilities, _ = model(source.masked_fill(padding, 0), padding, tokens(30, 3, 5))
        return {"log_probabilities": log_probabilities}

    return model, ["encoder", "decoder.lstm_cell"], run


def stanza_character_model() -> tuple[nn.Module, list[str], Run]:
    """Stanza's character language model: packed input, and a learned initial state that is expanded over rows."""
    char_model = package("stanza.models.common.char_model")
    sizes = {"char_emb_dim": 5, "char_hidden_dim": 7, "char_num_layers": 2}
    rates = {"char_dropout": 0.2, "char_rec_dropout": 0}
    model = char_model.CharacterLanguageModel(sizes | rates, {"char": list(range(20))})

    def run(model: Any) -> dict[str, Tensor]:
        output, (h_n, c_n), decoded = model(tokens(20, 3, 8), [8, 5, 5])
        return {"output": output, "h_n": h_n, "c_n": c_n, "decoded": decoded}

    return model, ["charlstm.lstm"], run


MODELS = (
    parakeet,
    encodec,
    demucs,
    deepar,
    temporal_fusion_transformer,
    stanza_lemmatizer,
    stanza_character_model,
)


@pytest.fixture(autouse=True)
def _default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def results(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Return the outputs of a model under one seed, and the gradient of every parameter that has one."""
    torch.set_default_dtype(next(model.parameters()).dtype)  # some models make their own initial states
    model.zero_grad()
    torch.manual_seed(7)
    outputs = run(model)
    generator = torch.Generator().manual_seed(8)
    terms = [
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)).sum()
        for value in outputs.values()
    ]
    torch.stack(terms).sum().backward()
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


def lstms_in(values: Mapping[str, Tensor], names: list[str]) -> list[str]:
    return [key for key in values if any(key.startswith(f"d{name}.") for name in names)]


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_converted_is_stock(make, backend):
    if backend == "triton" and make is demucs:
        pytest.skip("wide and long: half a minute under the interpreter")
    model, names, run = make()
    for train in (True, False):
        model.train(train)
        ours = copy.deepcopy(model)
        report = fastlstm.convert(ours, backend=backend)
        assert list(report.replaced) == names
        assert not report.skipped
        stock = results(model, run)
        truth = results(copy.deepcopy(model).double(), run)
        assert len(lstms_in(stock, names)) >= 4 * len(names)
        assert_close(results(ours, run), truth, stock, dtype=torch.float32)
