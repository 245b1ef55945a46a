"""What a tier looks at: which channels, in which dtypes and phases, on which cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

from hypothesis.strategies import SearchStrategy

from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.channel import Channel
from bdh_conformance.files import frozen
from bdh_conformance.files.vectors import Judged, origin
from bdh_conformance.yardstick.cases import POOL, Case
from bdh_conformance.yardstick.sizes import LONG, Shape
from bdh_conformance.yardstick.strategies import pooled, sized
from bdh_spec import Capabilities
from bdh_spec.dtypes import DTYPES, WIDE
from bdh_spec.rope import PHASES, Phase

# Scale and kind of weights. The narrow types hold neither mixed nor very large weights: scores overflow in float16.
KINDS = {
    True: ((1.0, "normal"), (20.0, "normal"), (50.0, "normal"), (5.0, "mixed"), (20.0, "mixed"), (5.0, "normal")),
    False: ((1.0, "normal"), (20.0, "normal"), (5.0, "normal")),
}
OTHER_SHAPES = (POOL[0], POOL[2], POOL[4])  # in dtypes beside the first

# Of a port that compiles a program for each shape, in standard: these shapes and classes of sizes, but for plain logits, which
# compile fast; in dtypes beside the first, and of what is dear, one shape.
COMPILED_SHAPES, COMPILED_ALONE = (POOL[1], POOL[4]), (POOL[4],)
COMPILED_SIZES = ("many", "beyond_a_thousand")
DEAR = 12  # the cost of a channel from which on one shape has to do


ENDLESS = 1000  # times a tier's examples: more than anybody waits for


@dataclass(frozen=True)
class Tier:
    """How much is looked at."""

    name: str
    examples: int  # generated, of the cheapest channel, in float32 and float64
    narrow_examples: int
    sized_examples: int  # of each class of sizes
    longest: int  # tokens of a text
    says: str
    minutes: float | None = None  # for which cases are drawn; None: until all are

    def for_minutes(self, minutes: float | None) -> Tier:
        """The same with as many cases as that time allows, if it is given."""
        if not minutes or not self.examples:
            return self
        return replace(
            self,
            examples=ENDLESS * self.examples,
            narrow_examples=ENDLESS * self.narrow_examples,
            sized_examples=ENDLESS * self.sized_examples,
            minutes=minutes,
        )


TIERS = {
    tier.name: tier
    for tier in (
        Tier("smoke", 0, 0, 0, 0, "frozen cases only: some ten seconds"),
        Tier("standard", 36, 12, 1, 1200, "structured cases, classes of sizes and properties: some two minutes"),
        Tier("deep", 1500, 400, 20, 4096, "thousands of examples, texts of 4,096 tokens: half an hour", 30.0),
    )
}


class Generated(NamedTuple):
    """Cases that Hypothesis draws, and how many of them."""

    strategy: SearchStrategy[Case]
    examples: int
    shrinks: bool = True  # a class of sizes has no simpler seed than another


@dataclass(frozen=True)
class Check:
    """One channel in one dtype and phase, on fixed cases and on generated ones. ``reason`` says why it is not claimed."""

    channel: Channel
    level: str
    dtype: str
    phase: Phase
    fixed: tuple[Case | Judged, ...] = ()
    generated: tuple[Generated, ...] = ()
    reason: str = ""

    def fit(self, case: Case) -> Case | None:
        """The case as the channel needs it, if anything can be said of it in this dtype.

        A norm over two features leaves their signs. Of a long text rounding to a narrow type turns some, on any port, and each
        port turns others.
        """
        if case.config.n_embd == 2 and case.time > LONG and self.dtype not in WIDE:
            return None
        return self.channel.prepare(case)


def plan(
    tier: Tier,
    capabilities: Capabilities,
    *,
    dtypes: Sequence[str] = (),
    channels: Sequence[str] = (),
    phases: Sequence[Phase] = (),
    case: Case | None = None,
) -> list[Check]:
    """Everything that a tier looks at; with a case, every channel on that case alone."""
    wanted = [CHANNELS[name] for name in channels or CHANNELS]
    base = next((d for d in (*dtypes, *DTYPES) if d in capabilities.dtypes), DTYPES[0])
    home = next((phase for phase in PHASES if phase in capabilities.phases), PHASES[0])
    return [
        check(tier, capabilities, channel, dtype, phase, base, home, case)
        for dtype in dtypes or DTYPES
        for phase in phases or PHASES
        for channel in wanted
        if applies(channel, dtype, phase, base, home) and (case or channels or in_tier(tier, channel, dtype, phase, base, home))
    ]


def applies(channel: Channel, dtype: str, phase: Phase, base: str, home: Phase) -> bool:
    """Whether a channel has anything to say here: all have where the port is at home, some in its other phases."""
    if (channel.once and dtype != base) or (channel.relative and phase == "float32"):
        return False
    return dtype in channel.dtypes and (phase == home or (channel.every_phase and dtype == base))


def in_tier(tier: Tier, channel: Channel, dtype: str, phase: Phase, base: str, home: Phase) -> bool:
    """Whether a tier has time for it."""
    if tier.name != "smoke":
        return True
    return phase == home and channel.smoke in (("first dtype", "every dtype") if dtype == base else ("every dtype",))


def check(
    tier: Tier,
    capabilities: Capabilities,
    channel: Channel,
    dtype: str,
    phase: Phase,
    base: str,
    home: Phase,
    case: Case | None,
) -> Check:
    """The cases of a channel, or the reason why it is not claimed."""
    level = channel.level if dtype == base else dtype
    if reason := unclaimed(channel, capabilities, dtype, phase):
        return Check(channel, level, dtype, phase, reason=reason)
    if case is not None and case.freqs != "published" and "frequencies" not in capabilities.verbs:
        return Check(channel, level, dtype, phase, reason="the port does not claim the verb frequencies")
    if case is not None:
        return Check(channel, level, dtype, phase, (case,))
    if tier.name == "smoke":
        return Check(channel, level, dtype, phase, smoke(channel, dtype, phase))
    is_base, few = dtype == base, capabilities.compiles and tier.name == "standard"
    drawn = tuple(generated(tier, channel, dtype, is_base, phase == home, few))
    return Check(channel, level, dtype, phase, tuple(structured(channel, dtype, is_base, few)), drawn)


def unclaimed(channel: Channel, capabilities: Capabilities, dtype: str, phase: Phase) -> str:
    """What a port would have to claim to be judged, or an empty string."""
    if dtype not in capabilities.dtypes:
        return f"the port does not claim {dtype}"
    if phase not in capabilities.phases:
        return f"the port does not claim {phase} phases"
    if missing := [verb for verb in channel.verbs if verb not in capabilities.verbs]:
        return f"the port does not claim the verb {', '.join(missing)}"
    return ""


def structured(channel: Channel, dtype: str, is_base: bool, few: bool) -> Iterator[Case]:
    """Every shape, with every kind of weights somewhere."""
    if channel.only:
        yield from (few and channel.only_compiled) or channel.only
        return
    kinds = cycle(KINDS[dtype in WIDE])
    for seed, (shape, (scale, weights)) in enumerate(zip(shapes(channel, is_base, few), kinds, strict=False)):
        yield Case(*shape, seed=seed, scale=scale, weights=weights)
    if dtype in WIDE:
        yield from channel.special


def generated(tier: Tier, channel: Channel, dtype: str, is_base: bool, at_home: bool, few: bool) -> Iterator[Generated]:
    """Values drawn for the shapes of the pool, then shapes drawn from the classes of sizes."""
    kinds = KINDS[dtype in WIDE]
    examples = (tier.examples if dtype in WIDE else tier.narrow_examples) // channel.cost
    if examples and not channel.only:
        yield Generated(pooled(shapes(channel, is_base, few), kinds), examples)
    for name in sizes(channel, dtype, is_base, few) if at_home and tier.sized_examples else ():
        yield Generated(sized(name, tier.longest, kinds), tier.sized_examples, shrinks=False)


def shapes(channel: Channel, is_base: bool, few: bool) -> tuple[Shape, ...]:
    """The shapes of the pool that a channel takes: fewer in all dtypes but the first, and of a port that compiles each anew."""
    fit = tuple(shape for shape in channel.shapes if shape[2] >= channel.min_time)
    if few and not (is_base and compiles_fast(channel)):
        wanted = COMPILED_SHAPES if is_base and channel.cost < DEAR else COMPILED_ALONE
        return tuple(shape for shape in fit if shape in wanted) or fit[:1]
    return tuple(shape for shape in fit if is_base or shape in OTHER_SHAPES)


def sizes(channel: Channel, dtype: str, is_base: bool, few: bool) -> tuple[str, ...]:
    """The classes of sizes that a channel draws from. A second wide dtype has more to say of kinks, which it does not meet."""
    if dtype not in WIDE:
        return channel.narrow_sizes if not few or compiles_fast(channel) else ()
    if few and not compiles_fast(channel):
        return tuple(name for name in channel.sizes if name in COMPILED_SIZES) if is_base and channel.cost < DEAR else ()
    return channel.sizes if is_base or (channel.dtypes == WIDE and not few) else ()


def compiles_fast(channel: Channel) -> bool:
    """Whether a channel asks for logits alone."""
    return channel.verbs == ("forward",) and not channel.partial


def smoke(channel: Channel, dtype: str, phase: Phase) -> tuple[Case | Judged, ...]:
    """The published vectors where they hold anything for this channel, and elsewhere the cases that they were made from."""
    chosen = [judged for judged in frozen.published() if judged.vector.name in channel.vectors]
    if channel.published and dtype in WIDE and phase == "exact":
        return (*chosen, *channel.smoke_special)
    cases = (origin(judged) for judged in chosen)
    return (*(replace(case, weights=channel.smoke_weights or case.weights) for case in cases), *channel.smoke_special)
