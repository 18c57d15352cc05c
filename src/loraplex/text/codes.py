"""Codes: short texts that a base answers with in place of options, such as letters. The tokenizer has to keep them
apart in their first token."""

import functools
import string
from collections import Counter
from collections.abc import Sequence as Seq
from itertools import product

from loraplex.errors import InvalidRequestError
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import QuestionType

WORDS, DIGITS, LETTERS = ("yes", "no"), tuple(string.digits), tuple(string.ascii_uppercase)
PAIRS = tuple(map("".join, product(LETTERS, LETTERS)))
# A type's kinds of codes. The first kind of which there are enough is used.
KINDS: dict[QuestionType, tuple[tuple[str, ...], ...]] = {
    "predicate": (WORDS, LETTERS),
    "choice": (LETTERS, PAIRS),
    "score": (DIGITS, LETTERS, PAIRS),
}


class Codes:
    """The codes that a tokenizer keeps apart behind one prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, *, add_special_tokens: bool) -> None:
        """prompt: any prompt that ends as all do."""
        self._tokenizer, self._prompt, self._adds = tokenizer, prompt, add_special_tokens
        self._ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        self._apart = functools.cache(self._find_apart)

    def of(self, type: QuestionType, num: int) -> dict[str, tuple[int, ...]]:
        """Return `num` codes for a question's type, and for each the tokens with which an answer may begin that means
        it. Raises InvalidRequestError where the tokenizer keeps too few apart."""
        most = 0
        for kind in KINDS[type]:
            found = self._apart(kind)
            if len(found) >= num:
                return dict(list(found.items())[:num])
            most = max(most, len(found))
        raise InvalidRequestError(
            f"a question has {num} labels, and the base's tokenizer keeps {most} apart", remedy="ask with fewer labels"
        )

    def _find_apart(self, kind: Seq[str]) -> dict[str, tuple[int, ...]]:
        firsts = {
            code: {first for text in _spellings(code) if (first := self._first(text)) is not None} for code in kind
        }
        counts = Counter(first for found in firsts.values() for first in found)
        apart = {code: tuple(sorted(one for one in found if counts[one] == 1)) for code, found in firsts.items()}
        return {code: ids for code, ids in apart.items() if ids}

    def _first(self, text: str) -> int | None:
        """Return the first token of `text` behind the prompt; None where the prompt's own end would change."""
        num = len(self._ids)
        ids = self._tokenizer.encode(self._prompt + text, add_special_tokens=self._adds)
        return ids[num] if len(ids) > num and ids[:num] == self._ids else None


def _spellings(code: str) -> tuple[str, ...]:
    """Return how a base may write the code: some begin their answers with a space, or with a capital letter."""
    return (
        tuple(dict.fromkeys((code, code.capitalize(), f" {code}", f" {code.capitalize()}")))
        if code in WORDS
        else (code, f" {code}")
    )
