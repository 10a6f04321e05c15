"""Random lives of many requests: none is lost, none ends twice, all blocks come back."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentserve.config import CONTROLLERS, PREFILL_ORDERS, SCHEDULERS, SLOTS, ControlConfig
from agentserve.core.batch import Batch, BatchOutput, Lane, TokenSample
from agentserve.core.engine import StepResult
from agentserve.core.events import Command, EndRequest, RequestFinished, TokenGenerated
from agentserve.core.request import FinishReason
from tests.core.builders import core, submit

WAYS = [
    {"control": ControlConfig(controller=controller, slots=slots)} for controller in CONTROLLERS for slots in SLOTS
] + [{"scheduler": scheduler} for scheduler in SCHEDULERS if scheduler != "lanes"]
"""Every controller with every kind of slots, and the baselines."""


class EngineMachine(RuleBasedStateMachine):
    """A tiny pool (10 blocks of 4), so that exhaustion and preemption happen all the time."""

    @initialize(way=st.sampled_from(WAYS), order=st.sampled_from(PREFILL_ORDERS))
    def build(self, way: dict[str, Any], order: str) -> None:
        self.core = core(
            num_blocks=10,
            max_model_len=40,
            max_num_seqs=4,
            prefill_chunk=7,
            resume_budget=3,
            resume_min_cached_tokens=4,
            max_num_batched_tokens=20,
            prefill_order=order,
            **way,
        )

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.num_submitted = 0
        self.alive: set[str] = set()
        self.ended: dict[str, FinishReason] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.texts: dict[str, list[int]] = {}
        self.flying: dict[Lane, Batch] = {}
        self.commands: list[Command] = []

    def step(self, outputs: list[BatchOutput]) -> None:
        self.now_ns += 1
        commands, self.commands = self.commands, []
        result = self.core.step(self.now_ns, outputs, commands)
        self.book(result)

    def book(self, result: StepResult) -> None:
        for event in result.events:
            if isinstance(event, RequestFinished):
                assert event.request_id in self.alive, "a terminal event too many"
                self.alive.discard(event.request_id)
                self.ended[event.request_id] = event.reason
            elif isinstance(event, TokenGenerated):
                assert event.request_id in self.alive, "a token after the end"
                assert event.output_index == len(self.texts[event.request_id])
                self.texts[event.request_id].append(event.sample.token_id)
        for batch in result.batches:
            assert batch.lane not in self.flying
            self.flying[batch.lane] = batch
            for chunk in batch.chunks:
                known = (*self.prompts[chunk.request_id], *self.texts[chunk.request_id])
                assert chunk.token_ids == known[chunk.start : chunk.end]
                assert len(chunk.block_ids) == -(-chunk.end // 4)

    # Prompts are taken from few texts, so prefixes are shared and arrive together.
    @rule(
        base=st.integers(0, 2),
        length=st.integers(0, 44),
        own=st.integers(0, 3),
        max_tokens=st.integers(1, 20),
        priority=st.sampled_from([0, 0, 0, -1]),
        salt=st.sampled_from([None, None, "s"]),
    )
    def submit(self, base: int, length: int, own: int, max_tokens: int, priority: int, salt: str | None) -> None:
        name = f"r{self.num_submitted}"
        self.num_submitted += 1
        prompt = tuple(base * 100 + i for i in range(length)) + tuple(range(900, 900 + own))
        self.alive.add(name)
        self.prompts[name], self.texts[name] = prompt, []
        self.commands.append(submit(name, prompt, max_tokens=max_tokens, priority=priority, cache_salt=salt))

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.CANCELLED, FinishReason.STOP]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        # Also requests that have ended already: the two may cross.
        self.commands.append(EndRequest(data.draw(st.sampled_from(sorted(self.prompts))), reason))

    @rule()
    def only_commands(self) -> None:
        self.step([])

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), fails=st.sampled_from([False] * 9 + [True]), took_ns=st.sampled_from([1, 10**6, 10**8]))
    def complete(self, data: st.DataObject, fails: bool, took_ns: int) -> None:
        started_ns, self.now_ns = self.now_ns, self.now_ns + took_ns
        lanes = data.draw(st.permutations(sorted(self.flying)))
        lanes = lanes[: data.draw(st.integers(1, len(lanes)))]
        outputs = []
        for lane in lanes:
            batch = self.flying.pop(lane)
            samples = tuple(
                # Two possible tokens: outputs of different requests become prefixes of others.
                TokenSample(chunk.request_id, chunk.end % 2)
                for chunk in batch.chunks
                if chunk.sample is not None
            )
            error = "made to fail" if fails else None
            outputs.append(BatchOutput(batch.batch_id, lane, started_ns, self.now_ns, () if fails else samples, error))
        self.step(outputs)

    @invariant()
    def consistent(self) -> None:
        if not self.commands:
            self.core.check_invariants()

    def teardown(self) -> None:
        """Everything that was accepted comes to an end, and every block comes back."""
        if not hasattr(self, "core"):
            return  # hypothesis gave up before the first rule
        for _ in range(2000):
            if not (self.alive or self.flying or self.commands):
                break
            outputs = [
                BatchOutput(
                    batch.batch_id,
                    lane,
                    self.now_ns,
                    self.now_ns + 1,
                    tuple(TokenSample(c.request_id, c.end % 2) for c in batch.chunks if c.sample),
                )
                for lane, batch in self.flying.items()
            ]
            self.flying.clear()
            self.step(outputs)
        assert not self.alive, f"never ended: {sorted(self.alive)}"
        assert set(self.ended) == set(self.prompts)
        for name, reason in self.ended.items():
            if not 1 <= len(self.prompts[name]) < 40:
                assert reason in (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.STOP)
        self.core.check_invariants()
        assert self.core.memory.num_available_blocks == 10


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
