"""Requests with a grammar through the whole engine, with too few blocks for all of them."""

from __future__ import annotations

import re

import pytest

from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.events import SubmitRequest
from agentserve.core.request import SamplingParams
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.runtime.live import MonotonicClock
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.grammar.source import Constraint
from agentserve.text.output import OutputFormat
from agentserve.text.tools.spec import RegexFormat
from tests.contract.vocabulary import EOS, SmallTokenizer
from tests.engine.harness import Run, drive
from tests.executors.builders import tiny_llama

PATTERNS = ("[ab]{20}", None, "([0-9]{2},){8}", None, "x(yz){10}")
"""None: a free request."""
TOKENIZER = SmallTokenizer()


def run(num_blocks: int, lookahead: int) -> Run:
    masks, compiler = GrammarMasks(), GrammarCompiler(TOKENIZER, OutputFormat(None, None, TOKENIZER))
    executor = TorchExecutor(
        tiny_llama(),
        CpuDevice(),
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=len(PATTERNS),
        clock=MonotonicClock(),
        lookahead=lookahead,
        token_masks=masks,
    )
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_model_len=min(128, num_blocks * 4),
        max_num_seqs=len(PATTERNS),
        decode_lookahead=lookahead,
        control=ControlConfig(controller="static"),
    )
    capabilities = executor.capabilities()
    units = capabilities.compute_units
    core = build_core(Header(config, units, capabilities.unit_granularity, capabilities.min_units, "m", "cpu"))
    requests = []
    for index, pattern in enumerate(PATTERNS):
        if pattern is not None:
            masks.open(f"r{index}", compiler.submit(Constraint(format=RegexFormat(pattern)), "").result())
        params = SamplingParams(
            max_tokens=30, seed=index, stop_token_ids=(EOS,) if pattern else (), constrained=pattern is not None
        )
        requests.append(SubmitRequest(f"r{index}", tuple(range(10 * index, 10 * index + 9)), params))
    try:
        done = drive(core, executor, requests)
        assert [masks.close(request.request_id) for request in requests] == [None] * len(requests)
    finally:
        executor.close()
        masks.shutdown()
        compiler.close()
    assert core.memory.num_available_blocks == num_blocks
    return done


@pytest.mark.parametrize("lookahead", [1, 2])
def test_a_preempted_request_keeps_its_place_in_the_grammar(lookahead: int) -> None:
    # Nine tokens of prompt and up to 30 of output, in blocks of four: 50 blocks hold all five, 20 do not.
    roomy, narrow = run(60, lookahead), run(20, lookahead)
    assert sum(end.stats.num_preemptions for end in narrow.ends.values()) > 0, "nobody was preempted"
    assert narrow.tokens == roomy.tokens
    for index, pattern in enumerate(PATTERNS):
        token_ids = narrow.tokens[f"r{index}"]
        if pattern is None:
            assert len(token_ids) == 30
        else:
            assert token_ids[-1] == EOS
            assert re.fullmatch(pattern, TOKENIZER.decode(token_ids[:-1]))
