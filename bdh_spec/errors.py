"""What can go wrong, by whose fault. Every message states the fact, the value, the place and the next step."""


class BDHError(Exception):
    """Any error that this project raises on purpose."""


class ConfigError(BDHError, ValueError):
    """A configuration that describes no BDH model."""


class ParamsError(BDHError, ValueError):
    """Weights that do not fit their configuration."""


class TokensError(BDHError, ValueError):
    """Tokens or targets that no model of this vocabulary can read."""


class ForeignTokensWarning(BDHError, UserWarning):  # noqa: N818  a warning, and an error only to who writes bytes
    """Weights of a model whose tokens are no bytes, so that text must go through its own tokenizer."""


class OwnFrequenciesWarning(BDHError, UserWarning):  # noqa: N818  a warning, and an error only to who wants none
    """Weights of a model with frequencies of its own, which computes by them and not by BDH's table."""


class StateError(BDHError, ValueError):
    """A recurrent state of another batch, of another model, or one already given away."""


class OptimizerError(BDHError, ValueError):
    """An optimiser of another model, moments that do not fit, or settings and rates that make no step."""


class SamplingError(BDHError, ValueError):
    """A temperature, top_k, seed or length that defines no distribution."""


class CheckpointError(BDHError, ValueError):
    """A file that is not the checkpoint or the state it is taken for."""


class CapabilityError(BDHError, ValueError):
    """A device, dtype, phase, verb or kind of model that this port does not claim."""


class BackendUnavailable(BDHError, ImportError):  # noqa: N818  it states a fact of the machine, not a mistake
    """A port whose framework is not installed here."""
