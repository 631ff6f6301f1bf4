"""Compile kernels that synchronise, with a right barrier and with wrong ones: `python tests/compile_barriers.py sm_90`.

Prints JSON, (kernel: fault) -> PTX or AMD assembly. A script, because what runs the tests has imported triton under its
interpreter, which compiles nothing.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType

import barriers
import triton
from triton.compiler import ASTSource

from fastlstm.kernels import backward_persistent, forward_persistent
from fastlstm.kernels.targets import gpu_target

# waiting for too few, or on one buffer, is well-formed code. After the wait a block barrier stands anyway, where the
# compiler hands the polled value to all threads.
VISIBLE = [
    "no barrier",
    "relaxed arrive",
    "no acquire",
    "volatile poll",
    "cta scope",
    "no block barrier before the arrive",
]
EARLY = "stores of other waves under way"
TYPES = {"cells": "*fp32", "counters": "*i32", "values": "*i32", "result": "*i32", "lengths": "*i64", "offsets": "*i64"}
CONSTEXPRS = {
    "H": 64,
    "BLOCK_H": 16,
    "BLOCK_B": 16,
    "BLOCK_K": 64,
    "PRECISION": "ieee",
    "SAVE": True,
    "VARLEN": True,
    "TAIL_K": 64,
    "KEPT": 0,
    "STREAM": False,
    "AHEAD": 1,
    "SPLIT": 1,
    "THREADS": 128,
    "STACK": False,
}
STACKED = {**CONSTEXPRS, "STACK": True}
KERNELS: dict[str, tuple[ModuleType, dict[str, object]]] = {
    "exchange": (barriers, {"BLOCK": 128, "N": 4}),
    "forward_persistent": (forward_persistent, CONSTEXPRS),
    "backward_persistent": (backward_persistent, CONSTEXPRS),
    "forward_persistent of a stack": (forward_persistent, STACKED),
    "backward_persistent of a stack": (backward_persistent, {**STACKED, "BLOCK_K": 128, "TAIL_K": 128}),
}


def compile_kernel(name: str, target: str, fault: str = "") -> str:
    """Return the text of a kernel's machine code, its pointers to float16 unless TYPES says otherwise."""
    module, constexprs = KERNELS[name]
    with barriers.replaced(module, {"": {}, EARLY: barriers.ARRIVES_EARLY, **barriers.MUTANTS}[fault]):
        # a new object, for triton remembers by object what a kernel's source and helpers hash to
        kernel = triton.jit(getattr(module, name.split()[0]).fn)
        constexprs = {**constexprs, "HIP": target.startswith("gfx")}
        constexprs = {argument: value for argument, value in constexprs.items() if argument in kernel.arg_names}
        signature = {
            argument: "constexpr"
            if argument in constexprs
            else TYPES.get(argument.removesuffix("_ptr"), "*fp16" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names
        }
        aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
        code = triton.compile(source, target=gpu_target(target), options={"num_warps": 4}).asm
    return code["ptx"] if "ptx" in code else code["amdgcn"]


def compile_all(target: str) -> dict[str, str]:
    """Return the machine code of everything, right and wrong, by name."""
    texts = {f"{name}: ": compile_kernel(name, target) for name in KERNELS}
    amd = [EARLY] if target.startswith("gfx") else []
    texts |= {f"exchange: {fault}": compile_kernel("exchange", target, fault) for fault in VISIBLE + amd}
    # the same again in a real kernel, where the compiler has more to move about
    for fault in ("relaxed arrive", "no acquire", *amd):
        texts[f"forward_persistent: {fault}"] = compile_kernel("forward_persistent", target, fault)
    return texts


if __name__ == "__main__":
    json.dump({target: compile_all(target) for target in sys.argv[1:]}, sys.stdout)
