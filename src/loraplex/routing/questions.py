"""Finds who answers typed questions, and checks each question against the contracts before anything is computed."""

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.classifier import Contract, kept_messages, valid_unicode
from loraplex.decisions import Answer, answer_of, failed, skipped
from loraplex.errors import InvalidRequestError, LoraplexError, NotReadyError, UnknownClassifierError, listed, quoted
from loraplex.routing.router import Router
from loraplex.state import State
from loraplex.types import ClassifyRequest, ClassifyResult, ErrorInfo, Message, Question, Roles

EVERYTHING = "*"  # the model that leaves the choice of a classifier to each question's name


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
                answers.append(answer_of(one.question, verdict, self.warnings.get((index, adapter), ())))
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
) -> Plan:
    """Return what is asked for typed questions about a state.

    field:    the state's name in the request, for errors.
    model:    a classifier or a route, which then answers every question; or the base, "*" or one of `aliases`, and each
              question's name is the classifier's or route's. The bare base answers the others, where it answers any.
    strict:   refuse a question whose words contradict the contract's, instead of warning.

    Raises UnknownClassifierError for names that are unknown, and InvalidRequestError, which names the question, where
    the classifier has other labels, or none, and where a message's role is unknown."""
    _check_text(state, asked)
    routes = {one.name: one for one in router.routes()}
    known = list(dict.fromkeys((*routes, *router.service.names())))
    names = _names(router, known, asked, model, aliases)
    questions = {name: one.question for one, name in zip(asked, names, strict=True) if not router.knows(name)}
    warnings: dict[tuple[int, str], tuple[str, ...]] = {}
    first: dict[str, int] = {}
    for index, message in enumerate(() if isinstance(state, str) else state):
        first.setdefault(message.role, index)
    of_adapters: dict[str, tuple[Contract | None, tuple[str, ...] | None]] = {}
    for index, (one, name) in enumerate(zip(asked, names, strict=True)):
        if name in questions:
            continue
        targets = routes[name].targets if name in routes else {name: 1}
        for adapter in (adapter for adapter, weight in targets.items() if weight):
            if is_new := adapter not in of_adapters:  # one classifier may answer thousands of questions
                of_adapters[adapter] = await _contract_of(router, adapter, one.place)
            contract, labels = of_adapters[adapter]
            if labels is not None:
                _check_labels(one, adapter, contract, labels)
                warnings[index, adapter] = _check_words(one, contract, strict)
            if is_new and contract is not None and contract.format == "lines":
                _check_roles(first, {**contract.roles, **(roles or {})}, field)
    classifiers = tuple(dict.fromkeys(name for name in names if name not in questions))
    request = ClassifyRequest(input=state, classifiers=classifiers, questions=questions, roles=roles)
    return Plan(asked=asked, request=request, names=names, adapters=of_adapters, warnings=warnings)


def _names(router: Router, known: list[str], asked: Seq[Asked], model: str, aliases: Collection[str]) -> list[str]:
    """Return for each question the name that its verdict will have."""
    if router.knows(model):
        return [model] * len(asked)
    if model != EVERYTHING and model not in aliases and model not in router.service.base_names:
        raise UnknownClassifierError(model, known)
    names: list[str] = []
    own: dict[str, Question] = {}  # questions that no adapter was trained for
    for index, one in enumerate(asked):
        name = one.name
        if name is None and not router.service.answers_questions:
            remedy = f"give a name, one of: {listed(known)}; or give a classifier as `model`"
            raise _wrong(f"{one.place}.name", "is missing, and names the classifier that answers", remedy)
        if name is None or not router.knows(name):
            name = f"question {index}" if name is None else name
            while own.get(name, one.question) != one.question or router.knows(name):
                name = f"{name} {index}"
            own[name] = one.question
        names.append(name)
    return names


