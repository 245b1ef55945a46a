"""BDH for transformers. The mathematics is that of ``bdh_torch``; here are masks, caches and the ways in and out.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary; S all tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from bdh_torch.attention import attend, write
from bdh_torch.layer import Weights, layer, layer_norm, wide
from bdh_torch.rope import fixed_point, rotation
from bdh_transformers.cache_bdh import BDHCache, BDHStateLayer, check_cache
from bdh_transformers.configuration_bdh import DEFAULT_FORM, FORMS, BDHConfig, demand_matrices

CHUNK = 256  # tokens read at once on top of a state
# The longest text that is read at once without a state: above it, time would grow with the square of the length.
WHOLE, WHOLE_WITH_GRADIENTS = 512, 1024

Rotations: TypeAlias = Callable[[int, int], Tensor]  # of the tokens from the first to before the second
Read: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # rotated and values to attention and its matrix


class BDHRecurrentAttention:
    """Attention through a state of fixed size: all that is remembered, whatever the length of the text (R13)."""

    def __call__(
        self, layer: BDHLayer, rotated: Tensor, v: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotated neurons (h*B, T, N) and values (h*B, T, D) to attention (h*B, T, D), and no matrix."""
        if past_key_values is None:
            return attend(rotated, v, None), None
        return past_key_values.layers[layer.layer_idx].read_and_write(rotated, v), None


