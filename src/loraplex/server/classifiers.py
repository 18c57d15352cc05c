"""HTTP route that says what each classifier asks, and when it says what. Whoever may ask classifiers may read it."""

from typing import Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from loraplex.classifier import Contract
from loraplex.server.json_body import JsonRoute
from loraplex.server.routes import router_of
from loraplex.types import AdapterInfo, QuestionType, Roles

router = APIRouter(tags=["classify"], route_class=JsonRoute)


class ClassifierCard(BaseModel):
    """Says what a classifier asks and when it says what, by its contract. Without a contract most fields are null."""

    name: str
    is_route: bool = Field(description="the name leads to adapters by weight")
    version: str | None = Field(None, description="of the adapter, or of a route's target with the largest weight")
    question: str | None = None
    type: QuestionType | None = None
    labels: tuple[str, ...] | None = None
    descriptions: dict[str, str] | None = None
    threshold: float | None = Field(None, description="of two labels, the first is answered from this score on")
    abstain_below: float = 0.0
    min_label_mass: float = 0.0
    max_length: int | None = Field(
        None, description="maximum tokens of the prompt; a longer one loses its oldest turns"
    )
    roles: Roles | None = Field(None, description="role -> the name that stands before its turns")

    @classmethod
    def of(cls, name: str, adapter: AdapterInfo | None, contract: Contract | None, is_route: bool) -> Self:
        """adapter: the one that answers for the name, or the likeliest one; None if it does not exist."""
        version, labels = (None, None) if adapter is None else (adapter.version, adapter.labels)
        if contract is None:
            return cls(name=name, is_route=is_route, version=version, labels=labels)
        return cls(
            name=name,
            is_route=is_route,
            version=version,
            question=contract.question,
            type=contract.question_type,
            labels=contract.labels,
            descriptions=contract.descriptions,
            threshold=contract.threshold,
            abstain_below=contract.abstain_below,
            min_label_mass=contract.min_label_mass,
            max_length=contract.max_length,
            roles=contract.roles,
        )


class ClassifierList(BaseModel):
    classifiers: list[ClassifierCard]
    answers_questions: bool = Field(description="whether requests may have `questions` (--adhoc-questions)")


@router.get("/v1/classifiers")
async def list_classifiers(request: Request) -> ClassifierList:
    """List the classifiers and routes that a request may name, with their labels and thresholds.

    A route has those of its target with the largest weight.
    """
    router = router_of(request)
    service, routes = router.service, {one.name: one for one in router.routes()}
    cards = []
    for name in dict.fromkeys((*routes, *service.names())):
        targets = routes[name].targets if name in routes else {name: 1.0}
        adapter = max(targets, key=lambda one: targets[one])
        is_known = service.knows(adapter)
        info, contract = (service.adapter(adapter), service.contract(adapter)) if is_known else (None, None)
        cards.append(ClassifierCard.of(name, info, contract, is_route=name in routes))
    return ClassifierList(classifiers=cards, answers_questions=service.answers_questions)
