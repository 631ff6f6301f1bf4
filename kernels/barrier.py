"""The barrier between the programs of one launch, and the only atomics of the package.

Programs that exchange h, or parts of dh, through L2 meet once a step. A counter in global memory counts arrivals and
never falls: after step s of n programs it stands at (s + 1) * n, so there is no reset for a late poll to miss.

    store what others will load;  arrive(counter);  wait(counter, (s + 1) * n);  load what others stored

Between `arrive` and `wait` a kernel may do whatever needs nothing of this step from other programs. What nobody waits
for, such as the saved gates, is best stored there: an arrival is held up until every store before it has landed.

What a caller owes:

- every program of a group arrives equally often, and all of them are on the chip at once: a cooperative launch, else
  `wait` may never return;
- one int32 for each group, zero at first, in a workspace of this launch alone; arrivals stay below 2^31;
- what is exchanged goes through two buffers in turn, `slot(s)`, or through one for each step. A fast program may write
  step s + 1 while a slow one still reads step s, but not step s + 2: for that it would have to get past the slow one's
  arrival.

tests/scheduler.py checks the order that this gives under every interleaving tried, tests/test_barrier.py the fences in
the compiled code.
"""

import triton
import triton.language as tl


@triton.jit
def gather_stores(HIP: tl.constexpr):
    """Bring the stores of all threads of this program where a release by one of them publishes them all."""
    if HIP:
        # a block barrier of AMD's does not wait for stores, and a release only for those of its own wave: each wave
        # waits until its own are in the L2, which the release then writes back as a whole
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0", "=v", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def arrive(counter_ptr, HIP: tl.constexpr):
    """Publish what this program stored so far, and count it in."""
    # one thread arrives for all: Triton puts neither a block barrier nor anything else before its release
    gather_stores(HIP)
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target):
    """Return once `target` arrivals are counted; what those programs stored before arriving can be loaded after."""
    # adding 0 is how Triton says "load, acquire", and is compiled to that; a volatile load would acquire nothing
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    # one thread polls for all: the block barrier puts its acquire before the others' loads (on RDNA it is also what
    # empties the L0 caches that those go through)
    tl.debug_barrier()


@triton.jit
def wait_unless(counter_ptr, target, seen):
    """`wait`, unless `target` arrivals have been seen; return how many have now, for the next time.

    For the counter of programs that may be several steps ahead: whoever waits for them need not ask every step.
    """
    while seen < target:
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return seen


@triton.jit
def slot(step):
    """Which of the two exchange buffers holds what was stored in `step`."""
    return step % 2
