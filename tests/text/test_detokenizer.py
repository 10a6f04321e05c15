from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentserve.text.detokenizer import IncrementalDetokenizer
from agentserve.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.models.builders import SMOLLM2, requires_smollm2
from tests.text.builders import sentencepiece_tokenizer

BYTES = ByteTokenizer()
# SmolLM2's vocabulary lacks a few control characters and the bytes that begin planes 4 to 11.
CHARACTERS = st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=("Cs",))


def pieces(tokenizer, token_ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(SMOLLM2)


@given(token_ids=st.lists(st.integers(0, 270), max_size=30), skip=st.booleans())
@example(token_ids=[0xF0, 0x9F, 257, 0x98, 0x80], skip=True)
@example(token_ids=[0xED, 0xA0, 0x80, 0xE0, 0x80, 0xF4, 0x90], skip=False)
def test_pieces_add_up_to_the_whole_for_bytes(token_ids, skip):
    whole = BYTES.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(BYTES, token_ids, skip_special_tokens=skip)) == whole


@pytest.mark.smollm2
@requires_smollm2
@settings(max_examples=300)
@given(data=st.data())
def test_pieces_add_up_to_the_whole_for_smollm2(smollm2, data):
    # Single bytes are rare among 49152 tokens; every byte has a token of its own, though.
    byte_ids = [smollm2.encode(chr(code))[-1] for code in (0xE9, 0x4E2D, 0x1F600)] + list(range(17, 273))
    token = st.one_of(st.integers(0, 49151), st.sampled_from(byte_ids), st.integers(49152, 49160))
    token_ids = data.draw(st.lists(token, max_size=30))
    skip = data.draw(st.booleans())
    whole = smollm2.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(smollm2, token_ids, skip_special_tokens=skip)) == whole


@pytest.mark.smollm2
@requires_smollm2
@given(text=st.text(CHARACTERS, max_size=30), extra=st.sampled_from(["", "🦙 Größe 中文", "👩‍👩‍👧‍👦"]))
def test_text_survives_and_never_shows_half_a_character(smollm2, text, extra):
    text = extra + text
    shown = pieces(smollm2, smollm2.encode(text), skip_special_tokens=False)
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_half_a_character_waits_for_its_other_half():
    assert pieces(BYTES, "é😀".encode()) == ["", "é", "", "", "", "😀", ""]
    assert pieces(BYTES, [0xF0, 0x9F, 0x41]) == ["", "", "\ufffdA", ""]
    assert pieces(BYTES, [0xF0, 0x9F]) == ["", "", "\ufffd"]


def test_a_prompt_may_end_within_a_character():
    prompt = "abc😀".encode()
    assert pieces(BYTES, prompt[-2:], prompt_token_ids=prompt[:-2]) == ["", "😀", ""]
    assert pieces(BYTES, [0x41], prompt_token_ids=[*prompt[:-2], 257]) == ["\ufffdA", ""]


def test_special_tokens_are_shown_on_request():
    ids = [65, 256, 66, 257]
    assert "".join(pieces(BYTES, ids)) == "AB"
    assert "".join(pieces(BYTES, ids, skip_special_tokens=False)) == "A<|im_start|>B<|im_end|>"


def test_sentencepiece_drops_one_space_at_the_start_of_a_text_only():
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode("ab é a")
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "ab é a"
    assert "".join(pieces(tokenizer, ids, prompt_token_ids=ids)) == " ab é a"
    assert "".join(pieces(tokenizer, [1, *ids])) == tokenizer.decode([1, *ids]) == "ab é a"
