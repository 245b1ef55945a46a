"""The tests that transformers runs on every model of its own, run on ours, once for each form of attention.

They come from the source distribution (transformers_tests.py). It carries the tests that all models have in common, one that
overfits, and those of configurations: all of these run here. It does not carry ``generation/test_utils.py``, whose subjects
have tests of this project: test_generate.py, test_static.py and test_generation_reach.py. ``exporters/test_export.py`` is
missing as well. What it carries of pipelines, FSDP, tensor and expert parallelism cannot be imported, for lack of
``utils/tiny_model_summary.json`` and ``distributed_testing_utils.py``.
Its ``MemoryCleanupMixin`` frees memory and tests nothing.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from bdh_transformers import BDHConfig, BDHForCausalLM, BDHModel

from .transformers_tests import load

common, training, configuration = map(load, ("test_modeling_common", "test_training_mixin", "test_configuration_common"))

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_internal_dim_multiplier": 4,
}
TOKENS = {"bos_token_id": 96, "eos_token_id": 97, "pad_token_id": 98}

# What is not run, and why. A pattern must fit some test, and no other test may be skipped by transformers itself.
SKIPPED: dict[str, tuple[str, ...]] = {
    "BDH is not made of other models": ("test_*_composite_model*", "test_internal_model_config_and_subconfig_are_same"),
    "BDH has no softmax, so there is no sdpa, flash or flex attention, and no kernel, that could stand in for another": (
        "test_eager_matches_sdpa_inference_*",
        "test_sdpa_*",
        "test_flash_attn_*",
        "test_flex_attention_with_grads",
        "test_kernels_can_load_without_crashing",
    ),
    "BDH reads text: no pictures, sounds or films, and no features of a text": (
        "test_get_*_features_*",
        "test_vision_axial_rope",
    ),
    "BDH has no encoder beside its decoder": ("test_encoder_decoder_loss_no_double_shift",),
    "BDH has no head that classifies": (
        "test_problem_types",
        "test_load_with_mismatched_shapes",
        "test_can_load_ignoring_mismatched_shapes",
    ),
    "BDH has no experts": (
        "test_eager_matches_batched_and_grouped_inference_*",
        "test_moe_models_record_router_logits",
        "test_output_router_logits_from_config",
    ),
    "BDH sees all earlier tokens": ("test_sliding_window_mask",),
    "phases of BDH are the specification's at every position: they have no scale, no part and no table": (
        "test_model_rope_*",
        "test_resize_position_vector_embeddings",
    ),
    "BDH has no tensor parallel plan: all its layers share three weights": (
        "test_tp_plan_matches_params",
        "test_tied_head_has_a_tp_plan_entry",
    ),
    "BDH has had one set of names for its weights": ("test_reverse_loading_mapping", "test_can_load_from_already_mapped_keys"),
    "BDH keeps no weight from being saved, and none in float32": (
        "test_save_load_keys_to_ignore_on_save",
        "test_keep_in_fp32_modules*",
    ),
    "the tests of generation, which this one looks for, are not in the source distribution": (
        "test_generation_tester_mixin_inheritance",
    ),
    "deepspeed is no dependency of this project": ("test_*_with_deepspeed*",),
}
WITHOUT_MATRICES = {
    "bdh_recurrent has no attention matrix to show": ("test_attention_outputs", "test_capture_outputs_decorator")
}
# These run where there is one; transformers skips them elsewhere.
NEEDS_A_GPU = (
    "test_can_load_with_device_context_manager",
    "test_can_load_with_global_device_set",
    "test_cpu_offload",
    "test_disk_offload_*",
    "test_model_parallelism",
    "test_torch_compile_for_training",
)

Class = TypeVar("Class", bound=type)


def skip(table: Mapping[str, tuple[str, ...]]) -> Callable[[Class], Class]:
    """Skip a class's tests by this table of reasons and patterns, and have transformers skip none beside them."""

    def apply(cls: Class) -> Class:
        for reason, patterns in table.items():
            for name in (name for pattern in patterns for name in _names(cls, pattern)):
                setattr(cls, name, _skipped(reason))
        _refuse_other_skips(cls, [*NEEDS_A_GPU, *(pattern for patterns in table.values() for pattern in patterns)])
        return cls

    return apply


