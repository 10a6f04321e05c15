"""Random lives of many requests: none is lost, none ends twice, all blocks come back."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentserve.config import CONTROLLERS, PREFILL_ORDERS, SCHEDULERS, SLOTS, ControlConfig, TierConfig, TieringConfig
from agentserve.core.batch import PENDING_TOKEN, Batch, BatchOutput, Lane, TokenSample
from agentserve.core.engine import StepResult
from agentserve.core.events import Command, EndRequest, RequestFinished, Speculate, SubmitRequest, TokenGenerated
from agentserve.core.executor import Completion
from agentserve.core.request import FinishReason, SamplingParams
from agentserve.core.transfers import Transfer, TransferKind, TransferOutput
from tests.core.builders import core

WAYS = [
    {"control": ControlConfig(controller=controller, slots=slots)} for controller in CONTROLLERS for slots in SLOTS
] + [{"scheduler": scheduler} for scheduler in SCHEDULERS if scheduler != "lanes"]
"""Every controller with every kind of slots, and the baselines."""


TIERINGS = [
    None,
    None,
    TieringConfig(100, (TierConfig("host", 12, 1e9, 1e9),), "incremental", 2),
    TieringConfig(100, (TierConfig("host", 3, 1e12, 1e12),), "on_evict"),
    TieringConfig(100, (TierConfig("host", 2, 1e12, 1e12), TierConfig("cxl", 6, 1e12, 1e12)), "on_evict", 3),
]
"""Without lower tiers and with: the machine's links are as slow as it likes."""


def _copied(transfer: Transfer, error: str | None = None) -> TransferOutput:
    return TransferOutput(transfer.transfer_id, 0, 1, error)


