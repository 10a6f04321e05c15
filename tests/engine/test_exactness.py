"""The whole engine against `transformers` on the same weights: the same greedy tokens, however they were scheduled.

Each output is checked by one reference forward over prompt and output: the token at every place must be the one that
the reference finds most likely there. By induction that is greedy decoding with the reference. Log-probabilities must
agree within 1e-4, so a wrong mask or position cannot hide behind an equal argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agentserve.config import ControlConfig, EngineConfig
from agentserve.core.engine import EngineCore
from agentserve.core.events import Speculate, SubmitRequest
from agentserve.core.executor import Executor
from agentserve.core.request import SamplingParams, WorkClass
from agentserve.executors.pytorch.devices.cpu import CpuDevice
from agentserve.executors.pytorch.executor import TorchExecutor
from agentserve.models.gguf_file import read_gguf_header
from agentserve.models.interface import DecoderModel
from agentserve.models.loader import load_model
from agentserve.models.registry import resolve_model
from agentserve.models.weights import GGUFWeights
from agentserve.runtime.live import MonotonicClock
from agentserve.runtime.recording import Header
from agentserve.runtime.replay import build_core
from agentserve.text.chat import load_chat_template
from agentserve.text.tokenizer import load_tokenizer
from tests.engine.harness import Run, drive
from tests.models.builders import reference_logits, requires_smollm2, save_tiny_model

BLOCK_SIZE = 16
NUM_PROMPTS = 8
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Say hello in Spanish.",
    "What is 12 times 12?",
    "List the files in this directory.",
    "Why is the sky blue? Answer in detail, please.",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of ours, the reference with the same weights, and prompts."""

    model: DecoderModel
    reference: torch.nn.Module
    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int
    """Output tokens of each prompt."""
    attention: str = "auto"
    """Which attention the executor is to use."""
    lookahead: int = 1
    """Batches of the decode lane that may be in flight."""


def make_core(executor: Executor, **values: Any) -> EngineCore:
    capabilities = executor.capabilities()
    defaults = {
        "max_model_len": 512,
        "max_num_seqs": NUM_PROMPTS,
        "control": ControlConfig(controller="static"),
        "decode_lookahead": capabilities.lookahead,
    }
    config = EngineConfig(num_blocks=capabilities.num_blocks, block_size=BLOCK_SIZE, **{**defaults, **values})
    units = capabilities.compute_units
    return build_core(Header(config, units, capabilities.unit_granularity, capabilities.min_units, "m", "cpu"))


@pytest.fixture
def executor_of() -> Iterator[Callable[..., TorchExecutor]]:
    made: list[TorchExecutor] = []

    def make(subject: Subject, num_blocks: int = 128) -> TorchExecutor:
        executor = TorchExecutor(
            subject.model,
            CpuDevice(),
            attention=subject.attention,
            lookahead=subject.lookahead,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=NUM_PROMPTS,
            clock=MonotonicClock(),
        )
        made.append(executor)
        return executor

    yield make
    for executor in made:
        executor.close()


def smollm2() -> Subject:
    source = resolve_model("smollm2-135m")
    assert source.path is not None and source.config is not None
    config = source.config
    tokenizer = load_tokenizer(source)
    template = load_chat_template(source, tokenizer)
    assert template is not None
    prompts = tuple(
        tuple(tokenizer.encode(template.render([{"role": "user", "content": question}]))) for question in QUESTIONS
    )
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    weights = GGUFWeights(read_gguf_header(source.path), config, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights.get(name, *parameter.shape))
    return Subject(load_model(source), reference, prompts, num_tokens=48)


def tiny(directory: Path, architecture: str, attention: str, lookahead: int) -> Subject:
    reference = save_tiny_model(directory, architecture, max_position_embeddings=512)
    generator = torch.Generator().manual_seed(1)
    model = load_model(resolve_model(str(directory)))
    prompts = tuple(
        tuple(torch.randint(0, model.config.vocab_size, (20 + 5 * index,), generator=generator).tolist())
        for index in range(NUM_PROMPTS)
    )
    return Subject(model, reference, prompts, num_tokens=24, attention=attention, lookahead=lookahead)


@pytest.fixture(
    params=[
        pytest.param(("smollm2", "mirror", 1), marks=[requires_smollm2, pytest.mark.smollm2], id="smollm2"),
        pytest.param(("llama", "mirror", 1), id="llama"),
        pytest.param(("qwen2", "mirror", 2), id="qwen2-lookahead"),
        pytest.param(("qwen3", "mirror", 1), id="qwen3"),
        pytest.param(("llama", "torch", 2), id="llama-paged-lookahead"),
        pytest.param(("qwen3", "torch", 1), id="qwen3-paged"),
    ],
    scope="module",
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    architecture, attention, lookahead = request.param
    if architecture == "smollm2":
        return smollm2()
    return tiny(tmp_path_factory.mktemp(architecture), architecture, attention, lookahead)


def requests_for(prompts: Sequence[tuple[int, ...]], num_tokens: int) -> list[SubmitRequest]:
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=0)
    return [SubmitRequest(f"r{index}", prompt, params) for index, prompt in enumerate(prompts)]


