"""Finds who answers typed questions, and checks each question against the contracts before anything is computed."""

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from loraplex.classifier import valid_unicode
from loraplex.decisions import Answer, answer_of, failed, skipped
from loraplex.errors import (
    InvalidRequestError,
    NotReadyError,
    UnknownClassifierError,
    listed,
    quoted,
    shortened,
)
from loraplex.problems import similar
from loraplex.questions import ASK_THE_BASE
from loraplex.routing.question_checks import checked, other_labels, stripped, wrong
from loraplex.routing.router import Router
from loraplex.state import State
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult, ErrorInfo, Question, Roles, Verdict

EVERYTHING = "*"  # the model that leaves the choice of a classifier to each question's name
MOST_HINTS = 3  # unknown names that similar ones are looked up for


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A typed question as a client asks it.

    place:    where it stands in the request, for errors.
    options:  the field that holds its labels, for errors.
    name:     None where it has none.
    """

    place: str
    options: str
    name: str | None
    question: Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Holds what is asked for typed questions.

    request:   without a deadline and ids.
    names:     of each question: the classifier's or route's name, or the name of the question in the request.
    adapters:  those that may answer.
    warnings:  (the question's number, the adapter that may answer) -> warnings.
    """

    asked: Seq[Asked]
    request: ClassifyRequest
    names: Seq[str]
    adapters: Collection[str]
    warnings: Mapping[tuple[int, str], tuple[str, ...]]

    def answers(self, result: ClassifyResult) -> list[Answer]:
        """Return the answer to each question, in order."""
        verdicts = {verdict.classifier: verdict for verdict in result.verdicts}
        answers = []
        for index, (one, name) in enumerate(zip(self.asked, self.names, strict=True)):
            verdict = verdicts[name]
            if verdict.skipped_by is not None:
                answers.append(skipped(one.question, verdict.skipped_by))
            elif verdict.error is not None:
                answers.append(failed(one.question, verdict, verdict.error))
            elif not _fits(one.question, verdict.scores or {}):
                answers.append(failed(one.question, verdict, ErrorInfo.of(_replaced(name))))
            else:
                adapter = "" if verdict.adapter is None else verdict.adapter.name
                warnings = self.warnings.get((index, adapter), ())
                answers.append(answer_of(one.question, _in_words_of(one.question, verdict), warnings))
        return answers


async def plan(
    router: Router,
    asked: Seq[Asked],
    state: State,
    *,
    field: str,
    model: str = EVERYTHING,
    aliases: Collection[str] = (),
    roles: Roles | None = None,
    strict: bool = False,
    places: Seq[str] = (),
    patience_s: float | None = None,
) -> Plan:
    """Return what is asked for typed questions about a state.

    field:       the state's name in the request, for errors.
    model:       a classifier or a route, which then answers every question; or the base, "*" or one of `aliases`, and
                 each question's name is the classifier's or route's. The bare base answers the others, where it answers
                 any.
    strict:      refuse a question whose words contradict the contract's, instead of warning.
    places:      the place of each message in the request, for errors; by default they are counted.
    patience_s:  wait so long for adapters that were never loaded. None: wait only where a contract is not known yet.

    Raises UnknownClassifierError for names that are unknown, and InvalidRequestError, which names the question, where
    the classifier has other labels, or none, and where a message's role is unknown. What needs no loading is checked
    first. Raises NotReadyError where loading takes too long."""
    _check_text(state, asked)
    names = _names(router, asked, model, aliases)
    questions = {name: one.question for one, name in zip(asked, names, strict=True) if not router.knows(name)}
    if questions:
        router.service.check_questions(questions)
    first: dict[str, str] = {}  # role -> place of the first message that has it
    for index, message in enumerate(() if isinstance(state, str) else state):
        first.setdefault(message.role, places[index] if places else f"{field}.{index}")
    targets = {name: router.targets(name) for name in dict.fromkeys(names) if router.knows(name)}
    known, warnings = await checked(
        router.service, asked, names, targets, first, roles, strict=strict, patience_s=patience_s
    )
    classifiers = tuple(dict.fromkeys(name for name in names if name not in questions))
    request = ClassifyRequest(input=state, classifiers=classifiers, questions=questions, roles=roles)
    return Plan(asked=asked, request=request, names=names, adapters=known, warnings=warnings)


