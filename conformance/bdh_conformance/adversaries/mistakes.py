"""The known mistakes: each one line of the specification, as somebody might have written it, and what a diagnosis says of it.

A table of places, and of what was written there instead. What no run could show, such as an offset common to all positions of a
text, is no mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bdh_conformance.adversaries.variants import Change, variant
from bdh_spec import Backend, Params

# The channels that must see a mistake; others may see it too.
FORWARD = ("logits", "traces")  # the parallel form
BOTH = ("logits", "traces", "decode")  # the parallel and the recurrent form


@dataclass(frozen=True)
class Mistake:
    """One line of bdh_spec changed: ``before`` stands once in ``module``, ``says`` is the sentence of a diagnosis."""

    name: str
    module: str
    before: str
    after: str
    says: str
    channels: tuple[str, ...]
    random: bool = False  # answers differ from run to run: a diagnosis knows it by where they do, and not by their values

    def backend(self) -> Backend:
        """A NumPy port with this mistake."""
        return variant(self.name, (Change(self.module, self.before, self.after),))


class Place(NamedTuple):
    """A piece of a line of the specification at which mistakes are made, and the channels that see most of them."""

    module: str
    before: str
    channels: tuple[str, ...]

    def __call__(
        self, name: str, after: str, says: str, channels: tuple[str, ...] | None = None, *, random: bool = False
    ) -> Mistake:
        """The mistake of writing ``after`` there."""
        return Mistake(name, self.module, self.before, after, says, channels or self.channels, random)


# R1: the embedding
LOOKED_UP = Place("model", "layer_norm(params.embed[tokens])", BOTH)
R1 = [
    LOOKED_UP("embedding_norm_missing", "params.embed[tokens]", "the embedding is not normalised"),
    LOOKED_UP("embedding_id_off_by_one", "layer_norm(params.embed[tokens - 1])", "every token reads the row before its own"),
    LOOKED_UP(
        "embedding_scaled",
        "layer_norm(params.embed[tokens] * params.embed.shape[1] ** 0.5)",
        "the embedding is scaled by the root of D",
    ),
    LOOKED_UP("embedding_norm_twice", "layer_norm(layer_norm(params.embed[tokens]))", "the embedding is normalised twice"),
    LOOKED_UP(
        "embedding_of_first_text",
        "layer_norm(params.embed[tokens[:1].repeat(len(tokens), 0)])",
        "every text of a batch reads the first one's tokens",
        ("logits", "batch"),
    ),
]

# R2: the norm
EPSILON = Place("model", "EPS = 1e-5", BOTH)
DEVIATION_OF = Place("model", "np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)", BOTH)
CENTRED = Place("model", "centred = x - x.mean(-1, keepdims=True)", BOTH)
NORMALISED = Place("model", "centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)", BOTH)
R2 = [
    EPSILON("eps_1e-6", "EPS = 1e-6", "the norm's epsilon is 1e-6"),
    EPSILON("eps_1e-3", "EPS = 1e-3", "the norm's epsilon is 1e-3"),
    EPSILON("eps_1e-12", "EPS = 1e-12", "the norm's epsilon is 1e-12"),
    EPSILON("eps_missing", "EPS = 0.0", "the norm has no epsilon: zeros become NaN"),
    DEVIATION_OF(
        "eps_outside_root",
        "(np.sqrt((centred * centred).mean(-1, keepdims=True)) + EPS)",
        "the norm's epsilon is added outside the root",
    ),
    DEVIATION_OF(
        "eps_as_floor",
        "np.sqrt(np.maximum((centred * centred).mean(-1, keepdims=True), EPS))",
        "the norm's epsilon is a lower bound of the variance",
    ),
    DEVIATION_OF(
        "eps_on_sum",
        "np.sqrt(((centred * centred).sum(-1, keepdims=True) + EPS) / x.shape[-1])",
        "the norm's epsilon is added before the division by D",
    ),
    DEVIATION_OF(
        "variance_unbiased",
        "np.sqrt((centred * centred).sum(-1, keepdims=True) / (x.shape[-1] - 1) + EPS)",
        "the norm divides the variance by D - 1",
    ),
    DEVIATION_OF(
        "norm_without_root",
        "((centred * centred).mean(-1, keepdims=True) + EPS)",
        "the norm divides by the variance and not by its root",
    ),
    DEVIATION_OF(
        "norm_variance_about_zero", "np.sqrt((x * x).mean(-1, keepdims=True) + EPS)", "the norm's variance is taken about zero"
    ),
    DEVIATION_OF(
        "norm_by_deviation",
        "(np.abs(centred).mean(-1, keepdims=True) + EPS)",
        "the norm divides by the mean absolute deviation",
    ),
    DEVIATION_OF(
        "norm_over_time",
        "np.sqrt((centred * centred).mean((-2, -1), keepdims=True) + EPS)",
        "the norm's variance is that of all tokens",
        ("logits", "traces", "decode", "properties"),
    ),
    CENTRED("norm_not_centred", "centred = x", "the norm does not subtract the mean"),
    CENTRED(
        "norm_over_batch",
        "centred = x - x.mean((0, -1), keepdims=True)",
        "the norm's mean is that of all texts of a batch",
        ("logits", "batch"),
    ),
    CENTRED("norm_in_place", "x -= x.mean(-1, keepdims=True); centred = x", "the norm centres its input in place", ("traces",)),
    NORMALISED(
        "norm_result_not_centred",
        "x / np.sqrt((centred * centred).mean(-1, keepdims=True) + EPS)",
        "the norm uses the mean for its variance but does not subtract it",
    ),
]

# R3: the sparse code
RELU = Place("model", "return np.maximum(x, 0)", BOTH)
X_SPARSE = Place("model", "x_sparse = relu(x[:, None] @ params.encoder)", BOTH)
LOADED = Place("numpy_backend", "(weight.copy() for weight in cast(params, dtype))", BOTH)
R3 = [
    RELU("relu_missing", "return x", "relu is missing"),
    RELU("relu_leaky", "return np.maximum(x, 0.01 * x)", "relu leaks a hundredth of negative values"),
    RELU("relu_squared", "return np.maximum(x, 0) ** 2", "relu is squared"),
    RELU("gelu", "return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))", "relu is a gelu"),
    RELU("silu", "return x / (1 + np.exp(-x))", "relu is a silu"),
    RELU("relu6", "return np.clip(x, 0, 6)", "relu is capped at 6"),
    X_SPARSE("x_relu_missing", "x_sparse = x[:, None] @ params.encoder", "x_sparse has no relu"),
    X_SPARSE("encoder_v_for_x", "x_sparse = relu(x[:, None] @ params.encoder_v)", "x_sparse is made by encoder_v"),
    X_SPARSE(
        "encoder_heads_reversed",
        "x_sparse = relu(x[:, None] @ params.encoder[::-1])",
        "the encoder's heads are in reverse order",
    ),
    X_SPARSE(
        "encoder_of_first_head",
        "x_sparse = relu(x[:, None] @ np.repeat(params.encoder[:1], len(params.encoder), 0))",
        "every head uses the first head's encoder",
    ),
    X_SPARSE(
        "encoder_reshaped",
        "x_sparse = relu(x[:, None] @ params.encoder.reshape(x.shape[-1], len(params.encoder), -1).swapaxes(0, 1))",
        "the encoder (nh, D, N) is read as (D, nh, N)",
    ),
    LOADED("encoders_swapped", "(cast(params, dtype)[i].copy() for i in (0, 2, 1, 3, 4))", "encoder and encoder_v are swapped"),
]

# R4: rotation, frequencies and phases
ROPE = Place("rope", "return v * cos + swap(v) * sin", BOTH)
PAIR = Place("rope", "(np.arange(n_neurons) // 2 * 2)", BOTH)
OVER_N = Place("rope", "/ np.float32(n_neurons)", BOTH)
POWER = Place("rope", "(THETA ** pair", BOTH)
GROWTH = Place("rope", "(THETA ** pair.astype(np.float64))", BOTH)
THETA = Place("rope", "THETA = 2.0**16", BOTH)
ANGLE = Place("rope", "2 * np.pi * turns(", BOTH)
FIXED = Place("rope", "(positions.astype(np.uint64)[:, None] * fixed_point(table)) * 2.0**-64", ("phases",))
COS_SIN = Place("rope", "return np.cos(angle), np.sin(angle)", BOTH)
QUARTER = Place("rope", "quarter[..., 0::2] = -v[..., 1::2]", BOTH)
TURNED = Place("model", "rotated = rope(x_sparse, cos, sin)", BOTH)
TABLE = Place("model", "return frequencies(config.n_neurons) if config.freqs is None else config.freqs.array", BOTH)
EXPONENT = Place("rope", ".astype(np.float32) / np.float32(n_neurons)", ("phases",))
PHASE = Place("rope", 'if phase == "float32":', ("phases",))
ROUNDED = Place("rope", "* turns(positions, table, phase)).astype(dtype)", BOTH)
POSITIONS = Place("rope", "positions = np.uint64(start) + np.arange(length, dtype=np.uint64)", ("phases",))
R4 = [
    ROPE(
        "half_split_pairs",
        "return (v[..., (o := np.arange(v.shape[-1]).reshape(2, -1).T.ravel())] * cos + swap(v[..., o]) * "
        "sin)[..., np.argsort(o)]",
        "neuron i is paired with i + N/2 and not with its neighbour",
    ),
    ROPE(
        "half_split_swap",
        "return v * cos + np.concatenate((-v[..., v.shape[-1] // 2 :], v[..., : v.shape[-1] // 2]), -1) * sin",
        "pairs are halves apart while the frequencies are those of neighbours",
    ),
    ROPE(
        "swap_in_halves",
        "return v * cos + np.concatenate((-v[..., 1::2], v[..., ::2]), -1) * sin",
        "swapped neighbours are laid in halves beside one another and not in turns",
    ),
    ROPE("rotation_backwards", "return v * cos - swap(v) * sin", "the rotation turns backwards"),
    PAIR("frequencies_not_paired", "np.arange(n_neurons)", "the two neurons of a pair have different frequencies"),
    PAIR("frequencies_halved_exponent", "(np.arange(n_neurons) // 2)", "the frequency's exponent counts pairs and not neurons"),
    OVER_N("frequencies_half_n", "/ np.float32(n_neurons // 2)", "the frequency's exponent is divided by N/2"),
    POWER("frequencies_ascending", "(THETA ** (1 - np.float32(2 / n_neurons) - pair)", "the frequencies are in reverse order"),
    GROWTH(
        "frequencies_linear", "(1 + THETA * pair.astype(np.float64))", "the frequencies fall linearly and not geometrically"
    ),
    THETA("theta_10000", "THETA = 10000.0", "theta is 10000"),
    THETA("theta_2_15", "THETA = 2.0**15", "theta is 2^15"),
    THETA("theta_65535", "THETA = 65535.0", "theta is 2^16 - 1", ("phases",)),
    ANGLE("turns_as_radians", "turns(", "phases in turns are taken for radians: a factor 2 pi is missing"),
    ANGLE("phase_in_half_turns", "np.pi * turns(", "phases are half of what they are"),
    FIXED(
        "two_pi_missing_in_table",
        "np.mod(positions[:, None] * (table * (2 * np.pi)), 1)",
        "the frequency table is not divided by 2 pi",
        BOTH,
    ),
    FIXED(
        "phases_float64_product",
        "np.mod(positions.astype(np.float64)[:, None] * table, 1)",
        "phases declared exact are products in float64, too coarse beyond 2^30",
    ),
    FIXED(
        "phases_not_wrapped", "positions.astype(np.float64)[:, None] * table", "whole turns are not taken off before the cosine"
    ),
    COS_SIN("cos_and_sin_swapped", "return np.sin(angle), np.cos(angle)", "cosine and sine are swapped"),
    QUARTER("swap_without_sign", "quarter[..., 0::2] = v[..., 1::2]", "the swap of a pair lacks its minus sign"),
    TURNED("rotation_missing", "rotated = x_sparse.copy()", "nothing is rotated"),
    TURNED("rotation_twice", "rotated = rope(rope(x_sparse, cos, sin), cos, sin)", "the rotation is applied twice"),
    TURNED(
        "rotation_of_half",
        "rotated = np.concatenate((rope(x_sparse, cos, sin)[..., : x_sparse.shape[-1] // 2], x_sparse[..., "
        "x_sparse.shape[-1] // 2 :]), -1)",
        "only the first half of the neurons is rotated",
    ),
    TURNED(
        "rotation_before_relu",
        "rotated = rope(x[:, None] @ params.encoder, cos, sin)",
        "the rotation takes the code before its relu",
    ),
    TURNED("rotation_then_relu", "rotated = relu(rope(x_sparse, cos, sin))", "the rotated code goes through a relu"),
    TABLE(
        "frequencies_bfloat16",
        "return frequencies(config.n_neurons).astype('bfloat16').astype(np.float32)",
        "the frequencies are rounded to bfloat16",
    ),
    TABLE(
        "frequencies_float16",
        "return frequencies(config.n_neurons).astype(np.float16).astype(np.float32)",
        "the frequencies are rounded to float16",
    ),
    EXPONENT("table_rounded_once", " / n_neurons", "the frequency table is computed in float64 and rounded once"),
    PHASE("phases_float32", "if True:", "phases declared exact are products in float32"),
    ROUNDED(
        "phases_bfloat16",
        "* turns(positions, table, phase)).astype('bfloat16').astype(dtype)",
        "phases are rounded to bfloat16",
    ),
    POSITIONS(
        "positions_32_bits",
        "positions = (np.uint64(start) + np.arange(length, dtype=np.uint64)) % 2**32",
        "positions are cut to 32 bits",
    ),
    POSITIONS(
        "positions_31_bits",
        "positions = (np.uint64(start) + np.arange(length, dtype=np.uint64)) % 2**31",
        "positions are cut to 31 bits",
    ),
    POSITIONS(
        "positions_float32",
        "positions = (np.uint64(start) + np.arange(length, dtype=np.uint64)).astype(np.float32).astype(np.uint64)",
        "positions are float32, which counts to 2^24",
    ),
    POSITIONS(
        "positions_table_ends",
        "positions = np.minimum(np.uint64(start) + np.arange(length, dtype=np.uint64), np.uint64(2**16))",
        "positions end with a table of 2^16",
    ),
]

# R5: attention
SCORES = Place("model", "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1)", FORWARD)
SIMILAR = Place("model", "similar = scores(rotated)", FORWARD)
VALUES = Place("model", "attention = similar @ x[:, None]", FORWARD)
R5 = [
    SCORES(
        "diagonal_kept", "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=0)", "the diagonal is kept: a token sees itself"
    ),
    SCORES(
        "mask_off_by_one", "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-2)", "the mask hides the token before as well"
    ),
    SCORES(
        "mask_missing",
        "return rotated @ rotated.swapaxes(-1, -2)",
        "the mask is missing: a token sees all others",
        ("logits", "traces", "properties"),
    ),
    SCORES(
        "mask_upper",
        "return np.triu(rotated @ rotated.swapaxes(-1, -2), k=1)",
        "the mask is turned over: a token sees later ones",
        ("logits", "traces", "properties"),
    ),
    SCORES(
        "window",
        "return np.triu(np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1), k=-3)",
        "a token sees no more than three others",
    ),
    SCORES(
        "scores_over_root_n",
        "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1) / rotated.shape[-1] ** 0.5",
        "scores are divided by the root of N",
    ),
    SCORES(
        "scores_over_n",
        "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1) / rotated.shape[-1]",
        "scores are divided by N",
    ),
    SCORES(
        "scores_averaged",
        "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1) / np.arange(1, rotated.shape[-2] + 1, "
        "dtype=rotated.dtype)[:, None]",
        "scores are averaged over the tokens seen",
    ),
    SCORES(
        "scores_normalised",
        "return (s := np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1)) / (s.sum(-1, keepdims=True) + 1e-6)",
        "scores are divided by their sum",
    ),
    SCORES(
        "scores_softmax",
        "return (s := np.tril(np.exp((r := rotated @ rotated.swapaxes(-1, -2)) - r.max(-1, keepdims=True)), "
        "k=-1)) / (s.sum(-1, keepdims=True) + 1e-30)",
        "scores go through a softmax",
    ),
    SCORES("scores_relu", "return np.tril(relu(rotated @ rotated.swapaxes(-1, -2)), k=-1)", "negative scores are cut"),
    SCORES(
        "scores_bfloat16",
        "return np.tril(rotated @ rotated.swapaxes(-1, -2), k=-1).astype('bfloat16').astype(rotated.dtype)",
        "scores are rounded to bfloat16",
    ),
    SIMILAR(
        "scores_cosine",
        "similar = scores(rotated / (np.linalg.norm(rotated, axis=-1, keepdims=True) + 1e-6))",
        "queries and keys are normalised",
    ),
    SIMILAR(
        "keys_alone_rotated",
        "similar = np.tril(x_sparse @ rotated.swapaxes(-1, -2), k=-1)",
        "keys are rotated and queries are not",
    ),
    SIMILAR(
        "queries_alone_rotated",
        "similar = np.tril(rotated @ x_sparse.swapaxes(-1, -2), k=-1)",
        "queries are rotated and keys are not",
    ),
    SIMILAR(
        "keys_of_another_head",
        "similar = np.tril((rotated @ np.flip(rotated, 1).swapaxes(-1, -2)), k=-1)",
        "queries meet the keys of another head",
    ),
    VALUES("values_normalised", "attention = similar @ layer_norm(x)[:, None]", "the values are normalised once more"),
    VALUES(
        "values_shifted", "attention = similar @ np.roll(x, -1, axis=1)[:, None]", "the value of a token is the next token's"
    ),
]

# R6: the norm of the attention
YKV = Place("model", "yKV = layer_norm(attention)", BOTH)
R6 = [
    YKV("attention_norm_missing", "yKV = attention", "the attention is not normalised"),
    YKV("attention_norm_twice", "yKV = layer_norm(layer_norm(attention))", "the attention is normalised twice"),
    YKV(
        "attention_heads_averaged",
        "yKV = layer_norm(np.broadcast_to(attention.mean(1, keepdims=True), attention.shape))",
        "all heads get the mean of their attentions",
    ),
    YKV("attention_residual", "yKV = layer_norm(attention + x[:, None])", "x is added to the attention"),
]

# R7: the gate
Y_SPARSE = Place("model", "y_sparse = relu(yKV @ params.encoder_v)", BOTH)
GATE = Place("model", "xy_sparse = x_sparse * y_sparse * keep", BOTH)
R7 = [
    Y_SPARSE("y_relu_missing", "y_sparse = yKV @ params.encoder_v", "y_sparse has no relu"),
    Y_SPARSE("encoder_for_y", "y_sparse = relu(yKV @ params.encoder)", "y_sparse is made by encoder"),
    Y_SPARSE(
        "y_from_x", "y_sparse = relu(x[:, None] @ params.encoder_v)", "y_sparse is made from x and not from the attention"
    ),
    Y_SPARSE(
        "encoder_v_heads_reversed",
        "y_sparse = relu(yKV @ params.encoder_v[::-1])",
        "the heads of encoder_v are in reverse order",
    ),
    Y_SPARSE(
        "encoder_v_of_first_head",
        "y_sparse = relu(yKV @ np.repeat(params.encoder_v[:1], len(params.encoder_v), 0))",
        "every head uses the first head's encoder_v",
    ),
    GATE("gate_rotated", "xy_sparse = rotated * y_sparse * keep", "the gate uses the rotated x_sparse"),
    GATE("gate_missing", "xy_sparse = y_sparse * keep", "y_sparse is not multiplied by x_sparse"),
    GATE("gate_adds", "xy_sparse = (x_sparse + y_sparse) * keep", "the gate adds where it should multiply"),
    GATE("gate_binary", "xy_sparse = (x_sparse > 0) * y_sparse * keep", "the gate uses only the sign of x_sparse"),
]

# R8: dropout
EVALUATED = Place("model", "keep=1.0 if keep is None else keep[i]", ("logits", "traces", "dropout"))
STEP = Place("model", "stages = layer(x, params, cos, sin, memory)", ("decode",))
MASKS = Place("model", "(rng.random(shape) < kept).astype(dtype) / dtype.type(kept)", ("dropout",))
ALL_MASKS = Place(
    "model", "[(rng.random(shape) < kept).astype(dtype) / dtype.type(kept) for _ in range(config.n_layer)]", ("dropout",)
)
MASK = Place("model", "shape = (B, config.n_head, T, config.n_neurons)", ("dropout",))
DROPPED = Place("numpy_backend", "keep = model.dropout(self.config, tokens.shape, np.dtype(self.dtype), rng)", ("dropout",))
SEEDED = Place("numpy_backend", "dropout_seed(moments.settings.seed, moments.step + 1, part)", ("dropout",))
D_KEEP = Place("gradients", "* keep  # B h T N, R8", ("dropout",))
R8 = [
    EVALUATED(
        "dropout_in_evaluation",
        "keep=(keep or dropout(config, tokens.shape, x.dtype, np.random.default_rng(0)))[i]",
        "evaluation drops",
    ),
    EVALUATED(
        "dropout_in_evaluation_at_random",
        "keep=(keep or dropout(config, tokens.shape, x.dtype, np.random.default_rng()))[i]",
        "evaluation drops, differently each time",
        ("logits", "determinism", "dropout"),
        random=True,
    ),
    STEP(
        "dropout_in_generation",
        "stages = layer(x, params, cos, sin, memory, dropout(config, tokens.shape, x.dtype, "
        "np.random.default_rng(state.position))[0])",
        "generation drops",
    ),
    MASKS("dropout_not_scaled", "(rng.random(shape) < kept).astype(dtype)", "what dropout keeps is not scaled up"),
    MASKS(
        "dropout_scaled_down",
        "(rng.random(shape) < kept).astype(dtype) * dtype.type(kept)",
        "what dropout keeps is scaled down",
    ),
    MASKS(
        "dropout_keeps_the_rest",
        "(rng.random(shape) < 1 - kept).astype(dtype) / dtype.type(kept)",
        "dropout keeps with probability p and not 1 - p",
    ),
    ALL_MASKS(
        "dropout_same_in_all_layers",
        "[(rng.random(shape) < kept).astype(dtype) / dtype.type(kept)] * config.n_layer",
        "all layers drop the same values",
    ),
    MASK("dropout_same_in_all_heads", "shape = (B, 1, T, config.n_neurons)", "all heads drop the same neurons"),
    MASK("dropout_same_at_all_tokens", "shape = (B, config.n_head, 1, config.n_neurons)", "all tokens drop the same neurons"),
    MASK(
        "dropout_same_in_all_texts",
        "shape = (1, config.n_head, T, config.n_neurons)",
        "all texts of a batch drop the same values",
    ),
    MASK("dropout_of_whole_heads", "shape = (B, config.n_head, T, 1)", "dropout drops whole heads"),
    TURNED(
        "dropout_in_attention_too",
        "rotated = rope(x_sparse * keep, cos, sin)",
        "what is dropped is missing from the attention as well",
        ("dropout",),
    ),
    DROPPED("dropout_missing", "keep = None", "training does not drop"),
    SEEDED("dropout_same_in_all_steps", "moments.settings.seed", "every step of training drops the same values"),
    SEEDED("dropout_seed_ignored", "dropout_seed(0, moments.step + 1, part)", "dropout does not follow its seed"),
    SEEDED("dropout_unseeded", "None", "dropout cannot be repeated from its seed", random=True),
    D_KEEP("dropout_forgotten_in_gradient", "* 1.0", "the gradient passes through what was dropped"),
]

# R9: heads and decoder
MERGED = Place("model", "xy_sparse.swapaxes(1, 2).reshape(B, T, nh * N)", BOTH)
DECODED = Place("model", "decoded = merge_heads(xy_sparse) @ params.decoder", BOTH)
Y = Place("model", "y = layer_norm(decoded)", BOTH)
R9 = [
    MERGED(
        "heads_merged_neuron_major", "xy_sparse.transpose(0, 2, 3, 1).reshape(B, T, nh * N)", "heads are merged neuron-major"
    ),
    MERGED("heads_merged_unswapped", "xy_sparse.reshape(B, T, nh * N)", "heads and tokens are mixed up when heads are merged"),
    MERGED(
        "heads_merged_reversed", "xy_sparse[:, ::-1].swapaxes(1, 2).reshape(B, T, nh * N)", "heads are merged in reverse order"
    ),
    DECODED(
        "decoder_of_first_head",
        "decoded = merge_heads(xy_sparse) @ np.tile(params.decoder[: xy_sparse.shape[-1]], (xy_sparse.shape[1], 1))",
        "every head uses the first head's decoder",
    ),
    DECODED(
        "decoder_tied",
        "decoded = merge_heads(xy_sparse) @ params.encoder.swapaxes(1, 2).reshape(params.decoder.shape)",
        "the encoder, transposed, is used as the decoder",
    ),
    DECODED(
        "heads_averaged",
        "decoded = merge_heads(xy_sparse) @ params.decoder / xy_sparse.shape[1]",
        "heads are averaged and not summed",
    ),
    Y("decoder_norm_missing", "y = decoded", "the decoder's result is not normalised"),
    Y("decoder_norm_twice", "y = layer_norm(layer_norm(decoded))", "the decoder's result is normalised twice"),
]

# R10: residual and layers
RESIDUAL = Place("model", "layer_norm(x + y))", BOTH)
RUN = Place("model", "return x, layers", ("logits",))
LAYER = Place("model", "layers.append(layer(x,", FORWARD)
NEXT = Place("model", "x = layers[-1].x", ("logits",))
R10 = [
    RESIDUAL("residual_missing", "layer_norm(y))", "the residual is missing"),
    RESIDUAL("residual_doubled", "layer_norm(2 * x + y))", "the residual counts twice"),
    RESIDUAL("residual_halved", "layer_norm(0.5 * x + y))", "the residual counts half"),
    RESIDUAL("residual_averaged", "layer_norm((x + y) / 2))", "residual and layer are averaged before the norm"),
    RESIDUAL("layer_norm_missing", "x + y)", "the sum with the residual is not normalised"),
    RESIDUAL("layer_norm_twice", "layer_norm(layer_norm(x + y)))", "every layer ends in two norms"),
    RESIDUAL("layer_subtracted", "layer_norm(x - y))", "what a layer computes is subtracted"),
    RUN("last_layer_unused", "return layers[-2:][0].x, layers", "the last layer is not used"),
    LAYER("layers_from_embedding", "layers.append(layer(embed(tokens, params),", "every layer starts from the embedding"),
    NEXT("first_layer_without_residual", "x = layers[-1].x if i else layers[-1].y", "the first layer alone has no residual"),
]

# R11: the head
HEAD = Place("model", "return x @ params.lm_head", ("logits", "decode"))
R11 = [
    HEAD("final_norm_added", "return layer_norm(x) @ params.lm_head", "there is one more norm before the head"),
    HEAD(
        "head_transposed",
        "return x @ params.lm_head.reshape(params.lm_head.shape[::-1]).T",
        "lm_head (D, V) is read as (V, D) and transposed",
    ),
    HEAD("head_tied", "return x @ params.embed.T", "the embedding is used as the head"),
    HEAD("logits_scaled", "return x @ params.lm_head / x.shape[-1] ** 0.5", "logits are divided by the root of D"),
    HEAD("logits_capped", "return 30 * np.tanh(x @ params.lm_head / 30)", "logits are capped softly at 30"),
    HEAD("logits_centred", "return (z := x @ params.lm_head) - z.mean(-1, keepdims=True)", "logits are centred"),
    HEAD("logits_log_softmax", "return log_softmax(x @ params.lm_head)", "logits are log-probabilities"),
    HEAD("logits_bfloat16", "return (x @ params.lm_head).astype('bfloat16').astype(x.dtype)", "logits are rounded to bfloat16"),
]

# R12: the loss
LOSS = Place(
    "model", "return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].mean())", ("loss",)
)
SHIFTED = Place("model", "shifted = logits - logits.max(-1, keepdims=True)", ("loss",))
PORT_LOSS = Place("numpy_backend", "return model.loss(self._forward(tokens), targets)", ("loss",))
R12 = [
    LOSS(
        "loss_in_bits",
        "return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].mean() / np.log(2))",
        "the loss is in bits",
    ),
    LOSS(
        "loss_summed",
        "return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].sum())",
        "the loss is a sum and not a mean",
    ),
    LOSS(
        "loss_over_all_targets",
        "return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].sum() / targets.size)",
        "the loss is divided by the number of all targets, the ignored included",
    ),
    LOSS(
        "loss_over_texts",
        "return float(-log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].sum() / len(targets))",
        "the loss is a sum over each text",
    ),
    LOSS(
        "loss_of_ignored_as_zero",
        "return float(-np.take_along_axis(log_softmax(logits), np.maximum(targets, 0)[..., None], -1).mean())",
        "an ignored target counts as id 0",
    ),
    LOSS(
        "loss_mean_of_means",
        "return float(np.mean([-log_softmax(z[c])[np.arange(c.sum()), t[c]].mean() for z, t, c in zip(logits, "
        "targets, counted)]))",
        "the loss is the mean of each text's mean",
    ),
    LOSS(
        "loss_of_last_token",
        "last = counted & (np.arange(targets.shape[-1]) == targets.shape[-1] - 1); "
        "return float(-log_softmax(logits[last])[np.arange(last.sum()), targets[last]].mean())",
        "the loss is that of the last token",
    ),
    LOSS(
        "loss_smoothed",
        "return float(-0.9 * log_softmax(logits[counted])[np.arange(counted.sum()), targets[counted]].mean() - "
        "0.1 * log_softmax(logits[counted]).mean())",
        "the targets are smoothed",
    ),
    SHIFTED("loss_overflows", "shifted = logits", "the softmax of the loss overflows: the largest logit is not subtracted"),
    PORT_LOSS(
        "loss_shifted_again",
        "return model.loss(self._forward(tokens)[:, :-1], targets[:, 1:])",
        "targets are shifted once more",
    ),
    PORT_LOSS(
        "loss_shifted_back",
        "return model.loss(self._forward(tokens)[:, 1:], targets[:, :-1])",
        "targets are compared with the logits after them",
    ),
]

# R13: the recurrent form
POSITION = Place("model", "rotation(state.position, T,", ("decode",))
AFTER = Place("model", "RecurrentState(state.position + T,", ("decode",))
CHUNK_ROTATION = Place(
    "model", "cos, sin = rotation(state.position, T, frequencies_of(config), params.encoder.dtype, phase)", ("decode",)
)
STATE_READ = Place("model", "attention = attention + read(memory, rotated)", ("decode",))
STATE_KEPT = Place("model", "memories.append(write(memory, stages.rotated, x))", ("decode", "states"))
STATE_WRITE = Place("model", "return memory + rotated.swapaxes(-1, -2) @ x[:, None]", ("decode", "states"))
MEMORIES = Place("model", "for memory in state.layers:", ("decode",))
EMPTY = Place("model", "np.zeros(shape, dtype)", ("states",))
CHUNK = Place("numpy_backend", "chunk = tokens[:, start : start + CHUNK]", ("decode",))
EXPORTED = Place("protocol", "return RecurrentState(state.position, self", ("states",))
IMPORTED = Place("numpy_backend", "return RecurrentState(state.position, tuple(memory.astype(self.dtype)", ("states",))
IMPORTED_MEMORY = Place("numpy_backend", "memory.astype(self.dtype)", ("states",))
EXPORTED_MEMORY = Place("numpy_backend", "memory.copy() for memory in native.layers", ("states",))
R13 = [
    POSITION(
        "position_one_behind",
        "rotation(max(state.position - 1, 0), T,",
        "decoding counts positions from one behind once a text has begun",
    ),
    POSITION(
        "position_one_ahead",
        "rotation(state.position + 1, T,",
        "the first position of a state is 1, so that its text reads on wrongly elsewhere",
        ("states",),
    ),
    POSITION("positions_restart", "rotation(0, T,", "positions restart with every chunk"),
    AFTER("position_counts_calls", "RecurrentState(state.position + 1,", "the position counts calls and not tokens"),
    CHUNK_ROTATION(
        "positions_all_first",
        "cos, sin = rotation(state.position, 1, frequencies_of(config), params.encoder.dtype, phase)",
        "all tokens of a chunk are rotated as its first",
    ),
    STATE_READ(
        "read_after_write",
        "attention = attention + read(write(memory, rotated, x), rotated)",
        "the state is read after it is written",
    ),
    STATE_READ("chunk_blind", "attention = read(memory, rotated)", "tokens of a chunk do not see one another"),
    STATE_READ(
        "chunk_sees_itself",
        "attention = attention + read(memory, rotated) + np.sum(rotated * rotated, -1, keepdims=True) * x[:, None]",
        "a token of a chunk sees itself",
    ),
    STATE_READ("state_not_read", "pass", "the state is not read"),
    STATE_READ(
        "state_read_by_first_alone",
        "attention[:, :, :1] += read(memory, rotated[:, :, :1])",
        "only the first token of a chunk reads the state",
    ),
    STATE_READ("state_read_unrotated", "attention = attention + read(memory, x_sparse)", "the state is read without rotation"),
    STATE_READ(
        "state_scaled",
        "attention = attention + read(memory, rotated) / rotated.shape[-1] ** 0.5",
        "what the state holds is divided by the root of N",
    ),
    STATE_READ(
        "state_of_first_text",
        "attention = attention + read(memory[:1], rotated)",
        "every text of a batch reads the first one's state",
    ),
    STATE_KEPT("state_not_carried", "memories.append(memory)", "the state is not carried on"),
    STATE_KEPT(
        "state_written_unrotated", "memories.append(write(memory, stages.x_sparse, x))", "the state is written without rotation"
    ),
    STATE_KEPT(
        "state_written_gated", "memories.append(write(memory, stages.xy_sparse, x))", "the state is written with the gated code"
    ),
    STATE_KEPT(
        "state_written_after_layer",
        "memories.append(write(memory, stages.rotated, stages.x))",
        "the state takes the layer's result for its value",
    ),
    STATE_KEPT(
        "state_last_token_alone",
        "memories.append(write(memory, stages.rotated[:, :, -1:], x[:, -1:]))",
        "only the last token of a chunk is written",
    ),
    STATE_KEPT(
        "state_lacks_last_token",
        "memories.append(write(memory, stages.rotated[:, :, : max(T - 1, 1)], x[:, : max(T - 1, 1)]))",
        "the last token of a chunk is not written",
    ),
    STATE_WRITE("state_overwritten", "return rotated.swapaxes(-1, -2) @ x[:, None]", "the state holds the last chunk alone"),
    STATE_WRITE("state_decays", "return 0.99 * memory + rotated.swapaxes(-1, -2) @ x[:, None]", "the state decays"),
    STATE_WRITE(
        "state_bfloat16",
        "return (memory + rotated.swapaxes(-1, -2) @ x[:, None]).astype('bfloat16').astype(memory.dtype)",
        "the state is kept in bfloat16",
    ),
    STATE_WRITE(
        "state_float16",
        "return (memory + rotated.swapaxes(-1, -2) @ x[:, None]).astype(np.float16).astype(memory.dtype)",
        "the state is kept in float16",
    ),
    STATE_WRITE(
        "state_averaged", "return memory + rotated.swapaxes(-1, -2) @ x[:, None] / x.shape[1]", "a chunk is written as its mean"
    ),
    STATE_WRITE(
        "delta_rule",
        "return memory + rotated.swapaxes(-1, -2) @ (x[:, None] - rotated @ memory)",
        "the state is written by the delta rule",
    ),
    STATE_WRITE(
        "state_in_place",
        "return np.add(memory, rotated.swapaxes(-1, -2) @ x[:, None], out=memory)",
        "a state that was not donated is overwritten",
        ("mutation",),
    ),
    MEMORIES(
        "state_of_first_layer",
        "for memory in (state.layers[0],) * len(state.layers):",
        "all layers read the first layer's state",
    ),
    EMPTY("state_not_empty", "np.full(shape, 1e-3, dtype)", "the state before the first token is not zero"),
    CHUNK(
        "chunks_overlap",
        "chunk = tokens[:, max(start - 1, 0) : start + CHUNK]",
        "the token at a chunk's edge is read twice: texts beyond 256 tokens",
    ),
    EXPORTED("exported_position_lost", "return RecurrentState(0, self", "an exported state forgets its position"),
    IMPORTED(
        "imported_position_lost",
        "return RecurrentState(0, tuple(memory.astype(self.dtype)",
        "an imported state begins at position 0",
    ),
    IMPORTED_MEMORY(
        "imported_in_half", "memory.astype(np.float16).astype(self.dtype)", "an imported state passes through float16"
    ),
    EXPORTED_MEMORY(
        "exported_heads_reversed",
        "memory[:, ::-1].copy() for memory in native.layers",
        "an exported state has its heads in reverse order",
    ),
    EXPORTED_MEMORY(
        "exported_layers_reversed",
        "memory.copy() for memory in native.layers[::-1]",
        "an exported state has its layers in reverse order",
    ),
]

# R14: sampling
SOFTMAX = Place("sampling", "np.exp((kept - kept.max()) / how.temperature)", ("sampling",))
TOP_K = Place("sampling", "if top_k and top_k < kept.size:", ("sampling",))
KTH_VALUE = Place("sampling", "kth = np.partition(kept, -top_k)[-top_k]", ("sampling",))
KEPT = Place("sampling", "kept = np.where(kept >= kth, kept, -np.inf)", ("sampling",))
COUNTER = Place("sampling", "counter=[0, 0, position, row]", ("sampling",))
KEY = Place("sampling", "key=seed", ("sampling",))
BITS = Place("sampling", "float(int(bits) >> 11) * 2.0**-53", ("sampling",))
PHILOX = Place("sampling", "np.random.Philox(key=seed, counter=[0, 0, position, row])", ("sampling",))
DRAWN_AT = Place("sampling", "draw * cumulative[-1]", ("sampling",))
CHOSEN = Place("sampling", 'int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))', ("sampling",))
ARGMAX = Place("sampling", "int(np.argmax(logits))", ("sampling",))
GREEDY = Place("sampling", "if how.temperature == 0:", ("sampling",))
UNIFORM = Place("protocol", "uniform(how.seed, state.position, b)", ("sampling",))
LAST_LOGITS = Place("protocol", "for b, row in enumerate(logits[:, -1])", ("sampling",))
READ_ON = Place("protocol", "logits, state = self.advance(state, tokens, donate=True)", ("sampling",))
R14 = [
    SOFTMAX("temperature_ignored", "np.exp(kept - kept.max())", "the temperature is ignored"),
    SOFTMAX(
        "temperature_multiplies", "np.exp((kept - kept.max()) * how.temperature)", "logits are multiplied by the temperature"
    ),
    SOFTMAX(
        "temperature_squared", "np.exp((kept - kept.max()) / how.temperature**2)", "logits are divided by the temperature twice"
    ),
    TOP_K("top_k_ignored", "if False:", "top_k is ignored"),
    TOP_K(
        "top_k_zero_is_one",
        "if top_k is not None and (top_k := max(top_k, 1)) < kept.size:",
        "top_k of 0 keeps one token and not all",
    ),
    KTH_VALUE("top_k_one_more", "kth = np.sort(kept)[max(-top_k - 1, -kept.size)]", "top_k keeps one token too many"),
    KTH_VALUE("top_k_one_less", "kth = np.sort(kept)[-max(top_k - 1, 1)]", "top_k keeps one token too few"),
    KEPT(
        "ties_dropped",
        'kept = np.where(np.argsort(np.argsort(-kept, kind="stable")) < top_k, kept, -np.inf)',
        "of tokens tied at the k-th value only the first stay",
    ),
    KEPT("top_k_fills_with_zero", "kept = np.where(kept >= kth, kept, 0.0)", "tokens that top_k leaves out get the logit 0"),
    COUNTER("uniform_without_position", "counter=[0, 0, 0, row]", "the draw ignores the position"),
    COUNTER("uniform_without_row", "counter=[0, 0, position, 0]", "all texts of a batch share their draws"),
    COUNTER("uniform_counter_swapped", "counter=[0, 0, row, position]", "position and row are swapped in the counter"),
    COUNTER("uniform_counter_front", "counter=[position, row, 0, 0]", "position and row stand in the counter's first words"),
    KEY("uniform_without_seed", "key=0", "the draw ignores the seed"),
    KEY("uniform_seed_32_bits", "key=seed % 2**32", "the seed is cut to 32 bits"),
    BITS("uniform_low_bits", "float(int(bits) % 2**53) * 2.0**-53", "the draw takes the low bits of its word"),
    PHILOX("uniform_of_pcg", "np.random.PCG64([seed, position, row])", "the draw comes from another generator"),
    DRAWN_AT("uniform_complement", "(1 - draw) * cumulative[-1]", "the draw is counted from the other end"),
    CHOSEN(
        "cdf_descending",
        "int((o := np.argsort(-np.diff(cumulative, prepend=0), "
        'kind="stable"))[np.searchsorted(np.cumsum(np.diff(cumulative, prepend=0)[o]), draw * cumulative[-1], side="right")])',
        "the cumulative sum runs by falling probability and not by id",
    ),
    ARGMAX(
        "greedy_highest_id", "int(logits.size - 1 - np.argmax(logits[::-1]))", "greedy choice takes the highest id of a tie"
    ),
    GREEDY(
        "greedy_draws",
        "if how.temperature == 0 and not (how := Sampling(1.0, how.top_k)):",
        "temperature 0 draws as temperature 1",
    ),
    UNIFORM(
        "draw_of_last_position",
        "uniform(how.seed, state.position - 1, b)",
        "a token is drawn with the draw of the position before",
    ),
    LAST_LOGITS(
        "draw_from_first_logits",
        "for b, row in enumerate(logits[:, 0])",
        "a token is drawn from the logits of the prompt's first token",
    ),
    READ_ON(
        "generation_forgets",
        "logits, state = self.advance(self.init_state(len(tokens)), tokens, donate=True)",
        "generation forgets what came before the last token",
    ),
]

# R15: gradients
D_NORM = Place(
    "gradients", "return scale * (d_y - d_y.mean(-1, keepdims=True) - y * (d_y * y).mean(-1, keepdims=True))", ("gradients",)
)
D_EPSILON = Place("gradients", "+ EPS)", ("gradients",))
D_X_OUT = Place("gradients", "return d_sum + from_values + from_encoder", ("gradients",))
D_VALUES = Place("gradients", "@ d_attention, axis=1)", ("gradients",))
D_ROTATED = Place("gradients", "(d_scores + d_scores.swapaxes(-1, -2))", ("gradients",))
D_SCORES = Place("gradients", "np.tril(d_attention @ x[:, None].swapaxes(-1, -2), k=-1)", ("gradients",))
D_X_SPARSE = Place("gradients", "d_x_sparse = d_xy * s.y_sparse + rope_gradient(d_rotated, cos, sin)", ("gradients",))
D_X_RELU = Place("gradients", "(s.x_sparse > 0)", ("gradients",))
D_Y_RELU = Place("gradients", "(s.y_sparse > 0)", ("gradients",))
D_GATE = Place("gradients", "d_y_before = d_xy * s.x_sparse", ("gradients",))
D_ATTENTION = Place(
    "gradients",
    "d_attention = layer_norm_gradient(d_y_before @ params.encoder_v.swapaxes(-1, -2), s.attention)",
    ("gradients",),
)
D_DECODED = Place("gradients", "d_decoded = layer_norm_gradient(d_sum, s.decoded)", ("gradients",))
D_SUM = Place("gradients", "d_sum = layer_norm_gradient(d_out, x + s.y)", ("gradients",))
D_EMBED = Place("gradients", "np.add.at(d.embed, tokens, layer_norm_gradient(d_x, looked_up))", ("gradients",))
D_ENCODER = Place("gradients", "d.encoder[...] +=", ("gradients",))
D_ENCODER_V = Place("gradients", "d.encoder_v[...] +=", ("gradients",))
D_DECODER = Place("gradients", "d.decoder[...] +=", ("gradients",))
D_LOGITS = Place("gradients", "return d_logits / counted.sum().astype(logits.dtype)", ("gradients",))
D_SOFTMAX = Place("gradients", "np.where(counted[..., None], np.exp(log_softmax(logits)), 0)", ("gradients",))
D_TARGET = Place("gradients", "targets[counted])] -= 1", ("gradients",))
D_ALL = Place("gradients", "return loss(logits, targets), d", ("gradients",))
R15 = [
    D_NORM(
        "gradient_norm_mean",
        "return scale * (d_y - y * (d_y * y).mean(-1, keepdims=True))",
        "the norm's gradient lacks the term of its mean",
    ),
    D_NORM(
        "gradient_norm_variance",
        "return scale * (d_y - d_y.mean(-1, keepdims=True))",
        "the norm's gradient lacks the term of its variance",
    ),
    D_NORM(
        "gradient_norm_scale",
        "return (d_y - d_y.mean(-1, keepdims=True) - y * (d_y * y).mean(-1, keepdims=True))",
        "the norm's gradient is not divided by the deviation",
    ),
    D_EPSILON("gradient_norm_eps", "+ 1e-12)", "the norm's gradient has another epsilon"),
    D_X_OUT("gradient_without_residual", "return from_values + from_encoder", "no gradient passes along the residual"),
    D_X_OUT("gradient_without_values", "return d_sum + from_encoder", "no gradient reaches the values of the attention"),
    D_X_OUT("gradient_without_encoder", "return d_sum + from_values", "no gradient passes through the encoder to x"),
    D_VALUES(
        "gradient_values_of_one_head",
        "@ d_attention, axis=1) / s.scores.shape[1]",
        "the values' gradient is the mean over heads and not the sum",
    ),
    D_ROTATED("gradient_queries_alone", "d_scores", "the keys' gradient is missing"),
    D_ROTATED("gradient_keys_alone", "d_scores.swapaxes(-1, -2)", "the queries' gradient is missing"),
    D_SCORES(
        "gradient_scores_unmasked", "d_attention @ x[:, None].swapaxes(-1, -2)", "the gradient of the scores is not masked"
    ),
    D_SCORES(
        "gradient_scores_diagonal",
        "np.tril(d_attention @ x[:, None].swapaxes(-1, -2))",
        "the gradient of the scores keeps the diagonal",
    ),
    D_X_SPARSE(
        "gradient_without_attention", "d_x_sparse = d_xy * s.y_sparse", "no gradient reaches the code through the attention"
    ),
    D_X_SPARSE(
        "gradient_without_gate",
        "d_x_sparse = rope_gradient(d_rotated, cos, sin)",
        "no gradient reaches the code through the gate",
    ),
    D_X_SPARSE(
        "gradient_turned_forwards",
        "d_x_sparse = d_xy * s.y_sparse + rope_gradient(d_rotated, cos, -sin)",
        "the gradient is rotated forwards and not back",
    ),
    D_X_SPARSE("gradient_not_turned", "d_x_sparse = d_xy * s.y_sparse + d_rotated", "the gradient is not rotated back"),
    D_X_RELU("gradient_without_x_relu", "1", "the gradient ignores the relu of x_sparse"),
    D_X_RELU("relu_slope_at_zero_1", "(x[:, None] @ params.encoder >= 0)", "the slope of relu at 0 is 1"),
    D_X_RELU(
        "relu_slope_at_zero_half",
        "np.heaviside(x[:, None] @ params.encoder, 0.5).astype(x.dtype)",
        "the slope of relu at 0 is 1/2, as that of a maximum of two",
    ),
    D_Y_RELU("gradient_without_y_relu", "1", "the gradient ignores the relu of y_sparse"),
    D_Y_RELU("y_relu_slope_at_zero_1", "(s.yKV @ params.encoder_v >= 0)", "the slope of y's relu at 0 is 1"),
    D_GATE("gradient_gate_of_rotated", "d_y_before = d_xy * s.rotated", "the gradient of y_sparse uses the rotated code"),
    D_ATTENTION(
        "gradient_without_attention_norm",
        "d_attention = d_y_before @ params.encoder_v.swapaxes(-1, -2)",
        "the gradient skips the norm of the attention",
    ),
    D_DECODED("gradient_without_decoder_norm", "d_decoded = d_sum", "the gradient skips the norm of the decoder's result"),
    D_SUM("gradient_without_layer_norm", "d_sum = d_out", "the gradient skips the norm of the residual's sum"),
    D_EMBED(
        "gradient_without_embedding_norm", "np.add.at(d.embed, tokens, d_x)", "the gradient skips the norm of the embedding"
    ),
    D_EMBED(
        "gradient_of_repeated_tokens",
        "d.embed[tokens] = layer_norm_gradient(d_x, looked_up)",
        "a token that occurs twice counts once in the embedding's gradient",
    ),
    D_ENCODER("gradient_encoder_of_one_layer", "d.encoder[...] =", "the encoder's gradient is the first layer's alone"),
    D_ENCODER_V(
        "gradient_encoder_v_of_one_layer", "d.encoder_v[...] =", "the gradient of encoder_v is the first layer's alone"
    ),
    D_DECODER("gradient_decoder_of_one_layer", "d.decoder[...] =", "the decoder's gradient is the first layer's alone"),
    D_LOGITS("gradient_of_sum", "return d_logits", "the gradient is that of a sum and not of a mean"),
    D_LOGITS(
        "gradient_over_all_targets",
        "return d_logits / counted.size",
        "the gradient is divided by the number of all targets, the ignored included",
    ),
    D_SOFTMAX("gradient_of_ignored", "np.exp(log_softmax(logits))", "ignored targets have a gradient"),
    D_TARGET("gradient_without_target", "targets[counted])] -= 0", "the gradient of the logits lacks the target"),
    D_ALL(
        "gradient_of_tied_head",
        "return loss(logits, targets), d._replace(embed=d.embed + d.lm_head.T)",
        "the head's gradient is added to the embedding's, as if they were tied",
    ),
    D_ALL(
        "gradient_clipped",
        "return loss(logits, targets), Params(*(g / max(1, float(np.linalg.norm(np.concatenate([h.ravel() for h "
        "in d])))) for g in d))",
        "gradients come back clipped",
    ),
]

# training: AdamW and clipping
TRAINED = ("training", "curve")
CORRECTED = Place(
    "optimizer", "mean, square = m / (1 - s.betas[0] ** moments.step), v / (1 - s.betas[1] ** moments.step)", TRAINED
)
STEPS = Place("optimizer", "moments.step += 1", TRAINED)
SQUARES = Place("optimizer", "v += (1 - s.betas[1]) * (g * g - v)", TRAINED)
CLIPPED = Place("optimizer", "g = slope * scale", TRAINED)
MOVED = Place("optimizer", "weight -= rate * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight)", TRAINED)
DEVIATION = Place("optimizer", "(np.sqrt(square) + s.eps)", TRAINED)
SETTINGS = Place("numpy_backend", "return begin(self._params, settings)", TRAINED)
CLIP_SCALE = Place("optimizer", "return 1.0 if clip is None or norm <= clip else clip / norm", TRAINED)
WEIGHTS = Place("optimizer", "if name in s.frozen:", TRAINED)
UPDATE = Place("numpy_backend", "update(self._params, slopes, native, rate)", TRAINED)
STEP_LOSS = Place("numpy_backend", "return loss_before", TRAINED)
TRAINING = [
    CORRECTED("adam_uncorrected", "mean, square = m, v", "Adam's moments are not corrected for their start"),
    STEPS("adam_correction_late", "moments.step += 1 + (not moments.step)", "Adam's correction is one step ahead"),
    CLIPPED(
        "adam_decay_in_gradient",
        "g = slope * scale + moments.settings.weight_decay * weight;"
        " s = __import__('dataclasses').replace(s, weight_decay=0.0)",
        "weight decay is added to the gradient (L2) and enters Adam's moments",
    ),
    CLIPPED(
        "adam_decay_in_both",
        "g = slope * scale + s.weight_decay * weight",
        "weight decay is added to the gradient as well",
    ),
    CLIPPED("clip_missing", "g = slope", "gradients are not clipped"),
    CLIPPED("clip_per_tensor", "g = slope * clip_scale((slope,), s.clip)", "each weight's gradient is clipped by itself"),
    CLIPPED(
        "clip_by_value",
        "g = np.clip(slope, -(s.clip or np.inf), s.clip or np.inf)",
        "gradients are clipped by value and not by norm",
    ),
    MOVED("adam_decay_missing", "weight -= rate * (mean / (np.sqrt(square) + s.eps))", "weight decay is missing"),
    MOVED(
        "adam_decay_unscaled",
        "weight -= rate * (mean / (np.sqrt(square) + s.eps)) + s.weight_decay * weight",
        "weight decay is not multiplied by the learning rate",
    ),
    MOVED(
        "adam_embedding_undecayed",
        "weight -= rate * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight * (weight is not params.embed))",
        "the embedding does not decay",
    ),
    MOVED("adam_is_sgd", "weight -= rate * (g + s.weight_decay * weight)", "the step is plain gradient descent"),
    MOVED(
        "adam_ascends",
        "weight += rate * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight)",
        "the step goes up the gradient",
    ),
    DEVIATION("adam_eps_in_root", "np.sqrt(square + s.eps)", "Adam's epsilon is inside the root"),
    SETTINGS(
        "adam_betas_swapped",
        'return begin(self._params, AdamW(**(vars(settings) | {"betas": settings.betas[::-1]})))',
        "Adam's two betas are swapped",
    ),
    SETTINGS(
        "adam_beta_default",
        'return begin(self._params, AdamW(**(vars(settings) | {"betas": (settings.betas[0], 0.999)})))',
        "Adam's second beta is 0.999 whatever is asked for",
        ("training",),
    ),
    CLIP_SCALE(
        "clip_always",
        "return 1.0 if clip is None else clip / norm",
        "gradients are scaled to the clipping norm even where they are smaller",
        ("training",),
    ),
    WEIGHTS("head_frozen", "if name in (*s.frozen, 'lm_head'):", "lm_head is not trained"),
    UPDATE(
        "weights_not_moved", "update(self.params(), slopes, native, rate)", "a step of training moves a copy of the weights"
    ),
    STEP_LOSS("loss_after_step", "return self._loss(*batches[-1][:2])", "a step of training returns the loss after it"),
    SQUARES(
        "adam_squares_in_float16",
        "v += (1 - s.betas[1]) * (g * g - v); v[...] = v.astype(np.float16)",
        "Adam's mean of squares is kept in float16",
    ),
    MOVED(
        "adam_decay_at_fixed_rate",
        "weight -= rate * (mean / (np.sqrt(square) + s.eps)) + s.learning_rate * s.weight_decay * weight",
        "weight decay is multiplied by the settings' rate and not by the step's",
    ),
    MOVED(
        "adam_lazy",
        "weight -= rate * (slope != 0) * (mean / (np.sqrt(square) + s.eps) + s.weight_decay * weight)",
        "weights that no token of a step has reached stay where they are",
    ),
]

# training: what acts after some steps only
GRAPH = 11  # steps after which a loop is captured as a graph, and what it was told then is repeated
CURVE = [
    STEPS(
        "step_captured",
        f"moments.step = min(moments.step + 1, {GRAPH})",
        f"Adam's correction stays that of step {GRAPH}, as in a captured graph",
        ("curve",),
    ),
    STEPS(
        "steps_to_127",
        "moments.step = min(moments.step + 1, 127)",
        "steps are counted up to 127, the most that 8 bits with a sign hold",
        ("curve",),
    ),
    STEPS(
        "moments_start_anew",
        "moments.step = moments.step % 100 + 1; [m.fill(0) for m in (*moments.first, *moments.second) if moments.step == 1]",
        "the optimiser is made anew after 100 steps, as at the end of an epoch",
        ("curve",),
    ),
    UPDATE(
        "rate_captured",
        f"update(self._params, slopes, native, rate if native.step < {GRAPH} else vars(native).setdefault('captured', rate))",
        f"the rate stays what it was after step {GRAPH}, as in a captured graph",
        ("curve",),
    ),
    CLIPPED(
        "clip_captured",
        f"g = slope * (scale if moments.step <= {GRAPH} else vars(moments).setdefault('captured', scale))",
        f"gradients are scaled as they were after step {GRAPH}, as in a captured graph",
        ("curve",),
    ),
    UPDATE(
        "moments_by_length",
        "update(self._params, slopes, vars(native).setdefault('by', {}).setdefault(batches[0].tokens.shape, "
        "begin(self._params, native.settings) if native.by else native), rate)",
        "texts of each length have moments and a count of steps of their own, as where each compiled program keeps its own",
        ("curve",),
    ),
]

# training: rates, several batches to a step, and optimisers that move
RATE = Place("protocol", "optimizer.settings.learning_rate if rate is None else check_rate(rate)", ("training",))
RATED = Place("numpy_backend", "update(self._params, slopes, native, rate)", TRAINED)
SHARE = Place("protocol", "n / sum(counts)", ("accumulation",))
SHARED = Place("numpy_backend", "(t + share * g for t, g in zip(total, slopes, strict=True))", ("accumulation",))
SHARED_LOSS = Place("numpy_backend", "value + share * loss", ("accumulation",))
DROPPED_BY = Place("numpy_backend", "dropout_seed(moments.settings.seed, moments.step + 1, part)", ("resumption",))
EXPORTED = Place(
    "numpy_backend", "(Params(*map(np.copy, held)) for held in (native.first, native.second))", ("optimizer", "resumption")
)
IMPORTED = Place(
    "numpy_backend", "[m.astype(self.dtype) for m in held] for held in (state.first, state.second)", ("optimizer", "resumption")
)
TAKEN_UP = Place("numpy_backend", "return Moments(state.settings, first, second, state.step)", ("optimizer", "resumption"))
COUNTED = Place("numpy_backend", "return OptimizerState(native.settings, native.step, first, second)", ("optimizer",))
OPTIMIZERS = [
    RATE("rate_ignored", "optimizer.settings.learning_rate", "a step's own rate is ignored"),
    RATE(
        "rate_kept",
        "vars(optimizer).setdefault('kept', optimizer.settings.learning_rate) if rate is None"
        " else vars(optimizer).update(kept=check_rate(rate)) or rate",
        "a step without a rate of its own takes that of the step before",
    ),
    RATED(
        "rate_late",
        "update(self._params, slopes, native, self.__dict__.setdefault('late', [rate]).append(rate) or self.late.pop(0))",
        "a step's own rate acts one step late",
    ),
    SHARE("accumulation_means_averaged", "1 / sum(n > 0 for n in counts)", "a step averages the means of unequal batches"),
    SHARED("accumulation_summed", "(t + g for t, g in zip(total, slopes, strict=True))", "a step adds up its batches' means"),
    SHARED("accumulation_last_only", "(share * g for g in slopes)", "a step moves along the last of its batches alone"),
    SHARED_LOSS("accumulation_loss_of_last", "loss", "the loss of a step is that of the last of its batches"),
    DROPPED_BY(
        "dropout_starts_again",
        "dropout_seed(moments.settings.seed, len(vars(moments).setdefault('drawn', []).append(0) or moments.drawn), part)",
        "an optimiser taken up again drops what it dropped at its start",
    ),
    EXPORTED(
        "moments_swapped_at_export",
        "(Params(*map(np.copy, held)) for held in (native.second, native.first))",
        "the two moments are swapped at export",
    ),
    EXPORTED(
        "moments_not_copied",
        "(Params(*held) for held in (native.first, native.second))",
        "an exported optimiser moves on with its model",
        ("optimizer",),
    ),
    IMPORTED(
        "moments_swapped_at_import",
        "[m.astype(self.dtype) for m in held] for held in (state.second, state.first)",
        "the two moments are swapped at import",
    ),
    IMPORTED(
        "moments_forgotten",
        "[np.zeros(m.shape, self.dtype) for m in held] for held in (state.first, state.second)",
        "an imported optimiser has forgotten its moments",
    ),
    IMPORTED(
        "moments_in_float16",
        "[m.astype('float16').astype(self.dtype) for m in held] for held in (state.first, state.second)",
        "imported moments are rounded to float16",
    ),
    TAKEN_UP(
        "step_forgotten", "return Moments(state.settings, first, second, 0)", "an imported optimiser counts its steps from 0"
    ),
    TAKEN_UP(
        "settings_forgotten",
        "return Moments(AdamW(), first, second, state.step)",
        "an imported optimiser has the default settings",
    ),
    COUNTED(
        "step_exported_late",
        "return OptimizerState(native.settings, max(native.step - 1, 0), first, second)",
        "an exported optimiser has made a step too few",
        ("optimizer", "resumption"),
    ),
]

# padding: texts of different lengths in one batch
TEXT_READ = Place("numpy_backend", "logits[b, start:] = self._forward(tokens[b : b + 1, start:])[0]", ("padding",))
STARTS = Place("numpy_backend", "enumerate(tokens.shape[1] - lengths)", ("padding",))
PADDING_ZEROED = Place("protocol", "np.where(is_padding[..., None], 0, ", ("padding",))
PADDING = [
    TEXT_READ("padding_seen", "logits[b] = self._forward(tokens[b : b + 1])[0]", "padding is read as part of the text"),
    TEXT_READ(
        "padding_read_as_id_0",
        "logits[b] = self._forward(np.where(np.arange(tokens.shape[1]) < start, 0, tokens[b : b + 1]))[0]",
        "padding is read as id 0",
    ),
    TEXT_READ(
        "padding_by_id",
        "logits[b, start:] = model.forward(tokens[b : b + 1, start:], self._params._replace(embed=self._params.embed * "
        "(np.arange(self.config.vocab_size) > 0)[:, None]), self.config, phase=self.phase)[0]",
        "id 0 counts as padding inside a text as well",
    ),
    TEXT_READ(
        "padding_embedded_as_mean",
        "logits[b] = model.forward(np.where(np.arange(tokens.shape[1]) < start, self.config.vocab_size, tokens[b])[None], "
        "self._params._replace(embed=np.vstack([self._params.embed, self._params.embed.mean(0)])), self.config, "
        "phase=self.phase)[0]",
        "padding is embedded as the mean of all ids",
    ),
    TEXT_READ(
        "padding_one_too_few",
        "logits[b, start:] = self._forward(tokens[b : b + 1, max(start - 1, 0) :])[0, min(start, 1) :]",
        "the last token of the padding is read as the text's first",
    ),
    TEXT_READ(
        "padding_one_too_many",
        "logits[b, s:] = self._forward(tokens[b : b + 1, (s := min(start + 1, tokens.shape[1] - 1)) :])[0]",
        "the first token of a text is taken for padding",
    ),
    TEXT_READ(
        "padding_on_the_right",
        "logits[b, start:] = self._forward(tokens[b : b + 1, : tokens.shape[1] - start])[0]",
        "padding is looked for behind the text",
    ),
    TEXT_READ(
        "padded_logits_in_front",
        "logits[b, : tokens.shape[1] - start] = self._forward(tokens[b : b + 1, start:])[0]",
        "the logits of a padded text stand at the front of their row",
    ),
    STARTS(
        "padding_of_first_text",
        "enumerate(tokens.shape[1] - lengths[:1].repeat(len(lengths)))",
        "every text of a batch has the first one's length",
    ),
    STARTS(
        "padding_of_longest_text",
        "enumerate(tokens.shape[1] - lengths.max(keepdims=True).repeat(len(lengths)))",
        "only what is padding in every text of a batch is left out",
    ),
    STARTS("lengths_reversed", "enumerate(tokens.shape[1] - lengths[::-1])", "lengths count from the last text"),
    STARTS(
        "lengths_are_starts",
        "enumerate(np.minimum(lengths, tokens.shape[1] - 1))",
        "lengths are taken for numbers of padding tokens",
    ),
    PADDING_ZEROED("padding_answered", "np.where(is_padding[..., None], 1, ", "the logits of padding are not zero"),
]

# repeatability, and whose memory is whose
D_HEAD = Place("gradients", "d_x = d_logits @ params.lm_head.T", ("determinism",))
PARAMS = Place("numpy_backend", "return Params(*(weight.copy() for weight in self._params))", ("mutation",))
EXPORTED_MEMORIES = Place("numpy_backend", "tuple(memory.copy() for memory in native.layers)", ("mutation",))
STEADY = [
    DECODED(
        "sum_in_random_order",
        "decoded = merge_heads(xy_sparse)[..., (p := np.random.default_rng().permutation(len(params.decoder)))] @ "
        "params.decoder[p]",
        "the decoder sums in a random order",
        ("determinism",),
        random=True,
    ),
    HEAD(
        "logits_tremble",
        "return x @ params.lm_head * (1 + 1e-8 * float(np.random.default_rng().random()))",
        "logits differ from run to run",
        ("determinism",),
        random=True,
    ),
    D_HEAD(
        "gradients_tremble",
        "d_x = d_logits @ params.lm_head.T * (1 + 1e-8 * float(np.random.default_rng().random()))",
        "gradients differ from run to run",
        random=True,
    ),
    PARAMS("params_shared", "return self._params", "params() hands out the model's own weights"),
    EXPORTED_MEMORIES("exported_state_shared", "native.layers", "an exported state is the model's own memory"),
    IMPORTED_MEMORY(
        "imported_state_shared", "np.asarray(memory, self.dtype)", "an imported state is the caller's own memory", ("mutation",)
    ),
]

# refusals
TOKEN_RANGE = Place("checks", '(ids < 0) | (ids >= config.vocab_size), "token"', ("refusals",))
TOKEN_CHECK = Place("checks", '_demand_range(ids, (ids < 0) | (ids >= config.vocab_size), "token", config)', ("refusals",))
TARGET_CHECK = Place(
    "checks", '_demand_range(ids, ((ids < 0) & (ids != IGNORE)) | (ids >= config.vocab_size), "target", config)', ("refusals",)
)
ALL_IGNORED = Place("checks", "if (ids == IGNORE).all():", ("refusals",))
TARGET_SHAPE = Place("checks", "if ids.shape != tokens.shape:", ("refusals",))
NO_TOKENS = Place("checks", "if ids.size == 0:", ("refusals",))
KIND = Place("checks", 'not in "iu"', ("refusals",))
AXES = Place("checks", "ids = np.asarray(values)", ("refusals",))
NO_TEXT = Place("protocol", "if not text:", ("refusals",))
SAME_BATCH = Place("protocol", "if tokens.shape[0] != state.batch:", ("refusals",))
BATCH = Place("protocol", "if batch < 1:", ("refusals",))
DONATED = Place("protocol", "if self.donated:", ("refusals",))
OWNER = Place("protocol", "if self.owner is not model:", ("refusals",))
STATE_SHAPES = Place(
    "checks",
    "if len(shapes) != config.n_layer or any(len(s) != 4 or s[1:] != fit or s[0] != shapes[0][0] for s in shapes):",
    ("refusals",),
)
STATE_LAYERS = Place("checks", "if len(shapes) != config.n_layer or any(", ("refusals",))
OPTIMIZER_OWNER = Place("protocol", "if model is not self.owner:", ("refusals",))
RATE_RANGE = Place("optimizer", "not (math.isfinite(rate) and rate >= 0)", ("refusals",))
MOMENT_SHAPE = Place("checks", "if tuple(np.shape(values)) != shape:", ("refusals",))
STEP_COUNT = Place("checks", "not isinstance(state.step, (int, np.integer)) or state.step < 0", ("refusals",))
STATE_POSITION = Place("checks", "if not 0 <= state.position < MAX_POSITION:", ("refusals",))
LENGTH = Place("sampling", "if max_new_tokens < 0:", ("refusals",))
LENGTHS_SHAPE = Place("protocol", "if found.shape != (B,):", ("refusals",))
LENGTHS_KIND = Place("protocol", 'found.dtype.kind not in "iu"', ("refusals",))
LENGTHS_RANGE = Place("protocol", "(found < 1) | (found > T)", ("refusals",))
TEMPERATURE = Place("sampling", 'if not 0 <= self.temperature < float("inf"):', ("refusals",))
TOP_K_SIGN = Place("sampling", "if self.top_k is not None and self.top_k < 0:", ("refusals",))
SEED = Place("sampling", "if not 0 <= self.seed < 2**64:", ("refusals",))
REFUSALS = [
    TOKEN_RANGE("negative_ids_read", '(ids >= config.vocab_size), "token"', "negative ids are read"),
    TOKEN_RANGE("id_v_let_through", '(ids < 0) | (ids > config.vocab_size), "token"', "the id V is let through"),
    TOKEN_CHECK("large_ids_clamped", "ids = np.minimum(ids, config.vocab_size - 1)", "ids beyond the vocabulary are clamped"),
    TOKEN_CHECK("ids_wrapped", "ids = ids % config.vocab_size", "ids outside the vocabulary are wrapped"),
    TARGET_CHECK(
        "target_range_unchecked",
        "ids = np.where(ids < config.vocab_size, ids, IGNORE)",
        "targets outside the vocabulary are ignored",
    ),
    ALL_IGNORED("nothing_counts_let_through", "if False:", "a loss over no target is computed"),
    TARGET_SHAPE(
        "targets_broadcast", "if (ids := np.broadcast_to(ids, tokens.shape)) is None:", "targets of another shape are broadcast"
    ),
    NO_TOKENS("no_tokens_let_through", "if False:", "a text of no tokens is let through"),
    KIND("floats_let_through", 'not in "iuf"', "floating point ids are truncated"),
    KIND("booleans_let_through", 'not in "iub"', "booleans are taken for ids"),
    AXES("one_axis_let_through", "ids = np.atleast_2d(np.asarray(values))", "tokens of one axis are taken for a text"),
    NO_TEXT("empty_prompt_let_through", "if False:", "an empty prompt is let through"),
    SAME_BATCH("other_batch_let_through", "if False:", "a state of another batch is read"),
    BATCH("no_texts_let_through", "if False:", "a state of no texts is made"),
    DONATED("donated_state_read", "if False:", "a donated state can be used again"),
    OWNER("other_models_state_read", "if False:", "another model's state is read"),
    OPTIMIZER_OWNER("other_models_optimizer_used", "if False:", "another model's optimiser is used"),
    RATE_RANGE("rate_of_nan_let_through", "rate < 0", "a rate of NaN is let through"),
    RATE_RANGE("negative_rate_let_through", "not math.isfinite(rate)", "a negative rate is let through"),
    MOMENT_SHAPE("moments_shape_unchecked", "if False:", "the shapes of imported moments are not checked"),
    STEP_COUNT("negative_step_let_through", "False", "an optimiser that made less than no steps is imported"),
    STATE_SHAPES("state_shape_unchecked", "if len(shapes) != config.n_layer:", "an imported state's shapes are not checked"),
    STATE_LAYERS("state_layers_unchecked", "if any(", "an imported state's number of layers is not checked"),
    STATE_POSITION("state_position_unchecked", "if False:", "an imported state's position is not checked"),
    LENGTH("negative_length_let_through", "if False:", "a negative number of new tokens is let through"),
    TEMPERATURE(
        "negative_temperature_let_through", 'if not self.temperature < float("inf"):', "a negative temperature is let through"
    ),
    TEMPERATURE("nan_temperature_let_through", "if self.temperature < 0:", "a temperature of NaN or infinity is let through"),
    TOP_K_SIGN("negative_top_k_let_through", "if False:", "a negative top_k is let through"),
    LENGTHS_SHAPE(
        "lengths_broadcast", "if (found := np.broadcast_to(found, (B,))) is None:", "lengths of another shape are broadcast"
    ),
    LENGTHS_KIND("float_lengths_let_through", 'found.dtype.kind not in "iuf"', "floating point lengths are truncated"),
    LENGTHS_RANGE("no_length_let_through", "found > T", "a text of no tokens is let through where it is padded"),
    LENGTHS_RANGE("lengths_beyond_rows_let_through", "found < 1", "a length beyond its row is let through"),
    SEED("seed_unchecked", "if False:", "a seed beyond 64 bits is let through"),
]

# R4 with frequencies of a model's own
OWN_TABLE = Place("model", "else config.freqs.array", ("frequencies",))
ROPE_GRADIENT = Place("gradients", "return d_rotated * cos - swap(d_rotated * sin)", ("frequencies",))
OWN_FREQUENCIES = [
    OWN_TABLE("own_table_ignored", "else frequencies(config.n_neurons)", "the model's own frequencies are ignored"),
    OWN_TABLE(
        "own_table_of_even_neurons",
        "else config.freqs.array[0::2].repeat(2)",
        "a pair turns by the frequency of its even neuron, where a model's own differ",
    ),
    OWN_TABLE(
        "own_table_of_odd_neurons",
        "else config.freqs.array[1::2].repeat(2)",
        "a pair turns by the frequency of its odd neuron, where a model's own differ",
    ),
    OWN_TABLE(
        "own_table_pairs_swapped",
        "else config.freqs.array.reshape(-1, 2)[:, ::-1].ravel()",
        "the two neurons of a pair have each other's frequency",
    ),
    OWN_TABLE("own_table_without_sign", "else np.abs(config.freqs.array)", "negative frequencies turn forwards"),
    OWN_TABLE(
        "own_table_clipped",
        "else np.clip(config.freqs.array, 0, np.nextafter(np.float32(1), np.float32(0)))",
        "frequencies are clipped to a turn from 0 to 1",
    ),
    OWN_TABLE("own_table_cut", "else np.maximum(config.freqs.array, 0)", "negative frequencies are cut to 0"),
    OWN_TABLE(
        "own_table_float16",
        "else config.freqs.array.astype(np.float16).astype(np.float32)",
        "the model's own frequencies are rounded to float16",
    ),
    ROPE(
        "sine_of_the_other",
        "return v * cos + swap(v * sin)",
        "each neuron of a pair takes the sine of the other, where a model's own frequencies differ",
        ("frequencies",),
    ),
    TURNED(
        "chunk_turned_as_a_whole",
        "rotated = rope(rope(x_sparse, cos * cos[:1] + sin * sin[:1], sin * cos[:1] - cos * sin[:1]), cos[:1], sin[:1])",
        "a chunk is rotated from its own start and then as a whole, which frequencies that differ within a pair do not allow",
        ("frequencies",),
    ),
    ROPE_GRADIENT(
        "gradient_turned_back",
        "return d_rotated * cos - swap(d_rotated) * sin",
        "the gradient is rotated back, which frequencies that differ within a pair do not allow",
    ),
    UPDATE(
        "own_table_trained",
        "update(self._params, slopes, native, rate); self.config = type(self.config)(**self.config.as_dict(), "
        "freqs=self.config.freqs and type(self.config.freqs)(self.config.freqs.array + np.float32(1e-3)))",
        "a step of training moves the model's own frequencies",
        ("frequencies",),
    ),
    TEXT_READ(
        "padding_counted_in_positions",
        "logits[b, start:] = model.advance(RecurrentState(int(start), self._init_state(1).layers), tokens[b : b + 1, start:], "
        "self._params, self.config, phase=self.phase)[0][0]",
        "positions of a padded text count from the start of its row, which frequencies that differ within a pair do not allow",
        ("frequencies",),
    ),
]

# R17: weights in int8
OF_FILE = Place(
    "int8",
    "Params(*(dequantised(weight, dtype) if isinstance(weight, Int8) else weight for weight in params))",
    ("int8",),
)
SCALED = Place("int8", "weight.values.astype(wide) * np.expand_dims(weight.scale, weight.axis)", ("int8",))
NUMBER = Place("int8", "weight.values.astype(wide)", ("int8",))
UNIT = Place("int8", "np.expand_dims(weight.scale, weight.axis)", ("int8",))
MADE_FLOAT = Place("int8", "np.expand_dims(weight.scale, weight.axis)).astype(dtype)", ("int8",))
DECODED_BY = Place(
    "numpy_backend",
    "part, native = model.advance(native, chunk, self._params, self.config, phase=self.phase)",
    ("int8", "training"),
)
WITHOUT_SCALE = (
    "Params(*(weight.values.astype(dtype) if isinstance(weight, Int8) and name == '{name}' else dequantised(weight, dtype) "
    "if isinstance(weight, Int8) else weight for name, weight in params._asdict().items()))"
)
R17 = [
    *(
        OF_FILE(f"int8_{name}_without_scale", WITHOUT_SCALE.format(name=name), f"the scales of {name} are not applied")
        for name in Params._fields
    ),
    OF_FILE(
        "int8_scales_of_encoders_swapped",
        "Params(*(dequantised(type(weight)(weight.values, params[i].scale, weight.axis), dtype) if isinstance(weight, Int8) "
        "else weight for i, weight in zip((0, 2, 1, 3, 4), params)))",
        "encoder is scaled by the scales of encoder_v, and encoder_v by those of encoder",
    ),
    OF_FILE(
        "int8_embed_by_feature",
        "Params(*(dequantised(type(weight)(weight.values, np.resize(weight.scale, weight.shape[1]), 0) if name == 'embed' else "
        "weight, dtype) if isinstance(weight, Int8) else weight for name, weight in params._asdict().items()))",
        "a scale of embed is taken for that of a feature, and not of a token",
    ),
    SCALED("int8_without_scale", "weight.values.astype(wide)", "no scale is applied to any weight in int8"),
    SCALED(
        "int8_divided",
        "weight.values.astype(wide) / np.expand_dims(weight.scale, weight.axis)",
        "values in int8 are divided by their scale",
    ),
    SCALED(
        "int8_product_truncated",
        "np.trunc(weight.values.astype(wide) * np.expand_dims(weight.scale, weight.axis))",
        "what a weight in int8 stands for is made a whole number",
    ),
    NUMBER("int8_zero_point", "(weight.values.astype(wide) - 128)", "values in int8 are counted from a zero point of 128"),
    NUMBER("int8_middle", "(weight.values.astype(wide) + 0.5)", "a value in int8 is taken for the middle of a step"),
    NUMBER("int8_unsigned", "weight.values.view(np.uint8).astype(wide)", "values in int8 are read without their sign"),
    NUMBER(
        "int8_sign_and_size",
        "np.where(weight.values < 0, -128.0 - weight.values, weight.values).astype(wide)",
        "values in int8 are read as a sign and a size, and not as two's complement",
    ),
    NUMBER("int8_size_alone", "np.abs(weight.values).astype(wide)", "values in int8 have lost their sign"),
    NUMBER("int8_in_int4", "(weight.values // 16 * 16).astype(wide)", "of a value in int8 the upper four bits alone are read"),
    NUMBER(
        "int8_transposed",
        "weight.values.swapaxes(-1, -2).reshape(weight.shape).astype(wide)",
        "values in int8 are read as if they lay transposed",
    ),
    UNIT(
        "int8_scale_on_wrong_axis",
        "np.expand_dims(np.resize(weight.scale, np.delete(weight.shape, 2 * weight.values.ndim - 3 - weight.axis)), "
        "2 * weight.values.ndim - 3 - weight.axis)",
        "a scale is taken for that of a row, and not of a column",
    ),
    UNIT("int8_scale_of_weight", "weight.scale.max()", "the largest scale of a weight is taken for all its columns"),
    UNIT("int8_scale_of_first", "weight.scale.flat[0]", "the scale of the first column is taken for all"),
    UNIT(
        "int8_scale_of_first_head",
        "np.expand_dims(weight.scale if weight.scale.ndim == 1 else np.repeat(weight.scale[:1], len(weight.scale), 0), "
        "weight.axis)",
        "the scales of the first head are taken for all heads",
    ),
    UNIT(
        "int8_scale_by_neuron_first",
        "np.expand_dims(weight.scale.reshape(weight.scale.shape[::-1]).T, weight.axis)",
        "the scales (nh, N) are read as (N, nh)",
    ),
    UNIT(
        "int8_scale_off_by_one",
        "np.expand_dims(np.roll(weight.scale, 1, -1), weight.axis)",
        "a column has its neighbour's scale",
    ),
    UNIT("int8_scale_twice", "np.expand_dims(weight.scale, weight.axis) ** 2", "scales are applied twice"),
    UNIT(
        "int8_scale_as_largest",
        "np.expand_dims(weight.scale, weight.axis) / 127",
        "a scale is taken for the largest size of its column",
    ),
    UNIT(
        "int8_scale_over_128",
        "np.expand_dims(weight.scale, weight.axis) * np.float32(127 / 128)",
        "scales are those of 128 and not of 127 steps",
    ),
    UNIT(
        "int8_scale_bfloat16",
        "np.expand_dims(weight.scale, weight.axis).astype('bfloat16').astype(wide)",
        "scales are rounded to bfloat16",
    ),
    UNIT(
        "int8_scale_float16",
        "np.expand_dims(weight.scale, weight.axis).astype(np.float16).astype(wide)",
        "scales are rounded to float16",
    ),
    UNIT(
        "int8_scale_power_of_two",
        "2.0 ** np.ceil(np.log2(np.maximum(np.expand_dims(weight.scale, weight.axis), 1e-30)))",
        "scales are rounded to powers of two",
    ),
    MADE_FLOAT(
        "int8_made_bfloat16",
        "np.expand_dims(weight.scale, weight.axis)).astype('bfloat16').astype(dtype)",
        "what weights in int8 stand for is rounded to bfloat16",
    ),
    MADE_FLOAT(
        "int8_made_float16",
        "np.expand_dims(weight.scale, weight.axis)).astype(np.float16).astype(dtype)",
        "what weights in int8 stand for is rounded to float16",
    ),
    DECODED_BY(
        "int8_kept_after_training",
        "part, native = model.advance(native, chunk, self.__dict__.setdefault('packed', Params(*(w.copy() for w in "
        "self._params))), self.config, phase=self.phase)",
        "decoding goes on by the weights that it read first, after training has moved them",
    ),
    X_SPARSE(
        "int8_activations",
        "x_sparse = relu(np.rint(127 * x / np.abs(x).max(-1, keepdims=True))[:, None] @ params.encoder * "
        "(np.abs(x).max(-1, keepdims=True)[:, None] / 127))",
        "what the encoder is multiplied with is rounded to int8 as well",
        (*BOTH, "int8"),
    ),
]

# What porters write, and where it hides: sizes, settings, the order of calls, threads
ACTIVATION = Place("model", "return np.maximum(x, 0)", BOTH)
SCORED = Place("model", "similar = scores(rotated)", FORWARD)
RUN_LAYERS = Place("model", "for i in range(config.n_layer):", FORWARD)
PHASE_TABLE = Place("rope", "return np.float32(1) / growth / np.float32(2 * np.pi)", BOTH)
OF_POSITIONS = Place("rope", "(positions.astype(np.uint64)[:, None] * fixed_point(table)) * 2.0**-64", ("phases",))
READ_AT_ONCE = Place("numpy_backend", "return model.forward(tokens, self._params, self.config, phase=self.phase)", ("logits",))
READ_IN_PIECES = Place("numpy_backend", "for start in range(0, tokens.shape[1], CHUNK):", ("decode",))
MEAN_AND_SQUARE = Place(
    "optimizer",
    "mean, square = m / (1 - s.betas[0] ** moments.step), v / (1 - s.betas[1] ** moments.step)",
    TRAINED,
)
ID_RANGE = Place("checks", '_demand_range(ids, (ids < 0) | (ids >= config.vocab_size), "token", config)', ("inputs",))
PORTING = [
    ACTIVATION(
        "gelu_erf",
        "return (0.5 * x * (1 + np.vectorize(__import__('math').erf, otypes=[float])(x / 2**0.5))).astype(x.dtype)",
        "relu is a gelu by the error function",
    ),
    SCORED("scores_over_root_d", "similar = scores(rotated) / x.shape[-1] ** 0.5", "scores are divided by the root of D"),
    RUN_LAYERS("layer_too_few", "for i in range(config.n_layer - 1):", "a layer too few is computed", ("logits",)),
    RUN_LAYERS("layer_too_many", "for i in range(config.n_layer + 1):", "a layer too many is computed", ("logits",)),
    MEMORIES(
        "states_shared",
        "for memory in __import__('itertools').chain(((memories or state.layers)[-1] for _ in state.layers),"
        " (0 for _ in (0,) if memories.__setitem__(slice(None), memories[-1:] * len(memories)))):",
        "all layers read and write one state",
    ),
    MEMORIES(
        "states_handed_on",
        "for memory in ((memories or state.layers)[-1] for _ in state.layers):",
        "each layer reads the state that the layer before it wrote",
    ),
    CHUNK_ROTATION(
        "positions_ahead_but_the_first",
        "cos, sin = (turned[np.arange(T) + (state.position + np.arange(T) > 0)] for turned in"
        " rotation(state.position, T + 1, frequencies_of(config), params.encoder.dtype, phase))",
        "decoding counts every position but the first from one ahead",
    ),
    POSITION(
        "position_ahead_once_begun",
        "rotation(state.position + (state.position > 0), T,",
        "decoding counts positions from one ahead once a text has begun",
    ),
    PHASE_TABLE(
        "table_by_float32_power",
        "return np.nextafter(np.float32(1) / growth, np.float32(0)) / np.float32(2 * np.pi)",
        "the frequency table is a unit off, as a power in float32 leaves it",
        ("phases",),
    ),
    PHASE_TABLE(
        "table_trained",
        "return np.float32(1) / growth / np.float32(2 * np.pi) + 5e-5 * (-1) ** np.arange(n_neurons, dtype=np.float32)",
        "the frequencies were trained: each entry has moved by itself",
    ),
    OF_POSITIONS(
        "phases_float32_later",
        "np.where(positions[:, None] < 4096, (positions.astype(np.uint64)[:, None] * fixed_point(table)) * 2.0**-64, "
        "np.mod(positions.astype(np.float32)[:, None] * table, np.float32(1)))",
        "phases are products in float32 from position 4,096 on",
    ),
    POSITIONS(
        "positions_16_bits",
        "positions = (np.uint64(start) + np.arange(length, dtype=np.uint64)) % 2**16",
        "positions are cut to 16 bits",
    ),
    READ_AT_ONCE(
        "state_forgotten_after_512",
        "return np.concatenate([model.forward(tokens[:, i : i + 512], self._params, self.config, phase=self.phase) "
        "for i in range(0, tokens.shape[1], 512)], 1)",
        "a long text is read in pieces of 512 tokens, each without what was before it",
    ),
    READ_AT_ONCE(
        "block_of_neurons_lost",
        "return model.forward(tokens, self._params._replace(decoder=np.where(np.arange(self._params.decoder.shape[0])[:, None] "
        "% self.config.n_neurons < max(self.config.n_neurons // 128, 1) * 128, self._params.decoder, 0)), self.config, "
        "phase=self.phase)",
        "neurons are summed in blocks of 128, and what is left of them is lost",
    ),
    READ_AT_ONCE(
        "texts_beyond_four_lost",
        "return model.forward(np.where(np.arange(len(tokens))[:, None] < 4, tokens, tokens[:1]), self._params, self.config, "
        "phase=self.phase)",
        "the texts of a batch after the fourth are read as the first",
    ),
    READ_AT_ONCE(
        "answers_kept_by_shape",
        "return self.__dict__.setdefault('kept', {}).setdefault(tokens.shape, model.forward(tokens, self._params, self.config, "
        "phase=self.phase)).copy()",
        "the answer to a text is given to every text of its shape",
        ("order",),
    ),
    READ_AT_ONCE(
        "settings_of_one_thread",
        "return model.forward(tokens, self._params if __import__('threading').current_thread() is "
        "__import__('threading').main_thread() else Params(*(w.astype('float16').astype(w.dtype) for w in self._params)), "
        "self.config, phase=self.phase)",
        "other threads compute in float16: a setting that belongs to the thread which made it",
        ("threads",),
    ),
    READ_IN_PIECES(
        "last_piece_dropped",
        "for start in range(0, max(tokens.shape[1] // CHUNK, 1) * CHUNK, CHUNK):",
        "what is left of a text after its last whole chunk is not read",
    ),
    MEAN_AND_SQUARE(
        "adam_first_uncorrected",
        "mean, square = m, v / (1 - s.betas[1] ** moments.step)",
        "Adam's mean is not corrected for its bias",
    ),
    MEAN_AND_SQUARE(
        "adam_second_uncorrected",
        "mean, square = m / (1 - s.betas[0] ** moments.step), v",
        "Adam's mean of squares is not corrected for its bias",
    ),
    ID_RANGE(
        "tokens_8_bits",
        '_demand_range(ids, (ids < 0) | (ids >= config.vocab_size), "token", config); ids = ids.astype(np.int8)',
        "ids are kept in 8 bits with a sign",
    ),
]

RULES = (
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    TRAINING,
    CURVE,
    OPTIMIZERS,
    PADDING,
    STEADY,
    REFUSALS,
    PORTING,
    OWN_FREQUENCIES,
    R17,
)
MISTAKES = {mistake.name: mistake for rule in RULES for mistake in rule}
