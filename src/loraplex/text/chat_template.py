"""A chat template: messages to text."""

import functools
import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from loraplex.classifier import CONVERSATION, QUESTION, valid_unicode
from loraplex.errors import InvalidRequestError, shortened
from loraplex.messages import escaped_message, template_message
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import Message, Owner

PROBE = "LoraplexProbe"  # a content that no template holds


class ChatTemplate:
    """The chat template of a base or of an adapter, or the absence of one.

    text:   None where there is none.
    owner:  whose template it is. The tokenizer may have another owner.
    """

    def __init__(self, tokenizer: Tokenizer, text: str | None, owner: Owner) -> None:
        self.tokenizer, self.text, self.owner = tokenizer, text, owner

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        """Return the chat template in a base's own files."""
        return cls(tokenizer, tokenizer.chat_template, "base")

    @property
    def is_bases(self) -> bool:
        return self.owner == self.tokenizer.owner == "base"

    @property
    def version(self) -> str:
        """Identifies the template and the tokenizer's rules."""
        return hashlib.sha256(f"{self.tokenizer.rules} {self.text}".encode()).hexdigest()

    def render(self, messages: Seq[Message], options: Mapping[str, Any] | None = None) -> str:
        """Return the messages as the template writes them, up to where the answer starts. Special tokens in them are
        not escaped. Raises whatever the template raises."""
        turns = [template_message(one) for one in messages]
        if self._takes_parts:
            turns = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in turns]
        return self.tokenizer.apply_chat_template(turns, self.text, options or {})

    def around_question(self, options: Mapping[str, Any] | None = None) -> str:
        """Return a prompt with the placeholders of a conversation and, behind it, a question: each is a message of the
        user, so that all before the question is the same for all questions; or both are one message, where the template
        refuses two. Raises ValueError, which says why there is none."""
        problem = ""
        for contents in ((CONVERSATION, QUESTION), (f"{CONVERSATION}\n\n{QUESTION}",)):
            try:
                text = self.render([Message(role="user", content=content) for content in contents], options)
            except Exception as exc:  # a template may refuse two messages of the user, with any error
                problem = shortened(str(exc))
                continue
            if text.count(CONVERSATION) == text.count(QUESTION) == 1 and text.index(CONVERSATION) < text.index(
                QUESTION
            ):
                return text
            problem = "it does not write each message once, in their order"
        raise ValueError(f"the base's chat template makes no prompt of a text and a question: {problem}")

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes a content only where it is a list of parts, as those of vision-language bases."""

        def writes(content: object) -> bool:
            try:
                text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], self.text, {})
            except Exception:  # a template may refuse what it does not take
                return False
            return PROBE in text

        return not writes(PROBE) and writes([{"type": "text", "text": PROBE}])

    def chat(self, messages: Seq[Message], options: Mapping[str, bool | int | str]) -> tuple[str, tuple[str, ...]]:
        """Return the messages as `render` does, and the special tokens that were escaped in them: only the template may
        write special tokens. options: the template's own variables. Raises InvalidRequestError where there is no
        template, or the template refuses the messages or options."""
        if self.text is None:
            raise InvalidRequestError(
                "the base has no chat template",
                remedy="ask an adapter with a contract, or send the whole prompt to /v1/completions",
            )
        # transformers' own arguments, such as another template, which a client must not choose.
        reserved = options.keys() & self.tokenizer.template_arguments
        if reserved:
            raise InvalidRequestError(
                f"chat_template_kwargs holds {min(reserved)!r}, which is not a variable of the template",
                remedy="leave it out",
            )
        spelled: list[str] = []

        def escaped(text: str) -> str:
            text, found = self.tokenizer.escape(valid_unicode(text))
            spelled.extend(found)
            return text

        turns = [escaped_message(one, escaped) for one in messages]
        given = {name: escaped(value) if isinstance(value, str) else value for name, value in options.items()}
        try:
            text = self.render(turns, given)
        except Exception as exc:  # jinja's errors and the template's own
            raise self.refused(exc) from None
        return text, tuple(dict.fromkeys(spelled))

    def refused(self, exc: Exception) -> InvalidRequestError:
        return InvalidRequestError(
            f"the {self.owner}'s chat template refuses the messages: {shortened(str(exc))}",
            remedy="send the roles, in the order, that it is written for",
        )
