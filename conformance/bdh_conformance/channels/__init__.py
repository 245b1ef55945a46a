"""What the suite looks at, channel by channel."""

from dataclasses import replace

from bdh_conformance.channels import dropout, refusals, sampling
from bdh_conformance.channels.channel import Channel
from bdh_conformance.channels.inputs import inputs_reference, observe_inputs
from bdh_conformance.channels.order import observe_order
from bdh_conformance.channels.ownership import judge_pairs, observe_determinism, observe_mutation
from bdh_conformance.channels.parallel import (
    batch_reference,
    logits_reference,
    loss_reference,
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
from bdh_conformance.channels.threads import observe_threads
from bdh_conformance.channels.training import meets_kinks, observe_training, trainable
from bdh_conformance.files import frozen
from bdh_conformance.yardstick import kinks
from bdh_conformance.yardstick.cases import CONFIGS, POOL, Case
from bdh_conformance.yardstick.sizes import LENGTHS, WIDTHS
from bdh_spec import BDHConfig
from bdh_spec.dtypes import WIDE

PLAIN = Case(CONFIGS["plain"], 2, 6, 1, 5.0)
HUGE = (replace(PLAIN, scale=200.0),)  # codes beyond 6
BYTES = Case(BDHConfig(1, 6, 0.1, 2, 4, 256), 2, 6, 5, 20.0)
LONG_TEXT = replace(PLAIN, batch=1)
TIES = (Case(CONFIGS["plain"], 2, 6, 1, 20.0, weights="ties"), Case(CONFIGS["square_encoder"], 3, 4, 2, 20.0, weights="ties"))

CHANNELS = {
    channel.name: channel
    for channel in (
        Channel(
            "logits",
            "forward",
            "logits of the parallel form, at many lengths",
            ("forward",),
            observe_logits,
            reference=logits_reference,
            sizes=(*WIDTHS, "beyond_a_thousand"),
            narrow_sizes=("many", "beyond_a_thousand"),
            special=HUGE,
            smoke="first dtype",
            vectors=(
                "first_steps",
                "fresh_weights",
                "three_heads",
                "square_head",
                "square_encoder",
                "mixed_scales",
                "wide_vocabulary",
            ),
            published=frozen.logits,
            smoke_special=(Case(*POOL[0], seed=2, scale=50.0),),
            every_phase=True,
        ),
        Channel(
            "traces",
            "traces",
            "every stage of every layer",
            ("trace",),
            observe_traces,
            sizes=("many", "indivisible"),
            special=HUGE,
            smoke="every dtype",
            published=frozen.traces,
        ),
        Channel(
            "loss",
            "forward",
            "mean cross entropy, at many lengths",
            ("loss",),
            observe_loss,
            reference=loss_reference,
            sizes=("many", "beyond_a_thousand"),
            narrow_sizes=("beyond_a_thousand",),
            special=(replace(PLAIN, scale=1e5),),  # logits beyond the range of exp
            smoke="first dtype",
            published=frozen.loss,
        ),
        Channel(
            "gradients",
            "gradients",
            "the slope of the loss in each weight",
            ("gradients",),
            observe_gradients,
            dtypes=WIDE,
            prepare=kinks.clear_of_kinks,
            kinked=kinks.kinked,
            sizes=(*WIDTHS, *LENGTHS),
            special=(replace(PLAIN, scale=20.0, weights="dead"),),  # relus that read exact zeros
            smoke="first dtype",
            published=frozen.gradients,
        ),
        Channel(
            "states",
            "decode",
            "the recurrent state",
            ("advance", "state"),
            observe_states,
            sizes=("many", "beyond_a_thousand"),
            narrow_sizes=("beyond_a_thousand",),
            cost=2,
            smoke="first dtype",
            published=frozen.decode,
        ),
        Channel(
            "decode",
            "decode",
            "one text read in pieces of all kinds",
            ("advance",),
            observe_decode,
            reference=decode_reference,
            sizes=(*WIDTHS, "beyond_a_thousand"),
            narrow_sizes=("beyond_a_thousand",),
            special=HUGE,
            cost=2,
        ),
        Channel(
            "batch",
            "forward",
            "texts of a batch do not touch",
            ("forward",),
            observe_batch,
            reference=batch_reference,
            sizes=("many",),
        ),
        Channel(
            "padding",
            "padding",
            "texts of different lengths in one batch",
            ("padded",),
            observe_padding,
            min_time=2,
            reference=padding_reference,
            sizes=("many", "between_blocks", "beyond_a_thousand"),
            cost=3,
            relative=True,
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
            only=(*dropout.CASES, *dropout.RATES),
            cost=40,
            once=True,
        ),
        Channel(
            "training",
            "training",
            "AdamW moves the five weights and nothing else",
            ("train",),
            observe_training,
            partial=True,
            dtypes=WIDE,
            prepare=trainable,
            kinked=meets_kinks,
            min_time=2,
            shapes=(POOL[1], POOL[4]),  # JAX takes two seconds to compile a step
            sizes=("many",),
            cost=12,
        ),
        Channel(
            "sampling",
            "sampling",
            "one seed, one text",
            ("advance",),
            sampling.written,
            sampling.judge,
            WIDE,
            special=(
                *TIES,
                replace(PLAIN, scale=0.0),
                BYTES,
                LONG_TEXT,
            ),  # logits that tie, some or all of them; texts of bytes
            sizes=("many",),
            cost=3,
            smoke="first dtype",
            smoke_weights="ties",
            once=True,
        ),
        Channel(
            "determinism",
            "forward",
            "a run equals itself",
            ("forward",),
            observe_determinism,
            judge_pairs,
            smoke="first dtype",
        ),
        Channel(
            "mutation",
            "forward",
            "nobody writes into what is not theirs",
            ("forward",),
            observe_mutation,
            judge_pairs,
            shapes=(POOL[1], POOL[4]),
            cost=4,
        ),
        Channel(
            "order",
            "forward",
            "lengths, batches, states and models in turns",
            ("forward",),
            observe_order,
            partial=True,
            shapes=(POOL[4],),
            cost=4,
        ),
        Channel(
            "inputs",
            "forward",
            "tokens of every integer type and layout",
            ("forward",),
            observe_inputs,
            reference=inputs_reference,
            partial=True,
            shapes=(POOL[3],),
            special=(BYTES, Case(CONFIGS["square_encoder"], 2, 6, 3)),
            cost=4,
            once=True,
        ),
        Channel(
            "threads",
            "threads",
            "one model on several threads",
            ("forward",),
            observe_threads,
            partial=True,
            shapes=(POOL[4],),
            prepare=trainable,
            kinked=meets_kinks,
            cost=12,
            once=True,
        ),
        Channel(
            "phases",
            "long positions",
            "phases far from the start",
            ("advance", "state"),
            observe_phases,
            min_time=2,
            cost=5,
            every_phase=True,
        ),
        Channel(
            "properties",
            "forward",
            "what holds without a reference",
            ("forward",),
            observe_properties,
            judge_properties,
            cost=2,
        ),
        Channel(
            "refusals",
            "refusals",
            "bad input gets its one sentence",
            ("forward",),
            refusals.observe,
            refusals.judge,
            WIDE,
            cost=10,
            smoke="first dtype",
            once=True,
        ),
    )
}
