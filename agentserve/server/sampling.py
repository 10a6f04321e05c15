"""How a request is sampled, once the length of its prompt and the model's stop tokens are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from agentserve.core.request import SamplingParams
from agentserve.server.types import SamplingRequest


def sampling_params(
    wanted: SamplingRequest, *, num_prompt_tokens: int, max_model_len: int, eos_token_ids: Iterable[int], seed: int
) -> SamplingParams:
    """What the engine gets. What does not fit the window is left for `EngineClient.check` to refuse."""
    max_tokens = wanted.max_tokens
    # A prompt that fills the window has no room at all; `EngineClient.check` says so.
    room = max(1, max_model_len - num_prompt_tokens)
    if max_tokens is not None and wanted.clamp_max_tokens:
        max_tokens = min(room, max_tokens)
    elif max_tokens is None:
        max_tokens = room if wanted.default_max_tokens is None else min(room, wanted.default_max_tokens)
    eos = () if wanted.ignore_eos else tuple(eos_token_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        repetition_penalty=wanted.repetition_penalty,
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys((*eos, *wanted.stop_token_ids))),
        min_tokens=wanted.min_tokens,
        logprobs=wanted.logprobs,
        logit_bias=wanted.logit_bias,
    )


def derive_seed(seed: int, index: int) -> int:
    """The seed of choice `index`, from 0 to 2**63 - 1. Choice 0 has the request's own seed, as if it were alone."""
    if index == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
