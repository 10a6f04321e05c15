from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from agentserve.errors import InvalidRequestError, ModelFormatError, UnknownModelError, UnsupportedModelError
from agentserve.text.tokenizer import ByteTokenizer, load_tokenizer
from tests.models.builders import SMOLLM2, requires_smollm2
from tests.text.builders import (
    gguf_source,
    hf_source,
    sentencepiece_metadata,
    sentencepiece_tokenizer,
    trained_bpe,
)

TEXTS = [
    "",
    " ",
    "Hello world, it's 2024!",
    "  two  spaces   three\t\ttabs \n\n\n newlines\r\n\r\n end  ",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # 0x1F\n\n\n  12345 + 67 = 12412",
    "Größe naïve Ünïcödé — “quotes” … ½ ² ٣",
    "中文字符 日本語テキスト 한국어 العربية עברית हिन्दी",
    "🦙🦙 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|> <|im_start <|not_special|>",
    json.dumps({"name": "search", "arguments": {"query": 'a "b" \\n', "k": [1, 2.5e-3]}}, indent=2),
    "x" * 500 + " " * 100 + "1" * 50,
]


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def reference():
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(SMOLLM2.path.parent), gguf_file=SMOLLM2.path.name)
    # transformers does not know what `tokenizer.ggml.pre = smollm` means: each digit by itself, as in the model's own
    # tokenizer.json (and in llama.cpp).
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


@pytest.mark.smollm2
@requires_smollm2
def test_smollm2_equals_transformers(smollm2, reference):
    for text in TEXTS:
        token_ids = reference.encode(text, add_special_tokens=False)
        assert smollm2.encode(text) == token_ids, text
        assert smollm2.encode(text, add_special_tokens=True) == reference.encode(text), text
        for skip in (True, False):
            expected = reference.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert smollm2.decode(token_ids, skip_special_tokens=skip) == expected
    assert smollm2.vocab_size == len(reference) == 49152
    assert smollm2.bos_token_id == reference.bos_token_id == 1
    assert smollm2.eos_token_ids == (2, 0)
    assert {token_id for token_id in range(49152) if smollm2.is_special(token_id)} == set(range(17))
    assert smollm2.special_tokens["eos_token"] == reference.eos_token == "<|im_end|>"

    @given(st.text(max_size=40))
    def any_text(text):
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False)

    any_text()


@pytest.mark.smollm2
@requires_smollm2
def test_encode_from_many_threads(smollm2):
    expected = [smollm2.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(smollm2.encode, TEXTS * 20))
    assert results == expected * 20


@pytest.mark.parametrize("make", [ByteTokenizer, sentencepiece_tokenizer, lambda: trained_bpe("qwen2")])
def test_a_lone_surrogate_is_refused(make):
    with pytest.raises(InvalidRequestError, match="lone surrogate at character 2"):
        make().encode("ab\ud800")


# ---- bytes ----


@given(st.text())
def test_bytes_are_reversible(text):
    tokenizer = ByteTokenizer()
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)


def test_special_tokens_of_the_byte_tokenizer():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a<|im_start|><|im_end|>b<|endoftext|>") == [97, 256, 257, 98, 258]
    assert tokenizer.decode([97, 256, 98, 300]) == "ab"
    assert [tokenizer.is_special(token_id) for token_id in (255, 256, 258, 259)] == [False, True, True, False]


# ---- GGUF: byte-level ----


def test_qwen2_equals_transformers():
    ours = trained_bpe("qwen2")
    vocabulary, merges = trained_bpe.vocabulary, trained_bpe.merges
    reference = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    for text in TEXTS:
        if "<|" not in text:  # the reference has other special tokens
            assert ours.encode(text) == reference.encode(text, add_special_tokens=False), text


def test_llama3_splits_numbers_by_three_and_takes_known_words_whole():
    tokenizer = trained_bpe("llama-bpe", add_bos=None)
    words = [tokenizer.decode([token_id]) for token_id in tokenizer.encode("12345 1234")]
    assert "".join(words) == "12345 1234"
    assert not any("34" in word for word in words)  # the splits are 123|45| |123|4
    # "zq" is in the vocabulary, but no merge leads to it.
    assert tokenizer.decode([tokenizer.encode("zq")[0]]) == "zq"
    assert len(trained_bpe("qwen2").encode("zq")) == 2
    # Llama 3 begins texts with a token of its own unless the file says otherwise.
    assert tokenizer.encode("a", add_special_tokens=True) == [tokenizer.bos_token_id, *tokenizer.encode("a")]
    assert trained_bpe("llama-bpe", add_bos=False).encode("a", add_special_tokens=True) == tokenizer.encode("a")
    assert trained_bpe("default", add_bos=None).encode("a", add_special_tokens=True) == tokenizer.encode("a")


