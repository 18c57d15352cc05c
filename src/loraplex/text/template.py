"""A contract bound to a tokenizer. Makes the prompts of a classifier."""

import functools
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Literal

from loraplex.classifier import Contract
from loraplex.errors import ContractError, InputTooLongError, InvalidRequestError
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.frame import Taken, frame_of
from loraplex.text.prompt import Prompt, kept_as_text, last_match
from loraplex.text.tokenizer import Conversations
from loraplex.types import Message, Roles

_CHARS_PER_TOKEN = 8  # in an end of a conversation that is likely to fill a prompt; languages have one to five


class Template:
    """A contract bound to a tokenizer and a chat template: what stands around the conversation, and the labels'
    tokens."""

    def __init__(
        self,
        chat: ChatTemplate,
        contract: Contract,
        max_model_len: int,
        source: object,
        invocation_tokens: tuple[int, ...] | None = None,
        *,
        reads_labels: bool = True,
    ) -> None:
        """source: the contract's file, for errors. reads_labels: whether the labels' tokens are the answer; a score
        head knows labels by number. Raises ContractError where the labels' tokens are ambiguous, the template lacks the
        adapter's `invocation_tokens` after the conversation, or the template or `max_length` does not fit the base."""
        self._tokenizer = tokenizer = chat.tokenizer
        is_chat = contract.template is None and chat.text is not None
        self.written_by: Literal["contract", "chat_template"] = "chat_template" if is_chat else "contract"
        self._roles = tuple(dict.fromkeys(filter(None, contract.roles.values())))
        self._frame, self._answer_start = frame_of(chat, contract, source), contract.answer_start
        self._add_special_tokens = self._frame.add_special_tokens
        self._probes = [self.parts(probe) for probe in self._frame.probes]
        self._tails = self._find_tails()
        self._num_tokens_of = functools.lru_cache(64)(
            lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        )
        self.label_ids = {label: self._label_ids(label, source) for label in contract.labels if reads_labels}
        for label, ids in self.label_ids.items():
            for other, other_ids in self.label_ids.items():
                if label != other and other_ids[: len(ids)] == ids:
                    raise ContractError(
                        f"{source}, key 'labels'",
                        f"the tokens of {label!r} {list(ids)} begin those of {other!r} {list(other_ids)}",
                        remedy="choose labels so that none is the beginning of another",
                    )
        self._invocation = invocation_tokens
        self._num_active = 0 if invocation_tokens is None else self._find_activation(invocation_tokens, source)
        continuation = max(map(len, self.label_ids.values()), default=1) - 1
        limit = max_model_len if contract.max_length is None else contract.max_length
        if limit > max_model_len:
            raise ContractError(
                f"{source}, key 'max_length'",
                f"{limit} is more than the base's {max_model_len}",
                remedy=f"at most {max_model_len}",
            )
        self._room = min(limit, max_model_len - continuation)
        self._num_around = self._frame.num_around(lambda conversation: len(self._encode(conversation, Conversations())))
        self._num_fixed = len(self._encode(self._frame.empty, Conversations()))
        if self._num_fixed >= self._room:
            raise ContractError(
                f"{source}, key 'template'",
                f"without a conversation it takes {self._num_fixed} tokens of {self._room}",
                remedy="shorten the template or raise 'max_length'",
            )

    def parts(self, conversation: Taken, conversations: Conversations | None = None) -> tuple[str, str | None]:
        """Return the prompt up to the end of the conversation, and the text behind it; see `TextFrame.parts`."""
        head, tail = self._frame.parts(conversation, conversations or Conversations())
        return (head + self._answer_start, None) if tail is None else (head, tail + self._answer_start)

    def prompt(
        self, given: str | tuple[Message, ...], conversations: Conversations, changed_roles: Roles | None = None
    ) -> Prompt:
        """Return the prompt for a conversation. The oldest turns are cut, with a warning, where the prompt is too long.
        changed_roles: those that differ from the contract's. Raises InputTooLongError where even the end of the
        conversation does not fit, and InvalidRequestError where the conversation is empty, or the template refuses
        it."""
        warnings = []
        conversation, spelled = self._frame.take(given, conversations, changed_roles)
        flat = self._frame.flat(conversation)
        if spelled:
            warnings.append(kept_as_text(spelled))
        for at in self._ends(len(flat)):
            end = self._frame.cut(conversation, at)
            ids = self._encode(end, conversations)
            if len(ids) > self._room:
                num_tokens = f"{'more than ' if at else ''}{len(ids)}"
                conversation, ids = self._truncate(end, len(ids), conversations)
                warnings.append(
                    f"cut_conversation: the prompt has {num_tokens} tokens, {self._room} at most; "
                    f"its beginning was cut, and {len(ids)} tokens are left"
                )
                break
        head, tail = self.parts(conversation, conversations)
        return Prompt(
            text=head + (tail or ""),
            token_ids=tuple(ids),
            num_conversation=0 if tail is None else len(ids) - self._num_tokens_of(tail),
            activation=self._activation(ids),
            warnings=tuple(warnings),
        )

    def _ends(self, num_chars: int) -> Iterator[int]:
        """Yield where ever longer ends of the conversation begin, and at last 0. The first end that is too long for a
        prompt is the one to cut, so that a megabyte is not tokenized for its last few hundred tokens.

        Each end begins at a multiple of its least size. So its beginning moves rarely while the conversation grows.
        """
        size = _CHARS_PER_TOKEN * self._room  # in characters
        while num_chars >= 2 * size:
            yield (num_chars // size - 1) * size
            size *= 2
        yield 0

    def _encode(self, conversation: Taken, conversations: Conversations) -> list[int]:
        head, tail = self.parts(conversation, conversations)
        tail_ids = None if tail is None else self._tails.get(tail)
        if tail_ids is None:
            head, tail_ids = head + (tail or ""), []
        return conversations.encode(self._tokenizer, head, add_special_tokens=self._add_special_tokens) + tail_ids

    def _truncate(self, conversation: Taken, num_tokens: int, conversations: Conversations) -> tuple[Taken, list[int]]:
        """Cut the conversation from the left until the prompt fits. Return the rest and the prompt's tokens.

        The cut is at a multiple of a quarter of the room that the template leaves. It moves on to the next turn where
        one starts within another quarter. So the cut moves rarely while the conversation grows: the cached K/V of the
        prompt's beginning stays valid, and at least half of the room stays used.
        """
        frame, flat = self._frame, self._frame.flat(conversation)
        text, head = frame.prefix + flat, len(frame.prefix)
        offsets = conversations.offsets(self._tokenizer, text, add_special_tokens=self._add_special_tokens)
        starts = [offset - head for offset in offsets if offset >= head]  # character of each conversation token
        turns = frame.turn_starts(conversation)
        if turns is None:
            turns = turn_starts(flat, self._roles)
        else:  # the template's own tokens of each message count, too
            starts = sorted([*starts, *(at for at in (0, *turns) for _ in range(self._num_around))])
        step = max(1, (self._room - self._num_fixed) // 4)
        first = -(-(num_tokens - self._room) // step) * step  # in tokens
        for cut in range(first, len(starts), step):
            soon = starts[min(cut + step, len(starts) - 1)]
            at = next((turn for turn in turns if starts[cut] <= turn <= soon), starts[cut])
            rest = frame.cut(conversation, at)
            ids = self._encode(rest, conversations)
            if len(ids) <= self._room:
                return rest, ids
        raise InputTooLongError(
            f"the prompt has {num_tokens} tokens, {self._room} at most, and even its end does not fit",
            remedy="raise 'max_length' in classifier.yaml, or shorten the input",
        )

    def _activation(self, ids: Seq[int]) -> int:
        """Return the activation: where the template puts the invocation tokens, whatever the conversation contains."""
        if self._invocation is None:
            return 0
        activation = last_match(ids, self._invocation)
        if activation != len(ids) - self._num_active:
            raise InvalidRequestError(
                "the conversation's end merges with the template's invocation tokens",
                remedy="begin the template's text behind the conversation with a special token or a line break",
            )
        return activation

    def _find_activation(self, invocation: tuple[int, ...], source: object) -> int:
        """Return the number of tokens from the invocation to the prompt's end. Raises ContractError where the template
        lacks the invocation tokens, or the number depends on the conversation."""
        found = set()
        for head, tail in self._probes:
            ids = self._tokenizer.encode(head + (tail or ""), add_special_tokens=self._add_special_tokens)
            at = last_match(ids, invocation)
            found.add(None if at is None else len(ids) - at)
        [distance] = found if len(found) == 1 else [None]
        if distance is None:
            spelled = "".join(map(self._tokenizer.decode, invocation))
            raise ContractError(
                f"{source}, key 'template'",
                f"lacks the adapter's invocation tokens {list(invocation)} ({spelled!r}) behind the conversation",
                remedy="put their text behind {conversation}, as in the adapter's training",
            )
        return distance

    def _find_tails(self) -> dict[str, list[int]]:
        """Return the texts behind a conversation that may be tokenized apart, with their tokens: they begin with a
        special token. Others may merge with the text before them."""
        tails: dict[str, list[int]] = {}
        for head, tail in self._probes:
            if tail is None or not self._tokenizer.starts_with_cut(tail):
                return {}
            head_ids = self._tokenizer.encode(head, add_special_tokens=self._add_special_tokens)
            ids = self._tokenizer.encode(head + tail, add_special_tokens=self._add_special_tokens)
            if ids[: len(head_ids)] != head_ids or tails.setdefault(tail, ids[len(head_ids) :]) != ids[len(head_ids) :]:
                return {}
        return tails

    def _label_ids(self, label: str, source: object) -> tuple[int, ...]:
        """Return the tokens that the label adds to a rendered prompt. Raises ContractError where they merge with the
        prompt or depend on the conversation's end."""
        found = set()
        for head, tail in self._probes:
            rendered = head + (tail or "")
            ids = self._tokenizer.encode(rendered, add_special_tokens=self._add_special_tokens)
            whole = self._tokenizer.encode(rendered + label, add_special_tokens=self._add_special_tokens)
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                shift = (
                    "move its last space to the labels" if rendered.endswith(" ") else "begin the labels with a space"
                )
                raise ContractError(
                    f"{source}, key 'labels'",
                    f"the label {label!r} merges with the end of the prompt {rendered[-20:]!r} when they are tokenized",
                    remedy="move the end of 'answer_start' to the beginning of each label"
                    if self._answer_start
                    else f"end the template with a special token or a line break, or {shift}",
                )
            found.add(tuple(whole[len(ids) :]))
        if len(found) > 1:
            raise ContractError(
                f"{source}, key 'labels'",
                f"the tokens of {label!r} depend on how the conversation ends: {sorted(found)}",
                remedy="end the template with a special token or a line break",
            )
        return found.pop()


def turn_starts(conversation: str, names: tuple[str, ...]) -> list[int]:
    """Return the character offsets of lines that begin with a role's name and a colon; of all lines where none does.
    The first line is never included."""
    speakers = "|".join(map(re.escape, names))
    starts = [match.end() for match in re.finditer(rf"\n(?=(?:{speakers}):)", conversation)]
    return starts or [match.end() for match in re.finditer(r"\n(?=.)", conversation)]
