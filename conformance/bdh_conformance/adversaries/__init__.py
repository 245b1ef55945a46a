"""Ports that are wrong on purpose, ports that only look it, and the diagnosis that tells which a port resembles."""
