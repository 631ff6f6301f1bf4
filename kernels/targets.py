"""Compile every kernel that dispatch can choose for a target, with no GPU, and report what the compiler made of it.

    python -m fastlstm.kernels.targets --target sm_90 --target gfx942 [--json] [--out DIR]

One row for each (kernel, configuration): registers of a thread, bytes spilled, shared memory, matrix instructions,
block barriers, and instructions in the longest loop. A configuration that spills, or does not fit, does not belong
in `fastlstm.plans` (which names an exception); tests/test_targets.py holds a sample to that.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..dispatch import interpreting
from ..plans import PERSISTENT_REGISTERS, SHARED_MEMORY, Plan, every_plan
from .backward_persistent import backward_persistent
from .backward_resident import backward_resident
from .backward_stepwise import backward_stepwise
from .forward_persistent import forward_persistent
from .forward_resident import forward_resident
from .forward_stepwise import forward_stepwise

FORWARD = (forward_resident, forward_persistent, forward_stepwise)
BACKWARD = (backward_resident, backward_persistent, backward_stepwise)
KERNELS = {kernel.__name__: kernel for kernel in FORWARD + BACKWARD}
GRIDS = {
    "resident": "(ceil(B / BLOCK_B), D)",
    "persistent": "(ceil(H / BLOCK_H), D * ceil(B / BLOCK_B)), cooperative",
    "stepwise": "(ceil(H / BLOCK_H), ceil(B / BLOCK_B), D)",
}
# arguments of one type whatever the problem's dtype; every other pointer is to that dtype
TYPES = {
    "cells_ptr": "*fp32",
    "c_ptr": "*fp32",
    "dc_ptr": "*fp32",
    "counters_ptr": "*i32",
    "lengths_ptr": "*i64",
    "offsets_ptr": "*i64",
    "s": "i32",
    "T": "i32",
    "D": "i32",
    "first": "i32",
    "B": "i32",
}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
COLUMNS = ("registers", "spills", "shared", "matrix", "barriers", "loop")  # of the table, as `Report` names them


@dataclass(frozen=True)
class Configuration:
    """One compilation: a kernel, and all that its binary depends on."""

    kernel: str
    target: str
    dtype: str
    precision: str
    H: int
    plan: Plan
    SAVE: bool
    VARLEN: bool

    @property
    def name(self) -> str:
        """A name to print and to call files."""
        flags = "".join(f"-{flag.lower()}" for flag in ("SAVE", "VARLEN") if getattr(self, flag))
        precision = f"-{self.precision}" if self.dtype == "float32" else ""
        plan = self.plan
        chunks = f"-k{plan.KEPT}x{plan.BLOCK_K}+{plan.TAIL_K}" if plan.kernel == "persistent" else ""
        layers = "-stack" if plan.regime == "wavefront" else ""
        blocks = f"H{self.H}-h{plan.BLOCK_H}-b{plan.BLOCK_B}{chunks}-w{plan.num_warps}{layers}"
        return f"{self.kernel}-{self.dtype}{precision}-{blocks}{flags}"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a configuration.

    Attributes:
        registers: of one thread (AMD: vector registers, the accumulators' among them).
        spills: bytes of a thread that did not fit its registers, and went to memory.
        shared: bytes of shared memory (LDS) of a program.
        matrix: matrix instructions: HMMA, HGMMA, tcgen05 (UTCHMMA in SASS), MFMA, WMMA.
        barriers: block barriers.
        loop: instructions in the longest loop.
    """

    registers: int
    spills: int
    shared: int
    matrix: int
    barriers: int
    loop: int


def configurations(target: str, dtypes: Sequence[str], every_flag: bool = True) -> Iterator[Configuration]:
    """Yield every configuration that `plans.choose` can pick for a target.

    `every_flag=False` leaves out the variants that do less: without SAVE, without VARLEN.
    """
    flags = (False, True) if every_flag else (True,)
    for dtype in dtypes:
        # float32 follows torch's TF32 settings on NVIDIA
        for precision in ("tf32", "ieee") if dtype == "float32" and target.startswith("sm_") else ("ieee",):
            for H, backward, plan in every_plan(getattr(torch, dtype), target, tf32=precision == "tf32"):
                kernel = f"{'backward' if backward else 'forward'}_{plan.kernel}"
                for VARLEN in flags:
                    for SAVE in (False,) if backward else flags:
                        yield Configuration(kernel, target, dtype, precision, H, plan, SAVE, VARLEN)


def compile_configuration(configuration: Configuration):
    """Compile ahead of time, specialised as a launch with 16-byte aligned tensors would be."""
    kernel, plan = KERNELS[configuration.kernel], configuration.plan
    values = {
        "H": configuration.H,
        **asdict(plan),
        "STREAM": plan.regime == "streaming",
        "STACK": plan.regime == "wavefront",
        "HIP": configuration.target.startswith("gfx"),
        "THREADS": plan.num_warps * gpu_target(configuration.target).warp_size,
        "PRECISION": configuration.precision,
        "SAVE": configuration.SAVE,
        "VARLEN": configuration.VARLEN,
    }
    constexprs = {name: values[name] for name in kernel.arg_names if name in values}
    if not configuration.VARLEN:
        constexprs |= {"lengths_ptr": None, "offsets_ptr": None}
    if "bias_ptr" in kernel.arg_names and not values["STACK"]:
        constexprs |= {"bias_ptr": None}
    element = f"*{DTYPES[configuration.dtype]}"
    signature = {name: "constexpr" if name in constexprs else TYPES.get(name, element) for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    pointers = {(n,): aligned for n, name in enumerate(signature) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=pointers)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if plan.regime in ("persistent", "wavefront") and not values["HIP"]:
        options["maxnreg"] = PERSISTENT_REGISTERS
    return triton.compile(source, target=gpu_target(configuration.target), options=options)


def gpu_target(target: str) -> GPUTarget:
    """Parse "sm_90" or "gfx942"."""
    if match := re.fullmatch(r"sm_(\d+)a?", target):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", target):
        # CDNA (gfx9) runs waves of 64 lanes, RDNA of 32
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"target must be like sm_90 or gfx942, got {target!r}")


