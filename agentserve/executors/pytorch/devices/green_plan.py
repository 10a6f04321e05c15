"""Which Green Contexts to make of a GPU: pure functions over facts about the device.

A GPU hands out SMs only as results of a *split*. Two splits of the device overlap; only the results of one and the same
call are disjoint, and only those may be combined in one context. There are two ways to get the slots of a partition
table out of that:

`GROUPS`: one split of the device into many equal groups. A decode slot is the first so many of them, a prefill slot
the last so many, therefore two slots whose sizes add up to the whole share no SM, by construction. What the split
leaves over (GPCs differ in size: an H100 was seen to give 15 groups of 8 and 12 SMs more) goes to the far end, behind
the groups of the prefill lane, if the driver lets it be combined with groups. Only cuDevSmResourceSplitByCount
(CUDA 12.4) is needed.

`PAIRS`: one split for each entry of the table, into its decode side and everything else, with cuDevSmResourceSplit
(CUDA 13.1 in driver and bindings). It is preferred where it exists. NVIDIA's guide (section 4.6.4.2) advises against
merging small groups, because the driver can place a large group better than the sum of small ones: whole GPCs stay
together, so that clusters of thread blocks and their shared L1 traffic find room. Every slot is then a single result,
no SM is left over (the far side is backfilled), and the ladder follows the alignment instead of a group size. The
price: slots of *different* entries may overlap in any way. With groups they may as well, whenever their sizes add up to
more than the device, and both only until the lane whose batch is still running in the old partition reaches its end.

Nothing here is a table of compute capabilities: smallest partition, alignment, the number of groups and what may be
combined are asked of the driver (`green_contexts`), for a GPU of next year is not in any table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from agentserve.core.batch import Lane
from agentserve.core.slots import build_partition_table
from agentserve.errors import ConfigError

FIRST_DRIVER = 12040
"""CUDA 12.4, as cuDriverGetVersion counts: the first with Green Contexts."""
FIRST_UNEQUAL_SPLIT = 13010
"""CUDA 13.1: the first with cuDevSmResourceSplit and resources for work queues."""

_MOST_GROUPS, _LEAST_GROUPS = 24, 8
"""The ladder of the table has about ten steps: fewer groups are coarser than that, more only make more to merge."""


class SlotMode(StrEnum):
    """How the lanes share the GPU."""

    GREEN = "green"  # Green Contexts for splits and caps
    STREAM = "stream"  # both lanes on the whole device, on streams of different priority
    OFF = "off"  # the lanes take turns
    AUTO = "auto"


class SplitMethod(StrEnum):
    """Where slots come from; see the module."""

    GROUPS = "groups"
    PAIRS = "pairs"


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is known of a GPU and its driver. None: not known, because there are no bindings to ask with."""

    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    l2_bytes: int
    driver_version: int | None = None
    """As cuDriverGetVersion counts: 13000 is CUDA 13.0."""
    bindings_version: int | None = None
    """The same of cuda-python."""
    can_split_unequal: bool = False
    """The bindings have cuDevSmResourceSplit."""
    min_partition_sms: int | None = None
    """SMs of the smallest partition."""
    coscheduled_alignment: int | None = None
    """Partitions are multiples of this many SMs."""
    mps: bool = False
    """The device is shared through MPS."""
    mig: bool = False
    """The device is a MIG slice."""

    @property
    def splits_unequal(self) -> bool:
        """Whether cuDevSmResourceSplit can be called."""
        return self.can_split_unequal and (self.driver_version or 0) >= FIRST_UNEQUAL_SPLIT

    @property
    def compute_capability_label(self) -> str:
        """As in `sm_90`."""
        return f"sm_{self.compute_capability[0]}{self.compute_capability[1]}"


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What the driver makes of a device that is split into equal groups."""

    group_sms: int
    num_groups: int
    remainder_sms: int
    remainder_joins: bool
    """Whether what is left over may be combined with groups in one context."""

    @property
    def unused_sms(self) -> int:
        """SMs that neither side of a split can have."""
        return 0 if self.remainder_joins else self.remainder_sms


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """A Green Context to be made."""

    lane: Lane
    units: int
    """SMs in it."""
    groups: tuple[int, ...] = ()
    """`GROUPS`: which groups of the split, in order."""
    with_remainder: bool = False
    """`GROUPS`: and what the split left over."""
    pair: tuple[int, ...] = ()
    """`PAIRS`: sizes of the split that it comes from, the first structured, the second backfilled."""
    side: int = 0
    """`PAIRS`: its place in `pair`."""


@dataclass(frozen=True, slots=True)
class GreenPlan:
    """The slots of a device; `compute_units` to `unused_units` are what `build_partition_table` asks for."""

    method: SplitMethod
    split: SplitFacts | None
    """`GROUPS`: the split that everything is made of."""
    compute_units: int
    unit_granularity: int
    min_units: int
    unused_units: int
    slots: tuple[SlotSpec, ...]
    """Each (lane, units) once. The whole device is no Green Context and not among them."""

    def describe(self) -> str:
        """One line for the log."""
        if self.split is None:
            how = f"split in pairs by multiples of {self.unit_granularity} SMs"
        else:
            how = f"{self.split.num_groups} groups of {self.split.group_sms} SMs"
            if self.split.remainder_sms:
                what = "joins the prefill slots" if self.split.remainder_joins else "stays unused while the lanes share"
                how += f", the remainder of {self.split.remainder_sms} {what}"
        return f"{len(self.slots)} slots on {self.compute_units} SMs: {how}"


@dataclass(frozen=True, slots=True)
class SlotDecision:
    """Which mode was taken, and why, as a sentence without a full stop."""

    mode: SlotMode
    reason: str


def decide_mode(wanted: SlotMode, facts: DeviceFacts) -> SlotDecision:
    """Settles `auto`, and checks what was asked for.

    `green` goes ahead under MPS and MIG, where `auto` does not: nothing in CUDA forbids it, but nobody has tried it
    with this code, and the driver's own error will say if it cannot be done.

    Raises ConfigError if Green Contexts were asked for and cannot be made.
    """
    if wanted is SlotMode.OFF:
        return SlotDecision(SlotMode.OFF, "slots are off: the lanes take turns")
    if wanted is SlotMode.STREAM:
        return SlotDecision(SlotMode.STREAM, "both lanes were put on the whole device")
    obstacle = _obstacle(facts)
    if wanted is SlotMode.GREEN:
        if obstacle is not None:
            raise ConfigError(f"Green Contexts cannot be made: {obstacle}; use --slots stream or auto")
        return SlotDecision(SlotMode.GREEN, "Green Contexts were asked for")
    if obstacle is None and facts.mps:
        obstacle = "the device is shared through MPS"
    if obstacle is None and facts.mig:
        obstacle = "the device is a MIG slice"
    if obstacle is not None:
        return SlotDecision(SlotMode.STREAM, f"both lanes use the whole device because {obstacle}")
    return SlotDecision(SlotMode.GREEN, f"the driver can split {facts.num_sms} SMs")


def _obstacle(facts: DeviceFacts) -> str | None:
    if facts.bindings_version is None or facts.driver_version is None:
        return "cuda-python is not installed or cannot reach the driver"
    if facts.driver_version < FIRST_DRIVER:
        return f"the driver is of {cuda_version(facts.driver_version)} and they need {cuda_version(FIRST_DRIVER)}"
    if facts.bindings_version < FIRST_DRIVER:
        return f"cuda-python is of {cuda_version(facts.bindings_version)} and they need {cuda_version(FIRST_DRIVER)}"
    if facts.min_partition_sms is None or facts.coscheduled_alignment is None:
        return "the driver does not say how small a partition may be"
    if facts.num_sms < 2 * facts.min_partition_sms:
        return f"{facts.num_sms} SMs do not make two partitions of at least {facts.min_partition_sms}"
    return None


def cuda_version(number: int) -> str:
    """`CUDA 13.0` for 13000."""
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


# ---- GROUPS ----


def candidate_group_sizes(facts: DeviceFacts) -> tuple[int, ...]:
    """Sizes of groups worth asking the driver about, smallest first. At least two groups must be possible."""
    smallest, alignment = _granule(facts)
    sizes = list(range(smallest, facts.num_sms // 2 + 1, alignment))
    if not sizes:
        raise ConfigError(f"{facts.num_sms} SMs do not make two partitions of at least {smallest}")
    fitting = [size for size in sizes if _LEAST_GROUPS <= facts.num_sms // size <= _MOST_GROUPS]
    return tuple(fitting) or (sizes[0] if facts.num_sms // sizes[0] < _LEAST_GROUPS else sizes[-1],)


def choose_split(splits: Sequence[SplitFacts]) -> SplitFacts:
    """The best of the splits that the driver offers.

    Two things cost, both in SMs: what is left over has no structure (or is not used at all), and a wanted size is
    missed by a quarter of a group on average, at worst by half of one, which counts. Ties go to the smaller group.

    Raises ConfigError if none of them has two groups.
    """
    usable = [split for split in splits if split.num_groups >= 2]
    if not usable:
        raise ConfigError("the driver does not split this device into two groups")
    return min(usable, key=lambda split: (split.remainder_sms + split.group_sms / 2, split.group_sms))


def plan_groups(facts: DeviceFacts, split: SplitFacts) -> GreenPlan:
    """The slots out of one split into equal groups.

    Raises ConfigError if the device is too small for two slots.
    """
    group = split.group_sms
    joined = split.remainder_sms if split.remainder_joins else 0
    # No slot consists of the remainder alone, which has no structure at all.
    min_units = _ceil(joined + 1, group)
    plan = GreenPlan(SplitMethod.GROUPS, split, facts.num_sms, group, min_units, split.unused_sms, ())

    def spec(lane: Lane, units: int) -> SlotSpec:
        if lane is Lane.DECODE:
            assert units % group == 0
            return SlotSpec(lane, units, tuple(range(units // group)))
        # If both ways give the size, the one with the remainder is disjoint from the decode slot of the complement.
        with_remainder = joined > 0 and (units - joined) % group == 0
        num_groups, rest = divmod(units - (joined if with_remainder else 0), group)
        assert rest == 0
        return SlotSpec(lane, units, tuple(range(split.num_groups - num_groups, split.num_groups)), with_remainder)

    return _with_slots(plan, [spec(lane, units) for lane, units in _wanted(plan)])


# ---- PAIRS ----


def plan_pairs(facts: DeviceFacts, structured_sms: int) -> GreenPlan:
    """The slots out of one split for each entry of the table.

    Args:
        facts: of the device.
        structured_sms: SMs in the largest partition that holds the device's alignment throughout, which bounds the
            decode side.

    Raises ConfigError if the device is too small for two slots.
    """
    smallest, alignment = _granule(facts)
    min_units = _ceil(max(smallest, facts.num_sms - structured_sms), alignment)
    plan = GreenPlan(SplitMethod.PAIRS, None, facts.num_sms, alignment, min_units, 0, ())

    def spec(lane: Lane, units: int) -> SlotSpec:
        rest = facts.num_sms - units
        if lane is Lane.DECODE:
            return SlotSpec(lane, units, pair=(units, rest), side=0)
        if rest in decode_sizes:
            return SlotSpec(lane, units, pair=(rest, units), side=1)
        return SlotSpec(lane, units, pair=(units,), side=0)

    wanted = _wanted(plan)
    decode_sizes = {units for lane, units in wanted if lane is Lane.DECODE}
    return _with_slots(plan, [spec(lane, units) for lane, units in wanted])


# ---- both ----


def _wanted(plan: GreenPlan) -> list[tuple[Lane, int]]:
    """Every slot of the partition table that is not the whole device, decode first, smallest first."""
    table = build_partition_table(
        plan.compute_units, plan.unit_granularity, plan.min_units, unused_units=plan.unused_units
    )
    decode = {split.decode_units for split in table.splits}
    prefill = {entry.prefill_units for entry in (*table.splits, *table.caps)}
    return [(Lane.DECODE, units) for units in sorted(decode)] + [(Lane.PREFILL, units) for units in sorted(prefill)]


def _with_slots(plan: GreenPlan, slots: list[SlotSpec]) -> GreenPlan:
    if not slots:
        raise ConfigError(
            f"{plan.compute_units} SMs in steps of {plan.unit_granularity} do not make two slots of at least "
            f"{plan.min_units}"
        )
    return GreenPlan(
        plan.method,
        plan.split,
        plan.compute_units,
        plan.unit_granularity,
        plan.min_units,
        plan.unused_units,
        tuple(slots),
    )


def _granule(facts: DeviceFacts) -> tuple[int, int]:
    """Smallest partition and alignment, the former a multiple of the latter."""
    if facts.min_partition_sms is None or facts.coscheduled_alignment is None:
        raise ConfigError("the driver does not say how small a partition may be")
    alignment = max(1, facts.coscheduled_alignment)
    return _ceil(max(1, facts.min_partition_sms), alignment), alignment


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
