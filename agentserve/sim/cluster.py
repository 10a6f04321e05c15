"""Several engine instances on one virtual clock, behind a router.

Time always advances to the earliest thing that happens anywhere: a batch that ends, a timer of a core, a call that
arrives, a transfer that is done. Instances wait in a heap by the time of their next event, so that a step costs
O(log n) for n instances beside what the instance itself does.

All that happens in one moment is taken together: first the calls of that moment are routed, with what was in flight
before it, then each instance concerned makes one step of its core, in the order of their numbers. So a cluster of one
instance does exactly what `VirtualDriver` does.

Moving KV. The daemon has no transport between instances, so this part is a model, and it goes through the same
`MemoryManager` as everything else. When the call is sent, the cached prefix is locked at its home. Its bytes beyond
what the target has cached already travel at the link's bandwidth after its latency, one transfer after the other into
each target. Then the target takes blocks for them, which may evict others, and marks them as computed: what the memory
manager does for a request whose prefill is done. Only then is the call delivered. If the target has no memory for them,
or is just computing the same prefix, the copy is lost: it counts as failed, and the call computes its prompt. Not
modelled: blocks that are set aside while the bytes travel, and the load on the device's memory.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agentserve.core.batch import BatchOutput
from agentserve.core.clock import VirtualClock
from agentserve.core.decode_run import PredictableExecutor
from agentserve.core.engine import EngineCore, StepResult
from agentserve.core.events import Command, RequestFinished, SetDistances, Speculate, SubmitRequest
from agentserve.core.executor import Executor
from agentserve.core.memory.manager import AllocationOutcome, MemoryManager, PrefixLock
from agentserve.errors import ConfigError, EngineError
from agentserve.runtime.virtual import MIN_RUN, run_decodes
from agentserve.sim.residency import occupancy_of
from agentserve.sim.router import Loads, Reason, Router


@dataclass(frozen=True, slots=True)
class Link:
    """What KV moves over between instances. Raises ConfigError for values that cannot be."""

    bandwidth_bytes_per_s: float = 12e9
    """About what a copy between two cards over PCIe 4.0 x16 through the host reaches; an estimate."""
    latency_ns: int = 20_000
    kv_bytes_per_token: int = 0
    """Of the model that all instances serve."""

    def __post_init__(self) -> None:
        if not 0.0 < self.bandwidth_bytes_per_s < float("inf") or min(self.latency_ns, self.kv_bytes_per_token) < 0:
            raise ConfigError("a link needs a bandwidth above 0, and a latency and sizes that are not negative")

    def duration_ns(self, num_bytes: int) -> int:
        """How long so many bytes are under way."""
        return self.latency_ns + round(num_bytes * 1e9 / self.bandwidth_bytes_per_s)


class Instance(NamedTuple):
    """One engine: a control plane and what runs its batches. Both must be idle."""

    core: EngineCore
    executor: Executor


class InstanceStep(NamedTuple):
    """One step of one core."""

    instance: int
    now_ns: int
    """When it was made; of a run of steps when the last one was."""
    completions: Sequence[BatchOutput]
    """The batches that had finished by then."""
    result: StepResult
    occupancy: tuple[int, ...]
    """Of the memory behind it; see `residency.occupancy_of`."""


@dataclass(slots=True)
class RoutingCounts:
    """What a router did, and what came of the transfers it asked for."""

    reasons: Counter[Reason] = field(default_factory=Counter)
    num_moved_tokens: int = 0
    """Tokens whose KV was copied and is cached at the target."""
    moved_bytes: int = 0
    num_failed_moves: int = 0
    """Copies for which the target had no room in the end."""

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries and numbers, in a fixed order."""
        return {
            "placements": {reason.value: self.reasons[reason] for reason in Reason if self.reasons[reason]},
            "num_moved_tokens": self.num_moved_tokens,
            "moved_bytes": self.moved_bytes,
            "num_failed_moves": self.num_failed_moves,
        }


class _Transfer(NamedTuple):
    """KV on its way, and the call that waits for it."""

    command: SubmitRequest
    source: int
    target: int
    lock: PrefixLock
    num_bytes: int


