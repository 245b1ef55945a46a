"""The kernels of ``fused``, in Triton: each a product of matrices, and all that is done to its elements before it is written.

Tensors are contiguous. Axes: h heads; R rows, which are C tokens of each of several texts, one text after the other; N neurons
per head; D embedding width. A product's operands are read as they are (float32 is never rounded to TF32); its sums, and all
that is done to them, are float32.

A program computes tiles of ROWS x COLUMNS one after the other, the same rows of several columns or heads. Where the axis that
is summed over is no longer than DEPTH, the left operand of all of them is read once and HELD, and a tile is one product; else a
tile is a sum in steps of DEPTH. What tiles read of the right operand, programs that run at the same time read too: so it comes
from the cache. The three sizes are powers of two and at least 16.
Offsets within a tile are 32-bit, those of tiles 64-bit: a long text has more than 2^31 neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(
    triton.knobs.runtime.interpret
)  # on a CPU, in Python, where a product of bfloat16 is one of its bits


@triton.jit(do_not_specialize=["h", "R", "C"])
def excite(
    x,  # R D
    encoder,  # h D N
    local,  # C N, cosine and sine of each pair in turn
    shift,  # N, the same, by which all are turned on
    neurons,  # h R N, written
    rotated,  # h R N, written
    h,
    R,
    C,
    D,
    N,
    span,  # columns that a program works on
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R3 and R4: relu(x @ encoder), and the same turned. A program works on all heads, which share x and phases."""
    _, row, start = _place(R, N, ROWS, span)  # of one matrix
    left = x + row * D
    held = _held(left, R - row, D, HELD, ROWS, DEPTH)
    for step in range(0, tl.minimum(span, N - start), COLUMNS):
        column = start + step
        cos, sin = _phases(local, shift, row, column, R, C, N, ROWS, COLUMNS)
        weight, target = encoder + column, row * N + column
        for _head in range(h):
            found = _product(left, held, weight, R - row, N - column, D, D, N, 1, HELD, ROWS, COLUMNS, DEPTH)
            found = tl.maximum(found, 0.0, propagate_nan=tl.PropagateNan.ALL)
            even, odd = _pairs(found)
            turned = _unpaired(even * cos - odd * sin, even * sin + odd * cos)
            _store(neurons + target, found, R - row, N - column, N)
            _store(rotated + target, turned, R - row, N - column, N)
            weight += D * N
            target += R.to(tl.int64) * N


