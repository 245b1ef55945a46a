"""A model on several processes or devices: what is shared among them, and the processes themselves."""

from __future__ import annotations

from dataclasses import dataclass

from bdh_spec.config import BDHConfig
from bdh_spec.errors import CapabilityError, ConfigError

KINDS = ("data", "neurons", "weights")  # what a port may be able to share, as it names them in its capabilities


@dataclass(frozen=True)
class Spread:
    """How a model lies on a mesh of ``data`` times ``neurons`` processes or devices.

    Those along ``data`` each read their own of the texts of a batch; those along ``neurons`` each have as many neurons of every
    head. With ``shares_weights``, weights and moments are shared along ``data`` as well, which else each holds all of.

    >>> Spread(data=2, neurons=3).size
    6
    """

    data: int = 1
    neurons: int = 1
    shares_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "neurons"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a spread has {name} {getattr(self, name)}: give a whole number of at least 1")

    @property
    def size(self) -> int:
        """Processes or devices in all."""
        return self.data * self.neurons

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is shared: some of KINDS."""
        wanted = {"data": self.data > 1, "neurons": self.neurons > 1, "weights": self.shares_weights}
        return tuple(kind for kind in KINDS if wanted[kind])

    def check(self, config: BDHConfig, offered: tuple[str, ...], port: str) -> None:
        """Refuse what the port does not share, and a model that cannot be shared so."""
        for kind in self.kinds:
            if kind not in offered:
                raise CapabilityError(f"the {port} port does not share {kind}: it shares {', '.join(offered) or 'nothing'}")
        if config.mlp_internal_dim_multiplier % self.neurons or config.n_neurons % (2 * self.neurons):
            raise ConfigError(
                f"{config.n_neurons} neurons per head ({config.mlp_internal_dim_multiplier} widths) do not make {self.neurons}"
                " equal parts of whole pairs: share neurons among a divisor of mlp_internal_dim_multiplier"
            )
        if self.shares_weights and config.n_embd % self.data:
            raise ConfigError(f"weights {config.n_embd} wide do not divide among {self.data}: choose a divisor of n_embd")


class Team:
    """The processes that a launcher started together, as one of them sees it. This is a process alone."""

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def places(self) -> int:
        """Where a model may lie that all of them share: in each process or, where one has several devices, on each of those."""
        return self.size

    def any(self, wish: bool) -> bool:
        """Whether one of all wishes it: asked by all at once."""
        return wish

    def wait(self) -> None:
        """Go on when all are here."""