async def trained(
    router: Router, requests: Seq[ClassifyRequest]
) -> tuple[Seq[ClassifyRequest], Mapping[tuple[str, str], tuple[str, ...]]]:
    """Let adapters answer the questions of /v1/classify that have the name of a classifier or a route, as `plan` does.
    So the same request is answered before and after an adapter is trained for one of its questions.

    requests:  all have the same questions and classifiers.
    Returns the requests, and warnings: (the question's name, the adapter that may answer) -> warnings. Raises as `plan`
    does, also where a predicate has other labels than its classifier."""
    questions = requests[0].questions
    asked = [
        Asked(place=f"questions.{name}", options="labels", name=name, question=one) for name, one in questions.items()
    ]
    names = _names(router, asked, EVERYTHING, ())
    left = {name: one for name, one in questions.items() if not router.knows(name)}
    if len(left) == len(questions):
        return requests, {}
    targets = {name: router.targets(name) for name in names if name not in left}
    contracts, warnings = await checked(router.service, asked, names, targets, {}, None)
    for one, name in zip(asked, names, strict=True):
        if one.question.type == "predicate":  # whose labels the typed formats do not name
            for adapter in targets.get(name, ()):
                labels = contracts[adapter][1] or one.question.labels
                if stripped(labels) != stripped(one.question.labels):
                    raise other_labels(one, adapter, labels)
    more = [name for name in questions if name not in left]
    classifiers = tuple(dict.fromkeys((*router.asked(requests[0].classifiers), *more)))
    changed = [replace(one, classifiers=classifiers, questions=left) for one in requests]
    return changed, {(names[index], adapter): told for (index, adapter), told in warnings.items()}


def warned(
    result: ClassifyResult | BatchResult, warnings: Mapping[tuple[str, str], tuple[str, ...]]
) -> ClassifyResult | BatchResult:
    """Return the result with the warnings that `trained` found."""
    if not warnings:
        return result
    if isinstance(result, BatchResult):
        results = (warned(one, warnings) if isinstance(one, ClassifyResult) else one for one in result.results)
        return replace(result, results=tuple(results))  # type: ignore[arg-type]  # no batch holds a batch

    def of(verdict: Verdict) -> Verdict:
        adapter = "" if verdict.adapter is None else verdict.adapter.name
        more = warnings.get((verdict.classifier, adapter), ()) if verdict.error is None else ()
        return replace(verdict, warnings=(*(verdict.warnings or ()), *more)) if more else verdict

    return replace(result, verdicts=tuple(map(of, result.verdicts)))


def _names(router: Router, asked: Seq[Asked], model: str, aliases: Collection[str]) -> list[str]:
    """Return for each question the name that its verdict will have."""
    service = router.service
    if router.knows(model):
        return [model] * len(asked)
    known = list(dict.fromkeys((*(one.name for one in router.routes()), *service.names())))
    if model != EVERYTHING and model not in aliases and model not in service.base_names:
        error = UnknownClassifierError(model, known)
        error.remedy += (
            f", which answers every question; or give {listed([EVERYTHING, *service.base_names, *aliases])}, and each "
            "question's name chooses who answers"
        )
        raise error
    unknown = [one.name for one in asked if one.name is not None and not router.knows(one.name)]
    if unknown and not service.answers_questions:
        error = UnknownClassifierError(unknown, known)
        hint = similar([shortened(name) for name in unknown[:MOST_HINTS]], known)
        error.remedy = "; ".join(filter(None, (hint, error.remedy, ASK_THE_BASE)))
        raise error
    names: list[str] = []
    own: dict[str, Question] = {}  # questions that no adapter was trained for
    for index, one in enumerate(asked):
        name = one.name
        if name is None and not service.answers_questions:
            remedy = f"give a name, one of: {listed(known)}; or give a classifier as `model`"
            raise wrong(one, "name", "is missing, and names the classifier that answers", remedy)
        if name is None or not router.knows(name):
            name = f"question {index}" if name is None else name
            while own.get(name, one.question) != one.question or router.knows(name):
                name = f"{name} {index}"
            own[name] = one.question
        names.append(name)
    return names


def _check_text(state: State, asked: Seq[Asked]) -> None:
    for one in asked:
        question = one.question
        for text in (one.name or "", question.instructions, *question.labels, *question.descriptions.values()):
            valid_unicode(text)
    for text in (state,) if isinstance(state, str) else (part for one in state for part in (one.role, one.content)):
        valid_unicode(text)
    if not (state.strip() if isinstance(state, str) else state):
        raise InvalidRequestError("the input is empty", remedy="send the text or the messages to decide about")


def _fits(question: Question, scores: Mapping[str, float]) -> bool:
    """Return whether the scores are of the question's labels. An adapter may be replaced while it is asked."""
    return len(scores) == 2 if question.type == "predicate" else stripped(scores) == stripped(question.labels)


def _in_words_of(question: Question, verdict: Verdict) -> Verdict:
    """Return the verdict with its labels as the question spells them."""
    scores = verdict.scores or {}
    if question.type == "predicate" or scores.keys() == set(question.labels):
        return verdict
    spelled = {label.strip(): label for label in question.labels}
    by_label = {spelled[label.strip()]: one for label, one in scores.items()}
    return replace(verdict, scores=by_label, label=spelled.get((verdict.label or "").strip(), verdict.label))


def _replaced(name: str) -> NotReadyError:
    message = f"{quoted(name)} was replaced by an adapter with other labels"
    return NotReadyError(message, remedy="send the request again")