@triton.jit
def compare(
    rotated,  # b C N
    scores,  # b C C, written
    C,
    N,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R5: similarity of each token with strictly earlier ones, and zeros; tiles above the diagonal cost no product."""
    b, row, column = _place(C, C, ROWS, COLUMNS)
    target, texts = scores + (b * C + row) * C + column, rotated + b * C * N
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    if column < row + ROWS:
        left, right, rows, columns = texts + row * N, texts + column * N, C - row, C - column
        held = _held(left, rows, N, HELD, ROWS, DEPTH)
        found = _product(left, held, right, rows, columns, N, N, 1, N, HELD, ROWS, COLUMNS, DEPTH)
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
    span,  # columns that a program works on
    DROPS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R7 and R8: neurons * relu(yKV @ encoder_v), some of them dropped, in the place of the neurons."""
    head, row, start = _place(R, N, ROWS, span)
    left, weight, neurons = yKV + (head * R + row) * D, encoder_v + head * D * N, neurons + (head * R + row) * N
    held = _held(left, R - row, D, HELD, ROWS, DEPTH)
    for step in range(0, tl.minimum(span, N - start), COLUMNS):
        column = start + step
        found = _load(neurons + column, R - row, N - column, N, ROWS, COLUMNS)
        opened = _product(left, held, weight + column, R - row, N - column, D, D, N, 1, HELD, ROWS, COLUMNS, DEPTH)
        found *= tl.maximum(opened, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if DROPS:
            found *= _mask(seed, p, scale, head, row, column, C, T, first, ROWS, COLUMNS)
        _store(neurons + column, found, R - row, N - column, N)


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
    span,  # columns that a program works on
    DROPS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Undo R9, R8 and R7, computing R7 once more."""
    head, row, start = _place(R, N, ROWS, span)
    left, d_left, tile = yKV + (head * R + row) * D, d_decoded + row * D, (head * R + row) * N
    held, d_held = _held(left, R - row, D, HELD, ROWS, DEPTH), _held(d_left, R - row, D, HELD, ROWS, DEPTH)
    encoder_v, decoder = encoder_v + head * D * N, decoder + head * N * D
    for step in range(0, tl.minimum(span, N - start), COLUMNS):
        column = start + step
        rows, columns, offset = R - row, N - column, tile + column
        found = _load(neurons + offset, rows, columns, N, ROWS, COLUMNS)
        opened = _product(left, held, encoder_v + column, rows, columns, D, D, N, 1, HELD, ROWS, COLUMNS, DEPTH)
        d = _product(d_left, d_held, decoder + column * D, rows, columns, D, D, 1, D, HELD, ROWS, COLUMNS, DEPTH)
        opened = tl.maximum(opened, 0.0, propagate_nan=tl.PropagateNan.ALL)
        xy = found * opened
        if DROPS:
            mask = _mask(seed, p, scale, head, row, column, C, T, first, ROWS, COLUMNS)
            xy, d = xy * mask, d * mask
        _store(xy_sparse + offset, xy, rows, columns, N)
        _store(d_opened + offset, tl.where(opened <= 0.0, 0.0, d * found), rows, columns, N)
        _store(d_neurons + offset, d * opened, rows, columns, N)


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
    span,  # columns that a program works on
    ADDS: tl.constexpr,
    HELD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Undo R5 to R3."""
    b, row, start = _place(C, N, ROWS, span)
    left, right, tile = sides + (b * C + row) * C, rotated + b * C * N, (b * C + row) * N
    held = _held(left, C - row, C, HELD, ROWS, DEPTH)
    for step in range(0, tl.minimum(span, N - start), COLUMNS):
        column = start + step
        rows, columns, offset = C - row, N - column, tile + column
        waiting = _load(d_neurons + offset, rows, columns, N, ROWS, COLUMNS)
        found = _load(neurons + offset, rows, columns, N, ROWS, COLUMNS)
        d = _product(left, held, right + column, rows, columns, C, C, N, 1, HELD, ROWS, COLUMNS, DEPTH)
        if ADDS:
            d += _load(d_rotated + offset, rows, columns, N, ROWS, COLUMNS)
        even, odd = _pairs(d)
        cos, sin = _phases(local, shift, row, column, C, C, N, ROWS, COLUMNS)
        d = _unpaired(even * cos + odd * sin, odd * cos - even * sin) + waiting
        _store(d_neurons + offset, tl.where(found <= 0.0, 0.0, d), rows, columns, N)


@triton.jit
def _place(R, N, ROWS: tl.constexpr, width):
    """Which matrix of a batch (b, R, N) this program writes to, and its first row and column, all 64-bit.

    Programs that follow one another work on the same columns, whose weights are then read from memory once.
    """
    program = tl.program_id(0)
    down = tl.cdiv(R, ROWS)
    tiles = down * tl.cdiv(N, width)
    tile = program % tiles
    return (program // tiles).to(tl.int64), (tile % down * ROWS).to(tl.int64), (tile // down * width).to(tl.int64)


@triton.jit
def _held(a, R, K, HELD: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """The left operand of products, (ROWS, DEPTH), zero beyond R rows and K columns; or nothing where it is read in steps."""
    rows, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, DEPTH)[None, :]
    return tl.load(a + rows * K + depth, mask=(rows < R.to(tl.int32)) & (depth < K), other=0.0) if HELD else 0


@triton.jit
def _product(
    a, held, b, R, N, K, a_row, b_row, b_column,
    HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of a (R, K) @ b (K, N), of which a row of a, a row and a column of b are so far from the next."""
    R, N = R.to(tl.int32), N.to(tl.int32)
    rows, columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left = a + rows[:, None] * a_row + depth[None, :]
    right = b + depth[:, None] * b_row + columns[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if HELD:
        others = tl.load(right, mask=(depth[:, None] < K) & (columns[None, :] < N), other=0.0)
        total = _dot(held, others, total)
    else:
        for k in range(0, K, DEPTH):
            inside = depth < K - k
            some = tl.load(left, mask=(rows[:, None] < R) & inside[None, :], other=0.0)
            others = tl.load(right, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
            total = _dot(some, others, total)
            left += DEPTH
            right += DEPTH * b_row
    return total


@triton.jit
def _dot(a, b, total):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


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


@triton.jit(do_not_specialize=["B"])
def through(
    state,  # h*B N D, float32, updated
    rotated,  # h*B N
    v,  # B D
    parts,  # h*B pieces D, float32, written: attention by way of a piece of the neurons
    B,
    D,
    N,
    span,  # neurons of a piece
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R13 for a token of each text: what the state holds for it; then with the token. Silent neurons keep their rows."""
    pieces = tl.cdiv(N, span)
    group, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    columns = tl.arange(0, DEPTH)
    seen = tl.load(v + group % B * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros((DEPTH,), tl.float32)
    for first in range(0, span, ROWS):
        rows = piece * span + first + tl.arange(0, ROWS)
        q = tl.load(rotated + group * N + rows, mask=rows < N, other=0.0).to(tl.float32)
        place = state + (group * N + rows[:, None]) * D + columns[None, :]
        active = (q != 0.0)[:, None] & (columns < D)[None, :]
        held = tl.load(place, mask=active, other=0.0)
        tl.store(place, held + q[:, None] * seen[None, :], mask=active)
        total += tl.sum(held * q[:, None], 0)
    tl.store(parts + (group * pieces + piece) * D + columns, total, mask=columns < D)


@triton.jit(do_not_specialize=["B"])
def write(
    yKV,  # h B D
    encoder_v,  # h D N
    neurons,  # h B N
    decoder,  # h N D
    parts,  # B h*pieces D, float32, written: what the decoder makes of a piece of a head's neurons
    h,
    B,
    D,
    N,
    span,  # neurons of a piece
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R7 and R9 for a token of each text."""
    head, row, start = _place(B, N, ROWS, span)
    left, weight = yKV + (head * B + row) * D, encoder_v + head * D * N
    held = _held(left, B - row, D, True, ROWS, DEPTH)
    rows, depth = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, DEPTH), tl.float32)
    for step in range(0, tl.minimum(span, N - start), COLUMNS):
        column = start + step
        found = _load(neurons + (head * B + row) * N + column, B - row, N - column, N, ROWS, COLUMNS)
        opened = _product(left, held, weight + column, B - row, N - column, D, D, N, 1, True, ROWS, COLUMNS, DEPTH)
        found *= tl.maximum(opened, 0.0, propagate_nan=tl.PropagateNan.ALL)
        columns = column + tl.arange(0, COLUMNS)
        inside = (columns < N)[:, None] & (depth < D)[None, :]
        some = tl.load(decoder + (head * N + columns[:, None]) * D + depth[None, :], mask=inside, other=0.0)
        total = _dot(found.to(some.dtype), some, total)
    pieces = tl.cdiv(N, span)
    piece = head * pieces + start // span
    target = parts + ((row + rows[:, None]) * (h * pieces) + piece) * D + depth[None, :]
    tl.store(target, total, mask=(row + rows < B)[:, None] & (depth < D)[None, :])


@triton.jit
def norm(
    parts,  # b many D, float32
    x,  # b D, if there is something to add
    target,  # b D, written
    many,
    D,
    eps,
    ADDS: tl.constexpr,
    SOME: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """R2 of a sum of parts: R6; or, if it ADDS, that of x and of this, R9 and R10."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DEPTH)
    total = tl.zeros((DEPTH,), tl.float32)
    for first in range(0, many, SOME):
        total += tl.sum(_load(parts + (row * many + first) * D, many - first, D, D, SOME, DEPTH), 0)
    found = _normed(total, D, eps, DEPTH)
    if ADDS:
        found += tl.load(x + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        found = _normed(found, D, eps, DEPTH)
    tl.store(target + row * D + columns, found.to(target.dtype.element_ty), mask=columns < D)


@triton.jit
def _normed(values, D, eps, DEPTH: tl.constexpr):
    """R2 of D values, of which those beyond are zero."""
    centred = tl.where(tl.arange(0, DEPTH) < D, values - tl.sum(values, 0) / D, 0.0)
    return centred / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
