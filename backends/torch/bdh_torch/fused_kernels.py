"""The kernels of ``fused``, in Triton: each a product of matrices, and all that is done to its elements before it is written.

Tensors are contiguous. Axes: h heads; R rows, which are C tokens of each of several texts, one text after the other; N neurons
per head; D embedding width. A product's operands are read as they are (float32 is never rounded to TF32); its sums, and all
that is done to them, are float32.

A program computes a tile of ROWS x COLUMNS, in steps of DEPTH along the axis that is summed over. The three are powers of two
and at least 16. Offsets within a tile are 32-bit, those of tiles 64-bit: a long text has more than 2^31 neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(
    triton.knobs.runtime.interpret
)  # on a CPU, in Python, where a product of bfloat16 is one of its bits


@triton.jit(do_not_specialize=["R", "C"])
def excite(
    x,  # R D
    encoder,  # h D N
    local,  # C N, cosine and sine of each pair in turn
    shift,  # N, the same, by which all are turned on
    neurons,  # h R N, written
    rotated,  # h R N, written
    R,
    C,
    D,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R3 and R4: relu(x @ encoder), and the same turned."""
    head, row, column = _place(R, N, ROWS, COLUMNS)
    found = _product(x + row * D, encoder + head * D * N + column, R - row, N - column, D, D, N, 1, ROWS, COLUMNS, DEPTH)
    found = tl.maximum(found, 0.0, propagate_nan=tl.PropagateNan.ALL)
    even, odd = _pairs(found)
    cos, sin = _phases(local, shift, row, column, R, C, N, ROWS, COLUMNS)
    turned = _unpaired(even * cos - odd * sin, even * sin + odd * cos)
    _store(neurons + (head * R + row) * N + column, found, R - row, N - column, N)
    _store(rotated + (head * R + row) * N + column, turned, R - row, N - column, N)


