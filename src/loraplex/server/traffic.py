"""Routes at run time, how their targets do, and feedback."""

from fastapi import APIRouter, Request

from loraplex.config import RouteSettings
from loraplex.server.routes import router_of
from loraplex.server.schemas import FeedbackBody, FeedbackResult, RouteList, errors
from loraplex.types import Route, RouteStats

router = APIRouter(tags=["routes"])

UNKNOWN = errors(_404="no such route")
NOTHING = errors(_409="no change to it can be rolled back")
UNSOUND = errors(_422="a wrong field, or a target that is not there")
NO_VERDICT = errors(
    _404="no such verdict, or not remembered any more", _422="a wrong field, or no label of the classifier"
)


@router.get("/v1/routes")
async def list_routes(request: Request) -> RouteList:
    return RouteList(routes=list(router_of(request).routes()))


@router.get("/v1/routes/{name}", responses=UNKNOWN)
async def show_route(request: Request, name: str) -> Route:
    return router_of(request).route(name)


@router.put("/v1/routes/{name}", responses=UNSOUND)
async def put_route(request: Request, name: str, body: RouteSettings) -> Route:
    """Make it, or change it for all requests that come from now on. A conversation stays with its target, as far as
    the weights allow."""
    return await router_of(request).set_route(name, body)


@router.delete("/v1/routes/{name}", responses=UNKNOWN)
async def delete_route(request: Request, name: str) -> dict[str, str]:
    await router_of(request).delete_route(name)
    return {"name": name, "state": "deleted"}


@router.post("/v1/routes/{name}/rollback", responses=NOTHING)
async def rollback_route(request: Request, name: str) -> Route:
    """Undo its last change, its deletion too."""
    return await router_of(request).rollback_route(name)


@router.get("/v1/routes/{name}/stats", responses=UNKNOWN)
async def route_stats(request: Request, name: str) -> RouteStats:
    """How each version of each target did, over the verdicts that are kept; of a classifier by itself, too."""
    return await router_of(request).stats(name)


@router.post("/v1/feedback", responses=NO_VERDICT)
async def feedback(request: Request, body: FeedbackBody) -> FeedbackResult:
    """What a verdict should have been: adds to the accuracy of all targets that gave it. The last word counts."""
    num_answers = await router_of(request).set_truth(body.verdict_id, body.label)
    return FeedbackResult(verdict_id=body.verdict_id, num_answers=num_answers)
