"""Token ids -> text, a token at a time: what is final of it, up to a stop string. It knows no tokenizer."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
_NUM_CONTEXT = 8  # tokens before the first one, so that it keeps the space that a text's first token would lose
_MAX_UNDECIDED = 32  # tokens that may wait for the end of a character; real text needs a few


class Detokenizer:
    """`push` each token, then `finish`; joined, the texts they return are the whole text, up to the first stop string.

    Held back are characters whose bytes are not all there, and what may be the beginning of a stop string. What was
    returned once stays, whatever comes.
    """

    def __init__(self, decode: Callable[[Seq[int]], str], prompt_ids: Seq[int] = (), stop: Seq[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        # The window: tokens that were decoded before, for what the next ones mean depends on them, then undecided ones.
        self._ids = _context(decode, prompt_ids)
        self._num_decided = len(self._ids)
        self._num_known = len(decode(self._ids))  # characters of the window's text that were passed on
        self._held = ""
        self.num_chars = 0  # decoded so far
        self.stopped = False  # at a stop string

    def push(self, token_id: int) -> str:
        """The text that is final now and was not before."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        whole = not text.endswith(REPLACEMENT) or len(self._ids) - self._num_decided >= _MAX_UNDECIDED
        new = self._take(text if whole else text.rstrip(REPLACEMENT))
        if whole:
            self._move_window()
        return self._release(new)

    def finish(self) -> str:
        """What was held back, as it stands."""
        return self._release(self._take(self._decode(self._ids)), is_last=True)

    def _take(self, text: str) -> str:
        new = text[self._num_known :]
        self._num_known = max(self._num_known, len(text))
        self.num_chars += len(new)
        return new

    def _move_window(self) -> None:
        """To the tokens that were decided last, if they have any text: others give the next one no context."""
        recent = self._ids[self._num_decided :]
        num_chars = len(self._decode(recent))
        if num_chars or len(recent) >= _MAX_UNDECIDED:
            self._ids, self._num_decided, self._num_known = recent, len(recent), num_chars

    def _release(self, new: str, *, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        cuts = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        num_held = 0 if is_last else max((_num_begun(text, stop) for stop in self._stop), default=0)
        final, self._held = text[: len(text) - num_held], text[len(text) - num_held :]
        return final


def _context(decode: Callable[[Seq[int]], str], prompt_ids: Seq[int]) -> list[int]:
    """The prompt's last tokens, as few as begin and end with whole characters."""
    size = _NUM_CONTEXT
    while size < len(prompt_ids) and REPLACEMENT in decode(prompt_ids[-size:]):
        size *= 2
    return list(prompt_ids[-size:])


def _num_begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
