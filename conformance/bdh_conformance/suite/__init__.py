"""The checks as pytest tests: see bdh_conformance.plugin."""
