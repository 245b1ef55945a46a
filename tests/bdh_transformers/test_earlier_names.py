"""Who comes from the earlier integration finds its names."""

import importlib

import bdh_transformers


def test_the_earlier_integration_s_imports_find_the_same_classes() -> None:
    names = {"configuration_bdh": ["BDHConfig"], "modeling_bdh": ["BDHForCausalLM", "BDHModel", "BDHCache"]}
    for module, found in names.items():
        there = importlib.import_module(f"bdh_transformers.models.bdh.{module}")
        assert all(getattr(there, name) is getattr(bdh_transformers, name) for name in found)
        assert all(hasattr(there, name) for name in there.__all__)