class _Told(NamedTuple):
    """What only one instance has to know."""

    command: Speculate
    target: int


class Cluster:
    """Runs calls on several instances. Deterministic: the same calls at the same times give the same steps."""

    def __init__(self, instances: Sequence[Instance], router: Router, link: Link | None = None) -> None:
        """`link`: needed if the router moves KV. Raises ConfigError for no instances."""
        if not instances:
            raise ConfigError("a cluster needs at least one instance")
        self.clock = VirtualClock()
        self.counts = RoutingCounts()
        self._instances = tuple(instances)
        # To ask for a protocol takes long.
        self._predictable = tuple(
            [i.executor if isinstance(i.executor, PredictableExecutor) else None for i in self._instances]
        )
        self._router = router
        self._link = link
        self._loads = Loads(len(instances))
        self._placed: dict[str, tuple[int, int]] = {}  # request under way: its instance and its prompt tokens
        self._link_free_ns = [0] * len(instances)
        self._due: list[tuple[int, int, SubmitRequest | SetDistances | _Transfer | _Told]] = []
        self._sequence = itertools.count()
        self._wakes: list[tuple[int, int]] = []  # outdated entries stay until they are met
        self._wake_of: list[int | None] = [None] * len(instances)
        self._is_ahead = [False] * len(instances)
        """Whether the instance is to be looked at behind more than one step, all of them certain."""
        self._seen_ns = [0] * len(instances)
        """When it was looked at last."""
        self._made: list[InstanceStep] = []
        """Steps of this moment so far."""
        self._touched: set[int] = set()
        """Instances whose memory was used from outside, which may have changed what is certain."""

    @property
    def cores(self) -> tuple[EngineCore, ...]:
        """The control planes, by instance."""
        return tuple(instance.core for instance in self._instances)

    def at(self, at_ns: int, command: SubmitRequest | SetDistances) -> None:
        """Schedules a call, which is routed then, or distances, which all instances are told.

        Commands of the same time keep their order. ValueError for the past.
        """
        if at_ns < self.clock.now_ns():
            raise ValueError(f"{at_ns} lies in the past")
        heapq.heappush(self._due, (at_ns, next(self._sequence), command))

    def tell(self, at_ns: int, command: Speculate, instance: int) -> None:
        """Schedules what one instance is told. ValueError for the past."""
        if at_ns < self.clock.now_ns():
            raise ValueError(f"{at_ns} lies in the past")
        heapq.heappush(self._due, (at_ns, next(self._sequence), _Told(command, instance)))

    def step(self) -> list[InstanceStep] | None:
        """Jumps to the next moment at which something happens; returns the steps made, None when all is done.

        Raises EngineError if requests are unfinished and nothing will ever wake their engine.
        """
        return self._advance(fast_forward=False)

    def advance(self) -> list[InstanceStep] | None:
        """Like `step`, but decode steps that are certain are left out until somebody must know of them.

        The same happens at the same times. Steps that were left out are returned as runs (see `StepResult.run`), before
        the step of their instance that ends the run, and possibly after later steps of other instances.

        Raises EngineError if requests are unfinished and nothing will ever wake their engine.
        """
        return self._advance(fast_forward=True)

    def _advance(self, *, fast_forward: bool) -> list[InstanceStep] | None:
        now_ns = self._next_ns()
        if now_ns is None:
            if any(instance.core.has_unfinished for instance in self._instances):
                raise EngineError("requests are unfinished, but nothing will ever wake their engine")
            return None
        self.clock.advance_to(now_ns)
        self._made = []
        commands = self._deliver(now_ns)
        concerned = set(commands)
        if fast_forward:
            concerned |= self._touched
        self._touched.clear()
        while self._wakes and self._wakes[0][0] <= now_ns:
            wake_ns, instance = heapq.heappop(self._wakes)
            if self._wake_of[instance] == wake_ns:
                concerned.add(instance)
        if not fast_forward:
            for instance in sorted(concerned):
                self._step(instance, now_ns, commands.get(instance, ()))
                self._wake_at(instance, self._due_ns(instance))
        elif len(concerned) == 1 and not commands:
            self._run_alone(concerned.pop(), now_ns)
        else:
            for instance in sorted(concerned):
                self._run_to(instance, now_ns, commands.get(instance, ()))
        return self._made

    def _next_ns(self) -> int | None:
        known = [wake for wake in (self._next_wake_ns(), self._due[0][0] if self._due else None) if wake is not None]
        return max(min(known), self.clock.now_ns()) if known else None

    def _next_wake_ns(self) -> int | None:
        while self._wakes and self._wake_of[self._wakes[0][1]] != self._wakes[0][0]:
            heapq.heappop(self._wakes)
        return self._wakes[0][0] if self._wakes else None

    def _due_ns(self, index: int) -> int | None:
        """When something happens next within an instance."""
        core, executor = self._instances[index]
        wakes = [wake for wake in (executor.next_completion_ns(), core.next_deadline_ns()) if wake is not None]
        return min(wakes, default=None)

    def _wake_at(self, index: int, wake_ns: int | None) -> None:
        self._wake_of[index] = wake_ns
        if wake_ns is not None:
            heapq.heappush(self._wakes, (wake_ns, index))

    def _step(self, index: int, now_ns: int, commands: Sequence[Command]) -> None:
        core, executor = self._instances[index]
        completions = executor.poll(now_ns)
        result = core.step(now_ns, completions, commands)
        for event in result.events:
            if isinstance(event, RequestFinished):
                self._loads.ended(*self._placed.pop(event.request_id))
        for batch in result.batches:
            executor.submit(batch, now_ns)
        for transfer in result.transfers:
            executor.submit_transfer(transfer, now_ns)
        batches = [output for output in completions if isinstance(output, BatchOutput)]
        self._made.append(InstanceStep(index, now_ns, batches, result, occupancy_of(core.memory)))

    # ---- steps that are certain ----
    #
    # An instance whose next decode steps are certain whatever the others do is not looked at before the last of these
    # steps, unless a call arrives there: then the steps before it are booked first.

    def _run_alone(self, index: int, now_ns: int) -> None:
        """Steps of an instance up to the next moment at which any other one, or a call, can matter to it."""
        others = [wake for wake in (self._next_wake_ns(), self._due[0][0] if self._due else None) if wake is not None]
        before_ns = min(others, default=None)
        # Not worth a try if somebody else comes long before a step as long as the last one is over.
        if before_ns is None or self._is_ahead[index] or 2 * (before_ns - now_ns) >= now_ns - self._seen_ns[index]:
            self._run(index, before_ns)
        # What is left until now may end a call, after which others can come at once: so nothing beyond that.
        self._catch_up(index, now_ns + 1)
        self.clock.advance_to(max([now_ns, *[step.now_ns for step in self._made]]))
        self._plan(index)

    def _run_to(self, index: int, now_ns: int, commands: Sequence[Command]) -> None:
        """Steps of an instance up to now, and one for the calls that arrive."""
        self._catch_up(index, now_ns if commands else now_ns + 1)
        if commands:
            self._step(index, now_ns, commands)
        self._plan(index)

    def _plan(self, index: int) -> None:
        """When an instance is to be looked at again."""
        wake_ns, is_ahead, executor = self._due_ns(index), False, self._predictable[index]
        if wake_ns is not None and executor is not None:
            core = self._instances[index].core
            plan = core.decode_plan(settled=True)
            if plan is not None and plan.num_steps >= MIN_RUN:
                _, ends_ns = executor.decode_ends(plan, core.next_deadline_ns())
                if len(ends_ns) >= MIN_RUN:
                    wake_ns, is_ahead = ends_ns[-1], True
        self._is_ahead[index] = is_ahead
        self._seen_ns[index] = self.clock.now_ns()
        self._wake_at(index, wake_ns)

    def _catch_up(self, index: int, before_ns: int) -> None:
        """Makes the steps of an instance before a moment; nothing can come to it before that."""
        while (due_ns := self._due_ns(index)) is not None and due_ns < before_ns:
            if not (self._is_ahead[index] and self._run(index, before_ns)):
                self._step(index, due_ns, ())

    def _run(self, index: int, before_ns: int | None) -> bool:
        """Books a run of decode steps that end before a moment; False if there is none that is worth it."""
        core, executor = self._instances[index].core, self._predictable[index]
        result = None if executor is None else run_decodes(core, executor, before_ns)
        if result is None or result.run is None:
            return False
        self._made.append(InstanceStep(index, result.run.ends_ns[-1], (), result, occupancy_of(core.memory)))
        return True

    # ---- calls and their ways ----

    def _deliver(self, now_ns: int) -> dict[int, list[Command]]:
        """The calls that arrive at each instance by now."""
        commands: dict[int, list[Command]] = {}
        while self._due and self._due[0][0] <= now_ns:
            item = heapq.heappop(self._due)[2]
            if isinstance(item, _Transfer):
                self._arrived(item)
                commands.setdefault(item.target, []).append(item.command)
                continue
            if isinstance(item, _Told):
                commands.setdefault(item.target, []).append(item.command)
                continue
            if isinstance(item, SetDistances):
                for index in range(len(self._instances)):
                    commands.setdefault(index, []).append(item)
                continue
            target = self._route(item, now_ns)
            if target is not None:
                commands.setdefault(target, []).append(item)
        return commands

    def _route(self, command: SubmitRequest, now_ns: int) -> int | None:
        """The instance that gets the call now; None if its KV has to travel first."""
        placement = self._router.route(command.session_id or command.request_id, self._loads)
        num_tokens = len(command.prompt_token_ids)
        self.counts.reasons[placement.reason] += 1
        self._loads.sent(placement.instance, num_tokens)
        self._placed[command.request_id] = (placement.instance, num_tokens)
        if placement.source is None or not self._depart(command, placement.source, placement.instance, now_ns):
            return placement.instance
        return None

    def _depart(self, command: SubmitRequest, source: int, target: int, now_ns: int) -> bool:
        """Starts to copy what `source` has cached of the prompt and `target` has not; False if that is nothing."""
        if self._link is None:
            raise ConfigError("the router moves KV, but the cluster has no link")
        tokens, salt = command.prompt_token_ids, command.cache_salt
        lock = self._memory(source).lock(tokens, salt=salt)
        num_tokens = lock.num_tokens - self._memory(target).match_prefix(tokens, salt=salt).num_tokens
        if num_tokens <= 0:
            self._memory(source).unlock(lock)
            return False
        num_bytes = num_tokens * self._link.kv_bytes_per_token
        start_ns = max(now_ns, self._link_free_ns[target])
        end_ns = self._link_free_ns[target] = start_ns + self._link.duration_ns(num_bytes)
        transfer = _Transfer(command, source, target, lock, num_bytes)
        heapq.heappush(self._due, (end_ns, next(self._sequence), transfer))
        return True

    def _arrived(self, transfer: _Transfer) -> None:
        """Books a copy at its target, for nobody: from then on it is cached and may be evicted."""
        command, memory = transfer.command, self._memory(transfer.target)
        tokens = command.prompt_token_ids[: transfer.lock.num_tokens]
        before = memory.match_prefix(command.prompt_token_ids, salt=command.cache_salt).num_tokens
        # The name is that of the call, which is delivered right after this.
        allocation = memory.allocate(command.request_id, tokens, salt=command.cache_salt)
        if allocation.outcome is AllocationOutcome.ALLOCATED:
            memory.commit(command.request_id, tokens, len(tokens))
            memory.free(command.request_id)
            self.counts.num_moved_tokens += max(0, len(tokens) - before)
            self.counts.moved_bytes += transfer.num_bytes
        else:
            self.counts.num_failed_moves += 1
        self._memory(transfer.source).unlock(transfer.lock)

    def _memory(self, instance: int) -> MemoryManager:
        """The memory of an instance as it is now."""
        if self._wake_of[instance] is not None:
            self._catch_up(instance, self.clock.now_ns())
            self._touched.add(instance)
        return self._instances[instance].core.memory
