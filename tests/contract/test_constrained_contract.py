"""What every executor must do for requests whose output a grammar decides."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from agentserve.core.request import SamplingParams
from agentserve.text.grammar.compiler import GrammarCompiler
from agentserve.text.grammar.masks import GrammarMasks
from agentserve.text.grammar.source import Constraint
from agentserve.text.output import OutputFormat
from agentserve.text.tools.spec import RegexFormat
from tests.contract.factories import FACTORIES
from tests.contract.harness import Harness, greedy
from tests.contract.vocabulary import EOS, SmallTokenizer
from tests.executors.builders import Generation, step

PROMPT = (5, 9, 23, 42, 77, 11)
TOKENIZER = SmallTokenizer()
SAMPLINGS = {"greedy": greedy(), "drawn": SamplingParams(max_tokens=64, temperature=1.0, top_p=0.9, seed=7)}


def constrained(sampling: str = "greedy") -> SamplingParams:
    params = SAMPLINGS[sampling]
    return SamplingParams(
        max_tokens=64,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=params.seed,
        stop_token_ids=(EOS,),
        constrained=True,
    )


class Bench:
    """An executor, and the grammars of its requests."""

    def __init__(self, harness: Harness, masks: GrammarMasks, compiler: GrammarCompiler) -> None:
        self.harness, self.masks = harness, masks
        self._compiler = compiler

    def start(self, name: str, pattern: str, first_block: int = 0, sampling: str = "greedy") -> Generation:
        """A request whose output is to match `pattern`."""
        self.masks.open(name, self._compiler.submit(Constraint(format=RegexFormat(pattern)), "").result())
        return Generation(name, PROMPT, range(first_block, first_block + 8), params=constrained(sampling))

    def finish(self, *generations: Generation, free: Generation | None = None) -> list[str]:
        """Runs all of them in one batch a step until each constrained one has ended; their texts."""
        while running := [generation for generation in generations if EOS not in generation.output]:
            step(self.harness, [*running, *([free] if free is not None else [])])
        for generation in generations:
            assert self.masks.close(generation.name) is None
        return [TOKENIZER.decode(generation.output[:-1]) for generation in generations]


@pytest.fixture(params=FACTORIES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    masks, compiler = GrammarMasks(), GrammarCompiler(TOKENIZER, OutputFormat(None, None, TOKENIZER))
    harness = FACTORIES[request.param](token_masks=masks)
    yield Bench(harness, masks, compiler)
    harness.executor.close()
    masks.shutdown()
    compiler.close()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_only_what_is_allowed_is_sampled(bench: Bench, sampling: str) -> None:
    pattern = "[ab]{3}-[0-9]{4}"
    (text,) = bench.finish(bench.start("a", pattern, sampling=sampling))
    assert re.fullmatch(pattern, text)


def test_each_row_of_a_batch_has_its_own_grammar(bench: Bench) -> None:
    """Two constrained requests and a free one between them, which gets the tokens that it gets alone."""
    alone = Generation("alone", PROMPT, range(40, 48), params=SAMPLINGS["drawn"])
    for _ in range(8):
        step(bench.harness, [alone])
    free = Generation("free", PROMPT, range(16, 24), params=SAMPLINGS["drawn"])
    one, other = bench.start("one", "[xy]{6}"), bench.start("other", "(12|34){3}", 8)
    step(bench.harness, [one, free, other])
    texts = bench.finish(one, other, free=free)
    assert re.fullmatch("[xy]{6}", texts[0])
    assert re.fullmatch("(12|34){3}", texts[1])
    assert free.output[:7] == alone.output[:7]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_request_that_is_computed_again_goes_on_in_its_grammar(bench: Bench, sampling: str) -> None:
    """As after a preemption: its tokens so far are a prompt, in other blocks, perhaps read in pieces."""
    pattern = "[a-z]{4}:[0-9]{5}"
    (undisturbed,) = bench.finish(bench.start("undisturbed", pattern, sampling=sampling))
    again = bench.start("again", pattern, 16, sampling)
    for _ in range(6):  # into the digits
        step(bench.harness, [again])
    again.num_computed = 0
    again.block_ids = tuple(range(32, 40))
    step(bench.harness, [again], max_tokens=5, ended_request_ids=("again",))
    assert len(again.output) == 6  # the first piece samples nothing, and asks for no mask
    assert bench.finish(again) == [undisturbed]
    assert re.fullmatch(pattern, undisturbed)


def test_without_a_grammar_the_batch_fails_and_no_other(bench: Bench) -> None:
    lost = Generation("lost", PROMPT, range(8), params=constrained())
    output = bench.harness.run(bench.harness.batch([lost.next_chunk()]))
    assert output.error is not None and "grammar" in output.error
    assert output.samples == ()
    assert bench.finish(bench.start("a", "[ab]{2}", 8)) in (["aa"], ["ab"], ["ba"], ["bb"])


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=list(FACTORIES))
def test_an_executor_without_grammars_fails_such_a_batch(factory) -> None:
    harness = factory()
    lost = Generation("lost", PROMPT, range(8), params=constrained())
    output = harness.run(harness.batch([lost.next_chunk()]))
    assert output.error is not None and "grammar" in output.error
    harness.executor.close()
