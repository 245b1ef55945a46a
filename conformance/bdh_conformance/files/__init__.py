"""Vectors: cases as files, for ports in other languages."""
