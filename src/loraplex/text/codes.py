"""Codes: short texts that a base answers with in place of a question's labels, such as letters. The tokenizer has to
keep them apart."""

import functools
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Literal

from loraplex.errors import InvalidRequestError
from loraplex.labelled import YES_NO
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import PREDICATE_LABELS, QuestionType

WORDS, DIGITS, LETTERS = PREDICATE_LABELS, tuple(string.digits), tuple(string.ascii_uppercase)
PAIRS = tuple(map("".join, product(LETTERS, LETTERS)))
MAX_NAME = 24  # characters of labels that stand for themselves
MAX_BEGINNINGS = 48  # of labels that stand for themselves; else fewer forms are read, or letters
FORMS = tuple(chain.from_iterable(combinations(range(4), num) for num in (4, 3, 2, 1)))  # of a code that may be read

TokenIds = tuple[int, ...]
Answers = tuple[TokenIds, ...]
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

    answers:  for each code, the sequences of tokens with which an answer begins that means it, in the same forms for
              all codes. None of all codes' sequences begins another.
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
        self._of_kind = functools.cache(lambda kind: self._spelled(OF_KIND[kind]))

    def of(self, type: QuestionType, labels: Seq[str]) -> Coding:
        """Return codes for the labels of a question. Raises InvalidRequestError where too few are kept apart."""
        num, most = len(labels), 0
        for kind in KINDS[type]:
            own = _own(kind, labels)
            if own is not None and (len(set(own)) < num or max(map(len, own)) > MAX_NAME):
                continue
            found = self._spelled(own) if own is not None and kind == "names" else self._of_kind(kind)
            if own is not None:
                found = {code: found[code] for code in own if code in found}
            for forms in FORMS:
                apart = _apart(found, forms)
                if len(apart) >= num:
                    codes = tuple(apart)[:num]
                    answers = tuple(apart[code] for code in codes)
                    if kind != "names" or len(beginnings(answers)) <= MAX_BEGINNINGS:
                        return Coding(kind=kind, codes=codes, answers=answers)
                most = max(most, len(apart))
        raise InvalidRequestError(
            f"a question has {num} labels, and the base's tokenizer keeps {most} apart", remedy="ask with fewer labels"
        )

    def _spelled(self, codes: Iterable[str]) -> dict[str, tuple[TokenIds, ...]]:
        """Return the tokens of each code in each of its forms; none for a form that cannot be read."""
        behind = functools.cache(lambda text: tuple(self._behind(text)))  # forms of a capital letter are the same
        return {code: tuple(map(behind, _spellings(code))) for code in codes}

    def _behind(self, text: str) -> list[int]:
        """Return the tokens of `text` behind the prompt; none where the prompt's own end would change, or one of them
        is special, such as that of all that is unknown."""
        num = len(self._ids)
        ids = self._tokenizer.encode(self._prompt + text, add_special_tokens=self._adds)
        is_clean = ids[:num] == self._ids and self._tokenizer.special_ids.isdisjoint(ids[num:])
        return ids[num:] if is_clean else []


def beginnings(answers: Iterable[Answers]) -> set[TokenIds]:
    """Return all that answers begin with and that is no whole answer: each is computed behind the prompt."""
    return {ids[:num] for ids in chain.from_iterable(answers) for num in range(1, len(ids))}


def _apart(spelled: Mapping[str, Seq[TokenIds]], forms: Seq[int]) -> dict[str, Answers]:
    """Return those of the codes that are told apart in all of `forms`. Each is read in the same forms: to read one in
    more of them than another would favour it."""
    chosen = {
        code: {found[form] for form in forms} for code, found in spelled.items() if all(found[form] for form in forms)
    }
    counts = Counter(chain.from_iterable(chosen.values()))
    begun = beginnings(tuple(ids) for ids in chosen.values())
    return {
        code: tuple(sorted(ids))
        for code, ids in chosen.items()
        if begun.isdisjoint(ids) and all(counts[one] == 1 for one in ids)
    }


def _own(kind: Kind, labels: Seq[str]) -> Seq[str] | None:
    """Return the codes that the labels need because of what they say: names are their own, no and false are not called
    yes, and a level that is called 1 is not called 0. None where any codes will do."""
    if kind == "names":
        return labels
    said = [label.strip().lower() for label in labels]
    if kind == "words":
        return next(([WORDS[of.index(one)] for one in said] for of in YES_NO if {*said} == {*of}), None)
    if kind == "digits" and any(one.lstrip("+-").replace(".", "", 1).isdecimal() for one in said):
        return said
    return None


def _spellings(code: str) -> tuple[str, ...]:
    """Return the forms in which a base may write the code: some begin their answers with a space, or with a capital
    letter."""
    capital = code[:1].upper() + code[1:]
    return (code, capital, f" {code}", f" {capital}")
