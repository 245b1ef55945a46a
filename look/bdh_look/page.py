"""One self-contained page about one text: what was read from where, by which neurons and synapses, and how the state grew.

What one sees of a byte is the largest few of thousands of numbers, so the page holds these: typed arrays in base64, shares as
16-bit fractions of their sum. ``TOP`` says how many of what, and the page says so too.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files

import jinja2
import markupsafe
import numpy as np

from bdh_look.causes import causes
from bdh_look.errors import LookError
from bdh_look.record import Record, record
from bdh_look.typed_arrays import encoded
from bdh_spec import Model
from bdh_spec.model import layer_norm
from bdh_spec.params import Array, Params, cast, count, fingerprint

MAX_BYTES = 2000  # of text: the map of who read whom grows with its square
FULL = 32767  # a share of 1
TOP = {
    "expected": 8,  # likeliest next bytes
    "causes": 12,  # earlier bytes that were left out, one at a time
    "reads": 12,  # earlier bytes, by layer and head
    "synapses": 4,  # state entries that were read, by layer and head
    "neurons": 24,  # by layer
    "grew": 4,  # state entries that a byte wrote to most, by layer
    "followed": 16,  # state entries over the whole text, by layer
    "contexts": 6,  # places that excite a neuron
    "writes": 5,  # bytes that a neuron speaks for, and against
    "partners": 6,  # neurons that a neuron excites, and that excite it
}


def page(model: Model, text: bytes, name: str = "the embedded model", *, with_causes: bool = True) -> str:
    """The page (HTML) about a model reading a text; ``name`` is what the page calls the model.

    ``with_causes`` reads each byte again without some earlier ones, which for a model of 25 million parameters takes minutes.

    Raises LookError where the text is empty, of one byte, or longer than ``MAX_BYTES``.
    """
    check_length(text)
    seen = record(model, text)
    params = model.params()
    about = {
        "model": name,
        "fingerprint": fingerprint(params, model.config.freqs)[:12],
        "port": f"{model.backend} on {model.device}, {model.dtype}",
        "parameters": count(model.config),
        "version": version("bdh-spec"),
        "bits": float(np.nanmean(seen.loss.values) / np.log(2)),
        "config": model.config.as_dict() | {"n_neurons": model.config.n_neurons},
        "glyphs": glyphs(text),
        "top": TOP,
    }
    held = page_arrays(seen, cast(params, seen.x.values.dtype)) | (cause_arrays(model, seen) if with_causes else {})
    arrays = {key: encoded(value) for key, value in held.items()}
    data = json.dumps({**about, "arrays": arrays}, separators=(",", ":")).replace("<", "\\u003c")
    here = files("bdh_look")
    parts = {name: markupsafe.Markup((here / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(about=about, names=set(arrays), size=len(text), data=markupsafe.Markup(data), **parts)


def check_length(text: bytes) -> bytes:
    """A text that fits on a page."""
    if not 2 <= len(text) <= MAX_BYTES:
        raise LookError(f"the text has {len(text)} bytes: a page shows 2 to {MAX_BYTES:,}, so give as many")
    return text


def glyphs(text: bytes) -> list[str]:
    """What to show for each byte: its character; of one of several bytes, the first shows it and the others a dot.

    >>> glyphs("né\\n".encode())
    ['n', 'é', '·', '⏎']
    """
    shown: list[str] = []
    while len(shown) < len(text):
        rest = text[len(shown) :]
        width = next((n for n in range(1, 5) if _decodes(rest[:n])), 0)
        if width == 0:
            shown.append(f"\\x{rest[0]:02x}")
            continue
        character = rest[:width].decode()
        named = {"\n": "⏎", "\t": "→", "\r": "␍"}.get(character, character)
        shown.append(named if named.isprintable() else f"\\x{rest[0]:02x}")
        shown += ["·"] * (width - 1)
    return shown


def _decodes(part: bytes) -> bool:
    try:
        return len(part.decode()) == 1
    except UnicodeDecodeError:
        return False


def page_arrays(seen: Record, params: Params) -> dict[str, Array]:
    """Every array of the page by name."""
    scores, q, x = seen.scores.values, seen.rotated.values, seen.x.values
    expected, chances = largest(seen.next_byte.values, TOP["expected"])
    shares = shares_of(scores)  # L h T T
    reads, read_shares = largest(shares, TOP["reads"])
    everything = np.abs(shares).mean((0, 1), dtype=np.float32)  # T T
    most = everything.max(-1)
    below = np.tril_indices(len(seen), -1)
    per_byte = np.round(everything / np.maximum(most, 1e-30)[:, None] * 255).astype(np.uint8)
    neurons, strengths, active = active_neurons(seen)
    grew, grew_by = grown(q, x)
    followed, course = followed_entries(seen)
    synapses = read_synapses(q, x)
    arrays = {
        "tokens": seen.tokens.values.astype(np.uint8),
        "loss": np.nan_to_num(seen.loss.values).astype(np.float32),
        "expected": expected.astype(np.uint8),
        "chances": chances.astype(np.float32),
        "everywhere": per_byte[below],  # row by row: who read whom, over all layers and heads
        "everywhereMost": most.astype(np.float32),
        "reads": reads.astype(np.uint16),
        "readShares": fixed(read_shares),
        **synapses,
        "neurons": neurons.astype(np.uint32),
        "strengths": strengths,
        "active": active.astype(np.uint16),
        "norms": np.sqrt((seen.state_norm.values**2).sum(1)).astype(np.float32),  # L T
        "grew": grew.astype(np.uint32),
        "grewBy": grew_by.astype(np.float32),
        "followed": followed.astype(np.uint16),
        "course": course,
    }
    N = q.shape[-1]
    of_synapses = synapses["synapses"][..., 0] + N * np.arange(q.shape[1], dtype=np.int64)[:, None, None]
    met = np.unique(
        np.concatenate([a.ravel() for a in (neurons, grew[..., 0], followed[..., 0] * N + followed[..., 1], of_synapses)])
    )
    return arrays | about_neurons(seen, params, met)


def cause_arrays(model: Model, seen: Record) -> dict[str, Array]:
    """What each prediction came from, byte by byte left out."""
    earlier, gave, left = causes(model, seen, TOP["causes"])
    return {"causes": earlier.astype(np.uint16), "gave": gave.astype(np.float32), "left": left.astype(np.float32)}


def largest(values: Array, k: int) -> tuple[Array, Array]:
    """Indices and values of the k largest magnitudes along the last axis, the largest first; zeros where there are fewer."""
    kept = min(k, values.shape[-1])
    size = np.abs(values)
    some = np.argpartition(-size, kept - 1, axis=-1)[..., :kept]
    order = np.argsort(-np.take_along_axis(size, some, -1), axis=-1, kind="stable")
    found = np.take_along_axis(some, order, -1)
    wide = [(0, 0)] * (values.ndim - 1) + [(0, k - kept)]
    return np.pad(found, wide), np.pad(np.take_along_axis(values, found, -1), wide)


def shares_of(scores: Array) -> Array:
    """Scores with their signs, over the sum of the magnitudes of their row: what part of a reading each earlier byte was.

    The norm after attention (R6) takes the size of a reading away, so that shares are what is left to compare.
    """
    total = np.abs(scores).sum(-1, keepdims=True)
    return np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)


def fixed(shares: Array) -> Array:
    """Shares from -1 to 1 as 16-bit whole numbers."""
    return np.round(shares * FULL).astype(np.int16)


def read_synapses(q: Array, x: Array) -> dict[str, Array]:
    """For each layer, head and byte the state entries S[n, d] that its reading was made of most: |q[n] S[n, d]| is largest.

    With each: its share of all that was read, its value, and the earlier byte that wrote most of it. The k largest entries lie
    in the k rows whose largest is largest, so a row's largest and sum are kept up to date and the others never looked at.
    """
    (L, h, T, _), k = q.shape, TOP["synapses"]
    entries = np.zeros((L, h, T, k, 3), np.uint16)  # neuron, feature, written most at
    shares, values = np.zeros((L, h, T, k), np.int16), np.zeros((L, h, T, k), np.float32)
    for i, j in np.ndindex(L, h):
        Q, X = q[i, j], x[i]
        S = np.zeros((Q.shape[1], X.shape[1]), Q.dtype)
        peak, total = np.zeros(len(S), Q.dtype), np.zeros(len(S), Q.dtype)
        for t in range(T):
            rows = np.flatnonzero(Q[t])
            size = np.abs(Q[t, rows])
            if t and (everything := float(size @ total[rows])) > 0:
                best = rows[np.argsort(-size * peak[rows], kind="stable")[:k]]
                parts = Q[t, best, None] * S[best]  # k D
                flat = np.argsort(-np.abs(parts), axis=None, kind="stable")[:k]
                n, d = best[flat // X.shape[1]], flat % X.shape[1]
                writer = np.argmax(np.abs(Q[:t, n] * X[:t, d]), axis=0)
                found = len(flat)
                entries[i, j, t, :found] = np.stack([n, d, writer], -1)
                shares[i, j, t, :found] = fixed(parts.ravel()[flat] / everything)
                values[i, j, t, :found] = S[n, d]
            S[rows] += Q[t, rows, None] * X[t]
            magnitude = np.abs(S[rows])
            peak[rows], total[rows] = magnitude.max(-1), magnitude.sum(-1)
    return {"synapses": entries, "synapseShares": shares, "synapseValues": values}


def side_by_side(values: Array) -> Array:
    """Neurons (..., h, T, N) of all heads in one row (..., T, h*N), as the decoder takes them (R9)."""
    moved = np.moveaxis(values, -3, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def active_neurons(seen: Record) -> tuple[Array, Array, Array]:
    """Per layer and byte: the neurons that pass most to the decoder, how much (255 is the layer's most), and counts of active.

    The counts are of ``x_sparse``, ``y_sparse`` and ``xy_sparse``.
    """
    passed = side_by_side(seen.xy_sparse.values)  # L T h*N
    neurons, values = largest(passed, TOP["neurons"])
    most = np.maximum(values.max((1, 2), keepdims=True), 1e-30)
    counts = [(array.values > 0).sum((1, 3)) for array in (seen.x_sparse, seen.y_sparse, seen.xy_sparse)]
    return neurons, np.ceil(values / most * 255).astype(np.uint8), np.stack(counts, -1)


def grown(q: Array, x: Array) -> tuple[Array, Array]:
    """Per layer and byte the state entries (neuron of all, feature) that the byte added most to, and what it added."""
    k = TOP["grew"]
    neurons, by = largest(side_by_side(q), k)  # L T k
    features, size = largest(x, k)
    products = by[..., :, None] * size[..., None, :]  # L T k k: the largest of all are among them
    flat, added = largest(products.reshape(*products.shape[:2], -1), k)
    return np.stack([np.take_along_axis(neurons, flat // k, -1), np.take_along_axis(features, flat % k, -1)], -1), added


def followed_entries(seen: Record) -> tuple[Array, Array]:
    """Per layer the largest entries (head, neuron, feature) of the last state, and the course of each over the text.

    127 is the largest magnitude that the entry reaches.
    """
    L, h, N, D = seen.state.values.shape
    at, _ = largest(seen.state.values.reshape(L, -1), TOP["followed"])
    head, neuron, feature = np.unravel_index(at, (h, N, D))
    courses = np.zeros((L, TOP["followed"], len(seen)))
    for i in range(L):
        written = seen.rotated.values[i, head[i], :, neuron[i]] * seen.x.values[i].T[feature[i]]  # k T
        courses[i] = np.cumsum(written, -1, dtype=np.float64)
    most = np.maximum(np.abs(courses).max(-1, keepdims=True), 1e-30)
    return np.stack([head, neuron, feature], -1), np.round(courses / most * 127).astype(np.int8)


def about_neurons(seen: Record, params: Params, met: Array) -> dict[str, Array]:
    """For the neurons that the page names: what excites them, the bytes they speak for and against, their partners."""
    excited = side_by_side(seen.x_sparse.values)[..., met]  # L T M
    at, values = largest(excited.max(0).T, TOP["contexts"])  # M k
    layer = np.take_along_axis(excited.argmax(0).T, at, -1)
    most = np.maximum(values.max(-1, keepdims=True), 1e-30)
    decoder = params.decoder
    encoder = np.concatenate(list(params.encoder), axis=-1)  # D h*N
    met_bytes = np.unique(seen.tokens.values)  # others the model may never have seen, and their readout is noise
    speaks = layer_norm(decoder[met]) @ params.lm_head[:, met_bytes]  # M bytes
    order = met_bytes[np.argsort(-speaks, axis=-1, kind="stable")]
    k = min(TOP["writes"], (len(met_bytes) + 1) // 2)
    (excites, excites_by), (excited_by, excited_how) = partners(decoder, encoder, met)
    return {
        "met": met.astype(np.uint32),
        "contexts": at.astype(np.uint16),
        "contextLayers": layer.astype(np.uint8),
        "contextSizes": np.ceil(values / most * 255).astype(np.uint8),
        "speaksFor": order[:, :k].astype(np.uint8),
        "speaksAgainst": order[:, ::-1][:, :k].astype(np.uint8),
        "excites": excites.astype(np.uint32),
        "excitesBy": excites_by.astype(np.float32),
        "excitedBy": excited_by.astype(np.uint32),
        "excitedHow": excited_how.astype(np.float32),
    }


Found = tuple[Array, Array]


def partners(decoder: Array, encoder: Array, met: Array, block: int = 256) -> tuple[Found, Found]:
    """Whom some neurons excite most in the next layer, and who them, by Gx = encoder after decoder, without the norm between.

    A block of rows or columns at a time: Gx has (h*N)^2 entries.
    """
    centred = decoder - decoder.mean(-1, keepdims=True)  # the norm (R2) takes the mean away
    k, blocks = TOP["partners"], [met[start : start + block] for start in range(0, len(met), block)]
    outgoing = [largest(np.maximum(centred[some] @ encoder, 0), k) for some in blocks]
    incoming = [largest(np.maximum(centred @ encoder[:, some], 0).T, k) for some in blocks]
    return joined(outgoing), joined(incoming)


def joined(parts: list[Found]) -> Found:
    """Indices and values of all blocks."""
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
