"""Baby Dragon Hatchling in PyTorch.

>>> from bdh_torch import BDH, BDHConfig
"""

from bdh_spec import BDHConfig
from bdh_torch.model import BDH, RecurrentState

__all__ = ["BDH", "BDHConfig", "RecurrentState"]
