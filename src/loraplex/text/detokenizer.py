"""Turns token ids into text, one token at a time, up to a stop string. Knows no tokenizer."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

REPLACEMENT = "\ufffd"  # decoders write this for bytes that are not (yet) a character
_NUM_CONTEXT = 8  # prompt tokens to decode before the first token, which would lose its leading space without them
_MAX_UNDECIDED = 32  # tokens that may wait for the end of a character; real text needs few


class Detokenizer:
    """Call `push` with each token, then `finish`. The returned texts join to the whole text, up to the first stop
    string.

    Characters whose bytes are incomplete, and text that may begin a stop string, are held back. Returned text never
    changes.
    """

    def __init__(self, decode: Callable[[Seq[int]], str], prompt_ids: Seq[int] = (), stop: Seq[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        # The window: decoded tokens, which the text of the next tokens depends on, then undecided tokens.
        self._ids = _context(decode, prompt_ids)
        self._num_decided = len(self._ids)
        self._num_known = len(decode(self._ids))  # characters of the window's text that were taken
        self._held = ""
        self.num_chars = 0  # decoded so far, including held text
        self.stopped = False  # a stop string was found

    def push(self, token_id: int) -> str:
        """Add a token. Return the text that has become final."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        whole = not text.endswith(REPLACEMENT) or len(self._ids) - self._num_decided >= _MAX_UNDECIDED
        new = self._take(text if whole else text.rstrip(REPLACEMENT))
        if whole:
            self._move_window()
        return self._release(new)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._release(self._take(self._decode(self._ids)), is_last=True)

    def _take(self, text: str) -> str:
        new = text[self._num_known :]
        self._num_known = max(self._num_known, len(text))
        self.num_chars += len(new)
        return new

    def _move_window(self) -> None:
        """Let the window begin with the tokens that were decided last, if they have any text. Tokens without text give
        the next token no context."""
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
    """Return the prompt's last tokens, as many as needed to decode to whole characters."""
    size = _NUM_CONTEXT
    while size < len(prompt_ids) and REPLACEMENT in decode(prompt_ids[-size:]):
        size *= 2
    return list(prompt_ids[-size:])


def _num_begun(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
