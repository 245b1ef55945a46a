"""BDHConfig for transformers: the six numbers of a model under the names that transformers uses, and its token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict

from bdh_spec.config import BDHConfig as Sizes
from bdh_spec.errors import CapabilityError
from bdh_transformers.remote_code import ConfigWithCode

FORMS = ("bdh_recurrent", "bdh_parallel", "eager")  # of attention; eager is what transformers calls the parallel one
DEFAULT_FORM = "bdh_recurrent"


@strict
class BDHConfig(ConfigWithCode):
    """Sizes of a model, the ids of its special tokens, and whether its head is its embedding.

    >>> BDHConfig(hidden_size=64, num_attention_heads=2).sizes.n_neurons
    4096
    """

    model_type = "bdh"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    mlp_internal_dim_multiplier: int = 128
    dropout: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    if TYPE_CHECKING:  # these would be two more options otherwise
        _output_attentions: bool | None
        _attn_implementation: str | None
        _built_with_cache: bool

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._built_with_cache = self.use_cache

    def to_dict(self) -> dict[str, Any]:
        """All options by name."""
        return {name: value for name, value in super().to_dict().items() if name != "_built_with_cache"}

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """Write the configuration, with the ``use_cache`` that it was made with.

        Trainer turns it off for the length of a run, and whoever loads the model afterwards would read on without a cache.
        """
        for_now = self.use_cache
        self.use_cache = self._built_with_cache
        try:
            super().to_json_file(json_file_path, use_diff)
        finally:
            self.use_cache = for_now

    @property
    def sizes(self) -> Sizes:
        """The same six numbers as the specification and the ports have them."""
        return Sizes(
            n_layer=self.num_hidden_layers,
            n_embd=self.hidden_size,
            dropout=self.dropout,
            n_head=self.num_attention_heads,
            mlp_internal_dim_multiplier=self.mlp_internal_dim_multiplier,
            vocab_size=self.vocab_size,
        )

    @classmethod
    def from_sizes(cls, sizes: Sizes, **options: Any) -> BDHConfig:
        """The configuration of a model of these sizes, which the specification and the ports share."""
        if sizes.freqs is not None:
            raise CapabilityError(
                "the model brings its own frequencies, which no folder of transformers stores: run it on another port, or"
                " convert it with bdh-convert --freqs reset, which writes BDH's"
            )
        return cls(
            num_hidden_layers=sizes.n_layer,
            hidden_size=sizes.n_embd,
            dropout=sizes.dropout,
            num_attention_heads=sizes.n_head,
            mlp_internal_dim_multiplier=sizes.mlp_internal_dim_multiplier,
            vocab_size=sizes.vocab_size,
            **options,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration. Where it does not say whether the head is the embedding, it is.

        transformers 4 did not write what equalled its default, and there a head was tied unless told otherwise. Where a file of
        weights has a head of its own all the same, transformers sees that and leaves it alone.
        """
        return super().from_dict({"tie_word_embeddings": True, **config_dict}, **kwargs)

    def validate_architecture(self) -> None:
        """Refuse sizes of which no model can be made: N must be even, and all of them positive."""
        self.sizes  # noqa: B018  its constructor checks

    def validate_token_ids(self) -> None:
        """Padding may lie outside the vocabulary, as that of a tokenizer of bytes does: the model never looks it up."""

    def validate_output_attentions(self) -> None:
        """Refuse attention matrices where there are none."""
        demand_matrices(self.output_attentions, self._attn_implementation)

    @property
    def output_attentions(self) -> bool | None:
        """Whether forward returns attention matrices, which only the parallel form has."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        if value and self._attn_implementation is None:
            self._attn_implementation = "eager"
        demand_matrices(value, self._attn_implementation)
        self._output_attentions = value


def demand_matrices(wanted: bool | None, form: str | None) -> None:
    """Refuse to show the attention matrix of a form that never has one."""
    if wanted and form == "bdh_recurrent":
        raise ValueError(
            "bdh_recurrent has no attention matrix to output: use attn_implementation='bdh_parallel' or"
            " model.set_attn_implementation('bdh_parallel')"
        )
