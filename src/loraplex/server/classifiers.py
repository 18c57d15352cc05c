"""HTTP route that says what each classifier asks, and when it says what. Whoever may ask classifiers may read it."""

from fastapi import APIRouter, Request

from loraplex.server.json_body import JsonRoute
from loraplex.server.routes import router_of
from loraplex.server.schemas import ClassifierCard, ClassifierList

router = APIRouter(tags=["classify"], route_class=JsonRoute)


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
        contract = service.contract(adapter) if service.knows(adapter) else None
        labels = service.adapter(adapter).labels if service.knows(adapter) else None
        cards.append(ClassifierCard.of(name, contract, labels, is_route=name in routes))
    return ClassifierList(classifiers=cards, answers_questions=service.answers_questions)