class EngineMachine(RuleBasedStateMachine):
    """A tiny pool (10 blocks of 4), so that exhaustion and preemption happen all the time."""

    @initialize(
        way=st.sampled_from(WAYS),
        order=st.sampled_from(PREFILL_ORDERS),
        lookahead=st.sampled_from([1, 2]),
        tiering=st.sampled_from(TIERINGS),
        speculate=st.sampled_from(["none", "next_turn"]),
        time_slice_ns=st.sampled_from([None, 1, 10**6]),
    )
    def build(
        self,
        way: dict[str, Any],
        order: str,
        lookahead: int,
        tiering: TieringConfig | None,
        speculate: str,
        time_slice_ns: int | None,
    ) -> None:
        speculating = {"speculate": speculate, "speculate_tokens": 18} if speculate != "none" else {}
        self.core = core(
            num_blocks=10,
            max_model_len=40,
            max_num_seqs=4,
            prefill_chunk=7,
            resume_budget=3,
            resume_min_cached_tokens=4,
            max_num_batched_tokens=20,
            prefill_order=order,
            decode_lookahead=lookahead,
            tiering=tiering,
            time_slice_ns=time_slice_ns,
            **(way if "scheduler" in way else way | speculating),
        )

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 0
        self.num_submitted = 0
        self.alive: set[str] = set()
        self.ended: dict[str, FinishReason] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.texts: dict[str, list[int]] = {}
        self.flying: dict[Lane, list[Batch]] = {}
        self.copying: list[Transfer] = []
        self.commands: list[Command] = []
        self.guesses: list[tuple[int, ...]] = []

    def step(self, outputs: list[Completion]) -> None:
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
        self.copying += result.transfers
        assert len({transfer.link for transfer in self.copying}) == len(self.copying), "two copies at once on one link"
        for batch in result.batches:
            written = {t.destination_ids for t in self.copying if t.kind is TransferKind.LOAD}
            used = {block_id for chunk in batch.chunks for block_id in chunk.block_ids}
            assert not used & set().union(*written), "a batch uses a block that is being loaded"
            before = self.flying.setdefault(batch.lane, [])
            assert len(before) < (self.core.config.decode_lookahead if batch.lane is Lane.DECODE else 1)
            sampling = {c.request_id: c.end for b in before for c in b.chunks if c.sample is not None}
            elsewhere = {
                c.request_id for lane, bs in self.flying.items() if lane is not batch.lane for b in bs for c in b.chunks
            }
            before.append(batch)
            for chunk in batch.chunks:
                if chunk.request_id.startswith("\0speculation/"):
                    assert chunk.sample is None, "nobody has asked for a token"
                    assert any(guess[chunk.start : chunk.end] == chunk.token_ids for guess in self.guesses)
                    assert len(batch.chunks) == 1 or all(c.sample is not None for c in batch.chunks if c is not chunk)
                    continue
                known = (*self.prompts[chunk.request_id], *self.texts[chunk.request_id])
                if chunk.token_ids == (PENDING_TOKEN,):
                    assert chunk.start == sampling[chunk.request_id] == len(known)
                else:
                    assert chunk.request_id not in sampling
                    assert chunk.token_ids == known[chunk.start : chunk.end]
                assert chunk.request_id not in elsewhere
                assert len(chunk.block_ids) == -(-chunk.end // 4)
            if len(before) == 2:
                writes = [set(c.block_ids[c.start // 4 :]) for c in batch.chunks]
                assert sum(map(len, writes)) == len(set().union(*writes)), "two requests write to one block"

    # Prompts are taken from few texts, so prefixes are shared and arrive together.
    @rule(
        base=st.integers(0, 2),
        length=st.integers(0, 44),
        own=st.integers(0, 3),
        max_tokens=st.integers(1, 20),
        stops=st.sampled_from([(), (), (1,)]),
        presence=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
        priority=st.sampled_from([0, 0, 0, -1]),
        salt=st.sampled_from([None, None, "s"]),
        session=st.sampled_from([None, "x", "y"]),
        goes_on=st.booleans(),
    )
    def submit(
        self,
        base: int,
        length: int,
        own: int,
        max_tokens: int,
        stops: tuple[int, ...],
        presence: float,
        priority: int,
        salt: str | None,
        session: str | None,
        goes_on: bool,
    ) -> None:
        name = f"r{self.num_submitted}"
        self.num_submitted += 1
        text = tuple(base * 100 + i for i in range(length))
        if goes_on and self.guesses:
            text = self.guesses[base % len(self.guesses)][:length]
        prompt = text + tuple(range(900, 900 + own))
        self.alive.add(name)
        self.prompts[name], self.texts[name] = prompt, []
        params = SamplingParams(max_tokens, temperature=0.0, stop_token_ids=stops, presence_penalty=presence)
        self.commands.append(
            SubmitRequest(name, prompt, params, priority=priority, cache_salt=salt, session_id=session)
        )

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), own=st.integers(0, 20), when=st.sampled_from(["later", "now", "idle", "idle"]))
    def speculate(self, data: st.DataObject, own: int, when: str) -> None:
        # Also about requests that still run, and about sessions that have called again.
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        if when == "idle":
            self.run_out()
            name = list(self.ended)[-1]
        guess = (*self.prompts[name], *self.texts[name], *range(700, 700 + own))
        self.guesses.append(guess)
        self.commands.append(Speculate(name, guess))
        if when != "later":
            self.step([])

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.CANCELLED, FinishReason.STOP]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        # Also requests that have ended already: the two may cross.
        self.commands.append(EndRequest(data.draw(st.sampled_from(sorted(self.prompts))), reason))

    @rule()
    def only_commands(self) -> None:
        self.step([])

    @precondition(lambda self: any(self.flying.values()))
    @rule(data=st.data(), fails=st.sampled_from([False] * 9 + [True]), took_ns=st.sampled_from([1, 10**6, 10**8]))
    def complete(self, data: st.DataObject, fails: bool, took_ns: int) -> None:
        started_ns, self.now_ns = self.now_ns, self.now_ns + took_ns
        lanes = data.draw(st.permutations(sorted(lane for lane, batches in self.flying.items() if batches)))
        lanes = lanes[: data.draw(st.integers(1, len(lanes)))]
        outputs = []
        for lane in lanes:
            batch = self.flying[lane].pop(0)
            samples = tuple(
                # Two possible tokens: outputs of different requests become prefixes of others.
                TokenSample(chunk.request_id, chunk.end % 2)
                for chunk in batch.chunks
                if chunk.sample is not None
            )
            error = "made to fail" if fails else None
            outputs.append(BatchOutput(batch.batch_id, lane, started_ns, self.now_ns, () if fails else samples, error))
        self.step(outputs)

    @precondition(lambda self: self.copying)
    @rule(data=st.data(), fails=st.sampled_from([False] * 4 + [True]))
    def copied(self, data: st.DataObject, fails: bool) -> None:
        transfer = self.copying.pop(data.draw(st.integers(0, len(self.copying) - 1)))
        self.step([_copied(transfer, "made to fail" if fails else None)])

    @invariant()
    def consistent(self) -> None:
        if not self.commands:
            self.core.check_invariants()

    def teardown(self) -> None:
        """Everything that was accepted comes to an end, and every block comes back."""
        if not hasattr(self, "core"):
            return  # hypothesis gave up before the first rule
        self.run_out()
        assert not self.alive, f"never ended: {sorted(self.alive)}"
        assert set(self.ended) == set(self.prompts)
        for name, reason in self.ended.items():
            if not 1 <= len(self.prompts[name]) < 40:
                assert reason in (FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.STOP)
        self.core.check_invariants()
        assert self.core.memory.num_available_blocks == 10

    def run_out(self) -> None:
        """Goes on until nothing is left to do."""
        for _ in range(2000):
            if not (self.alive or any(self.flying.values()) or self.commands or self.copying):
                break
            outputs: list[Completion] = [_copied(self.copying.pop(0))] if self.copying else []
            outputs += [
                BatchOutput(
                    batch.batch_id,
                    lane,
                    self.now_ns,
                    self.now_ns + 1,
                    tuple(TokenSample(c.request_id, c.end % 2) for c in batch.chunks if c.sample),
                )
                for lane, batches in self.flying.items()
                if batches
                for batch in [batches.pop(0)]
            ]
            self.step(outputs)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=150, stateful_step_count=60)
