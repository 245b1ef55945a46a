"""BDH for transformers. The mathematics is that of ``bdh_torch``; here are masks, caches and the ways in and out.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs
from transformers.utils.versions import require_version

from bdh_spec.model import IGNORE
from bdh_torch.decode import gated as gated_token
from bdh_torch.forms import Kernel, decodes, is_one_table, streams
from bdh_torch.forms import chunk as streamed_chunk
from bdh_torch.layer import Linears, Weights, layer, layer_norm, residual, wide
from bdh_torch.rope import Rotations as Streamed
from bdh_torch.rope import fixed_point, relative, rotation
from bdh_torch.streamed import gated
from bdh_transformers.attention_bdh import BDHParallelAttention, BDHRecurrentAttention
from bdh_transformers.cache_bdh import BDHCache, BDHStateLayer, BDHStaticCache, PositionedCache, check_cache
from bdh_transformers.configuration_bdh import DEFAULT_FORM, FORMS, BDHConfig, demand_matrices
from bdh_transformers.linear_bdh import (
    check_quantiser,
    check_stored,
    check_weights,
    demand_plain,
    give_linears,
    joined,
    refuse_head_alone,
    to_linear_names,
    to_raw_names,
    try_torchao,
)
from bdh_transformers.texts_bdh import Texts, in_common, packed, places, spread

require_version("transformers>=5.13,<5.24", "5.24 hands caches to models by another name: text would be wrong without a word")

Rotations: TypeAlias = Callable[[int, int], Tensor]  # of the tokens from the first to before the second


class Span(NamedTuple):
    """Tokens that the streamed kernel reads in one go, by their rotations: a text of one row, or all rows alike."""

    row: int | None
    start: int
    stop: int
    rotations: Streamed


ALL_ATTENTION_FUNCTIONS.register("bdh_recurrent", BDHRecurrentAttention)
ALL_ATTENTION_FUNCTIONS.register("bdh_parallel", BDHParallelAttention)


class BDHLayer(GradientCheckpointingLayer):
    """One of L equal layers. It has no weights of its own: all layers share the model's."""

    def __init__(self, config: BDHConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        encoder: Tensor | nn.ModuleList,  # by itself, so that checkpoints of activations know it as an input with a gradient
        encoder_v: Tensor | nn.ModuleList,
        decoder: Tensor | nn.ModuleList,
        rotations: Rotations | list[Span] | Tensor,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        texts: Texts | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on (B, T, D), a long text chunk by chunk: the next hidden states, and the matrix if it is wanted."""
        (_, T, D), weights = hidden_states.shape, joined(encoder, encoder_v, decoder)
        if isinstance(rotations, list):
            return self._stream(hidden_states, cast("Weights", weights), rotations, mask, past_key_values), None
        if isinstance(rotations, Tensor):
            return self._decode(hidden_states, cast("Weights", weights), rotations, mask, cast("Cache", past_key_values)), None
        form = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, BDHParallelAttention)
        attention = form(self.config.num_attention_heads, self.layer_idx, T, D, past_key_values, output_attentions)

        def part(start: int, stop: int) -> Tensor:
            kept = None if mask is None else mask[:, mask.shape[1] - T + start : mask.shape[1] - T + stop]
            attend = partial(attention, kept=kept, texts=texts and texts.part(start, stop))
            return layer(hidden_states[:, start:stop], weights, rotations(start, stop), attend, self.drop)

        if attention.chunk >= T:  # no loop, of which a compiler would make one program for each length
            return part(0, T), attention.matrix
        parts = [part(start, min(start + attention.chunk, T)) for start in range(0, T, attention.chunk)]
        attention.finish(texts)
        return torch.cat(parts, dim=1), None

    def streams(self, x: Tensor, weights: Weights | Linears, kernel: Kernel | None, past_key_values: Cache | None) -> bool:
        """Whether this layer reads by the streamed kernel, which keeps no rows, and writes to a state in place."""
        if past_key_values is not None and (torch.is_grad_enabled() or not _is_state(past_key_values)):
            return False
        return isinstance(weights, Weights) and streams(kernel, x, weights, self.drop)

    def _stream(
        self, x: Tensor, weights: Weights, spans: list[Span], mask: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        (B, T, D), N = x.shape, weights.encoder.shape[2]
        mask, dropout = None if mask is None else mask[:, -T:], self.drop.p if self.drop.training else 0.0
        blank, memories = False, None
        if past_key_values is not None:
            state = past_key_values.layers[self.layer_idx]
            blank, memories = state.is_blank(), state.room(B, N, D, x)
            state.count(T)

        def read(span: Span) -> Tensor:
            part, memory, is_blank = (_rows(B, span.row), slice(span.start, span.stop)), memories, blank
            if memories is not None and span.row is not None:
                memory = torch.unflatten(memories, 0, (-1, B))[:, span.row]  # h N D
                if span.start:  # a text of its own, which begins here
                    memory, is_blank = memory.zero_(), True
            kept, chunk = None if mask is None else mask[part], len(span.rotations.local)
            return gated(x[part], weights, span.rotations, chunk, memory, blank=is_blank, dropout=dropout, kept=kept)

        decoded = torch.cat([read(span).flatten(0, 1) for span in spans]) if len(spans) > 1 else read(spans[0])
        return residual(x, decoded.view(B, T, D))

    def decodes(self, x: Tensor, weights: Weights | Linears, kernel: Kernel | None, past_key_values: Cache | None) -> bool:
        """Whether these are single tokens, read by what is made for them: in place, and not where a compiler is to follow."""
        if past_key_values is None or not _is_state(past_key_values) or isinstance(weights, Linears):
            return False
        return not (past_key_values.is_compileable or is_tracing(x)) and decodes(kernel, None, x, weights, self.drop)

    def _decode(self, x: Tensor, weights: Weights, rotations: Tensor, mask: Tensor | None, past_key_values: Cache) -> Tensor:
        (B, _, D), N, state = x.shape, weights.encoder.shape[2], past_key_values.layers[self.layer_idx]
        x = x[:, 0]
        v = x if mask is None else x * mask[:, -1:]  # what has no value is seen by nobody
        memory = state.memory_for(1, B, N, D, x)
        state.count(1)
        return residual(x, gated_token(x, v, weights, rotations, memory.through))[:, None]


def _rows(B: int, row: int | None) -> slice:
    return slice(0, B) if row is None else slice(row, row + 1)


def _is_state(past_key_values: Cache) -> bool:
    """Whether a cache has states: one of rows may have no layers yet."""
    return all(isinstance(each, BDHStateLayer) for each in past_key_values.layers or [None])


class BDHRotaryEmbedding(nn.Module):
    """Rotations of positions (R4), exact at each: they come from whole numbers, which no cast of the model changes."""

    fixed: Tensor  # (N/2) int64, turns per token of a pair in units of 2^-64

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.n_neurons = config.sizes.n_neurons
        self.register_buffer("fixed", fixed_point(self.n_neurons), persistent=False)

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions (..., T) to cosines and sines (..., T, N/2, 2), never narrower than float32."""
        return rotation(position_ids, self.fixed, wide(dtype), "exact")


class BDHPreTrainedModel(PreTrainedModel):
    """What the model has in common with and without its head."""

    config: BDHConfig
    config_class = BDHConfig
    base_model_prefix = "backbone"
    _input_embed_layer = "embed"
    _no_split_modules: ClassVar[list[str]] = ["BDHModel"]  # its layers share all weights
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": BDHLayer,
        "attentions": OutputRecorder(BDHLayer, index=1),
    }

    @property
    def _is_stateful(self) -> bool:
        """Whether tokens cannot be taken back, which assisted decoding asks."""
        return self.config._attn_implementation == "bdh_recurrent"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """The model of a folder or of the hub, as `PreTrainedModel.from_pretrained` has it.

        With a ``quantization_config`` its weights become modules, see ``to_linear``, and are stored as that says.
        """
        wanted = options.pop("quantization_config", None)
        if wanted is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        check_quantiser(wanted, has_head=not issubclass(cls, BDHModel))
        placed = {name: options.pop(name) for name in ("device_map", "max_memory") if name in options}
        informs = options.pop("output_loading_info", False)
        found, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **options)
        if found.is_linear:
            raise ValueError(f"{pretrained_model_name_or_path} is quantised already: leave quantization_config out")
        if not placed:
            try_torchao(wanted, body_of(found))
        config, options = found.config, {"dtype": found.dtype, "generation_config": getattr(found, "generation_config", None)}
        tensors = to_linear_names(found.state_dict(), config.num_attention_heads)
        del found  # the wide weights are held once
        made = super().from_pretrained(None, config=config, state_dict=tensors, quantization_config=wanted, **options, **placed)
        check_stored(made)
        made.name_or_path = made.config.name_or_path = config.name_or_path
        return (made, info) if informs else made

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **options: Any) -> None:
        """Save the model, as `PreTrainedModel.save_pretrained` has it: by the names of all files of BDH, or quantised."""
        if getattr(self, "hf_quantizer", None) is not None:
            options.setdefault("save_original_format", False)  # transformers knows no way back from what it has read
        elif self.is_linear:
            state_dict = self.state_dict() if state_dict is None else state_dict
            demand_plain(state_dict)
            state_dict = to_raw_names(state_dict, self.config.num_attention_heads)
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **options)

    @property
    def is_linear(self) -> bool:
        """Whether modules of each head hold the weights, and not raw parameters."""
        return not isinstance(body_of(self).encoder, Tensor)

    def to_linear(self) -> Any:
        """Put an ``nn.Linear`` for each head in the place of each raw weight, and return the model, which computes the same.

        Libraries look for them to quantise them or to adapt them. The plain kernel reads them. Files keep their names.
        """
        if not self.is_linear:
            give_linears(body_of(self), self.config.num_attention_heads)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BDHModel) and not module.is_linear:
            for weight in (module.encoder, module.encoder_v, module.decoder):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, BDHRotaryEmbedding):
            init.copy_(module.fixed, fixed_point(module.n_neurons))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The form of attention that is asked for, the recurrent one if none is."""
        form = requested_attention or DEFAULT_FORM
        if form not in FORMS:
            raise ValueError(
                f"attn_implementation is {form!r}, and BDH has no softmax to speed up: choose from {', '.join(FORMS)}"
            )
        return form


def body_of(model: nn.Module) -> Any:
    """The model without its head, also where peft has put a wrapper around it."""
    return next(module for module in model.modules() if isinstance(module, BDHModel))


class BDHModel(BDHPreTrainedModel):
    """BDH without its head: tokens to hidden states (R1 to R10).

    >>> model = BDHModel(BDHConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, mlp_internal_dim_multiplier=4))
    >>> model(torch.zeros(1, 8, dtype=torch.long)).last_hidden_state.shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, config: BDHConfig, *, has_head: bool = False) -> None:
        super().__init__(config)
        D, nh, N = config.hidden_size, config.num_attention_heads, config.sizes.n_neurons
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Parameter(torch.empty(nh, D, N))
        self.encoder_v = nn.Parameter(torch.empty(nh, D, N))
        self.decoder = nn.Parameter(torch.empty(nh * N, D))
        self.rotary = BDHRotaryEmbedding(config)
        self.layers = nn.ModuleList(BDHLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.kernel: Kernel | None = None  # plain or streamed where one of them is wanted: see bdh_torch.forms
        self.pads_with: int | None = None  # the id with which ended texts go on beside longer ones, while text is generated
        if getattr(config, "quantization_config", None) is not None:
            check_quantiser(config.quantization_config, has_head=has_head)
            give_linears(self, nh)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of tokens (B, T) or of embeddings (B, T, D).

        ``attention_mask`` (B, S) is 0 where there is padding, on either side; its last T columns belong to these tokens.
        ``position_ids`` (B, T) or (1, T) count on from the cache if they are not given, and what the mask keeps if there is
        one. Where they start again within a row, or ``cu_seq_lens_q`` or ``seq_idx`` of a collator say so, a text of its own
        begins; a cache then goes on with the last text of each row.
        """
        form = self.config._attn_implementation
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        demand_matrices(output_attentions, form)
        T = demand_tokens(input_ids, inputs_embeds)
        check_mask(attention_mask, T)
        kept = None if attention_mask is None else attention_mask != 0
        if inputs_embeds is None:
            inputs_embeds = self._embedded(self._without_foreign_padding(input_ids, kept))
        if use_cache and past_key_values is None and not self.training:
            past_key_values = BDHCache(self.config)
        if past_key_values is not None:
            check_cache(past_key_values, form)
        texts = packed(inputs_embeds.shape[:2], position_ids, kept, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
        position_ids = self._places(position_ids, kept, T, past_key_values, inputs_embeds.device)

        x = layer_norm(inputs_embeds)  # B T D  R1
        weights = joined(self.encoder, self.encoder_v, self.decoder)
        check_weights(weights, learns=self.training and torch.is_grad_enabled())
        streamed = None
        if not output_attentions:
            streamed = self._streamed(x, weights, position_ids, kept, texts, past_key_values)
        if T > 1 and texts is None and streamed is None and position_ids.ndim > 1:
            position_ids = in_common(position_ids, kept, is_whole=past_key_values is None)
        rotations: Rotations | list[Span] | Tensor
        if streamed is not None:
            rotations = streamed
        elif self._decodes(x, weights, past_key_values):
            rotations = torch.view_as_complex(self.rotary(position_ids, x.dtype)).flatten(0, -2)  # 1 N/2, or B N/2
        else:
            rotations = self._rotations(position_ids, x.dtype)
        for block in self.layers[: self.config.num_hidden_layers]:  # fewer while the model is its own assistant
            x, _ = block(
                x,
                *weights,
                rotations=rotations,
                mask=kept,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
                texts=texts,
            )
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values if use_cache else None)

    def _places(
        self, position_ids: Tensor | None, kept: Tensor | None, T: int, past_key_values: Cache | None, device: torch.device
    ) -> Tensor:
        """Where these tokens stand, (B, T), (1, T) or (T), which a cache is told."""
        is_given = position_ids is not None or kept is not None
        if position_ids is None:  # else nothing is looked at in a cache, which a program would be compiled for
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            start = past_key_values.next_position() if isinstance(past_key_values, PositionedCache) else past
            if isinstance(past, Tensor) and not is_tracing(past):  # as a static cache counts
                past = int(past)
            here = torch.arange(T, device=device)
            position_ids = start + here if kept is None else places(kept, T, past, start)
        if isinstance(past_key_values, PositionedCache) and (is_given or past_key_values.last is not None):
            # A program that is traced keeps nothing for later but what it is to return.
            past_key_values.last = None if is_tracing(position_ids) else (position_ids, kept)
        return position_ids

    def _streamed(
        self,
        x: Tensor,
        weights: Weights | Linears,
        position_ids: Tensor,
        kept: Tensor | None,
        texts: Texts | None,
        past_key_values: Cache | None,
    ) -> list[Span] | None:
        """What the streamed kernel reads in one go, if it is to read: it wants the tokens of a text side by side."""
        layers = cast("list[BDHLayer]", self.layers[: self.config.num_hidden_layers])
        if not all(each.streams(x, weights, self.kernel, past_key_values) for each in layers):
            return None
        encoder = cast("Weights", weights).encoder
        found = side_by_side(x.shape[0], position_ids, kept, texts, is_whole=past_key_values is None)
        if found is None:
            return None
        longest, whole = dict[int, int](), dict[int, Streamed]()
        for _, start, stop, position in found:
            if streamed_chunk(stop - start, None, encoder) >= stop - start:
                longest[position] = max(stop - start, longest.get(position, 0))

        def rotations(position: int, T: int) -> Streamed:
            chunk = streamed_chunk(T, None, encoder)
            if chunk < T:
                return relative(position, T, chunk, self.rotary.fixed, wide(x.dtype), "exact")
            if position not in whole:  # one table for all texts that begin alike
                size = longest[position]
                whole[position] = relative(position, size, size, self.rotary.fixed, wide(x.dtype), "exact")
            return Streamed(whole[position].local[:T], whole[position].shifts)

        return [Span(row, start, stop, rotations(position, stop - start)) for row, start, stop, position in found]

    def _decodes(self, x: Tensor, weights: Weights | Linears, past_key_values: Cache | None) -> bool:
        layers = cast("list[BDHLayer]", self.layers[: self.config.num_hidden_layers])
        return all(each.decodes(x, weights, self.kernel, past_key_values) for each in layers)

    def _rotations(self, position_ids: Tensor, dtype: torch.dtype) -> Rotations:
        """Those of a short text are worked out once for all layers; those of a long one in each, and never kept."""
        if is_one_table(position_ids.shape[-1]):
            table = self.rotary(position_ids, dtype)  # T N/2 2, or B T N/2 2
            return lambda start, stop: table[..., start:stop, :, :]
        return lambda start, stop: self.rotary(position_ids[..., start:stop], dtype)

    def _embedded(self, input_ids: Tensor) -> Any:
        try:
            return self.embed(input_ids)
        except IndexError as error:  # where PyTorch looks, which is on a CPU
            raise IndexError(
                f"token {int(input_ids.max())} is none of the {self.config.vocab_size} of the vocabulary: for special tokens"
                " call model.resize_token_embeddings(len(tokenizer)); for padding give an attention_mask or config.pad_token_id"
            ) from error

    def _without_foreign_padding(self, input_ids: Any, kept: Tensor | None) -> Tensor:
        """Tokens in which padding reads as id 0, for a tokenizer of bytes pads with an id that is none of the vocabulary."""
        if kept is not None:
            foreign = input_ids >= self.config.vocab_size
            input_ids = input_ids.masked_fill(foreign & ~kept[:, -input_ids.shape[1] :], 0)
        for pad in (self.config.pad_token_id, self.pads_with):  # which ended texts of a batch go on with, unmasked
            if pad is not None and pad >= self.config.vocab_size:
                input_ids = input_ids.masked_fill(input_ids == pad, 0)
        return input_ids


def side_by_side(
    B: int, position_ids: Tensor, kept: Tensor | None, texts: Texts | None, *, is_whole: bool
) -> list[tuple[int | None, int, int, int]] | None:
    """The texts of B rows as row, first token, end and position of the first; None where a text leaves positions out.

    Row None are all rows, which are read alike. What is read as a whole may stand anywhere.
    """
    T = position_ids.shape[-1]
    if texts is None:
        offsets, is_one = spread(position_ids, kept)
        if not is_one.all():
            return None
        if is_whole or (offsets == offsets[0]).all():
            return [(None, 0, T, int(offsets[0]))]
        return [(row, 0, T, int(offset)) for row, offset in enumerate(offsets)]
    found, position_ids = list[tuple[int | None, int, int, int]](), position_ids.view(-1, T).expand(B, -1)
    for row, index in enumerate(texts.number):
        for start, stop in pairwise([0, *(index.diff().nonzero()[:, 0] + 1).tolist(), T]):
            mask = None if kept is None else kept[row : row + 1, -T:][:, start:stop]
            offsets, is_one = spread(position_ids[row : row + 1, start:stop], mask)
            if not is_one.all():
                return None
            found.append((row, start, stop, 0 if is_whole else int(offsets[0])))
    return found


def demand_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    """The number of tokens to read; refuse none, which `generate` makes of new tokens after a cache of unknown length."""
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give either input_ids or inputs_embeds")
    if given.shape[1] == 0:
        raise ValueError(
            "there are no tokens to read: give at least one, and to generate after a cache the attention_mask of all tokens"
        )
    return given.shape[1]


def places_of(hidden_states: Tensor, wanted: int | Tensor) -> Tensor:
    """Of hidden states (B, T, D) the last so many, 0 for all; those at places (K) or (B, K); (K, D) of a mask (B, T)."""
    if isinstance(wanted, int):
        return hidden_states[:, -wanted:]
    if wanted.ndim == 1:
        return hidden_states[:, wanted]
    return hidden_states[wanted] if wanted.dtype == torch.bool else hidden_states.take_along_dim(wanted[..., None], dim=1)


def check_mask(attention_mask: Tensor | None, T: int) -> None:
    """Refuse masks that are no padding masks: causality is the model's own."""
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < T):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give (B, S) with S at least the {T} tokens at hand,"
            " 0 where there is padding"
        )


