"""HTTP API of routes: their changes at run time, their statistics, and feedback on verdicts."""

from fastapi import APIRouter, Request

from loraplex.config import RouteSettings
from loraplex.server import logs
from loraplex.server.json_body import JsonRoute
from loraplex.server.routes import router_of
from loraplex.server.schemas import ExamplesBody, FeedbackBody, FeedbackResult, RouteList, errors
from loraplex.types import Examples, Route, RouteStats, classifier_names

router = APIRouter(tags=["routes"], route_class=JsonRoute)

UNKNOWN = errors(_404="no such route")
NOTHING = errors(_409="the route has no change to roll back")
UNSOUND = errors(_422="a field is wrong, or a target does not exist")
NO_VERDICT = errors(
    _404="the verdict is unknown or no longer kept",
    _422="a field is wrong, or the classifier has no such label",
)


@router.get("/v1/routes")
async def list_routes(request: Request) -> RouteList:
    """List all routes."""
    return RouteList(routes=list(router_of(request).routes()))


@router.get("/v1/routes/{name}", responses=UNKNOWN)
async def show_route(request: Request, name: str) -> Route:
    """Return one route."""
    return router_of(request).route(name)


@router.put("/v1/routes/{name}", responses=UNSOUND)
async def put_route(request: Request, name: str, body: RouteSettings) -> Route:
    """Create a route, or replace it for all later requests.

    A conversation keeps its target as far as the new weights allow.
    """
    return await router_of(request).set_route(name, body)


@router.delete("/v1/routes/{name}", responses=UNKNOWN)
async def delete_route(request: Request, name: str) -> dict[str, str]:
    """Delete a route. Its adapters stay loaded."""
    await router_of(request).delete_route(name)
    return {"name": name, "state": "deleted"}


@router.post("/v1/routes/{name}/rollback", responses=NOTHING)
async def rollback_route(request: Request, name: str) -> Route:
    """Undo the last change of a route. A deletion can be undone, too."""
    return await router_of(request).rollback_route(name)


@router.get("/v1/routes/{name}/stats", responses=UNKNOWN)
async def route_stats(request: Request, name: str) -> RouteStats:
    """Return how each version of each target answered, over the verdicts that are kept.

    `name` can also be a classifier that is requested by its own name.
    """
    return await router_of(request).stats(name)


@router.post("/v1/examples", responses=UNKNOWN)
async def examples(request: Request, body: ExamplesBody) -> Examples:
    """Return the texts that `--keep-inputs` keeps, with the labels of their verdicts, a page at a time.

    A page may be empty; the last one has no `after`.
    """
    names = classifier_names(body.classifiers)
    return await router_of(request).examples(names, body.since_s, body.only == "corrected", body.after)


@router.post("/v1/feedback", responses=NO_VERDICT, response_model_exclude_none=True)
async def feedback(request: Request, body: FeedbackBody) -> FeedbackResult:
    """Record the label that a verdict should have had.

    A request is found by the key that sent it, and by admin keys. The label counts in the accuracy of all targets that
    answered. A later label replaces an earlier one.
    """
    if body.request_id is not None:
        key = None if (record := logs.current()).is_trusted else record.key
        num_answers = await router_of(request).set_truth_of_request(body.request_id, body.classifier, body.label, key)
    else:
        num_answers = await router_of(request).set_truth(body.verdict_id or "", body.label)
    return FeedbackResult(verdict_id=body.verdict_id, request_id=body.request_id, num_answers=num_answers)
