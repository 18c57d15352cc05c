"""Checks the label that feedback gives to a verdict."""

from typing import TYPE_CHECKING

from loraplex.errors import InvalidRequestError, listed, quoted
from loraplex.labelled import YES_NO
from loraplex.routing.verdict_log import Targets

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

YES_OR_NO = dict(zip(*reversed(YES_NO), strict=True))  # what else is taken where the labels are yes and no


def as_spelled(label: str, targets: Targets, service: "Service") -> str:
    """Return the label as the targets that answered spell it. Raises InvalidRequestError if one of them has labels, and
    not this one."""
    for target, of_question in targets.items():
        info = service.adapter(target) if service.knows(target) and not of_question else None
        labels = of_question or (info and info.labels) or ()
        plain = {one.strip() for one in labels}
        if plain == {*YES_OR_NO.values()}:
            label = YES_OR_NO.get(label.strip(), label)
        if labels and label.strip() not in plain:
            whose = "the question" if of_question else repr(target)
            raise InvalidRequestError(f"{quoted(label)} is no label of {whose}", remedy=f"use one of: {listed(labels)}")
    return label