def inspect(compiled) -> Report:
    """Read a compiled kernel's resources from its machine code."""
    return _inspect_amd(compiled) if "amdgcn" in compiled.asm else _inspect_nvidia(compiled)


def _inspect_nvidia(compiled) -> Report:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources is not None, usage
    # "/*0a40*/  @!P0 BRA 0x980 ;"
    listing = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*([^;]*);", sass, re.MULTILINE)
    addresses = {int(address, 16): n for n, (address, _, _) in enumerate(listing)}
    loops = [0]
    for n, (_, operation, operands) in enumerate(listing):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target and addresses.get(int(target[1], 16), n) < n:
            loops.append(n + 1 - addresses[int(target[1], 16)])
    operations = [operation.split(".")[0] for _, operation, _ in listing]
    return Report(
        registers=int(resources[1]),
        spills=int(resources[2]),
        shared=compiled.metadata.shared,
        matrix=sum(bool(re.fullmatch(r"HMMA|HGMMA|UTC\w*MMA", operation)) for operation in operations),
        barriers=operations.count("BAR"),
        loop=max(loops),
    )


def _inspect_amd(compiled) -> Report:
    text = compiled.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    # an instruction is indented and starts with a letter, a label stands at the margin
    lines = re.findall(r"^(?:(\.L\w+):|\s+([a-z]\w+)[ \t]*([^;\n]*))", text, re.MULTILINE)
    labels, operations, loops = {}, [], [0]
    for label, operation, operands in lines:
        if label:
            labels[label] = len(operations)
            continue
        operations.append(operation)
        if re.match(r"s_c?branch", operation) and operands.strip() in labels:
            loops.append(len(operations) - labels[operands.strip()])
    return Report(
        registers=count["vgpr_count"],
        spills=count["private_segment_fixed_size"],  # what a scalar register spills goes into a vector's lanes
        shared=compiled.metadata.shared,
        matrix=sum(operation.startswith(("v_mfma", "v_wmma")) for operation in operations),
        barriers=operations.count("s_barrier"),
        loop=max(loops),
    )


def build(configuration: Configuration, out: Path | None = None) -> Report:
    """Compile a configuration, leave its files in `out` if given, and report on it."""
    compiled = compile_configuration(configuration)
    if out is not None:
        _write(configuration, compiled, out)
    return inspect(compiled)


def _write(configuration: Configuration, compiled, out: Path) -> None:
    """Write NAME.ptx and NAME.cubin (or NAME.amdgcn and NAME.hsaco), and NAME.json that says how to launch them."""
    for kind in ("ptx", "cubin", "amdgcn", "hsaco"):
        if kind in compiled.asm:
            code = compiled.asm[kind]
            path = out / f"{configuration.target}-{configuration.name}.{kind}"
            path.write_bytes(code if isinstance(code, bytes) else code.encode())
    arguments = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    description = {
        "kernel": configuration.kernel,
        "target": configuration.target,
        # the last two are triton's own: null, for no kernel here wants any
        "arguments": {**arguments, "global_scratch": "*i8", "profile_scratch": "*i8"},
        "constexprs": {compiled.src.fn.arg_names[index[0]]: value for index, value in compiled.src.constants.items()},
        "num_warps": configuration.plan.num_warps,
        "shared": compiled.metadata.shared,
        "entry": compiled.metadata.name,
        "grid": GRIDS[configuration.plan.kernel],
    }
    path = out / f"{configuration.target}-{configuration.name}.json"
    path.write_text(json.dumps(description, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table or JSON, and return 1 if some configuration spills or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlstm.kernels.targets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--target", action="append", metavar="ARCH", help="sm_80, gfx942, ...; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype; repeatable")
    parser.add_argument("--filter", default="", metavar="REGEX", help="only configurations whose name matches")
    parser.add_argument("--heaviest", action="store_true", help="only the variants that save and take lengths")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave machine code and launch descriptions here")
    options = parser.parse_args(arguments)
    if interpreting():
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it and run again")
    targets = options.target or ["sm_80", "sm_90"]
    if unknown := [target for target in targets if target not in SHARED_MEMORY]:
        parser.error(f"no plans for {', '.join(unknown)}; known targets: {', '.join(SHARED_MEMORY)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)

    todo = [
        configuration
        for target in targets
        for configuration in configurations(target, options.dtype or list(DTYPES), not options.heaviest)
        if re.search(options.filter, configuration.name)
    ]
    if not todo:
        parser.error("no configuration matches --filter and --dtype")
    rows = []
    width = max(len(configuration.name) for configuration in todo)
    if not options.json:
        print(f"{'target':8} {'kernel and configuration':{width}} " + " ".join(f"{name:>9}" for name in COLUMNS))
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for configuration, report in zip(todo, pool.map(build, todo, [options.out] * len(todo)), strict=True):
            row = {
                **{key: value for key, value in asdict(configuration).items() if key != "plan"},
                **asdict(configuration.plan),
                "name": configuration.name,
                **asdict(report),
                "limit": SHARED_MEMORY[configuration.target],
            }
            rows.append(row)
            if not options.json:  # as they come: all of a target take minutes
                figures = " ".join(f"{row[name]:>9}" for name in COLUMNS)
                print(f"{row['target']:8} {row['name']:{width}} {figures}", flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    return int(any(row["spills"] or row["shared"] > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
