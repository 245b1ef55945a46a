"""What can go wrong when one looks inside a model."""

from __future__ import annotations

from bdh_spec import BDHError


class LookError(BDHError, ValueError):
    """A neuron, synapse, text or corpus that there is nothing to see of."""
