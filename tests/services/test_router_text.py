"""Token ids to text: pieces join to the whole, stop strings are found wherever they fall."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from common.errors import StartupError
from services.router.api_errors import ApiError
from services.router.model_text import load
from services.router.text import HELD_TOKENS_MAX, Detokenizer, StopFinder, TextStream
from services.router.validate import ChatPrompt
from tests.services.router_world import CONTEXT, ids_of, tiny_text, tiny_tokenizer, write_folder


def sentencepiece_like() -> Tokenizer:
    """Llama's and Mistral's kind: words with ▁, bytes as <0xNN>, the leading space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁a", "c", "a", "t", "s"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


def sentencepiece_decode(ids):
    return SENTENCEPIECE.decode(list(ids), skip_special_tokens=True)


def streamed(decode, ids, cuts=()):
    """Text of every piece, the ids pushed in parts that end at `cuts`."""
    detokenizer = Detokenizer(decode)
    edges = sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
    pieces = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, detokenizer.finish()]


@given(st.text(max_size=60), st.lists(st.integers(0, 100), max_size=8))
def test_pieces_join_to_the_whole_text(text: str, cuts: list[int]):
    ids = ids_of(text)
    assert "".join(streamed(tiny_text().decode, ids, cuts)) == tiny_text().decode(ids) == text
    ids = SENTENCEPIECE.encode(text).ids
    assert "".join(streamed(sentencepiece_decode, ids, cuts)) == sentencepiece_decode(ids)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 399), max_size=80), st.lists(st.integers(0, 80), max_size=8))
def test_any_tokens_at_all_join_to_their_decoding(ids: list[int], cuts: list[int]):
    """A model may sample halves of characters in any order."""
    assert "".join(streamed(tiny_text().decode, ids, range(len(ids)))) == tiny_text().decode(ids)
    assert "".join(streamed(tiny_text().decode, ids, cuts)) == tiny_text().decode(ids)


@given(st.lists(st.integers(3, 258), min_size=40, max_size=200))
def test_endless_bytes_that_are_no_text_are_held_within_a_bound(ids: list[int]):
    detokenizer = Detokenizer(sentencepiece_decode)
    for token_id in ids:
        detokenizer.push([token_id])
        assert len(detokenizer._window) - detokenizer._settled <= HELD_TOKENS_MAX + 1


def test_half_a_character_is_held_back():
    ids = ids_of("a東b")
    assert len(ids) >= 4
    pieces = streamed(tiny_text().decode, ids, range(len(ids)))
    assert not any("\ufffd" in piece for piece in pieces)
    assert [p for p in pieces if p] == ["a", "東", "b"]
    assert streamed(tiny_text().decode, ids[:2], [1]) == ["a", "", "\ufffd"], "at the end, what is there"


def test_special_tokens_are_no_text_and_a_run_of_them_costs_nothing():
    detokenizer = Detokenizer(tiny_text().decode)
    assert detokenizer.push([0] * 1_000) == ""
    assert len(detokenizer._window) <= HELD_TOKENS_MAX + 1
    assert detokenizer.push(ids_of("the")) == "the"


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_cut_where_the_earliest_begins(text: str, stops: list[str], cuts: list[int]):
    # Cut by cut, the first stop string that is complete wins; the same text in one piece is the reference.
    def run(parts: list[str]) -> str:
        finder, out = StopFinder(stops), ""
        for part in parts:
            given_out, stopped = finder.push(part)
            out += given_out
            if stopped:
                return out
        return out + finder.finish()

    edges = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    found = run(parts)
    assert text.startswith(found)
    ends = sorted(text.find(stop) + len(stop) for stop in stops if stop in text)
    if not ends:
        assert found == text
    else:
        # Nothing of a complete stop string was given out, and nothing before the first to complete is missing.
        assert not any(stop in found for stop in stops)
        first_to_end = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == ends[0]]
        assert len(found) <= max(first_to_end)


def test_a_possible_beginning_is_held_and_given_back():
    finder = StopFinder(["\n\nUser:"])
    assert finder.push("Hi\n") == ("Hi", False)
    assert finder.push("\nUs") == ("", False)
    assert finder.push("a") == ("\n\nUsa", False)
    assert finder.push("\n\nUser: x") == ("", True)


def test_the_stop_token_is_left_out_and_a_stop_in_the_held_rest_counts():
    eos = 1
    stream = TextStream(tiny_text().decode, stops=["is!"], stop_token_ids=[eos])
    assert stream.push([*ids_of("the i"), eos], last=True) == ("the i", False)
    held = TextStream(tiny_text().decode, stops=["\ufffd"])
    assert held.push(ids_of("a東")[:2], last=True) == ("a", True)


def test_facts_template_and_token_bytes_of_a_folder(tmp_path: Path):
    text = load(write_folder(tmp_path, tiny_tokenizer()), name="x", default_max_tokens=9)
    facts = text.facts
    assert (facts.context_tokens, facts.stop_token_ids, facts.default_max_tokens) == (CONTEXT, (1,), 9)
    assert len(text.encode("the " * 50)) > 8, "the file's truncation must not cut prompts"
    assert b"".join(text.token_bytes(i) for i in text.encode("東 🙂")).decode() == "東 🙂"
    with pytest.raises(ApiError, match="the first word must not be no"):
        text.encode(ChatPrompt(({"role": "user", "content": "no"},)))


def test_a_folder_without_template_or_tokenizer(tmp_path: Path):
    folder = write_folder(tmp_path, tiny_tokenizer(), template=None)
    assert not load(folder, name="x", default_max_tokens=9).facts.has_chat_template
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{% if %}")
    with pytest.raises(StartupError, match="chat template"):
        load(folder, name="x", default_max_tokens=9)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(StartupError, match="tokenizer"):
        load(folder, name="x", default_max_tokens=9)


def test_the_router_does_not_import_torch_or_transformers():
    code = "import sys, services.router.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
