"""Checks typed questions against the contracts of the classifiers that they ask, before anything is computed."""

import asyncio
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from loraplex.classifier import Contract, kept_messages
from loraplex.errors import InvalidRequestError, LoraplexError, NotReadyError, listed, quoted
from loraplex.problems import refused_at
from loraplex.types import AdapterInfo, Message, Roles

if TYPE_CHECKING:  # the service imports torch
    from loraplex.routing.questions import Asked
    from loraplex.service.service import Service

Known = tuple[Contract | None, tuple[str, ...] | None]  # an adapter's contract and labels


async def checked(
    service: "Service",
    asked: Seq["Asked"],
    names: Seq[str],
    targets: Mapping[str, tuple[str, ...]],
    first: Mapping[str, str],
    roles: Roles | None,
    *,
    strict: bool = False,
    patience_s: float | None = None,
) -> tuple[Mapping[str, Known], dict[tuple[int, str], tuple[str, ...]]]:
    """Check the questions whose names are in `targets`: name -> the adapters of which one answers. Return what is known
    of these adapters, and warnings: (the question's number, the adapter) -> warnings.

    names:       of the questions.
    first:       role -> place of the first message that has it.
    patience_s:  see `plan`. Questions to adapters whose contract is known are checked before any adapter is loaded."""
    adapters = list(dict.fromkeys(adapter for of_name in targets.values() for adapter in of_name))
    unread = {one for one in adapters if service.knows(one) and not _is_read(service.adapter(one))}
    known: dict[str, Known] = {}
    warnings: dict[tuple[int, str], tuple[str, ...]] = {}

    def check(index: int, one: "Asked", name: str) -> None:
        for adapter in targets[name]:
            if is_new := adapter not in known:  # one classifier may answer thousands of questions
                known[adapter] = _known_of(service, adapter, one)
            contract, labels = known[adapter]
            if is_new and contract is not None and contract.format == "lines":
                _check_roles(first, {**contract.roles, **(roles or {})})
            if labels is not None and len(targets[name]) == 1:
                _check_labels(one, adapter, contract, labels)
            if labels is not None:
                warnings[index, adapter] = _check_words(one, contract, strict)
        if len(targets[name]) > 1:
            _check_route(one, name, {adapter: known[adapter] for adapter in targets[name]})

    waiting = []
    for index, (one, name) in enumerate(zip(asked, names, strict=True)):
        if name in targets:
            if unread.isdisjoint(targets[name]):
                check(index, one, name)
            else:
                waiting.append((index, one, name))
    # With patience, all are loaded now: whoever has little time learns now that it takes longer.
    await load_in_time(service, unread if patience_s is None else adapters, patience_s)
    for index, one, name in waiting:
        check(index, one, name)
    return known, warnings


def _is_read(info: AdapterInfo) -> bool:
    """Return whether the labels are known. What was never loaded may have a score head with labels."""
    return info.labels is not None or info.version is not None or info.error is not None


def _known_of(service: "Service", adapter: str, one: "Asked") -> Known:
    """Return an adapter's contract and its labels. Labels are None where the adapter cannot be used, which its verdict
    says."""
    try:
        info = service.adapter(adapter)
    except LoraplexError:
        return None, None
    if info.labels is None and info.version is None:
        return None, None
    if info.labels is None:
        remedy = "give it a classifier.yaml with `labels`, or ask it through /v1/classify"
        raise wrong(one, "", f"{adapter!r} has no labels, so it answers no typed question", remedy)
    return service.contract(adapter), info.labels


def _check_route(one: "Asked", name: str, targets: Mapping[str, Known]) -> None:
    """Check a question to a route with several targets."""
    of = {adapter: labels for adapter, (_, labels) in targets.items() if labels is not None}
    if one.question.type != "predicate" and len({frozenset(stripped(labels)) for labels in of.values()}) > 1:
        told = "; ".join(f"those of {adapter!r} are {listed(labels)}" for adapter, labels in of.items())
        remedy = "ask one of these classifiers by its name, or let the route lead to classifiers with the same labels"
        raise wrong(one, "", f"the targets of the route {name!r} have different labels: {told}", remedy)
    for adapter, labels in of.items():
        _check_labels(one, adapter, targets[adapter][0], labels)


