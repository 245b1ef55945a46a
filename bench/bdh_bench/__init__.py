"""Measurements side by side: every port beside the plain form of the model, in one run, on one machine."""
