"""bdh-look: inside a model, on any port: what it did at each byte, and what if it had been otherwise.

>>> import bdh_look, bdh_spec
>>> record = bdh_look.record(bdh_spec.load(backend="numpy"), "The dragon")
>>> record.xy_sparse
<xy_sparse (layer 4, head 4, time 10, neuron 512)>
"""

from bdh_look.errors import LookError
from bdh_look.intervene import (
    Intervened,
    Intervention,
    Neuron,
    Synapse,
    add_to_synapses,
    amplify,
    cut_neurons,
    cut_synapses,
    go_on,
    intervene,
    silence,
)
from bdh_look.record import Named, Record, record

__all__ = [
    "Intervened",
    "Intervention",
    "LookError",
    "Named",
    "Neuron",
    "Record",
    "Synapse",
    "add_to_synapses",
    "amplify",
    "cut_neurons",
    "cut_synapses",
    "go_on",
    "intervene",
    "record",
    "silence",
]
