"""What a tier looks at: which channels, in which dtypes and phases, on which cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from bdh_conformance.channels import CHANNELS
from bdh_conformance.channels.channel import ALL, WIDE, Channel
from bdh_conformance.channels.dropout import CASES as DROPPED
from bdh_conformance.files import frozen, vectors
from bdh_conformance.files.vectors import Judged
from bdh_conformance.yardstick.cases import CONFIGS, POOL, Case
from bdh_spec import Capabilities
from bdh_spec.rope import PHASES, Phase

# Scale and kind of weights. The narrow types hold neither mixed nor very large weights: scores overflow in float16.
KINDS = {
    True: ((1.0, "normal"), (20.0, "normal"), (50.0, "normal"), (5.0, "mixed"), (20.0, "mixed"), (5.0, "normal")),
    False: ((1.0, "normal"), (20.0, "normal"), (5.0, "normal")),
}
NARROW_SHAPES = (POOL[0], POOL[2], POOL[4])  # JAX compiles each shape anew for each dtype

# Texts longer than any port's chunk, and one word past a power of two.
LONG = Case(CONFIGS["one_layer"], batch=1, time=257, seed=3, scale=20.0)
VERY_LONG = Case(CONFIGS["plain"], batch=1, time=2048, seed=4, scale=20.0)
PLAIN = Case(CONFIGS["plain"], 2, 6, 1, 5.0)
# Where else some mistakes hide: codes beyond 6, relus that read exact zeros, logits beyond the range of exp, or all equal.
SPECIAL = {
    "logits": (replace(PLAIN, scale=200.0),),
    "traces": (replace(PLAIN, scale=200.0),),
    "decode": (replace(PLAIN, scale=200.0),),
    "gradients": (replace(PLAIN, scale=20.0, weights="dead"),),
    "loss": (replace(PLAIN, scale=1e5),),
    "sampling": (replace(PLAIN, scale=0.0),),
}
TIES = (Case(CONFIGS["plain"], 2, 6, 1, 20.0, weights="ties"), Case(CONFIGS["square_encoder"], 3, 4, 2, 20.0, weights="ties"))

# How many times dearer an example of a channel is than one of logits.
DEAR = {
    "decode": 2,
    "states": 2,
    "properties": 2,
    "sampling": 3,
    "padding": 3,
    "phases": 5,
    "training": 12,
    "mutation": 4,
    "dropout": 40,
    "refusals": 10,
}
# JAX compiles a second for each verb, shape and dtype: smoke takes one shape, and the other dtypes by two channels.
SMOKE = ("logits", "traces", "loss", "gradients", "states", "sampling", "determinism", "refusals")
SMOKE_OTHER_DTYPES = ("traces",)
SMOKE_LOGITS = (
    "first_steps",
    "fresh_weights",
    "three_heads",
    "square_head",
    "square_encoder",
    "mixed_scales",
    "wide_vocabulary",
)
IN_OTHER_PHASES = ("logits", "phases")
RELATIVE = ("padding",)  # rests on an offset of positions changing nothing, which phases in float32 do not keep
ONCE = ("dropout", "refusals", "sampling")  # in the first dtype only: they look at choices, not at rounding


@dataclass(frozen=True)
class Tier:
    """How much is looked at."""

    name: str
    examples: int  # generated, of the cheapest channel, in float32 and float64
    narrow_examples: int
    says: str


TIERS = {
    tier.name: tier
    for tier in (
        Tier("smoke", 0, 0, "frozen cases only: some ten seconds"),
        Tier("standard", 36, 12, "structured cases and properties: some two minutes"),
        Tier("deep", 1500, 400, "thousands of examples, texts of 2048 tokens: half an hour"),
    )
}


@dataclass(frozen=True)
class Check:
    """One channel in one dtype and phase, on fixed cases and on generated ones. ``reason`` says why it is not claimed."""

    channel: Channel
    level: str
    dtype: str
    phase: Phase
    fixed: tuple[Case | Judged, ...] = ()
    examples: int = 0
    kinds: tuple[tuple[float, str], ...] = ()
    reason: str = ""


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
    base = next((d for d in (*dtypes, *ALL) if d in capabilities.dtypes), ALL[0])
    home = next((phase for phase in PHASES if phase in capabilities.phases), PHASES[0])
    return [
        check(tier, capabilities, channel, dtype, phase, base, case)
        for dtype in dtypes or ALL
        for phase in phases or PHASES
        for channel in wanted
        if applies(channel, dtype, phase, base, home) and (case or channels or in_tier(tier, channel, dtype, phase, base, home))
    ]


def applies(channel: Channel, dtype: str, phase: Phase, base: str, home: Phase) -> bool:
    """Whether a channel has anything to say here: all have where the port is at home, two in its other phases."""
    if (channel.name in ONCE and dtype != base) or (channel.name in RELATIVE and phase == "float32"):
        return False
    return dtype in channel.dtypes and (phase == home or (channel.name in IN_OTHER_PHASES and dtype == base))


def in_tier(tier: Tier, channel: Channel, dtype: str, phase: Phase, base: str, home: Phase) -> bool:
    """Whether a tier has time for it."""
    if tier.name != "smoke":
        return True
    return phase == home and channel.name in (SMOKE if dtype == base else SMOKE_OTHER_DTYPES)


def check(
    tier: Tier, capabilities: Capabilities, channel: Channel, dtype: str, phase: Phase, base: str, case: Case | None
) -> Check:
    """The cases of a channel, or the reason why it is not claimed."""
    level = channel.level if dtype == base else dtype
    if reason := unclaimed(channel, capabilities, dtype, phase):
        return Check(channel, level, dtype, phase, reason=reason)
    if case is not None:
        return Check(channel, level, dtype, phase, (case,))
    kinds = KINDS[dtype in WIDE]
    if tier.name == "smoke":
        return Check(channel, level, dtype, phase, smoke(channel, dtype, phase, dtype == base))
    examples = (tier.examples if dtype in WIDE else tier.narrow_examples) // DEAR.get(channel.name, 1)
    return Check(channel, level, dtype, phase, tuple(structured(tier, channel, dtype)), examples, kinds)


def unclaimed(channel: Channel, capabilities: Capabilities, dtype: str, phase: Phase) -> str:
    """What a port would have to claim to be judged, or an empty string."""
    if dtype not in capabilities.dtypes:
        return f"the port does not claim {dtype}"
    if phase not in capabilities.phases:
        return f"the port does not claim {phase} phases"
    if missing := [verb for verb in channel.verbs if verb not in capabilities.verbs]:
        return f"the port does not claim the verb {', '.join(missing)}"
    return ""


def structured(tier: Tier, channel: Channel, dtype: str) -> Iterator[Case]:
    """Every shape, with every kind of weights somewhere."""
    shapes = channel.shapes if dtype in WIDE else [shape for shape in channel.shapes if shape in NARROW_SHAPES]
    if channel.name == "dropout":
        yield from DROPPED
        return
    for seed, (shape, (scale, weights)) in enumerate(zip(shapes, cycle(KINDS[dtype in WIDE]), strict=False)):
        if shape[2] >= channel.min_time:
            yield Case(*shape, seed=seed, scale=scale, weights=weights)
    if channel.name == "sampling":
        yield from TIES
    if dtype in WIDE:
        yield from SPECIAL.get(channel.name, ())
    if channel.name in ("logits", "decode") and dtype == "float32":
        yield LONG
    if channel.name == "decode" and dtype == "float32" and tier.name == "deep":
        yield VERY_LONG


def smoke(channel: Channel, dtype: str, phase: Phase, is_base: bool) -> tuple[Case | Judged, ...]:
    """The published vectors where there are any for this channel, and elsewhere the case that one of them was made from."""
    main = next(judged for judged in frozen.published() if judged.vector.name == "three_heads")
    if channel.name not in frozen.OBSERVE or dtype not in vectors.DTYPES or phase != "exact":
        case = Case.parse(main.vector.origin)
        return (replace(case, weights="ties") if channel.name == "sampling" else case,)
    if channel.name == "logits" and is_base:
        chosen = (judged for judged in frozen.published() if judged.vector.name in SMOKE_LOGITS)
        return (*chosen, Case(*POOL[0], seed=2, scale=50.0))
    return (main,)
