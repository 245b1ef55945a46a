"""BDH as a module of PyTorch: the equations of ``bdh_spec.model``, in the same order.

Axes: B batch, T time, h head (nh of them), N neurons per head, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh_spec import BDHConfig, TokensError
from bdh_spec.checks import check_tokens
from bdh_spec.model import IGNORE
from bdh_spec.params import INIT_STD
from bdh_spec.rope import Phase
from bdh_spec.sampling import Sampling, check_length, sample, uniform
from bdh_torch import decode, forms, streamed
from bdh_torch.attention import Note, attend, unnoted, without_padding, write
from bdh_torch.forms import Attention, Kernel
from bdh_torch.layer import Attend, Weights, layer, layer_norm, residual, wide
from bdh_torch.rope import Rotary, check_frequencies, relative


@dataclass(frozen=True)
class RecurrentState:
    """What the model remembers of B texts (R13): their length and, per layer, one matrix per head."""

    position: int  # tokens read so far
    layers: Sequence[Tensor]  # L of h*B N D, never narrower than float32; of a short text they are made when looked at
    blank: bool = False  # nothing was written yet, so there is nothing to read


class BDH(nn.Module):
    """Baby Dragon Hatchling, with the interface and the ``state_dict`` of the original implementation.

    >>> model = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4))
    >>> logits, loss = model(torch.zeros(1, 8, dtype=torch.long))
    >>> logits.shape
    torch.Size([1, 8, 256])
    """

    def __init__(
        self,
        config: BDHConfig,
        *,
        phase: Phase = "exact",
        kernel: Kernel | None = None,
        attention: Attention | None = None,
    ) -> None:
        """``kernel`` and ``attention`` choose one of the forms that compute the same: see ``bdh_torch.forms``."""
        super().__init__()
        self.config, self.kernel, self.attention = config, forms.known(kernel, Kernel), forms.known(attention, Attention)
        V, D, nh, N = config.vocab_size, config.n_embd, config.n_head, config.n_neurons
        self.embed = nn.Embedding(V, D)
        self.encoder = nn.Parameter(torch.empty(nh, D, N))
        self.encoder_v = nn.Parameter(torch.empty(nh, D, N))
        self.decoder = nn.Parameter(torch.empty(nh * N, D))
        self.lm_head = nn.Parameter(torch.empty(D, V))
        self.attn = Rotary(config, phase)  # named as in checkpoints
        self.drop = nn.Dropout(config.dropout)
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_check_frequencies)  # type: ignore[no-untyped-call]  # PyTorch has not typed it
        self.register_load_state_dict_post_hook(_restore_phases)  # type: ignore[no-untyped-call]  # PyTorch has not typed it

    @property
    def weights(self) -> Weights:
        """What every layer applies."""
        return Weights(self.encoder, self.encoder_v, self.decoder)

    def reset_parameters(self) -> None:
        """Fresh weights, normal with standard deviation 0.02."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD)
        self.attn.reset(self.encoder.device)

    def laid_out_for_decoding(self) -> BDH:
        """This model, ``encoder_v`` in the order of memory in which a CPU reads what few active neurons need of it.

        Its values are what they were, and training goes on with them; but in the state dict it is no longer contiguous.
        """
        self.encoder_v.data = decode.neurons_first(self.encoder_v.data)
        return self

    def trace(self, idx: Tensor, note: Note = unnoted, kept: Tensor | None = None) -> Tensor:
        """Logits by the parallel form; ``note`` is shown each stage under its name, layer after layer.

        Where ``kept`` (B, T) is 0 there is padding, which changes no logit but its own.
        """

        def read(rotated: Tensor, v: Tensor) -> Tensor:
            return attend(rotated, v if kept is None else without_padding(v, kept), None, note)

        x, rotations = self._start(idx, self._from_first_token(idx, kept))
        note("embed", x)
        for _ in range(self.config.n_layer):
            x = self._layer(x, rotations, read, note)
        return note("logits", x @ self.lm_head)  # B T V  R11

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T) to logits (B, T, V), and their loss if targets are given, already shifted (R12)."""
        _demand_rectangle(idx)
        if self.attention == "recurrent":
            logits, _ = self._advance(self.init_state(idx.shape[0]), torch.split(idx, 1, dim=1), donate=True)
        elif self._streams(idx):
            logits = self._stream(idx, None)
        elif self.attention != "chunked" and (
            self.attention == "parallel" or forms.is_read_whole(idx.shape[1], self.config.n_embd)
        ):
            logits = self.trace(idx)
        else:
            logits, _ = self._advance(self.init_state(idx.shape[0]), torch.split(idx, forms.CHUNK, dim=1), donate=True)
        return logits, None if targets is None else loss(logits, targets)

    def init_state(self, batch: int = 1) -> RecurrentState:
        """The state before the first token: zeros."""
        is_plain = self.kernel is not None or self.attention is not None
        return blank(self.config, batch, self.encoder, keeps_rows=not is_plain)

    def advance(self, state: RecurrentState, idx: Tensor, *, donate: bool = False) -> tuple[Tensor, RecurrentState]:
        """Read tokens (B, T) after the text that the state remembers: their logits (B, T, V), and the state after them.

        One token is the recurrent form, more the chunked one. A donated state must not be used again: it is updated in
        place, unless gradients are recorded, which need what it was.
        """
        _demand_rectangle(idx)
        if self.attn.in_pairs and forms.steps(self.kernel, self.attention, idx, self.weights, self.drop):
            return self._step_on_gpu(state, idx, donate=donate)
        if self.attn.in_pairs and forms.decodes(self.kernel, self.attention, idx, self.weights, self.drop):
            return self._step(state, idx, donate=donate)
        if not torch.is_grad_enabled() and self._streams(idx):
            layers = tuple(state.layers) if donate else tuple(memory.clone() for memory in state.layers)
            logits = self._stream(idx, replace(state, layers=layers))
            return logits, RecurrentState(state.position + idx.shape[1], layers)
        return self._advance(state, torch.split(idx, forms.CHUNK, dim=1), donate=donate)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """The tokens (B, T) and their continuation, (B, T + max_new_tokens), read once and then continued token by token.

        One seed gives one text (R14), the same as from every other port. Without a seed the text is a new one each time, by
        PyTorch's own generator, so that ``torch.manual_seed`` makes it come again.
        """
        check_length(max_new_tokens)
        how = Sampling(temperature, top_k, fresh_seed() if seed is None else seed)
        check_tokens(idx.cpu().numpy(), self.config)
        training = self.training
        self.eval()
        try:
            text, state = [idx], self.init_state(idx.shape[0])
            for _ in range(max_new_tokens):
                logits, state = self.advance(state, text[-1], donate=True)
                rows = logits[:, -1].to("cpu", wide(logits.dtype)).numpy()
                drawn = [sample(row, uniform(how.seed, state.position, b), how) for b, row in enumerate(rows)]
                text.append(torch.tensor(drawn, dtype=idx.dtype, device=idx.device)[:, None])
        finally:
            self.train(training)
        return torch.cat(text, dim=1)

    def _start(self, idx: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer reads (R1), and the rotations that all layers and heads share."""
        x = layer_norm(self.embed(idx))  # B T D
        return x, self.attn(positions, wide(self.encoder.dtype))

    def _layer(self, x: Tensor, rotations: Tensor, attend: Attend, note: Note = unnoted) -> Tensor:
        return layer(x, self.weights, rotations, attend, self.drop, note)

    def _from_first_token(self, idx: Tensor, kept: Tensor | None) -> Tensor:
        """The positions of a text (T), or (B, T) where padding is before the texts and an offset is no matter of naming."""
        if kept is None or self.attn.in_pairs:
            return torch.arange(idx.shape[1], device=idx.device)
        return (kept.long().cumsum(1) - 1).clamp(min=0)

    def _streams(self, idx: Tensor) -> bool:
        """Whether these tokens are read by the streamed kernel."""
        if not self.attn.in_pairs:
            return False  # what turns the two neurons of a pair differently is no complex number
        if self.attn.phase == "float32" and idx.shape[1] > self._chunk(idx.shape[1]):
            return False  # phases that are rounded at each position are not relative
        return forms.streams(self.kernel, idx, self.weights, self.drop)

    def _chunk(self, T: int) -> int:
        """How many tokens the streamed kernel reads by their scores."""
        return forms.chunk(T, self.attention, self.encoder)

    def _stream(self, idx: Tensor, state: RecurrentState | None) -> Tensor:
        """Logits by the streamed kernel. A state is updated in place."""
        T, start = idx.shape[1], state.position if state else 0
        x, chunk = layer_norm(self.embed(idx)), self._chunk(T)  # B T D  R1
        rotations = relative(start, T, chunk, self.attn.fixed, wide(self.encoder.dtype), self.attn.phase)
        dropout = self.drop.p if self.training else 0.0
        memories = state.layers if state else (None,) * self.config.n_layer
        for memory in memories:
            blank = state is not None and state.blank
            decoded = streamed.gated(x, self.weights, rotations, chunk, memory, blank=blank, dropout=dropout)
            x = residual(x, decoded)
        return x @ self.lm_head  # B T V  R11

    def _step(self, state: RecurrentState, idx: Tensor, *, donate: bool) -> tuple[Tensor, RecurrentState]:
        """``advance`` by one token (B, 1) of each text."""
        x, weights = layer_norm(self.embed(idx[:, 0])), self.weights  # B D  R1
        position = torch.tensor([state.position], device=idx.device)
        rotations = torch.view_as_complex(self.attn(position, wide(x.dtype)))  # 1 N/2
        memories = decode.memories(state.layers, 1, donate=donate)
        for memory in memories:
            x = residual(x, decode.gated(x, x, weights, rotations, memory.through))
        return (x @ self.lm_head)[:, None], RecurrentState(state.position + 1, decode.Memories(memories))  # B 1 V  R11

    def _step_on_gpu(self, state: RecurrentState, idx: Tensor, *, donate: bool) -> tuple[Tensor, RecurrentState]:
        """``advance`` by one token (B, 1) of each text."""
        fused = import_module("bdh_torch.fused_decode")  # what Triton is installed for alone
        layers, weights = state.layers, self.weights
        if not donate or not isinstance(layers, fused.Steps):
            layers = fused.Steps([memory if donate else memory.clone() for memory in layers])

        def read(tokens: Tensor, position: Tensor) -> Tensor:
            x = layer_norm(self.embed(tokens))  # B D  R1
            turned = self.attn(torch.cat([position, position - position]), torch.float32).flatten(1)  # and not at all
            for memory in layers:
                x = fused.gated(x, weights, turned.split(1), memory)
            return x @ self.lm_head  # B V  R11

        logits = layers.read(idx[:, 0], state.position, [*self.parameters(), self.attn.fixed], read)
        return logits[:, None], RecurrentState(state.position + 1, layers)

    def _advance(self, state: RecurrentState, chunks: Sequence[Tensor], *, donate: bool) -> tuple[Tensor, RecurrentState]:
        logits = []
        for chunk in chunks:
            part, state = self._advance_chunk(state, chunk, donate=donate and not torch.is_grad_enabled())
            logits.append(part)
            donate = True  # from here on the state is nobody else's
        return torch.cat(logits, dim=1), state

    def _advance_chunk(self, state: RecurrentState, idx: Tensor, *, donate: bool) -> tuple[Tensor, RecurrentState]:
        x, rotations = self._start(idx, state.position + torch.arange(idx.shape[1], device=idx.device))
        if decode.has_room(state.layers, idx.shape[1]):
            rows = decode.memories(state.layers, idx.shape[1], donate=donate)
            for memory in rows:
                x = self._layer(x, rotations, memory.through)
            return x @ self.lm_head, RecurrentState(state.position + idx.shape[1], decode.Memories(rows))
        memories: list[Tensor] = []

        def attend_and_write(rotated: Tensor, v: Tensor) -> Tensor:
            memory = state.layers[len(memories)]
            attention = attend(rotated, v, None if state.blank else memory)
            memories.append(write(memory, rotated, v, donate=donate))
            return attention

        for _ in state.layers:
            x = self._layer(x, rotations, attend_and_write)
        return x @ self.lm_head, RecurrentState(state.position + idx.shape[1], tuple(memories))