@triton.jit
def compare(
    rotated,  # b C N
    scores,  # b C C, written
    C,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R5: similarity of each token with strictly earlier ones, and zeros; tiles above the diagonal cost no product."""
    b, row, column = _place(C, C, ROWS, COLUMNS)
    target, texts = scores + (b * C + row) * C + column, rotated + b * C * N
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    if column < row + ROWS:
        found = _product(texts + row * N, texts + column * N, C - row, C - column, N, N, 1, N, ROWS, COLUMNS, DEPTH)
        query, key = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        found = tl.where(query[:, None] > key[None, :], found, 0.0)
    _store(target, found, C - row, C - column, C)


@triton.jit(do_not_specialize=["R", "C", "T", "first", "seed"])
def gate(
    yKV,  # h R D
    encoder_v,  # h D N
    neurons,  # h R N, overwritten
    R,
    C,
    D,
    N,
    T,
    first,
    seed,
    p,
    scale,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R7 and R8: neurons * relu(yKV @ encoder_v), some of them dropped, in the place of the neurons."""
    head, row, column = _place(R, N, ROWS, COLUMNS)
    left, weight = yKV + (head * R + row) * D, encoder_v + head * D * N + column
    opened = _product(left, weight, R - row, N - column, D, D, N, 1, ROWS, COLUMNS, DEPTH)
    opened = tl.maximum(opened, 0.0, propagate_nan=tl.PropagateNan.ALL)
    place = neurons + (head * R + row) * N + column
    found = _load(place, R - row, N - column, N, ROWS, COLUMNS) * opened
    if DROPS:
        found *= _mask(seed, p, scale, head, row, column, C, T, first, ROWS, COLUMNS)
    _store(place, found, R - row, N - column, N)


@triton.jit(do_not_specialize=["R", "C", "T", "first", "seed"])
def undo_gate(
    yKV,  # h R D
    encoder_v,  # h D N
    d_decoded,  # R D
    decoder,  # h N D
    neurons,  # h R N
    xy_sparse,  # h R N, written: what ``gate`` wrote
    d_opened,  # h R N, written: slopes in yKV @ encoder_v
    d_neurons,  # h R N, written: slopes in the neurons by way of the gate
    R,
    C,
    D,
    N,
    T,
    first,
    seed,
    p,
    scale,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Undo R9, R8 and R7, computing R7 once more."""
    head, row, column = _place(R, N, ROWS, COLUMNS)
    left, weight = yKV + (head * R + row) * D, encoder_v + head * D * N + column
    opened = _product(left, weight, R - row, N - column, D, D, N, 1, ROWS, COLUMNS, DEPTH)
    opened = tl.maximum(opened, 0.0, propagate_nan=tl.PropagateNan.ALL)
    weight = decoder + (head * N + column) * D
    d = _product(d_decoded + row * D, weight, R - row, N - column, D, D, 1, D, ROWS, COLUMNS, DEPTH)
    offset = (head * R + row) * N + column
    found = _load(neurons + offset, R - row, N - column, N, ROWS, COLUMNS)
    xy = found * opened
    if DROPS:
        mask = _mask(seed, p, scale, head, row, column, C, T, first, ROWS, COLUMNS)
        xy, d = xy * mask, d * mask
    _store(xy_sparse + offset, xy, R - row, N - column, N)
    _store(d_opened + offset, tl.where(opened <= 0.0, 0.0, d * found), R - row, N - column, N)
    _store(d_neurons + offset, d * opened, R - row, N - column, N)


@triton.jit
def undo_turn(
    sides,  # b C C, slopes in the scores and the same transposed
    rotated,  # b C N
    d_rotated,  # b C N, slopes by way of the state, if there are any
    local,  # C N, cosine and sine of each pair in turn
    shift,  # N, the same, by which all are turned on
    neurons,  # b C N
    d_neurons,  # b C N, overwritten: slopes by way of the gate, then those in x @ encoder
    C,
    N,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Undo R5 to R3."""
    b, row, column = _place(C, N, ROWS, COLUMNS)
    left, right = sides + (b * C + row) * C, rotated + b * C * N + column
    d = _product(left, right, C - row, N - column, C, C, N, 1, ROWS, COLUMNS, DEPTH)
    offset = (b * C + row) * N + column
    if ADDS:
        d += _load(d_rotated + offset, C - row, N - column, N, ROWS, COLUMNS)
    even, odd = _pairs(d)
    cos, sin = _phases(local, shift, row, column, C, C, N, ROWS, COLUMNS)
    d = _unpaired(even * cos + odd * sin, odd * cos - even * sin)
    d += _load(d_neurons + offset, C - row, N - column, N, ROWS, COLUMNS)
    found = _load(neurons + offset, C - row, N - column, N, ROWS, COLUMNS)
    _store(d_neurons + offset, tl.where(found <= 0.0, 0.0, d), C - row, N - column, N)


@triton.jit
def _place(R, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which matrix of a batch (b, R, N) this program writes to, and the first row and column of its tile, all 64-bit."""
    program = tl.program_id(0)
    across = tl.cdiv(N, COLUMNS)
    tiles = tl.cdiv(R, ROWS) * across
    tile = program % tiles
    batch, row, column = program // tiles, tile // across * ROWS, tile % across * COLUMNS
    return batch.to(tl.int64), row.to(tl.int64), column.to(tl.int64)


@triton.jit
def _product(a, b, R, N, K, a_row, b_row, b_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of a (R, K) @ b (K, N), of which a row of a, a row and a column of b are so far from the next."""
    R, N = R.to(tl.int32), N.to(tl.int32)
    rows, columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left = a + rows[:, None] * a_row + depth[None, :]
    right = b + depth[:, None] * b_row + columns[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        inside = depth < K - k
        some = tl.load(left, mask=(rows[:, None] < R) & inside[None, :], other=0.0)
        others = tl.load(right, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
        if INTERPRETED:
            some, others = some.to(tl.float32), others.to(tl.float32)
        total = tl.dot(some, others, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * b_row
    return total


@triton.jit
def _load(source, R, N, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of values as float32, zero beyond R rows and N columns."""
    R, N = R.to(tl.int32), N.to(tl.int32)
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(source + rows * stride + columns, mask=(rows < R) & (columns < N), other=0.0).to(tl.float32)


@triton.jit
def _store(target, values, R, N, stride):
    """Write what of a tile lies within R rows and N columns."""
    R, N = R.to(tl.int32), N.to(tl.int32)
    rows, columns = tl.arange(0, values.shape[0])[:, None], tl.arange(0, values.shape[1])[None, :]
    tl.store(target + rows * stride + columns, values.to(target.dtype.element_ty), mask=(rows < R) & (columns < N))


@triton.jit
def _phases(local, shift, row, column, R, C, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Cosine and sine of every pair of a tile, each (ROWS, COLUMNS/2)."""
    rows, columns = row.to(tl.int32) + tl.arange(0, ROWS), column.to(tl.int32) + tl.arange(0, COLUMNS)
    source = local + (rows % C).to(tl.int64)[:, None] * N + columns[None, :]
    cos, sin = _pairs(tl.load(source, mask=(rows < R)[:, None] & (columns < N)[None, :], other=0.0))
    on = tl.load(shift + columns, mask=columns < N, other=0.0)
    cos_on, sin_on = tl.split(tl.reshape(on, (COLUMNS // 2, 2)))
    cos_on, sin_on = cos_on[None, :], sin_on[None, :]
    return cos * cos_on - sin * sin_on, cos * sin_on + sin * cos_on


@triton.jit
def _pairs(values):
    """Even and odd columns."""
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))


@triton.jit
def _unpaired(even, odd):
    """Columns in turn from one and the other."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def _mask(seed, p, scale, head, row, column, C, T, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``scale`` where a value is kept and 0 where it is dropped, the same wherever tiles begin (R8).

    Values are numbered by head, token and neuron, and Philox makes four numbers out of the number of the first of four neurons,
    in the seven rounds that its authors found to pass every test.
    """
    rows, quads = row.to(tl.int32) + tl.arange(0, ROWS), column.to(tl.int32) // 4 + tl.arange(0, COLUMNS // 4)
    nothing = tl.zeros((ROWS, COLUMNS // 4), tl.int32)
    tokens = nothing + (first + rows // C * T + rows % C)[:, None]
    a, b, c, d = tl.philox(seed, nothing + quads[None, :], tokens, nothing + head.to(tl.int32), nothing, n_rounds=7)
    a, b = _kept(a, p, scale), _kept(b, p, scale)
    c, d = _kept(c, p, scale), _kept(d, p, scale)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))


@triton.jit
def _kept(number, p, scale):
    return tl.where(tl.uint_to_uniform_float(number) >= p, scale, 0.0)