class BDHForCausalLM(BDHPreTrainedModel, GenerationMixin):
    """BDH with its head: tokens to logits, and text."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embed.weight"}

    def __init__(self, config: BDHConfig) -> None:
        super().__init__(config)
        self.backbone = BDHModel(config, has_head=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._longest_cache = 0  # of a fixed length, that generate has made
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, also where peft has put a wrapper around the backbone, which holds the raw weights."""
        return cast("nn.Module", body_of(self).embed)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of tokens (B, T), or of the last ``logits_to_keep``, and the loss if labels (B, T) are given.

        Labels are shifted here: label t is compared with what was said at t-1. -100 counts for nothing, nor does the first
        label of a text that is packed behind another. No cache is built in training, nor for a loss unless it is asked for.
        """
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.backbone(
            input_ids,  # in this place, because peft's wrapper of raw weights has another name for it
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if not self.is_linear:
            refuse_head_alone(self.lm_head.weight)
        logits = self.lm_head(places_of(outputs.last_hidden_state, logits_to_keep))  # B T V  R11
        loss = None
        if labels is not None:
            kept = None if attention_mask is None else attention_mask != 0
            texts = packed(labels.shape, position_ids, kept, kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
            labels = labels if texts is None else labels.masked_fill(texts.begins(), IGNORE)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Text after these tokens, as `GenerationMixin.generate` has it. It never drops, not even in training mode (R8)."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return super().generate(*args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    def _prepare_special_tokens(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        super()._prepare_special_tokens(generation_config, *args, **kwargs)
        pad = generation_config._pad_token_tensor
        self.backbone.pads_with = None if pad is None else int(pad)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        pad = generation_config._pad_token_tensor
        if pad is not None and inputs_tensor.ndim == 2 and int(pad) >= self.config.vocab_size:
            return (inputs_tensor != pad).long()  # no token that was ever read or written, also where it is eos as well
        return super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, *args, **kwargs)

    def _validate_generation_mode(self, generation_mode: Any, *args: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION and self._is_stateful:
            raise ValueError(
                "assisted generation takes tokens back, which the state of bdh_recurrent cannot: use"
                " model.set_attn_implementation('bdh_parallel'), which keeps rows"
            )
        super()._validate_generation_mode(generation_mode, *args)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Make the cache that the present form of attention needs; refuse those that it cannot have."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"BDH has no cache_implementation {kind!r}: leave it out, and bdh_recurrent keeps a state of fixed size,"
                " bdh_parallel the rows of all tokens; or ask for 'static', which compiled programs read"
            )
        if not generation_config.use_cache or model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_cache_length)
        cache: PositionedCache = BDHCache(self.config)
        if kind == "static":
            cache = self._static_cache(generation_config, batch_size, max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    def _static_cache(self, generation_config: Any, batch_size: int, max_cache_length: int) -> BDHStaticCache:
        # As long as the longest so far: programs that were compiled for it serve again.
        longest = max(max_cache_length, generation_config.max_cache_len or 0, self._longest_cache)
        self._longest_cache = longest
        cache, embed, sizes = BDHStaticCache(self.config, longest), body_of(self).embed.weight, self.config.sizes
        texts = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        cache.make_room(texts, sizes.n_neurons, sizes.n_embd, embed)
        return cache

    @staticmethod
    def create_masks_for_generate(inputs_embeds: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The columns of a mask (B, S) that are of the tokens at hand: all that is needed of it, and of one size."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
