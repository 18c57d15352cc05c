"""One question's part of a call: the bare base, asked in words, without an adapter."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.classifier import Contract, low_mass
from loraplex.decisions import expected_level, softmax
from loraplex.engine.sequence import Sequence, SequenceOutput, Target
from loraplex.errors import LoraplexError
from loraplex.service.base import Base
from loraplex.service.verdict import Computed, warned
from loraplex.text.prompt import Prompt
from loraplex.text.question import ROLES, Presentation, num_chars
from loraplex.text.tokenizer import Conversations
from loraplex.types import ClassifyRequest, ErrorInfo, Question, Verdict

MIN_LABEL_MASS = Contract.model_fields["min_label_mass"].default
NUM_TRIES = 10


@dataclass(slots=True, kw_only=True)
class QuestionEvaluation(Computed):
    """A question to the bare base, in each order of its labels, or the `error` that prevents this. Its methods are
    those of `Evaluation`."""

    name: str
    question: Question
    presentations: Seq[Presentation] = ()
    prompts: Seq[Prompt] = ()

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_chars(self) -> int:
        """About how many characters are tokenized: a prompt is tried on several texts before its first use."""
        return NUM_TRIES * num_chars(self.question)

    def tokenize(self, request: ClassifyRequest, base: Base, conversations: Conversations) -> None:
        """Make the prompts and the sequences, or record the error."""
        assert base.questions is not None, "questions are refused where the server answers none"
        try:
            self.presentations = base.questions.present(self.question)
            roles = {**ROLES, **(request.roles or {})}
            self.prompts = [
                warned(one.template.prompt(request.input, conversations, request.roles), request.input, roles)
                for one in self.presentations
            ]
        except LoraplexError as exc:
            self.error = exc
            return
        self.sequences = [
            Sequence(
                token_ids=prompt.token_ids + before,
                slot=NO_ADAPTER,
                num_kept=prompt.num_conversation,  # what the base computes of a conversation is always kept
                targets=tuple(Target(position=-1, token_id=one) for one in follow),
            )
            for prompt, presentation in zip(self.prompts, self.presentations, strict=True)
            for before, follow in presentation.reads.items()
        ]

    def verdict(self, id: str | None = None) -> Verdict:
        """Return the verdict, whose `adapter` is None. Its first warning says that the bare base answered."""
        if self.error is not None:
            return Verdict(id=id, classifier=self.name, error=ErrorInfo.of(self.error))
        outputs = iter(self.outputs)
        by_order = [_label_log_probs(outputs, presentation) for presentation in self.presentations]
        # The mean of logarithms cancels a factor by which a place in the list is preferred, whatever its size.
        logits = [math.fsum(of_label) / len(by_order) for of_label in zip(*by_order, strict=True)]
        scores = dict(zip(self.question.labels, softmax(logits), strict=True))
        label = max(scores, key=scores.__getitem__)
        mass = math.fsum(math.fsum(map(math.exp, log_probs)) for log_probs in by_order) / len(by_order)
        warnings = ["zero_shot: no adapter was trained for this question, and the bare base answered it"]
        if mass < MIN_LABEL_MASS:
            warnings.append(low_mass(mass, MIN_LABEL_MASS))
        is_score = self.question.type == "score"
        return Verdict(
            id=id,
            classifier=self.name,
            label=label,
            confidence=scores[label],
            scores=scores,
            score=expected_level(scores.values()) if is_score else None,
            label_mass=min(1.0, mass),
            warnings=tuple(dict.fromkeys((*warnings, *(one for prompt in self.prompts for one in prompt.warnings)))),
        )


def _label_log_probs(outputs: Iterator[SequenceOutput], presentation: Presentation) -> list[float]:
    """Return each label's log probability: the sum over the beginnings of an answer that mean it. outputs: those of one
    presentation are taken from it."""
    found = {
        (*before, token_id): log_prob
        for before, follow in presentation.reads.items()
        for token_id, log_prob in zip(follow, next(outputs).log_probs, strict=True)
    }
    log_probs = []
    for answers in presentation.answers:
        of_label = [math.fsum(found[answer[: at + 1]] for at in range(len(answer))) for answer in answers]
        highest = max(of_label)
        log_probs.append(highest + math.log(math.fsum(math.exp(one - highest) for one in of_label)))
    return log_probs
