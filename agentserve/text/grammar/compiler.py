"""Compiles grammars, in threads of its own, and keeps them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from agentserve.errors import InvalidGrammarError
from agentserve.text.grammar.lark import json_schema
from agentserve.text.grammar.source import Constraint, build_grammar
from agentserve.text.output import OutputFormat
from agentserve.text.tokenizer import Tokenizer

_NUM_WORKERS = 2
_NUM_KEPT = 128
_MAX_CHARACTERS = 1 << 20
"""Of a grammar, and of what a request says about its answer; larger ones are refused."""


@dataclasses.dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar that is ready for use by any number of requests."""

    prototype: LLMatcher
    """At the start of the grammar; to be copied, not used."""
    eos_token_ids: tuple[int, ...]
    """Allowed where the grammar may end, and nowhere else. Not empty."""


class GrammarCompiler:
    """Grammars of one model. May be used from any thread.

    The same grammar is compiled once, also if it is asked for while it is being compiled; those that were used last are
    kept.
    """

    def __init__(self, tokenizer: Tokenizer, output: OutputFormat, *, num_kept: int = _NUM_KEPT) -> None:
        """`num_kept`: how many grammars are kept at most."""
        self._tokenizer = tokenizer
        self._output = output
        self._num_kept = num_kept
        self._workers = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="agentserve-grammar")
        self._kept: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()
        self._lock = threading.Lock()  # guards the one above and the two below
        self.num_hits = 0
        self.num_compiled = 0
        self._vocabulary: LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()

    def close(self) -> None:
        """Waits for what is being compiled."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def compile(self, constraint: Constraint, prompt: str) -> CompiledGrammar | None:
        """What an answer to the rendered `prompt` is held to; None if it may be any text.

        Raises InvalidGrammarError for a schema, pattern or grammar that is wrong or not supported, and
        InvalidRequestError for a choice of tools that is impossible.
        """
        if not constraint.is_constrained:
            return None
        # The future is shared with others, who still want it if we are cancelled.
        return await asyncio.shield(asyncio.wrap_future(self.submit(constraint, prompt)))

    def submit(self, constraint: Constraint, prompt: str) -> Future[CompiledGrammar]:
        """The same without an event loop, for a constraint that needs a grammar."""
        reasoning = self._output.reasoning
        # All that matters of the prompt is whether it opened the reasoning.
        is_open = reasoning is not None and constraint.may_reason and reasoning.is_open_in(prompt)
        opening = reasoning.open if reasoning is not None and is_open else ""
        key = f"{opening} {_describe(constraint)}"
        with self._lock:
            future = self._kept.get(key)
            if future is not None:
                self._kept.move_to_end(key)
                self.num_hits += 1
                return future
            future = self._workers.submit(self._compile, constraint, opening)
            self._kept[key] = future
            self.num_compiled += 1
            while len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)
            return future

    # ---- in a worker ----

    def _compile(self, constraint: Constraint, prompt: str) -> CompiledGrammar:
        vocabulary = self._open_vocabulary()
        grammar = build_grammar(constraint, self._output, prompt, partial(_problem, vocabulary))
        assert grammar is not None
        if len(grammar.text) > _MAX_CHARACTERS:
            raise InvalidGrammarError(f"{grammar.param} is too large", param=grammar.param)
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar.text), log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split("<state>")[0].split())
            raise InvalidGrammarError(f"{grammar.param} cannot be compiled: {reason}", param=grammar.param)
        return CompiledGrammar(matcher, self._tokenizer.eos_token_ids)

    def _open_vocabulary(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it, which takes a moment and is needed by few."""
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(
                    TokenizerWrapper(_Vocabulary(self._tokenizer)), eos_token=list(self._tokenizer.eos_token_ids)
                )
            return self._vocabulary


class _Vocabulary:
    """The bytes of each token, as they are: llguidance need not know the kind of tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        token_ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in token_ids]
        self.special_token_ids = [token_id for token_id in token_ids if tokenizer.is_special(token_id)]

    def __call__(self, data: bytes) -> list[int]:
        return self._tokenizer.encode(data.decode("utf-8", "replace"))


def _problem(vocabulary: LLTokenizer, schema: Mapping[str, Any]) -> str:
    """Why a schema cannot be compiled; empty if it can."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(json_schema(schema)))
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    return messages[0] if is_error else ""


def _describe(constraint: Constraint) -> str:
    """Equal for equal constraints. The order of properties is the order in which they are written, so it matters."""
    names = [type(constraint.format).__name__, dataclasses.asdict(constraint)]
    try:
        text = json.dumps(names)
    except (RecursionError, ValueError, TypeError) as error:
        raise InvalidGrammarError(
            f"the schema is nested too deeply or is no JSON: {error}", param="response_format"
        ) from None
    if len(text) > _MAX_CHARACTERS:
        raise InvalidGrammarError("tools and response_format are too large for a grammar", param="response_format")
    return text
