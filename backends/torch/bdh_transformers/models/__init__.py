"""Where transformers and the earlier integration of BDH keep a model."""