def _skipped(reason: str) -> Callable[..., None]:
    """Stand in for a test. All of one reason are counted together, as they stand in the same line."""

    @unittest.skip(reason)
    def test(self: unittest.TestCase) -> None:
        """Check nothing."""

    return test


def _names(cls: type, pattern: str) -> list[str]:
    names = [name for name in dir(cls) if fnmatch(name, pattern) and callable(getattr(cls, name))]
    if not names:
        raise ValueError(f"{pattern} fits no test of {cls.__name__}: take it off the table of skips")
    return names


def _refuse_other_skips(cls: type, patterns: list[str]) -> None:
    for name in _names(cls, "test_*"):
        why = getattr(getattr(cls, name), "__unittest_skip_why__", "")
        if why and not any(fnmatch(name, pattern) for pattern in patterns):
            raise ValueError(f"transformers skips {name} ({why}): put it on the table of skips with a reason, or make it run")


class Tiny:
    """What the tests ask for a model to test: its sizes, and a text with padding."""

    causal_lm_class = BDHForCausalLM
    is_training = True
    batch_size, seq_length = 3, 7
    num_hidden_layers = SIZES["num_hidden_layers"]
    hidden_size = SIZES["hidden_size"]
    num_attention_heads = SIZES["num_attention_heads"]

    def __init__(self, form: str) -> None:
        self.form = form

    def get_config(self) -> BDHConfig:
        """Its configuration, new each time: the tests change it."""
        return BDHConfig(**SIZES, **TOKENS, attn_implementation=self.form)

    def prepare_config_and_inputs_for_common(self) -> tuple[BDHConfig, dict[str, torch.Tensor]]:
        """Its configuration, and texts of which the second is a token longer than the first, and so on."""
        tokens = torch.randint(min(TOKENS.values()), (self.batch_size, self.seq_length))
        mask = torch.ones_like(tokens).tril(self.seq_length - self.batch_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}


class OwnTests(common.ModelTesterMixin, training.TrainingTesterMixin, common.GenerationTesterMixin):
    """Every test for either form."""

    form: str
    all_model_classes = (BDHModel, BDHForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # run it, whatever year a file says
    _torch_compile_train_cls = BDHForCausalLM

    @property
    def model_tester(self) -> Tiny:
        """The model under test."""
        return Tiny(self.form)

    @pytest.fixture(autouse=True)
    def _one_of_their_own(self) -> Iterator[None]:
        """Name the classes where the tests look up which is a bare model and which has a loss; same weights each run."""
        torch.manual_seed(0)
        with (
            mock.patch.dict(common.MODEL_MAPPING_NAMES, bdh="BDHModel"),
            mock.patch.dict(common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, bdh="BDHForCausalLM"),
        ):
            yield

    def skipTest(self, reason: Any) -> None:
        """Fail: what a test finds not to apply belongs on the table."""
        raise AssertionError(f"transformers skips this test ({reason}): put it on the table of skips, or make it run")

    def test_config(self) -> None:
        """Run the tests of configurations."""
        configuration.ConfigTester(self, config_class=BDHConfig, **SIZES).run_common_tests()

    def test_tied_weights_keys(self) -> None:
        """Tie head and embedding, on which the test of this name does not insist: a model that ties nothing passes it."""
        super().test_tied_weights_keys()
        config = self.model_tester.get_config()
        config.tie_word_embeddings = True
        model = BDHForCausalLM(config)
        assert model.lm_head.weight is model.backbone.embed.weight

    def test_can_set_attention_dynamically(self) -> None:
        """Switch between our forms, where the test of this name wants sdpa."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            for form in ("bdh_parallel", "eager", "bdh_recurrent", self.form):
                model.set_attn_implementation(form)
                with pytest.raises(ValueError, match="attn_implementation is 'sdpa'"):
                    model.set_attn_implementation("sdpa")
                assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {form}


@skip(SKIPPED | WITHOUT_MATRICES)
class TestRecurrent(OwnTests, unittest.TestCase):
    form = "bdh_recurrent"
    has_attentions = False


@skip(SKIPPED)
class TestParallel(OwnTests, unittest.TestCase):
    form = "bdh_parallel"
