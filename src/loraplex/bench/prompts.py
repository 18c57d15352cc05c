"""Prompts and labels of a bundle's classifiers, without the base's weights: what a server of another kind is asked."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.base_name import ServedBase
from loraplex.adapters.weights import AdapterWeights
from loraplex.bench.call import Answer
from loraplex.bundle import Bundle
from loraplex.errors import UnknownClassifierError
from loraplex.executors.capabilities import NATIVE
from loraplex.messages import conversation_of
from loraplex.model.base_weights import BaseWeights
from loraplex.model.loader import max_positions, read_config, read_layers, read_stop_ids
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierChecker, ClassifierReader, ClassifierVersion
from loraplex.service.verdict import render
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.prompt import Prompt
from loraplex.text.tokenizer import Conversations, Tokenizer
from loraplex.types import Input


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One classifier as it is asked. label_ids: the tokens of each label."""

    version: ClassifierVersion
    weights: AdapterWeights

    @property
    def name(self) -> str:
        return self.version.source.name

    @property
    def label_ids(self) -> dict[str, tuple[int, ...]]:
        return {} if self.version.template is None else dict(self.version.template.label_ids)

    def answer(self, log_probs: dict[str, float]) -> Answer:
        """Return the verdict that a server of ours would give. log_probs: of each label."""
        contract = self.version.source.contract
        assert contract is not None, "labels are a contract's"
        decision = contract.decide([log_probs[label] for label in contract.labels])
        return Answer(label=decision.label, scores=decision.scores, label_mass=decision.label_mass)


class Prompts:
    """Makes the same prompts as our server."""

    def __init__(self, bundle: Bundle, names: Iterable[str]) -> None:
        """Read the classifiers. Raises ConfigurationError where one cannot be served, and UnknownClassifierError."""
        self.config: Any = read_config(bundle.base)
        layers, num_embeddings = read_layers(self.config, bundle.base)
        chat = ChatTemplate.of(Tokenizer(bundle.base, num_embeddings))
        self.base = Base(
            names=(bundle.base_name,),
            chat=chat,
            max_model_len=max_positions(self.config),
            pad_token_id=getattr(self.config, "pad_token_id", None),
            stop_ids=read_stop_ids(bundle.base, self.config),
        )
        checker = ClassifierChecker(layers, chat, self.base.max_model_len, NATIVE, ServedBase(bundle.base))
        reader = ClassifierReader(checker, BaseWeights(bundle.base).find, 0)
        sources = {source.name: source for source in bundle.adapters}
        self.questions: dict[str, Question] = {}
        for name in names:
            if name not in sources:
                raise UnknownClassifierError(name, list(sources))
            version, weights = reader.read(sources[name])
            self.questions[name] = Question(version=version, weights=weights)

    def prompt(self, name: str, given: Input, conversations: Conversations) -> Prompt:
        """Return a classifier's prompt for a conversation. Raises LoraplexError where there is none."""
        return render(self.questions[name].version, conversation_of(given), self.base, conversations)
