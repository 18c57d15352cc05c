"""A contract bound to a tokenizer. Makes the prompts of a classifier."""

import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from loraplex.classifier import CONVERSATION, QUESTION, Contract
from loraplex.errors import ContractError, InputTooLongError, InvalidRequestError
from loraplex.text.prompt import Prompt, kept_as_text, last_match
from loraplex.text.tokenizer import Conversations, Tokenizer

# Conversations with different endings. Labels and invocation must not depend on the ending, as binding checks.
_PROBES = ("Customer: hello", "Customer: is it done?", "Agent: Yes.\nCustomer: ok 5")
_CHARS_PER_TOKEN = 8  # in an end of a conversation that is likely to fill a prompt; languages have one to five


class Template:
    """A contract bound to a tokenizer: fixed text around the conversation, and the labels' tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
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
        self._tokenizer = tokenizer
        self._roles = tuple(dict.fromkeys(contract.roles.values()))
        self.prefix, self.suffix, self._add_special_tokens = _frame(tokenizer, contract, source)
        self._suffix_ids = self._cut_suffix()
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
        self._num_suffix = len(tokenizer.encode(self.suffix, add_special_tokens=False))
        continuation = max(map(len, self.label_ids.values()), default=1) - 1
        limit = max_model_len if contract.max_length is None else contract.max_length
        if limit > max_model_len:
            raise ContractError(
                f"{source}, key 'max_length'",
                f"{limit} is more than the base's {max_model_len}",
                remedy=f"at most {max_model_len}",
            )
        self._room = min(limit, max_model_len - continuation)
        self._num_fixed = len(tokenizer.encode(self.render(""), add_special_tokens=self._add_special_tokens))
        if self._num_fixed >= self._room:
            raise ContractError(
                f"{source}, key 'template'",
                f"without a conversation it takes {self._num_fixed} tokens of {self._room}",
                remedy="shorten the template or raise 'max_length'",
            )

    def render(self, conversation: str) -> str:
        return self.prefix + conversation + self.suffix

    def prompt(self, conversation: str, conversations: Conversations) -> Prompt:
        """Return the prompt for the normalized `conversation`. The oldest turns are cut, with a warning, where the
        prompt is too long. Raises InputTooLongError where even the end of the conversation does not fit."""
        warnings = []
        conversation, spelled = conversations.escape(conversations.normalized(conversation))
        if spelled:
            warnings.append(kept_as_text(spelled))
        for end in self._ends(conversation):
            ids = self._encode(end, conversations)
            if len(ids) > self._room:
                num_tokens = f"{'more than ' if len(end) < len(conversation) else ''}{len(ids)}"
                conversation, ids = self._truncate(end, len(ids), conversations)
                warnings.append(
                    f"cut_conversation: the prompt has {num_tokens} tokens, {self._room} at most; "
                    f"the oldest turns were cut, and {len(ids)} tokens are left"
                )
                break
        return Prompt(
            text=self.render(conversation),
            token_ids=tuple(ids),
            num_conversation=len(ids) - self._num_suffix,
            activation=self._activation(ids),
            warnings=tuple(warnings),
        )

    def _ends(self, conversation: str) -> Iterator[str]:
        """Yield ever longer ends of the conversation, and at last all of it. The first that is too long for a prompt
        is the one to cut, so that a megabyte is not tokenized for its last few hundred tokens.

        Each end begins at a multiple of its least size. So its beginning moves rarely while the conversation grows.
        """
        size = _CHARS_PER_TOKEN * self._room  # in characters
        while len(conversation) >= 2 * size:
            yield conversation[(len(conversation) // size - 1) * size :]
            size *= 2
        yield conversation

    def _encode(self, conversation: str, conversations: Conversations) -> list[int]:
        if self._suffix_ids is not None:
            head = conversations.encode(self.prefix + conversation, add_special_tokens=self._add_special_tokens)
            return head + self._suffix_ids
        return conversations.encode(self.render(conversation), add_special_tokens=self._add_special_tokens)

    def _truncate(self, conversation: str, num_tokens: int, conversations: Conversations) -> tuple[str, list[int]]:
        """Cut the conversation from the left until the prompt fits. Return the rest and the prompt's tokens.

        The cut is at a multiple of a quarter of the room that the template leaves. It moves on to the next turn where
        one starts within another quarter. So the cut moves rarely while the conversation grows: the cached K/V of the
        prompt's beginning stays valid, and at least half of the room stays used.
        """
        head = len(self.prefix)
        offsets = conversations.offsets(self.prefix + conversation, add_special_tokens=self._add_special_tokens)
        starts = [offset - head for offset in offsets if offset >= head]  # character of each conversation token
        turns = turn_starts(conversation, self._roles)
        step = max(1, (self._room - self._num_fixed) // 4)
        first = -(-(num_tokens - self._room) // step) * step  # in tokens
        for cut in range(first, len(starts), step):
            soon = starts[min(cut + step, len(starts) - 1)]
            at = next((turn for turn in turns if starts[cut] <= turn <= soon), starts[cut])
            ids = self._encode(conversation[at:], conversations)
            if len(ids) <= self._room:
                return conversation[at:], ids
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
        for probe in _PROBES:
            ids = self._tokenizer.encode(self.render(probe), add_special_tokens=self._add_special_tokens)
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

    def _cut_suffix(self) -> list[int] | None:
        """Return the suffix's own tokens if the suffix begins with a special token. Otherwise return None: the suffix
        may merge with the text before it."""
        if not self._tokenizer.starts_with_cut(self.suffix):
            return None
        add = self._add_special_tokens
        suffixes = []
        for probe in _PROBES:
            head = self._tokenizer.encode(self.prefix + probe, add_special_tokens=add)
            whole = self._tokenizer.encode(self.render(probe), add_special_tokens=add)
            if whole[: len(head)] != head:
                return None
            suffixes.append(whole[len(head) :])
        return suffixes[0] if all(suffix == suffixes[0] for suffix in suffixes) else None

    def _label_ids(self, label: str, source: object) -> tuple[int, ...]:
        """Return the tokens that the label adds to a rendered prompt. Raises ContractError where they merge with the
        prompt or depend on the conversation's end."""
        found = set()
        for probe in _PROBES:
            rendered = self.render(probe)
            ids = self._tokenizer.encode(rendered, add_special_tokens=self._add_special_tokens)
            whole = self._tokenizer.encode(rendered + label, add_special_tokens=self._add_special_tokens)
            if whole[: len(ids)] != ids or len(whole) == len(ids):
                raise ContractError(
                    f"{source}, key 'labels'",
                    f"the label {label!r} merges with the end of the prompt {rendered[-20:]!r} when they are tokenized",
                    remedy="end the template with a special token or a line break, or begin the labels with a space",
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


def _frame(tokenizer: Tokenizer, contract: Contract, source: object) -> tuple[str, str, bool]:
    """Return the text before and after the conversation, and whether the tokenizer adds its special tokens."""
    template, add_special_tokens = contract.template, True
    if template is None:
        content = f"{CONVERSATION}\n{QUESTION}" if contract.question is not None else CONVERSATION
        frame = tokenizer.chat_frame(content, source)
        template = content + "\n" if frame is None else frame
        if CONVERSATION not in template:
            raise ContractError(
                source,
                "the base's chat template leaves the user's message out",
                remedy="give a 'template' in classifier.yaml",
            )
        add_special_tokens = frame is None  # a chat template writes the special tokens
    if tokenizer.starts_with_bos(template):
        add_special_tokens = False  # otherwise there would be two
    prefix, _, suffix = template.partition(CONVERSATION)
    question = contract.question or ""
    return prefix.replace(QUESTION, question), suffix.replace(QUESTION, question), add_special_tokens