async def _contract_of(router: Router, adapter: str, place: str) -> tuple[Contract | None, tuple[str, ...] | None]:
    """Return an adapter's contract and its labels. Labels are None where the adapter cannot be used, which its verdict
    says."""
    service = router.service
    try:
        info = service.adapter(adapter)
        if info.labels is None and info.version is None:  # what was not read yet may have a score head with labels
            await service.version_of(adapter)
            info = service.adapter(adapter)
    except LoraplexError:
        return None, None
    if info.labels is None:
        remedy = "give it a classifier.yaml with `labels`, or ask it through /v1/classify"
        raise _wrong(place, f"{adapter!r} has no labels, so it answers no typed question", remedy)
    return service.contract(adapter), info.labels


def _check_labels(one: Asked, adapter: str, contract: Contract | None, labels: tuple[str, ...]) -> None:
    question, who = one.question, repr(adapter)
    if question.type == "predicate":
        kind = contract.question_type if contract is not None else "predicate" if len(labels) == 2 else "choice"
        if kind != "predicate":
            raise _wrong(
                f"{one.place}.type", f"{who} is a {kind} between {listed(labels)}", f"ask a {kind} with these labels"
            )
        return
    asked = question.labels
    if len(set(asked)) != len(asked):
        raise _wrong(f"{one.place}.{one.options}", f"two of {listed(asked)} are the same label", "give each label once")
    if set(asked) != set(labels):
        raise _wrong(
            f"{one.place}.{one.options}",
            f"{listed(asked)} are not the labels of {who}, which are {listed(labels)}",
            f"give {listed(labels)}, in any order",
        )


def _check_words(one: Asked, contract: Contract | None, strict: bool) -> tuple[str, ...]:
    """Return warnings about words of the question that are not used, because the contract has others."""
    question, warnings = one.question, []
    own = None if contract is None else contract.question
    if question.instructions.strip() and not _same(question.instructions, own):
        if strict and own is not None:
            raise _wrong(
                f"{one.place}.instructions", f"the classifier's own question is {quoted(own)}", "give this one"
            )
        told = "its template holds its question" if own is None else f"its own question is {quoted(own)}"
        warnings.append(f"instructions_not_used: the classifier was trained with other words; {told}")
    named = {} if contract is None else contract.descriptions or {}
    labels = question.labels if question.type != "predicate" or contract is None else contract.labels
    given = {labels[question.labels.index(label)]: text for label, text in question.descriptions.items()}
    others = [label for label, text in given.items() if text.strip() and not _same(text, named.get(label))]
    if others:
        if strict and (label := next((one for one in others if one in named), None)) is not None:
            raise _wrong(
                f"{one.place}.{one.options}",
                f"{label!r} means {quoted(named[label])} to the classifier",
                "give this one",
            )
        warnings.append(f"descriptions_not_used: the classifier has its own meaning of {listed(others)}")
    return tuple(warnings)


def _same(text: str, other: str | None) -> bool:
    return other is not None and text.split() == other.split()


def _check_text(state: State, asked: Seq[Asked]) -> None:
    for one in asked:
        question = one.question
        for text in (one.name or "", question.instructions, *question.labels, *question.descriptions.values()):
            valid_unicode(text)
    for text in (state,) if isinstance(state, str) else (one.content for one in state):
        valid_unicode(text)
    if not (state.strip() if isinstance(state, str) else state):
        raise InvalidRequestError("the input is empty", remedy="send the text or the messages to decide about")


def _check_roles(first: Mapping[str, int], roles: Roles, field: str) -> None:
    """first: role -> number of the first message that has the role."""
    for role, index in first.items():
        try:
            kept_messages([Message(role=role, content="")], roles)
        except InvalidRequestError as exc:
            raise _wrong(f"{field}.{index}", exc.message, exc.remedy) from None


def _fits(question: Question, scores: Mapping[str, float]) -> bool:
    """Return whether the scores are of the question's labels. An adapter may be replaced while it is asked."""
    return len(scores) == 2 if question.type == "predicate" else scores.keys() == set(question.labels)


def _replaced(name: str) -> NotReadyError:
    return NotReadyError(f"{name!r} was replaced by an adapter with other labels", remedy="send the request again")


def _wrong(place: str, message: str, remedy: str) -> InvalidRequestError:
    error = InvalidRequestError(f"{place}: {message}", remedy=remedy)
    error.param = place
    return error
