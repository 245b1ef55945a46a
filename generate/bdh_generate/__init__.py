"""bdh-generate: text from a checkpoint, on any port."""
