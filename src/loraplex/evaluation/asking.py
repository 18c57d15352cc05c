"""Asks classifiers about labelled conversations, in this process or at a server."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.client import Client
from loraplex.client.many import in_threads
from loraplex.errors import ConfigurationError, LoraplexError, QueueFullError, UnknownClassifierError, listed
from loraplex.generation import GenerateRequest
from loraplex.inprocess import Loraplex
from loraplex.labelled import Labelled
from loraplex.problems import similar
from loraplex.routing.batch import in_turns
from loraplex.types import ClassifyRequest, ClassifyResult, ErrorInfo, Timings, Usage, Verdict

if TYPE_CHECKING:  # it imports torch
    from loraplex.service.service import Service

NO_LABELS = "it has no contract, so there are no labels to choose from"
UNLABELLED = "no conversation has a label for it"

Outcome = ClassifyResult | LoraplexError
Advance = Callable[[], object]  # is called after each conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A conversation, and the classifiers that it has labels for."""

    row: Labelled
    classifiers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Holds what is asked.

    left_out:  classifier -> why it has no figures.
    unknown:   name in the data -> conversations with a label for it, where no classifier has this name.
    """

    questions: tuple[Question, ...]
    left_out: Mapping[str, str]
    unknown: Mapping[str, int]


def plan(rows: Seq[Labelled], known: Mapping[str, bool], wanted: Seq[str], data: Path) -> Plan:
    """Return what to ask.

    known:   classifier -> whether it has labels, or may have some.
    wanted:  the classifiers that the user named; none means all.
    Raises UnknownClassifierError for a name that is not known, and ConfigurationError where nothing is left to ask."""
    if strangers := [name for name in wanted if name not in known]:
        error = UnknownClassifierError(strangers, [*known])
        if hint := similar(strangers, known):
            error.remedy = f"{hint} Or {error.remedy}"
        raise error
    counts = Counter(name for row in rows for name in row.labels)
    left_out = {
        name: UNLABELLED if not counts[name] else NO_LABELS
        for name in wanted or known
        if not counts[name] or not known[name]
    }
    names = [name for name in wanted or known if name not in left_out]
    questions = [Question(row=row, classifiers=tuple(name for name in names if name in row.labels)) for row in rows]
    asked = tuple(one for one in questions if one.classifiers)
    unknown = {name: num for name, num in sorted(counts.items()) if name not in known}
    if not asked:
        raise ConfigurationError(
            data,
            "no conversation has a label that can be asked for: the data has labels for "
            f"{listed(sorted(counts)) or 'no classifier'}, and asked can be "
            f"{listed([name for name in wanted or known if known[name]]) or 'none'}",
            remedy=similar(unknown, known)
            or f'write "labels": {{"{next(iter(wanted or known), "NAME")}": true}} beside the conversations',
        )
    return Plan(questions=asked, left_out=left_out, unknown=unknown)


def sample(rows: tuple[Labelled, ...], num: int | None, data: Path) -> tuple[Labelled, ...]:
    """Return `num` of the conversations in their order, always the same ones; all for None."""
    if num is None:
        return rows
    if not 0 < num <= len(rows):
        raise ConfigurationError(
            f"--conversations {num}", f"{data} holds {len(rows)}", remedy=f"give a number from 1 to {len(rows)}"
        )
    return tuple(rows[index] for index in sorted(random.Random(0).sample(range(len(rows)), num)))


def ask_in_process(
    loraplex: Loraplex, questions: Seq[Question], advance: Advance, *, bare_base: bool = False
) -> list[Outcome]:
    """Return the answer to each question, or why there is none. Many are asked at once, so that steps are full.

    bare_base:  ask the base without its adapters, with the same prompts and contracts.
    """

    async def ask(question: Question) -> ClassifyResult:
        request = ClassifyRequest(input=question.row.input, classifiers=question.classifiers, cascade=False)
        try:
            result = await (_of_base(loraplex, request) if bare_base else loraplex.router.classify(request))
        except LoraplexError as exc:
            if not isinstance(exc, QueueFullError):  # which is asked again
                advance()
            raise
        advance()
        return result

    return loraplex.run(in_turns(ask, questions))


def ask_server(client: Client, questions: Seq[Question], concurrency: int, advance: Advance) -> list[Outcome]:
    """Do as `ask_in_process` at a server. concurrency: conversations that are asked at once."""

    def ask(question: Question) -> Outcome:
        try:
            return client.classify(question.row.input, question.classifiers, cascade=False)
        except LoraplexError as exc:
            return exc
        finally:
            advance()

    return in_threads(ask, questions, concurrency)


async def _of_base(loraplex: Loraplex, request: ClassifyRequest) -> ClassifyResult:
    service, verdicts = loraplex.service, []
    for name, _, prompt in await service.show_prompt(request):
        version = await service.version_of(name)
        contract, template = version.source.contract, version.template
        if contract is None or template is None or version.has_score:
            error = ErrorInfo(code="unsupported_model", message="the base has no such head", remedy="leave it out")
            verdicts.append(Verdict(classifier=name, error=error))
            continue
        log_probs = [await _log_prob(service, prompt, template.label_ids[label]) for label in contract.labels]
        verdicts.append(contract.decide(log_probs).verdict(name))
    return ClassifyResult(id="", verdicts=tuple(verdicts), usage=Usage(), timings=Timings())


async def _log_prob(service: "Service", prompt: tuple[int, ...], label: tuple[int, ...]) -> float:
    """Return the log probability of a label's tokens behind a prompt, under the base."""
    total = 0.0
    for at, token in enumerate(label):
        request = GenerateRequest(prompt=(*prompt, *label[:at]), allowed_token_ids=(token,))
        total += (await service.generate(request)).tokens[0].log_prob
    return total
