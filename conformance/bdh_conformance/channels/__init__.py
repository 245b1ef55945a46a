"""What the suite looks at, channel by channel."""

from bdh_conformance.channels import dropout, refusals, sampling
from bdh_conformance.channels.channel import WIDE, Channel
from bdh_conformance.channels.ownership import judge_pairs, observe_determinism, observe_mutation
from bdh_conformance.channels.parallel import (
    batch_reference,
    observe_batch,
    observe_gradients,
    observe_logits,
    observe_loss,
    observe_padding,
    observe_traces,
    padding_reference,
)
from bdh_conformance.channels.properties import judge_properties, observe_properties
from bdh_conformance.channels.recurrent import decode_reference, observe_decode, observe_phases, observe_states
from bdh_conformance.channels.training import observe_training, trainable
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import POOL

CHANNELS = {
    channel.name: channel
    for channel in (
        Channel("logits", "forward", "logits of the parallel form", ("forward",), observe_logits),
        Channel("traces", "traces", "every stage of every layer", ("trace",), observe_traces),
        Channel("loss", "forward", "mean cross entropy", ("loss",), observe_loss),
        Channel(
            "gradients",
            "gradients",
            "the slope of the loss in each weight",
            ("gradients",),
            observe_gradients,
            dtypes=WIDE,
            prepare=kinks.clear_of_kinks,
        ),
        Channel("states", "decode", "the recurrent state", ("advance", "state"), observe_states),
        Channel(
            "decode",
            "decode",
            "one text read in pieces of all kinds",
            ("advance",),
            observe_decode,
            reference=decode_reference,
        ),
        Channel("batch", "forward", "texts of a batch do not touch", ("forward",), observe_batch, reference=batch_reference),
        Channel(
            "padding",
            "padding",
            "texts of different lengths in one batch",
            ("padded",),
            observe_padding,
            min_time=2,
            reference=padding_reference,
        ),
        Channel(
            "dropout",
            "training",
            "dropped in training only, in the right place, by the right share",
            ("train",),
            dropout.observe,
            dropout.judge,
            WIDE,
            dropout.prepare,
            min_time=2,
        ),
        Channel(
            "training",
            "training",
            "AdamW moves the five weights and nothing else",
            ("train",),
            observe_training,
            dtypes=WIDE,
            prepare=trainable,
            min_time=2,
            shapes=(POOL[1], POOL[4]),  # JAX takes two seconds to compile a step
        ),
        Channel("sampling", "sampling", "one seed, one text", ("advance",), sampling.written, sampling.judge, WIDE),
        Channel("determinism", "forward", "a run equals itself", ("forward",), observe_determinism, judge_pairs),
        Channel(
            "mutation",
            "forward",
            "nobody writes into what is not theirs",
            ("forward",),
            observe_mutation,
            judge_pairs,
            WIDE,
            shapes=(POOL[1], POOL[4]),
        ),
        Channel("phases", "long positions", "phases far from the start", ("advance", "state"), observe_phases, min_time=2),
        Channel("properties", "forward", "what holds without a reference", ("forward",), observe_properties, judge_properties),
        Channel(
            "refusals", "refusals", "bad input gets its one sentence", ("forward",), refusals.observe, refusals.judge, WIDE
        ),
    )
}
