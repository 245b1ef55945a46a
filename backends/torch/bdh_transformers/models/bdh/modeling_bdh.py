"""The model and what it is made of, where the earlier integration has them."""

from bdh_transformers.attention_bdh import BDHParallelAttention, BDHRecurrentAttention
from bdh_transformers.cache_bdh import BDHCache
from bdh_transformers.configuration_bdh import BDHConfig
from bdh_transformers.modeling_bdh import BDHForCausalLM, BDHModel, BDHPreTrainedModel

__all__ = [
    "BDHCache",
    "BDHConfig",
    "BDHForCausalLM",
    "BDHModel",
    "BDHParallelAttention",
    "BDHPreTrainedModel",
    "BDHRecurrentAttention",
]
