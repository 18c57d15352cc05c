"""Puts a conversation into a prompt: into fixed text, or into a chat template."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from loraplex.classifier import CONVERSATION, QUESTION, Contract, valid_unicode
from loraplex.errors import ContractError, InvalidRequestError, quoted
from loraplex.messages import escaped_message
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Conversations
from loraplex.types import Message, Roles

# Conversations with different ends, and with characters that a template may escape, strip or write in another way.
# Labels and invocation must not depend on the end, as binding checks.
TEXTS = ("Customer: hello", "Customer: is it done?", "Agent: Yes.\nCustomer: ok 5", ' "It\'s" <b>é</b> & {x} \\ 5%')
TURNS = (
    (Message(role="user", content="hello"),),
    (Message(role="user", content="is it done?"), Message(role="assistant", content=TEXTS[-1])),
    tuple(Message(role=role, content="ok 5") for role in ("user", "assistant", "user")),
)
MARK, QUESTION_MARK = "LoraplexMark", "LoraplexQuestion"  # stand for texts while a template is rendered

Taken = str | tuple[Message, ...]  # a conversation as a prompt holds it: normalized, its special tokens escaped


class TextFrame:
    """A conversation that is text, within fixed text or within one user message of a chat template.

    prefix:              what stands before every conversation, for offsets.
    add_special_tokens:  whether the tokenizer adds its special tokens to the prompt.
    """

    probes: Seq[Taken] = TEXTS
    empty: Taken = ""

    def __init__(self, chat: ChatTemplate, contract: Contract, source: object) -> None:
        """Raises ContractError where the chat template fails, or leaves the user's message out."""
        self._tokenizer, self._roles, self._question = chat.tokenizer, contract.roles, contract.question
        self._chat = chat if contract.template is None and chat.text is not None else None
        self._is_plain = False  # whether the chat template writes most messages as they are
        if self._chat is None:
            template = contract.template or self._content(CONVERSATION, QUESTION) + "\n"
            # A template that begins with the special token would have two of them.
            self.add_special_tokens = not self._tokenizer.starts_with_bos(template)
            prefix, _, suffix = template.partition(CONVERSATION)
            question = contract.question or ""
            self.prefix, self._suffix = prefix.replace(QUESTION, question), suffix.replace(QUESTION, question)
            return
        self.add_special_tokens = False  # a chat template writes the special tokens
        try:
            self.prefix, mark, self._suffix = self._render(MARK, Conversations()).partition(MARK)
            self._marked_suffix = self._render(MARK, Conversations(), QUESTION_MARK).partition(MARK)[2]
            rendered = [self._render(probe, Conversations()) for probe in TEXTS]
        except InvalidRequestError as exc:
            raise ContractError(source, exc.message, remedy="give a 'template' in classifier.yaml") from None
        if len(set(rendered)) < len(rendered):
            raise ContractError(
                source,
                f"the {chat.owner}'s chat template leaves the user's message out",
                remedy="give a 'template' in classifier.yaml",
            )
        if not mark:
            self.prefix = ""
        self._is_plain = bool(mark) and all(
            self._around(probe) == text for probe, text in zip(TEXTS, rendered, strict=True)
        )

    def take(
        self, given: str | tuple[Message, ...], conversations: Conversations, changed_roles: Roles | None = None
    ) -> tuple[Taken, tuple[str, ...]]:
        """Return the conversation as a prompt holds it, and the special tokens that were escaped in it. changed_roles:
        those that differ from the contract's. Raises InvalidRequestError where the conversation is empty or has an
        unknown role."""
        roles = {**self._roles, **changed_roles} if changed_roles else self._roles
        text = conversations.normalized(conversations.text(given, roles))
        return conversations.escape(self._tokenizer, text)

    def parts(self, conversation: Taken, conversations: Conversations) -> tuple[str, str | None]:
        """Return the prompt up to the conversation's end, and the text behind it. The second is None where the template
        writes the conversation in another way, so that no such place is known."""
        assert isinstance(conversation, str)
        head = self.prefix + conversation
        if self._chat is None:
            return head, self._suffix
        # A template may treat some messages in its own way, such as those with </think>. Seen once for all questions.
        if self._is_plain and self._render(conversation, conversations, QUESTION_MARK) == head + self._marked_suffix:
            return head, self._suffix
        text = self._render(conversation, conversations)
        return (head, self._suffix) if text == head + self._suffix else (text, None)

    def flat(self, conversation: Taken) -> str:
        """Return the conversation as one text, to find a place where to cut it."""
        assert isinstance(conversation, str)
        return conversation

    def cut(self, conversation: Taken, at: int) -> Taken:
        """Return the conversation without the first `at` characters of `flat`."""
        return conversation[at:]

    def turn_starts(self, conversation: Taken) -> list[int] | None:
        """Return where turns begin in `flat`, but the first; None where the text's lines have to tell."""
        return None

    def num_around(self, num_tokens: Callable[[Taken], int]) -> int:
        """Return how many tokens stand around each turn. num_tokens: counts those of a prompt."""
        return 0

    def _content(self, conversation: str, question: str | None) -> str:
        return conversation if self._question is None else f"{conversation}\n{question}"

    def _around(self, conversation: str) -> str:
        return self.prefix + conversation + self._suffix

    def _render(self, conversation: str, conversations: Conversations, question: str | None = None) -> str:
        assert self._chat is not None
        message = Message(role="user", content=self._content(conversation, question or self._question))
        return _rendered(self._chat, (message,), conversations)