def blank(config: BDHConfig, batch: int, like: Tensor, *, keeps_rows: bool) -> RecurrentState:
    """The state before the first token, of a model with weights ``like`` this one in dtype and device."""
    c, sizes = config, (config.n_head * batch, batch, config.n_neurons, config.n_embd)
    layers = [decode.Memory.blank(*sizes, like=like, keeps_rows=keeps_rows) for _ in range(c.n_layer)]
    return RecurrentState(0, decode.Memories(layers), blank=True)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats over the targets that are not ignored (R12)."""
    return F.cross_entropy(logits.flatten(0, 1).to(wide(logits.dtype)), targets.flatten(), ignore_index=IGNORE)


def fresh_seed() -> int:
    """A seed from PyTorch's own generator."""
    return int(torch.randint(2**63 - 1, ()))


def _demand_rectangle(idx: Tensor) -> None:
    if idx.ndim != 2 or 0 in idx.shape:
        raise TokensError(f"tokens have shape {tuple(idx.shape)}: give at least one text of at least one token, (B, T)")


def _check_frequencies(module: BDH, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}attn.freqs" in state_dict:
        check_frequencies(state_dict[f"{prefix}attn.freqs"], module.attn.table)


def _restore_phases(module: BDH, incompatible: Any) -> None:
    module.attn.restore(module.encoder.device)
