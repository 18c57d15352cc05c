"""The base, as the service knows it: no weights, no executor."""

from dataclasses import dataclass

from loraplex.service.classifiers import ClassifierVersion
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.question import QuestionPrompts
from loraplex.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base that is served.

    names:          the names by which the base is asked; the first is shown.
    chat:           its chat template and its tokenizer.
    max_model_len:  the most tokens of a prompt.
    stop_ids:       the tokens that end a text.
    questions:      makes prompts of questions that no adapter was trained for; None where none are answered.
    """

    names: tuple[str, ...]
    chat: ChatTemplate
    max_model_len: int
    pad_token_id: int | None
    stop_ids: frozenset[int]
    questions: QuestionPrompts | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.chat.tokenizer

    def chat_of(self, version: ClassifierVersion | None) -> ChatTemplate:
        """Return the chat template and the tokenizer of an adapter's version; of the bare base for None."""
        return self.chat if version is None else version.chat
