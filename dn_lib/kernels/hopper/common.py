"""What the Hopper kernels share: sizes, shared memory, barriers, products and the walk's bounds.

One tile has one way: the copy engine (TMA) brings it to shared memory, and the tensor cores read it there (wgmma).  The
threads touch only accumulators, which are float32 and stay in registers, and what of them becomes an operand again.

Two tricks keep ptxas from spoiling the kernels.

Order of products.  wgmma is asynchronous: it is begun, and awaited later.  If an accumulator is read while a product
that was begun after it still adds to the same registers, or if registers run out between the two, ptxas makes every
wgmma of the kernel wait for the one before (warning C7514): 0.50 ms where the backward now takes 0.46.  So products are
begun in the order in which they are awaited, `warpgroup_mma_wait(n)` says how many may still run, and no result is read
before its own wait.

The opaque zero.  A buffer indexed by a constant has a constant wgmma descriptor, and ptxas keeps all of those, a
hundred 64-bit numbers, in registers for the whole loop.  So buffers that exist once are indexed by `step >> 20`, which
is zero, but not to the compiler: the descriptors are formed where they are used.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

C = gl.constexpr(64)  # tokens of a chunk
D = gl.constexpr(128)  # channels of a head, keys and values alike
LOW = gl.constexpr(gl.bfloat16)
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))

# Rows with a strength below this keep 2^-40 E for the backward instead of Vn, see `backward.py`.
WEAK = gl.constexpr(2.0**-40)

meet_only = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # its name until Triton 3.6, and since


@gluon.jit
def tiles(COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for so many tiles `[ROWS, COLUMNS]`."""
    return gl.allocate_shared_memory(LOW, [COUNT, ROWS, COLUMNS], TILE)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """So many barriers that open when the bytes announced to them have arrived."""
    arrived = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(COUNT):
        mbarrier.init(arrived.index(j), count=1)
    return arrived


@gluon.jit
def fetch(tensors, columns, buffers, row, arrived, pred=True):
    """Has the copy engine bring one tile of each tensor, from `row` on, and announces their bytes to `arrived`."""
    BYTES: gl.constexpr = bytes_of(tensors)
    mbarrier.expect(arrived, BYTES, pred=pred)
    for j in gl.static_range(len(tensors)):
        tma.async_copy_global_to_shared(tensors[j], [row, columns[j]], arrived, buffers[j], pred=pred)


@gluon.constexpr_function
def bytes_of(tensors):
    return sum(x.block_type.nbytes for x in tensors)


@gluon.jit
def meet():
    """Both warpgroups are here, and what they stored to shared memory is there for tensor cores and copy engine."""
    fence_async_shared()
    meet_only()


@gluon.jit
def transposed(tile):
    return tile.permute([1, 0])


@gluon.jit
def product(a, b, LAYOUT: gl.constexpr):
    """a b, begun and not awaited; a and b in shared memory."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[1]
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, layout=LAYOUT)
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def add(acc, a, b):
    """acc + a b, begun and not awaited."""
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def segment_bounds(s, L, SEGMENT, SEGMENTS):
    """First token (counted over the batch), first chunk (likewise) and number of chunks of segment `s`."""
    sequence = s // SEGMENTS
    start = (s % SEGMENTS) * SEGMENT
    chunks = (gl.minimum(L, start + SEGMENT) - start) // C
    return sequence * L + start, sequence * (L // C) + start // C, chunks


@gluon.jit
def row_scalars(beta, q_norm, k_norm, token, rows, head, H, NORM: gl.constexpr, GROUP: gl.constexpr):
    """beta, 1/|q| and 1/|k| of the chunk's rows, in float32; without NORM beta stands for all three, unused."""
    at = (token.to(gl.int64) + rows) * H + head
    b = gl.load(beta + at).to(gl.float32)
    r_q = b
    r_k = b
    if NORM:
        at_key = (token.to(gl.int64) + rows) * (H // GROUP) + head // GROUP
        r_q = gl.load(q_norm + at_key)
        r_k = gl.load(k_norm + at_key)
    return b, r_q, r_k


@gluon.jit
def log_gates(sums, token, rows, head, tokens):
    """Sums of the log gates since the chunk began, of these rows; their high parts, see `gate_sums`."""
    return gl.load(sums + 2 * (head.to(gl.int64) * tokens + token + rows))


@gluon.jit
def decay(span):
    """exp(span), where no exponent is above 0 but for rows that are masked afterwards."""
    return gl.exp(gl.minimum(span, 0.0))
