"""All programs of one Triton launch at once, under Triton's interpreter, with every memory access proved ordered.

Triton's interpreter runs the programs of a grid one after another, so a kernel whose programs wait for one another
never ends there. Here each program is a thread and exactly one runs at a time: at every memory operation a seeded
generator may pass the turn on, which makes an interleaving that the seed reproduces. On top of it, every access is
checked three ways.

Order, by vector clocks. A plain access must happen after every conflicting access of another program, through a
chain that the kernel wrote down: stores, block barrier, releasing atomic; then acquiring atomic, block barrier,
loads. So a protocol error is reported even where this interleaving, on a CPU with strong ordering, computed the right
numbers. The rules are those of the PTX and LLVM memory models:

- an atomic is done by one thread of its program, and only a block barrier (`tl.debug_barrier`) orders the program's
  other threads with it: before it for a release, after it for an acquire;
- a release publishes what its program knows; a read-modify-write of the same cell carries it on;
- relaxed atomics and volatile loads order nothing, but do not race with other atomics;
- an atomic of scope "cta" is a plain access as far as other programs are concerned.

Bounds. The kernel runs on copies of its arguments that lie far apart, so an index that leaves an argument is seen,
and nothing is written that a caller owns until the launch has ended well.

Progress. A program that reads the same value from the same cell again sleeps until that cell is written. If all sleep,
that is a hang; so is passing `limit` operations. A loop with no memory operation in it cannot be stopped.

Accesses are told apart by ranges as wide as the narrowest element among the arguments, so two programs that share
such a range through a cast pointer are taken to conflict. What goes on inside one program (layouts, shared memory,
the order between its threads other than through atomics) is the compiler's business and not seen here.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from shadow_memory import ATOMIC_READ, ATOMIC_WRITE, PLAIN_READ, PLAIN_WRITE, Memory
from torch import Tensor
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from triton.runtime import interpreter

ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)

# accepted, as a launch accepts them, and without meaning here
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "launch_cooperative_grid"}

PATIENCE = 32  # how often all sleeping programs are let to look again before it counts as a hang


class HangError(AssertionError):
    """Programs that wait for what will not come."""


class _Stopped(BaseException):
    """Unwinds a program because another one failed; not an Exception, so that nothing on the way catches it."""


def launch(
    kernel: Any, grid: Sequence[int], *, seed: int = 0, switch: float = 0.3, limit: int = 1_000_000, **arguments: Any
) -> int:
    """Run all programs of `kernel[grid](**arguments)` concurrently.

    Args:
        kernel: a `@triton.jit` function; triton must have been imported under TRITON_INTERPRET=1.
        grid: one to three extents.
        seed: of the interleaving; the same seed gives the same one.
        switch: how likely the turn passes on at a memory operation.
        limit: memory operations, of all programs together, after which it counts as a hang.
        **arguments: the kernel's arguments by name (CPU tensors, numbers, None) and launch options.

    Returns:
        The number of memory operations.

    Raises:
        RaceError: an access conflicts with one of another program, and nothing orders them.
        BoundsError: an access outside every argument.
        HangError: no program makes progress.
        TypeError: an argument that the kernel does not have, or a tensor that is not on the CPU.
        Whatever the kernel itself raised.

        The traceback ends at the kernel's line. After any of these, the argument tensors are as they were.
    """
    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise TypeError(f"expected a @triton.jit function under TRITON_INTERPRET=1, got {kernel!r}")
    if unknown := set(arguments) - set(kernel.arg_names) - LAUNCH_OPTIONS:
        raise TypeError(f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    function = kernel.rewrite()
    arguments = inspect.getcallargs(function, **{k: v for k, v in arguments.items() if k in kernel.arg_names})

    x, y, z = (*grid, 1, 1)[:3]
    programs = list(itertools.product(range(x), range(y), range(z)))
    memory = Memory({name: value for name, value in arguments.items() if isinstance(value, Tensor)}, programs)
    turns = _Turns(programs, random.Random(seed), switch, limit, memory.describe)
    constexprs = interpreter.GridExecutor(function, kernel.arg_names, (x, y, z)).constexprs
    with _interpreting(_Machine(memory, turns).operations(), (x, y, z)):
        arguments = {
            name: value if name in constexprs else interpreter._implicit_cvt(memory.stand_in(name, value))
            for name, value in arguments.items()
        }
        turns.run(lambda: function(**arguments))
    memory.copy_back()
    return turns.taken


@contextlib.contextmanager
def scheduled(**options: Any) -> Iterator[None]:
    """Every `kernel[grid](...)` inside, also from library code, goes through `launch` with these options."""

    def run(self, *positional, grid: Any, warmup: bool, **named):
        arguments = dict(zip(self.arg_names, positional, strict=False)) | named
        extents: Any = grid(arguments) if callable(grid) else grid
        launch(self, extents, **options, **arguments)

    original = interpreter.InterpretedFunction.run
    interpreter.InterpretedFunction.run = run
    try:
        yield
    finally:
        interpreter.InterpretedFunction.run = original


@contextlib.contextmanager
def _interpreting(operations: dict[str, Callable], grid: tuple[int, int, int]) -> Iterator[None]:
    """Have the interpreter use `operations` in the place of its own; undo it afterwards."""
    builder = interpreter.interpreter_builder
    before = dict(vars(builder))
    vars(builder).update(operations)
    builder.set_grid_dim(*grid)
    try:
        yield
    finally:
        vars(builder).clear()
        vars(builder).update(before)


class _Turns:
    """Who runs: one thread for each program, of which all but one wait.

    Attributes:
        running: index of the program that has the turn.
        taken: memory operations so far.
    """

    def __init__(
        self,
        programs: Sequence[tuple[int, int, int]],
        generator: random.Random,
        switch: float,
        limit: int,
        describe: Callable[[int], str],
    ):
        self.programs = programs
        self.generator, self.switch, self.limit, self.describe = generator, switch, limit, describe
        self.running = 0
        self.taken = 0
        self._ready = list(range(len(programs)))
        self._asleep: dict[int, int] = {}  # program -> address of the cell it polls
        self._looks = 0
        self._locks = [threading.Lock() for _ in programs]
        self._error: BaseException | None = None

    def run(self, body: Callable[[], None]) -> None:
        """Run `body` once for each program; raise what the first to fail raised."""
        threads = []
        for program, lock in enumerate(self._locks):
            lock.acquire()
            threads.append(threading.Thread(target=self._program, args=(program, body), daemon=True))
            threads[-1].start()
        self._give(self.generator.choice(self._ready))
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def consider(self) -> None:
        """Call before a memory operation: the turn may pass on."""
        self.taken += 1
        if self.taken > self.limit:
            raise HangError(f"not done after {self.limit} memory operations")
        if self.generator.random() < self.switch:
            self._pass_on()

    def sleep(self, address: int) -> None:
        """Let the running program rest until `address` is written, or until all rest."""
        self._ready.remove(self.running)
        self._asleep[self.running] = address
        if not self._ready:
            self._look_again()
        self._pass_on()

    def written(self, addresses: np.ndarray) -> None:
        """Wake the programs that poll one of these."""
        awake = [program for program, address in self._asleep.items() if (addresses == address).any()]
        for program in awake:
            del self._asleep[program]
        self._ready += awake
        self._looks = 0

    def _look_again(self) -> None:
        self._looks += 1
        if self._looks > PATIENCE:
            waiting = "; ".join(
                f"program {self.programs[program]} for {self.describe(address)}"
                for program, address in sorted(self._asleep.items())
            )
            raise HangError(f"every program left waits: {waiting}")
        self._ready = sorted(self._asleep)
        self._asleep.clear()

    def _pass_on(self) -> None:
        giver, taker = self.running, self.generator.choice(self._ready)
        if taker != giver:
            self._give(taker)
            self._take(giver)

    def _give(self, program: int) -> None:
        self.running = program
        interpreter.interpreter_builder.grid_idx = self.programs[program]
        self._locks[program].release()

    def _take(self, program: int) -> None:
        self._locks[program].acquire()
        if self._error is not None:
            raise _Stopped

    def _program(self, program: int, body: Callable[[], None]) -> None:
        try:
            self._take(program)
            body()
            self._ready.remove(program)
            if self._asleep and not self._ready:
                self._look_again()
        except _Stopped:
            return
        except BaseException as error:
            # a helper's errors come wrapped, once for each call on the way
            while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
                error = error.__cause__
            self._error = error
            for other in {*self._ready, *self._asleep} - {program}:
                self._locks[other].release()
            return
        if self._ready:
            self._give(self.generator.choice(self._ready))


class _Machine:
    """The interpreter's memory operations, each told to the scheduler and to the memory before it is done."""

    def __init__(self, memory: Memory, turns: _Turns):
        self.memory, self.turns = memory, turns
        self._builder = interpreter.interpreter_builder
        self._original = type(self._builder)
        self._polled: list[tuple[int, bytes] | None] = [None] * len(turns.programs)

    def operations(self) -> dict[str, Callable]:
        """Return what replaces the builder's methods. Atomics that no kernel uses are refused, not let through."""
        atomics = [name for name in dir(self._original) if name.startswith("create_atomic_")]
        known = (self.create_masked_load, self.create_masked_store, self.create_atomic_rmw, self.create_barrier)
        return dict.fromkeys(atomics, _refuse) | {method.__name__: method for method in known}

    # the last of the options tells volatile loads; how many precede it differs between versions of Triton
    def create_masked_load(self, pointers, mask, other, *options):
        self.turns.consider()
        addresses, size = _active(pointers, mask), _itemsize(pointers)
        kind, leader = (ATOMIC_READ, True) if options[-1] else (PLAIN_READ, False)
        self.memory.access(self.turns.running, addresses, size, kind, leader)
        result = self._original.create_masked_load(self._builder, pointers, mask, other, *options)
        self._read(addresses, result)
        return result

    def create_masked_store(self, pointers, value, mask, *options):
        self.turns.consider()
        addresses = _active(pointers, mask)
        self.memory.access(self.turns.running, addresses, _itemsize(pointers), PLAIN_WRITE)
        result = self._original.create_masked_store(self._builder, pointers, value, mask, *options)
        self._wrote(addresses)
        return result

    def create_atomic_rmw(self, operation, pointers, value, mask, semantic, scope):
        self.turns.consider()
        program, addresses, size = self.turns.running, _active(pointers, mask), _itemsize(pointers)
        if scope == ir.MEM_SYNC_SCOPE.CTA:
            self.memory.access(program, addresses, size, PLAIN_WRITE, leader=True)
        else:
            self.memory.access(program, addresses, size, ATOMIC_WRITE, leader=True)
            if semantic in ACQUIRES:
                self.memory.acquire(program, addresses)
            if semantic in RELEASES:
                self.memory.release(program, addresses)
        result = self._original.create_atomic_rmw(self._builder, operation, pointers, value, mask, semantic, scope)
        if operation == ir.ATOMIC_OP.ADD and not value.data.any():
            self._read(addresses, result)
        else:
            self._wrote(addresses)
        return result

    def create_barrier(self):
        self.memory.block_barrier(self.turns.running)

    def _read(self, addresses: np.ndarray, result) -> None:
        """Send the running program to sleep if it reads again what it has just read."""
        program = self.turns.running
        news = (int(addresses[0]), result.data.tobytes()) if addresses.size == 1 else None
        if news is not None and news == self._polled[program]:
            self.turns.sleep(news[0])
        self._polled[program] = news

    def _wrote(self, addresses: np.ndarray) -> None:
        self._polled[self.turns.running] = None
        self.turns.written(addresses)


def _active(pointers, mask) -> np.ndarray:
    """Return the addresses of the lanes that the mask leaves."""
    if mask is None:
        return pointers.data.ravel()
    return pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]


def _itemsize(pointers) -> int:
    """Return how many bytes each pointer points at."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _refuse(*_) -> None:
    raise NotImplementedError("of the atomics, this scheduler knows only read-modify-write")
