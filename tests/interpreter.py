"""Triton's interpreter as the tests need it: it rounds as every GPU does, and does once what it did at every call.

By itself it patches triton.language anew for each call of a kernel's helper, builds its table of dtypes at each use,
and does every integer operation twice, for a check of overflow that nobody hears unless `debug` is on. That was more
than half of its time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Prepare triton's interpreter, which must be on; undo it afterwards."""
    builder, convert = interpreter.interpreter_builder, interpreter._convert_float

    def rounded(input, input_dtype, output_dtype, rounding_mode):
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):  # which it would cut, not round
            return convert(input, input_dtype, output_dtype, rounding_mode)
        values = torch.from_numpy(np.array(input).view(np.float32).reshape(input.shape))
        return values.bfloat16().view(torch.uint16).numpy()

    look_up = functools.cache(interpreter._get_np_dtype)

    def np_dtype(type):
        return np.dtype(np.uint64) if type.scalar.is_ptr() else look_up(type.scalar)

    language = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounded)
        patch.setattr(interpreter, "_patch_lang", lambda fn: SimpleNamespace(restore=lambda: None))
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        assert not builder.options.debug
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        try:
            yield
        finally:
            language.restore()