def test_user_defined_tokens_stay_whole_and_are_shown():
    tokenizer = trained_bpe("qwen2")
    (token_id,) = tokenizer.encode("<my tool>")
    assert tokenizer.token_bytes(token_id) == b"<my tool>"
    assert not tokenizer.is_special(token_id)
    assert tokenizer.decode([token_id]) == "<my tool>"


# ---- GGUF: SentencePiece ----


def naive_sentencepiece(text: str) -> list[str]:
    """Joins the neighbours with the best score, the first such pair first, until nothing joins."""
    metadata = sentencepiece_metadata()
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]


@given(st.text(alphabet="abc ", min_size=1, max_size=20))
def test_sentencepiece_without_merges(text):
    tokenizer = sentencepiece_tokenizer()
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[token_id] for token_id in tokenizer.encode(text)] == naive_sentencepiece(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_falls_back_to_bytes():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.encode("é", add_special_tokens=True) == [1, 259, 3 + 0xC3, 3 + 0xA9]
    assert [tokenizer.token_bytes(token_id) for token_id in (3 + 0xC3, 263)] == [b"\xc3", b" a"]
    assert tokenizer.decode([1, 259, 3 + 0xC3, 3 + 0xA9, 2]) == "é"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedModelError, "kind 'bert'"),
        ({"model": "gpt2", "merges": ["a b"], "pre": "martian"}, UnsupportedModelError, "the way 'martian'"),
        ({"model": "gpt2"}, ModelFormatError, "no list tokenizer.ggml.merges"),
        ({"model": "gpt2", "merges": ["ab"]}, ModelFormatError, "'ab' is no merge"),
        ({"model": "gpt2", "merges": ["a q"]}, ModelFormatError, "inconsistent"),
        ({"tokens": [1, 2]}, ModelFormatError, "no list of strings"),
        ({"tokens": None}, ModelFormatError, "no list tokenizer.ggml.tokens"),
        ({"token_type": 3}, ModelFormatError, "no list tokenizer.ggml.token_type"),
        ({"scores": [1.0]}, ModelFormatError, "neither merges nor a score"),
        ({"eos_token_id": 99999}, ModelFormatError, "99999, which is no token"),
        ({"unknown_token_id": "x"}, ModelFormatError, "'x', which is no token"),
    ],
)
def test_damaged_gguf_tokenizers(changes, error, message):
    metadata = sentencepiece_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        load_tokenizer(gguf_source(metadata))


# ---- Hugging Face directories ----


@pytest.fixture
def directory(tmp_path):
    """A small tokenizer, written by transformers."""
    trained_bpe("qwen2")
    tokenizer = transformers.Qwen2Tokenizer(vocab=trained_bpe.vocabulary, merges=trained_bpe.merges)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_directory_equals_transformers(directory):
    ours = load_tokenizer(hf_source(directory, eos_token_ids=(7, 5)))
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        token_ids = reference.encode(text)
        assert ours.encode(text, add_special_tokens=True) == token_ids, text
        assert ours.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)
    assert ours.special_tokens["eos_token"] == "<|im_end|>"
    assert ours.eos_token_ids == (7, 5, reference.eos_token_id)
    assert ours.vocab_size == len(reference)


def test_older_directories_are_converted(directory):
    expected = load_tokenizer(hf_source(directory)).encode(TEXTS[4])
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(trained_bpe.vocabulary))
    (directory / "merges.txt").write_text("\n".join(" ".join(merge) for merge in trained_bpe.merges))
    assert load_tokenizer(hf_source(directory)).encode(TEXTS[4]) == expected


def test_damaged_directories(directory, tmp_path):
    for text in ["", "{", '{"version": "1.0"}']:
        (directory / "tokenizer.json").write_text(text)
        with pytest.raises(ModelFormatError, match=r"cannot read .*tokenizer\.json"):
            load_tokenizer(hf_source(directory))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFormatError, match="no usable tokenizer"):
        load_tokenizer(hf_source(tmp_path / "empty"))
    with pytest.raises(UnknownModelError, match="no tokenizer of fake"):
        load_tokenizer(hf_source(None))


def test_damaged_tokenizer_config(directory):
    for text in ["{", "[]"]:
        (directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json"):
            load_tokenizer(hf_source(directory))


def test_unknown_decoders_are_refused(directory):
    state = json.loads((directory / "tokenizer.json").read_text())
    for decoder, name in [({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"), (None, "nothing")]:
        (directory / "tokenizer.json").write_text(json.dumps(state | {"decoder": decoder}))
        with pytest.raises(UnsupportedModelError, match=f"decodes with {name}"):
            load_tokenizer(hf_source(directory))