def _check_labels(one: "Asked", adapter: str, contract: Contract | None, labels: tuple[str, ...]) -> None:
    question, who = one.question, repr(adapter)
    if question.type == "predicate":
        if contract is None:
            raise wrong(
                one,
                "type",
                f"{who} has no classifier.yaml, so nothing says which of its labels holds",
                "write a classifier.yaml with `labels`, the one that holds first; or ask a choice between "
                f"{listed(labels)}",
            )
        if (kind := contract.question_type) != "predicate":
            raise wrong(one, "type", f"{who} is a {kind} between {listed(labels)}", f"ask a {kind} with these labels")
        return
    if len(stripped(question.labels)) != len(question.labels):
        raise wrong(one, one.options, f"two of {listed(question.labels)} are the same label", "give each label once")
    if stripped(question.labels) != stripped(labels):
        raise other_labels(one, adapter, labels)


async def load_in_time(service: "Service", adapters: Iterable[str], patience_s: float | None) -> None:
    """Load adapters that were never loaded. Raises NotReadyError where that takes too long; they are then loaded all
    the same, for the client's next attempt. An adapter that cannot be loaded says so in its verdict."""
    infos = [service.adapter(name) for name in adapters if service.knows(name)]
    loads = {
        asyncio.create_task(service.version_of(one.name)): one.name
        for one in infos
        if one.version is None and one.error is None
    }
    if not loads:
        return
    for load in loads:
        _loads.add(load)
        load.add_done_callback(_loaded)
    _, pending = await asyncio.wait(loads, timeout=patience_s)
    if pending:
        names = [name for load, name in loads.items() if load in pending]
        raise NotReadyError(f"still being loaded: {listed(names)}", remedy="send the request again")


_loads: "set[asyncio.Task[Any]]" = set()  # asyncio itself keeps no task alive


def _loaded(load: "asyncio.Task[Any]") -> None:
    _loads.discard(load)
    if not load.cancelled():
        load.exception()  # its verdict says it


def other_labels(one: "Asked", adapter: str, labels: Seq[str]) -> InvalidRequestError:
    message = f"{listed(one.question.labels)} are not the labels of {adapter!r}, which are {listed(labels)}"
    return wrong(one, one.options, message, f"give {listed(labels)}, in any order")


def stripped(labels: Iterable[str]) -> set[str]:
    """Return labels as they are compared: a space before a label belongs to its token, not to its name."""
    return set(map(str.strip, labels))


def _check_words(one: "Asked", contract: Contract | None, strict: bool) -> tuple[str, ...]:
    """Return warnings about words of the question that are not used, because the contract has others."""
    question, warnings = one.question, []
    own = None if contract is None else contract.question
    if question.instructions.strip() and not _same(question.instructions, own):
        if strict and own is not None:
            raise wrong(one, "instructions", f"the classifier's own question is {quoted(own)}", "give this one")
        told = "its template holds its question" if own is None else f"its own question is {quoted(own)}"
        warnings.append(f"instructions_not_used: the classifier was trained with other words; {told}")
    named = {label.strip(): text for label, text in ((contract and contract.descriptions) or {}).items()}
    labels = question.labels if question.type != "predicate" or contract is None else contract.labels
    given = {labels[question.labels.index(label)].strip(): text for label, text in question.descriptions.items()}
    others = [label for label, text in given.items() if text.strip() and not _same(text, named.get(label))]
    if others:
        if strict and (label := next((one for one in others if one in named), None)) is not None:
            raise wrong(one, one.options, f"{label!r} means {quoted(named[label])} to the classifier", "give this one")
        warnings.append(f"descriptions_not_used: the classifier has its own meaning of {listed(others)}")
    return tuple(warnings)


def _same(text: str, other: str | None) -> bool:
    return other is not None and text.split() == other.split()


def _check_roles(first: Mapping[str, str], roles: Roles) -> None:
    """first: role -> place of the first message that has the role."""
    for role, place in first.items():
        try:
            kept_messages([Message(role=role, content="")], roles)
        except InvalidRequestError as exc:
            raise refused_at(place.split("."), exc.message, remedy=exc.remedy) from None


def wrong(one: "Asked", field: str, message: str, remedy: str) -> InvalidRequestError:
    """Return the error of a question, or of one of its fields. A question's name may hold dots."""
    return refused_at((*one.place.split(".", 1), *filter(None, (field,))), message, remedy=remedy)