def check(subject: Subject, requests: Sequence[SubmitRequest], run: Run) -> None:
    for request in requests:
        tokens = run.tokens[request.request_id]
        assert len(tokens) == request.sampling.max_tokens
        prompt = request.prompt_token_ids
        logits = reference_logits(subject.reference, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == tokens, request.request_id
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        ours = torch.tensor(run.logprobs[request.request_id])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_each_alone(subject: Subject, executor_of: Callable[..., TorchExecutor]) -> None:
    executor = executor_of(subject)
    requests = requests_for(subject.prompts, subject.num_tokens)
    run = drive(make_core(executor), executor, requests, apart=True)
    assert all(len(batch.chunks) == 1 for batch in run.batches)
    check(subject, requests, run)


@pytest.mark.parametrize(
    "values",
    [
        {"control": ControlConfig(controller="static", slots="off"), "prefill_chunk": 48},
        {"scheduler": "chunked", "max_num_batched_tokens": 40},
        {"scheduler": "prefill-first"},
        {"scheduler": "fcfs"},
    ],
    ids=["turns", "chunked", "prefill-first", "fcfs"],
)
def test_prompts_and_decodes_in_one_batch(
    subject: Subject, executor_of: Callable[..., TorchExecutor], values: dict[str, Any]
) -> None:
    executor = executor_of(subject)
    requests = requests_for(subject.prompts, subject.num_tokens)
    run = drive(make_core(executor, **values), executor, requests)
    if values.get("scheduler") in {"prefill-first", "fcfs"}:
        # All prompts are read before anybody goes on, and then all decode together.
        assert max(len(batch.chunks) for batch in run.batches) == NUM_PROMPTS
    else:
        assert any(len({chunk.work_class for chunk in batch.chunks}) > 1 for batch in run.batches), "never mixed"
    check(subject, requests, run)


def test_batched_with_others(subject: Subject, executor_of: Callable[..., TorchExecutor]) -> None:
    executor = executor_of(subject)
    requests = requests_for(subject.prompts, subject.num_tokens)
    run = drive(make_core(executor, prefill_chunk=64), executor, requests)
    # How many of them decode together depends on how fast the prompts are read beside.
    assert max(len(batch.chunks) for batch in run.batches) > 1
    assert any(batch.co_running for batch in run.batches), "the lanes never overlapped"
    check(subject, requests, run)


@pytest.mark.parametrize(("prefill_chunk", "resume_budget"), [(7, 5), (13, 3), (1, 1)])
def test_chunked_prefill_with_odd_sizes(
    subject: Subject, executor_of: Callable[..., TorchExecutor], prefill_chunk: int, resume_budget: int
) -> None:
    executor = executor_of(subject)
    requests = requests_for(subject.prompts, subject.num_tokens)
    core = make_core(executor, prefill_chunk=prefill_chunk, resume_budget=resume_budget)
    run = drive(core, executor, requests)
    largest = max(c.num_tokens for b in run.batches for c in b.chunks if c.work_class is WorkClass.COLD_PREFILL)
    assert largest <= prefill_chunk
    check(subject, requests, run)


def test_after_a_prefix_hit(subject: Subject, executor_of: Callable[..., TorchExecutor]) -> None:
    executor = executor_of(subject)
    core = make_core(executor, resume_min_cached_tokens=BLOCK_SIZE)
    first = requests_for(subject.prompts, subject.num_tokens)
    run = drive(core, executor, first)
    # The second turn: all of the first one, and something new.
    turns = [(*r.prompt_token_ids, *run.tokens[r.request_id], *r.prompt_token_ids[:9]) for r in first]
    second = [SubmitRequest(f"second-{index}", turn, first[index].sampling) for index, turn in enumerate(turns)]
    again = drive(core, executor, second)
    for request, before in zip(second, first, strict=True):
        stats = again.ends[request.request_id].stats
        # All whole blocks of what has KV: the last sampled token of the first turn has none.
        known = len(before.prompt_token_ids) + before.sampling.max_tokens - 1
        assert stats.num_cached_tokens == known // BLOCK_SIZE * BLOCK_SIZE
        assert stats.first_work_class == WorkClass.RESUME_PREFILL
    check(subject, second, again)


def test_after_speculation(subject: Subject, executor_of: Callable[..., TorchExecutor]) -> None:
    """What was computed before anybody asked, beside somebody who decodes, is what would have been computed later."""
    executor = executor_of(subject)
    core = make_core(executor, resume_min_cached_tokens=BLOCK_SIZE, speculate="next_turn")
    first = requests_for(subject.prompts[:3], subject.num_tokens)
    run = drive(core, executor, first)
    # Answers as they were written but for the first one, which comes back as something else; then what opens a result.
    answers = [subject.prompts[3], run.tokens["r1"], run.tokens["r2"]]
    heads = [(*r.prompt_token_ids, *answer, *range(5, 40)) for r, answer in zip(first, answers, strict=True)]
    guesses = [Speculate(r.request_id, head) for r, head in zip(first, heads, strict=True)]
    others = [
        replace(request, request_id="other") for request in requests_for(subject.prompts[4:5], subject.num_tokens)
    ]
    beside = drive(core, executor, [*others, *guesses])
    second = [
        SubmitRequest(f"second-{index}", (*head, *head[:9]), first[index].sampling) for index, head in enumerate(heads)
    ]
    again = drive(core, executor, second)
    for request, head in zip(second, heads, strict=True):
        assert again.ends[request.request_id].stats.num_cached_tokens == len(head) // BLOCK_SIZE * BLOCK_SIZE
    check(subject, others, beside)
    check(subject, second, again)


def test_after_preemption_and_recompute(subject: Subject, executor_of: Callable[..., TorchExecutor]) -> None:
    requests = requests_for(subject.prompts, subject.num_tokens)
    # Room for the prompts and a little more: they outgrow it together.
    num_blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in subject.prompts) + 2
    executor = executor_of(subject, num_blocks=num_blocks)
    # All prompts in one batch.
    core = make_core(executor, max_model_len=num_blocks * BLOCK_SIZE, prefill_chunk=2048)
    run = drive(core, executor, requests)
    assert sum(end.stats.num_preemptions for end in run.ends.values()) > 0, "nobody was preempted"
    check(subject, requests, run)
