"""Baby Dragon Hatchling for Hugging Face transformers. Importing this registers the model type ``bdh`` with the Auto classes.

>>> import bdh_transformers
>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained("folder")  # doctest: +SKIP
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bdh_transformers.attention_bdh import BDHParallelAttention, BDHRecurrentAttention
from bdh_transformers.batching import ContinuousBatch
from bdh_transformers.cache_bdh import BDHCache, BDHStaticCache
from bdh_transformers.configuration_bdh import BDHConfig
from bdh_transformers.modeling_bdh import BDHForCausalLM, BDHModel
from bdh_transformers.tokenization_bdh import BDHTokenizer

__all__ = [
    "BDHCache",
    "BDHConfig",
    "BDHForCausalLM",
    "BDHModel",
    "BDHParallelAttention",
    "BDHRecurrentAttention",
    "BDHStaticCache",
    "BDHTokenizer",
    "ContinuousBatch",
]

AutoConfig.register(BDHConfig.model_type, BDHConfig)
AutoModel.register(BDHConfig, BDHModel)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM)
AutoTokenizer.register(BDHConfig, BDHTokenizer)
# Where Trainer looks whether labels are shifted when it smooths them; registration leaves this table as it is.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[BDHConfig.model_type] = BDHForCausalLM.__name__
