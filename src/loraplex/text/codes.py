"""Codes: short texts that a base answers with in place of a question's labels, such as letters. The tokenizer has to
keep them apart: by their first tokens, or where there are many by all of their tokens."""

import functools
import string
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import product
from typing import Literal

from loraplex.errors import InvalidRequestError
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import QuestionType

WORDS, DIGITS, LETTERS = ("yes", "no"), tuple(string.digits), tuple(string.ascii_uppercase)
PAIRS = tuple(map("".join, product(LETTERS, LETTERS)))
MAX_NAME = 24  # characters of labels that stand for themselves; what begins a sentence says little about it

Answers = tuple[tuple[int, ...], ...]
Kind = Literal["names", "words", "digits", "letters", "pairs"]
OF_KIND: Mapping[Kind, tuple[str, ...]] = {"words": WORDS, "digits": DIGITS, "letters": LETTERS, "pairs": PAIRS}
# The first kind is used of which there are enough. Names are the labels themselves.
KINDS: Mapping[QuestionType, tuple[Kind, ...]] = {
    "predicate": ("words", "letters"),
    "choice": ("names", "letters", "pairs"),
    "score": ("digits", "letters", "pairs"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """A question's codes, in the order of its labels.

    answers:  for each code, the sequences of tokens with which an answer begins that means it. None of all codes'
              sequences begins another.
    """

    kind: Kind
    codes: tuple[str, ...]
    answers: tuple[Answers, ...]


class Codes:
    """The codes that a tokenizer keeps apart behind one prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, *, add_special_tokens: bool) -> None:
        """prompt: any prompt that ends as all do."""
        self._tokenizer, self._prompt, self._adds = tokenizer, prompt, add_special_tokens
        self._ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        self._of_kind = functools.cache(lambda kind: self._apart(OF_KIND[kind]))
        self._pairs_in_full = functools.cache(lambda: self._in_full(PAIRS))

    def of(self, type: QuestionType, labels: Seq[str]) -> Coding:
        """Return codes for the labels of a question. Raises InvalidRequestError where too few are kept apart."""
        num, most = len(labels), 0
        for kind in KINDS[type]:
            is_names = kind == "names"
            if is_names and (len(set(labels)) < num or max(map(len, labels)) > MAX_NAME):
                continue
            found = self._apart(labels) if is_names else self._of_kind(kind)
            if len(found) >= num:
                return Coding(kind=kind, codes=tuple(found)[:num], answers=tuple(found.values())[:num])
            most = max(most, len(found))
        if "pairs" in KINDS[type]:  # as for tokenizers that have few pairs of letters as one token
            found = self._pairs_in_full()
            if len(found) >= num:
                return Coding(kind="pairs", codes=tuple(found)[:num], answers=tuple(found.values())[:num])
            most = max(most, len(found))
        raise InvalidRequestError(
            f"a question has {num} labels, and the base's tokenizer keeps {most} apart", remedy="ask with fewer labels"
        )

    def _apart(self, codes: Seq[str]) -> dict[str, Answers]:
        """Return those of the codes that have first tokens of their own, with these tokens."""
        firsts = {code: self._firsts(code) for code in codes}
        counts = Counter(first for found in firsts.values() for first in found)
        apart = {code: tuple((one,) for one in sorted(found) if counts[one] == 1) for code, found in firsts.items()}
        return {code: answers for code, answers in apart.items() if answers}

    def _in_full(self, codes: Seq[str]) -> dict[str, Answers]:
        """Return those of the codes that are told apart by all of their tokens, with the shortest spellings of each."""
        spelled = {code: [tuple(ids) for ids in map(self._behind, _spellings(code)) if ids] for code in codes}
        shortest = {code: {ids for ids in found if len(ids) == min(map(len, found))} for code, found in spelled.items()}
        counts = Counter(ids for found in shortest.values() for ids in found)
        begun = {ids[:num] for ids in counts for num in range(1, len(ids))}
        special = self._tokenizer.special_ids
        apart = {
            code: tuple(
                ids for ids in sorted(found) if counts[ids] == 1 and ids not in begun and special.isdisjoint(ids)
            )
            for code, found in shortest.items()
        }
        return {code: answers for code, answers in apart.items() if answers}

    def _firsts(self, code: str) -> set[int]:
        """Return the first tokens of the code's spellings; where some spellings are one token, only these."""
        spelled = list(filter(None, map(self._behind, _spellings(code))))
        return {ids[0] for ids in spelled if len(ids) == 1} or {ids[0] for ids in spelled}

    def _behind(self, text: str) -> list[int]:
        """Return the tokens of `text` behind the prompt; none where the prompt's own end would change, or the first of
        them stands for all that is unknown."""
        num = len(self._ids)
        ids = self._tokenizer.encode(self._prompt + text, add_special_tokens=self._adds)
        is_clean = ids[:num] == self._ids and self._tokenizer.special_ids.isdisjoint(ids[num : num + 1])
        return ids[num:] if is_clean else []


def _spellings(code: str) -> tuple[str, ...]:
    """Return how a base may write the code: some begin their answers with a space, or with a capital letter."""
    written = dict.fromkeys((code, code[:1].upper() + code[1:]))
    return (*written, *(f" {one}" for one in written))
