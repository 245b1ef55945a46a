"""Checkpoints of every BDH dialect, read, converted and inspected without the framework that wrote them."""