class ChatFrame:
    """A conversation whose messages are messages of a chat template, and the question a last message of the user. The
    methods are those of TextFrame."""

    probes: Seq[Taken] = TURNS
    empty: Taken = (Message(role="user", content=""),)
    prefix = ""
    add_special_tokens = False

    def __init__(self, chat: ChatTemplate, contract: Contract, source: object) -> None:
        """Raises ContractError where there is no chat template, or it does not write the question as it is behind the
        conversation."""
        self._chat, self._tokenizer, self._question = chat, chat.tokenizer, contract.question
        self._roles = contract.roles
        if chat.text is None:
            raise ContractError(
                f"{source}, key 'format'", "the base has no chat template", remedy="remove it, or write `format: lines`"
            )
        self._is_cut = True  # whether a special token follows every conversation
        for probe in TURNS:
            try:
                head, tail = self._around(probe, conversations := Conversations())
                self._is_cut &= self._end(probe, head) <= self._tokenizer.last_cut(head)
                asked = probe if self._question is None else (*probe, Message(role="user", content=self._question))
                is_exact = head + tail == _rendered(chat, asked, conversations)
            except InvalidRequestError as exc:
                raise ContractError(
                    f"{source}, key 'format'",
                    f"{exc.message} (the question is a user's message behind a {probe[-1].role}'s)",
                    remedy="write `format: lines`, or a 'template'",
                ) from None
            if not is_exact:
                raise ContractError(
                    f"{source}, key 'format'",
                    f"the {chat.owner}'s chat template does not write the question as it is",
                    remedy="write `format: lines`, or a 'template'",
                )

    def take(
        self, given: str | tuple[Message, ...], conversations: Conversations, changed_roles: Roles | None = None
    ) -> tuple[Taken, tuple[str, ...]]:
        if named := {role: name for role, name in (changed_roles or {}).items() if name is not None}:
            raise InvalidRequestError(
                f"roles: {quoted(named)} names roles, and the chat template does that itself",
                remedy="give null to leave a role's turns out, and nothing else",
            )
        messages = (Message(role="user", content=given),) if isinstance(given, str) else given
        left_out = {role.lower() for role, name in {**self._roles, **(changed_roles or {})}.items() if name is None}
        messages = tuple(message for message in messages if message.role.lower() not in left_out)
        if not any(message.content.strip() for message in messages):
            raise InvalidRequestError("the input is empty", remedy="send the text or the messages to classify")
        spelled: list[str] = []

        def escaped(text: str) -> str:
            text, found = conversations.escape(self._tokenizer, valid_unicode(conversations.normalized(text)))
            spelled.extend(found)
            return text

        return tuple(escaped_message(one, escaped) for one in messages), tuple(dict.fromkeys(spelled))

    def parts(self, conversation: Taken, conversations: Conversations) -> tuple[str, str]:
        head, tail = self._around(conversation, conversations)
        # Text may be tokenized apart before a special token, and the question's message often begins with one.
        end = self._tokenizer.last_cut(head) if self._is_cut else self._end(conversation, head)
        return head[:end], head[end:] + tail

    def _around(self, conversation: Taken, conversations: Conversations) -> tuple[str, str]:
        """Return the prompt up to the question, and from there."""
        assert isinstance(conversation, tuple)
        if self._question is None:
            return _rendered(self._chat, conversation, conversations), ""
        asked = (*conversation, Message(role="user", content=MARK))  # rendered once for all questions
        head, _, tail = _rendered(self._chat, asked, conversations).rpartition(MARK)
        return head, self._question + tail

    def _end(self, conversation: Taken, head: str) -> int:
        """Return where the last message ends in `head`, as far as that can be seen."""
        last = _contents(conversation)[-1]
        return max(0, head.rfind(last)) + len(last)

    def flat(self, conversation: Taken) -> str:
        return "\n".join(_contents(conversation))

    def cut(self, conversation: Taken, at: int) -> Taken:
        assert isinstance(conversation, tuple)
        for index, message in enumerate(conversation):
            if at < len(message.content) + 1:
                return (replace(message, content=message.content[at:]), *conversation[index + 1 :])
            at -= len(message.content) + 1
        return ()

    def turn_starts(self, conversation: Taken) -> list[int] | None:
        starts, at = [], 0
        for content in _contents(conversation)[:-1]:
            starts.append(at := at + len(content) + 1)
        return starts

    def num_around(self, num_tokens: Callable[[Taken], int]) -> int:
        turns = TURNS[-1]  # three with the same content
        content = len(self._tokenizer.encode(turns[0].content, add_special_tokens=False))
        return max(0, (num_tokens(turns) - num_tokens(turns[:1])) // 2 - content)


Frame = TextFrame | ChatFrame


def frame_of(chat: ChatTemplate, contract: Contract, source: object) -> Frame:
    """Return the frame that the contract asks for. Raises ContractError where the chat template is unfit."""
    return (ChatFrame if contract.format == "chat" else TextFrame)(chat, contract, source)


def _contents(conversation: Taken) -> list[str]:
    return [conversation] if isinstance(conversation, str) else [message.content for message in conversation]


def _rendered(chat: ChatTemplate, messages: tuple[Message, ...], conversations: Conversations) -> str:
    try:
        text: str = conversations.render(chat, messages)
    except Exception as exc:  # jinja's errors and the template's own
        raise chat.refused(exc) from None
    return text
