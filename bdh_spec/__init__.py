"""Baby Dragon Hatchling (arXiv 2509.26507): the executable specification, and the door to its ports.

>>> import bdh_spec
>>> bdh_spec.load(backend="numpy").generate("The ", 0)
b'The '
"""

from bdh_spec.checkpoint import SPEC_VERSION, save
from bdh_spec.config import BDHConfig
from bdh_spec.errors import (
    BackendUnavailable,
    BDHError,
    CapabilityError,
    CheckpointError,
    ConfigError,
    ForeignTokensWarning,
    OptimizerError,
    OwnFrequenciesWarning,
    ParamsError,
    SamplingError,
    StateError,
    TokensError,
)
from bdh_spec.model import RecurrentState
from bdh_spec.optimizer import AdamW, OptimizerState
from bdh_spec.params import Params, fingerprint, init
from bdh_spec.protocol import Backend, Batch, Capabilities, Model, Optimizer, State
from bdh_spec.registry import PortReport, backends, choose, get_backend, load, read
from bdh_spec.rope import Frequencies
from bdh_spec.sampling import Sampling
from bdh_spec.spread import Spread, Team

__version__ = "0.1.0"

__all__ = [
    "SPEC_VERSION",
    "AdamW",
    "BDHConfig",
    "BDHError",
    "Backend",
    "BackendUnavailable",
    "Batch",
    "Capabilities",
    "CapabilityError",
    "CheckpointError",
    "ConfigError",
    "ForeignTokensWarning",
    "Frequencies",
    "Model",
    "Optimizer",
    "OptimizerError",
    "OptimizerState",
    "OwnFrequenciesWarning",
    "Params",
    "ParamsError",
    "PortReport",
    "RecurrentState",
    "Sampling",
    "SamplingError",
    "Spread",
    "State",
    "StateError",
    "Team",
    "TokensError",
    "backends",
    "choose",
    "fingerprint",
    "get_backend",
    "init",
    "load",
    "read",
    "save",
]
