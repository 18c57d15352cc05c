"""The pieces of text, joined, are the text; no piece ends inside a character or a stop string."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings, strategies
from transformers import PreTrainedTokenizerFast

import tiny
from loraplex.text.detokenizer import REPLACEMENT, Detokenizer
from loraplex.text.tokenizer import Tokenizer

KINDS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny.byte_level_tokenizer,
    "metaspace": tiny.metaspace_tokenizer,
    "stripping": lambda: tiny.metaspace_tokenizer(strips=True),
}
TEXTS = ["hello, is it done?", " a  b ", "Küche\n“ja”", "東京タワー", "👩‍👩‍👧‍👦 ok 👍🏽", "€€x€", "ends with 👍"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.FAMILIES["llama"].save_pretrained(folder)
    KINDS[request.param]().save_pretrained(folder)
    return Tokenizer(folder)


def decoder(tokenizer: Tokenizer, *, skip: bool = True) -> Callable[[Seq[int]], str]:
    return lambda ids: tokenizer.decode_part(ids, skip_special_tokens=skip)


def pieces(detokenizer: Detokenizer, ids: Seq[int]) -> Iterator[str]:
    for token_id in ids:
        yield detokenizer.push(token_id)
        if detokenizer.stopped:
            return
    yield detokenizer.finish()


def split(tokenizer: Tokenizer, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those that follow where `text` does."""
    ids, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    assert whole[: len(ids)] == ids, "the case needs a prompt that ends at a token's end"
    return ids, whole[len(ids) :]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["Customer: yes\n", "Agent: 東京タワー東京タワー", "ask<|ask|>"])
def test_the_pieces_are_the_text_that_follows_the_prompt(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    ids, following = split(tokenizer, prompt, text)
    found = list(pieces(Detokenizer(decoder(tokenizer), ids), following))
    expected = text
    if prompt.endswith("<|ask|>"):  # what starts a text may lose or gain a space there, as the tokenizer has it
        whole = decoder(tokenizer)([*ids, *following])
        expected = whole[len(decoder(tokenizer)(ids)) :]
    assert "".join(found) == expected
    assert not [piece for piece in found if REPLACEMENT in piece]


def test_a_first_word_keeps_its_space(tokenizer: Tokenizer) -> None:
    ids, following = split(tokenizer, "Customer: is it done?", " yes")
    detokenizer = Detokenizer(decoder(tokenizer), ids)
    assert "".join(pieces(detokenizer, following)) == " yes"
    assert detokenizer.num_chars == len(" yes")


def test_a_character_comes_when_its_last_byte_does(tokenizer: Tokenizer) -> None:
    ids, following = split(tokenizer, "x", "é👍!")
    assert len(following) == 7  # none of them is in the vocabulary: 2 bytes, 4 bytes, and one
    found = list(pieces(Detokenizer(decoder(tokenizer), ids), following))
    assert found == ["", "é", "", "", "", "👍", "!", ""]


def test_half_a_character_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    ids, following = split(tokenizer, "x", "a👍")
    found = list(pieces(Detokenizer(decoder(tokenizer), ids), following[:-1]))
    assert found[:-1] == ["a", "", "", ""]
    assert found[-1] and set(found[-1]) == {REPLACEMENT}


def test_special_tokens_are_left_out_or_kept(tokenizer: Tokenizer) -> None:
    special = tiny.SPECIAL_TOKENS.index("<|ask|>")
    ids, following = split(tokenizer, "Customer: hi", " yes")
    for skip, expected in ((True, " yes yes"), (False, "<|ask|> yes<|ask|> yes")):
        detokenizer = Detokenizer(decoder(tokenizer, skip=skip), ids)
        assert "".join(pieces(detokenizer, [special, *following, special, *following])) == expected


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "abcabd"),
        (("zz",), "abcabd"),
        (("abd",), "abc"),
        (("bd", "cab"), "ab"),
        (("ab",), ""),
        (("d",), "abcab"),
        (("abdx",), "abcabd"),
        (("abcabdx", "cab"), "ab"),
    ],
)
def test_text_ends_before_the_stop_string(stop: tuple[str, ...], expected: str) -> None:
    """Characters as tokens: every stop string but one of a character comes in several."""
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), [], stop)
    assert "".join(pieces(detokenizer, list(map(ord, "abcabd")))) == expected
    assert detokenizer.stopped == (expected != "abcabd")


def test_of_two_stop_strings_in_one_token_the_first_counts() -> None:
    words = ["one two", " three"]
    for stop in (("e t", "ne"), ("ne", "e t")):
        assert list(pieces(Detokenizer(lambda ids: "".join(words[i] for i in ids), [], stop), [0, 1])) == ["o"]


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    detokenizer = Detokenizer(lambda ids: "".join(map(chr, ids)), [], ("aab",))
    assert [detokenizer.push(ord(char)) for char in "xaaacaa"] == ["x", "", "", "a", "aac", "", ""]
    assert detokenizer.num_chars == 7
    assert detokenizer.finish() == "aa"


def test_a_stop_string_within_a_token_and_after_characters_in_parts(tokenizer: Tokenizer) -> None:
    ids, following = split(tokenizer, "x", "👍é, done")
    detokenizer = Detokenizer(decoder(tokenizer), ids, (", d", "é, q"))
    assert "".join(pieces(detokenizer, following)) == "👍é"
    assert detokenizer.stopped


@settings(max_examples=150, deadline=None)
@given(
    ids=strategies.lists(strategies.integers(0, tiny.VOCAB_SIZE - 1), max_size=80),
    stop=strategies.lists(strategies.text("aeist \n", min_size=1, max_size=3), max_size=2),
)
def test_any_tokens_give_the_same_text_in_pieces_that_stay(
    tokenizer: Tokenizer, ids: list[int], stop: list[str]
) -> None:
    """Also bytes that are no characters."""
    plain, stopping = Detokenizer(decoder(tokenizer), ids[:10]), Detokenizer(decoder(tokenizer), ids[:10], stop)
    text, cut = "".join(pieces(plain, ids[10:])), "".join(pieces(stopping, ids[10:]))
    assert text.startswith(cut)
    assert not [one for one in stop if one in cut]
    assert stopping.stopped == any(one in text for one in stop)
    assert cut == text or text[len(cut) :].startswith(tuple(stop))
    assert plain.num_chars == len(text)


def test_the_window_stays_small_whatever_comes(tokenizer: Tokenizer) -> None:
    lengths = []

    def decode(ids: Seq[int]) -> str:
        lengths.append(len(ids))
        return decoder(tokenizer)(ids)

    half = tokenizer.encode("é", add_special_tokens=False)[-2]
    detokenizer = Detokenizer(decode)
    text = "".join(pieces(detokenizer, [half] * 500))
    assert set(text) == {REPLACEMENT} and max(lengths) < 100


def test_the_bytes_of_tokens_make_the_characters(tokenizer: Tokenizer) -> None:
    spelled = [tokenizer.spell(token_id) for token_id in tokenizer.encode("Küche👍", add_special_tokens=False)]
    assert b"".join(utf8 or b"" for _, utf8 in spelled).decode().strip() == "Küche👍"
    assert any(REPLACEMENT in text for text, _ in spelled)