class BDHParallelAttention:
    """Attention to the rows of all earlier tokens: its matrix can be seen, and the last tokens can be taken back (R5)."""

    def __call__(
        self, layer: BDHLayer, rotated: Tensor, v: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotated neurons (h*B, T, N) and values (h*B, T, D) to attention (h*B, T, D), and its matrix (B, h, T, S)."""
        nh, T = layer.config.num_attention_heads, v.shape[1]
        if past_key_values is None:
            seen: dict[str, Tensor] = {}
            attention = attend(rotated, v, None, note=lambda name, value: seen.setdefault(name, value))
            return attention, batch_first(seen["scores"], nh)
        keys, values = update_rows(layer, rotated, v, past_key_values)  # B h S N, B 1 S D
        S, (B, D) = keys.shape[2], values.shape[::3]
        scores = (batch_first(rotated, nh) @ keys.mT).tril(S - T - 1)  # B h T S
        attention = scores.view(B, nh * T, S) @ values[:, 0]  # B h*T D: all heads have the same values
        return attention.view(B, nh, T, D).transpose(0, 1).flatten(0, 1), scores


ALL_ATTENTION_FUNCTIONS.register("bdh_recurrent", BDHRecurrentAttention())
ALL_ATTENTION_FUNCTIONS.register("bdh_parallel", BDHParallelAttention())


def batch_first(rows: Tensor, nh: int) -> Tensor:
    """(h*B, T, K) to (B, h, T, K)."""
    return rows.unflatten(0, (nh, -1)).transpose(0, 1)


def update_rows(layer: BDHLayer, rotated: Tensor, v: Tensor, past_key_values: Cache) -> tuple[Tensor, Tensor]:
    """Keep these tokens' rows: those of all tokens so far, (B, h, S, N), and their values (B, 1, S, D), one for all heads."""
    nh = layer.config.num_attention_heads
    return past_key_values.update(batch_first(rotated, nh), v[: len(v) // nh, None], layer.layer_idx)


class BDHLayer(GradientCheckpointingLayer):
    """One of L equal layers. It has no weights of its own: all layers share the model's."""

    def __init__(self, config: BDHConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        weights: Weights,
        rotations: Rotations,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on (B, T, D), a long text chunk by chunk: the next hidden states, and the matrix if it is wanted."""
        T = hidden_states.shape[1]
        read, size = self._plan(T, past_key_values, output_attentions)
        parts, matrix = [], None
        for start in range(0, T, size):
            x, stop = hidden_states[:, start : start + size], min(start + size, T)
            seen: list[Tensor | None] = []
            kept = None if mask is None else mask[:, mask.shape[1] - T + start : mask.shape[1] - T + stop]
            attend = partial(_attend, read=read, kept=kept, nh=self.config.num_attention_heads, seen=seen)
            parts.append(layer(x, weights, rotations(start, stop), attend, self.drop))
            matrix = seen[0]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], matrix if output_attentions else None

    def _plan(self, T: int, past_key_values: Cache | None, output_attentions: bool) -> tuple[Read, int]:
        """How to attend, and how many tokens at once."""
        form = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, BDHParallelAttention())
        read = partial(form, self, past_key_values=past_key_values)
        if past_key_values is not None and isinstance(form, BDHRecurrentAttention):
            return read, CHUNK
        if output_attentions or T <= (WHOLE_WITH_GRADIENTS if torch.is_grad_enabled() else WHOLE):
            return read, T
        return partial(self._read_long, memory=self._remember(past_key_values), past_key_values=past_key_values), CHUNK

    def _remember(self, past_key_values: Cache | None) -> BDHStateLayer:
        """A state for the length of one call, which remembers the rows that a cache has kept."""
        memory = BDHStateLayer(self.config.num_attention_heads)
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            rows = past_key_values.layers[self.layer_idx]
            keys = rows.keys.transpose(0, 1).flatten(0, 1)  # h*B S N
            v = rows.values.transpose(0, 1).expand(self.config.num_attention_heads, -1, -1, -1).flatten(0, 1)  # h*B S D
            memory.lazy_initialization(keys, v)
            memory.state = write(memory.state, keys, v)
        return memory

    def _read_long(
        self, rotated: Tensor, v: Tensor, memory: BDHStateLayer, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """One chunk of a long text: time linear in its length also where rows are kept."""
        if past_key_values is not None:
            update_rows(self, rotated, v, past_key_values)
        return memory.read_and_write(rotated, v), None


def _attend(rotated: Tensor, v: Tensor, read: Read, kept: Tensor | None, nh: int, seen: list[Tensor | None]) -> Tensor:
    """Attention in which padding has no value, so that nobody sees it; its matrix goes to ``seen``."""
    if kept is not None:
        v = v * kept.to(v.dtype).repeat(nh, 1)[..., None]
    attention, matrix = read(rotated, v)
    seen.append(matrix)
    return attention


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
    _no_split_modules = ["BDHModel"]  # its layers share all weights
    _skip_keys_device_placement = ["past_key_values"]
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BDHLayer, "attentions": OutputRecorder(BDHLayer, index=1)}

    @property
    def _is_stateful(self) -> bool:
        """Whether tokens cannot be taken back, which assisted decoding asks."""
        return self.config._attn_implementation == "bdh_recurrent"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BDHModel):
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


class BDHModel(BDHPreTrainedModel):
    """BDH without its head: tokens to hidden states (R1 to R10).

    >>> model = BDHModel(BDHConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, mlp_internal_dim_multiplier=4))
    >>> model(torch.zeros(1, 8, dtype=torch.long)).last_hidden_state.shape
    torch.Size([1, 8, 16])
    """

    def __init__(self, config: BDHConfig) -> None:
        super().__init__(config)
        D, nh, N = config.hidden_size, config.num_attention_heads, config.sizes.n_neurons
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Parameter(torch.empty(nh, D, N))
        self.encoder_v = nn.Parameter(torch.empty(nh, D, N))
        self.decoder = nn.Parameter(torch.empty(nh * N, D))
        self.rotary = BDHRotaryEmbedding(config)
        self.layers = nn.ModuleList(BDHLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
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
        ``position_ids`` (B, T) or (1, T) count on from the cache if they are not given.
        """
        form = self.config._attn_implementation
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        demand_matrices(output_attentions, form)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(self._without_foreign_padding(input_ids))
        T = inputs_embeds.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = BDHCache(self.config)
        if past_key_values is not None:
            check_cache(past_key_values, form)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = past + torch.arange(T, device=inputs_embeds.device)
        check_mask(attention_mask, T)

        x = layer_norm(inputs_embeds)  # B T D  R1
        weights, rotations = Weights(self.encoder, self.encoder_v, self.decoder), self._rotations(position_ids, x.dtype)
        for block in self.layers:
            x, _ = block(
                x,
                weights,
                rotations,
                mask=attention_mask,
                past_key_values=past_key_values,
                output_attentions=output_attentions,
            )
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values if use_cache else None)

    def _rotations(self, position_ids: Tensor, dtype: torch.dtype) -> Rotations:
        """Those of a short text are worked out once for all layers; those of a long one in each, and never kept."""
        if position_ids.shape[-1] <= WHOLE_WITH_GRADIENTS:
            table = self.rotary(position_ids, dtype)  # T N/2 2, or B T N/2 2
            return lambda start, stop: table[..., start:stop, :, :]
        return lambda start, stop: self.rotary(position_ids[..., start:stop], dtype)

    def _without_foreign_padding(self, input_ids: Tensor) -> Tensor:
        """Tokens in which padding that is no id of the vocabulary, as a tokenizer of bytes has it, reads as id 0."""
        pad = self.config.pad_token_id
        return input_ids if pad is None or pad < self.config.vocab_size else input_ids.masked_fill(input_ids == pad, 0)


def check_mask(attention_mask: Tensor | None, T: int) -> None:
    """Refuse masks that are no padding masks: causality is the model's own."""
    if attention_mask is not None and (attention_mask.ndim != 2 or attention_mask.shape[1] < T):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give (B, S) with S at least the {T} tokens at hand,"
            " 0 where there is padding"
        )


class BDHForCausalLM(BDHPreTrainedModel, GenerationMixin):
    """BDH with its head: tokens to logits, and text."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embed.weight"}

    def __init__(self, config: BDHConfig) -> None:
        super().__init__(config)
        self.backbone = BDHModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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

        Labels are shifted here: label t is compared with what was said at t-1. -100 counts for nothing. No cache is built in
        training or for a loss unless it is asked for.
        """
        if use_cache is None and (self.training or labels is not None):
            use_cache = False
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))  # B T V  R11
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Make the cache that the present form of attention needs; refuse those that it cannot have."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"BDH has no cache_implementation {kind!r}: leave it out, and bdh_recurrent keeps a state of fixed size,"
                " bdh_parallel the rows of all tokens"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = BDHCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
