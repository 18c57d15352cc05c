"""HTTP routes that manage adapters at run time: Loraplex's own, and those with the paths of vLLM and SageMaker."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from loraplex.errors import ConfigurationError, RefusedError
from loraplex.server.json_body import JsonRoute
from loraplex.server.lifecycle import stopping
from loraplex.server.routes import router_of, service_of
from loraplex.server.schemas import AdapterBody, AdapterList, SageMakerAdapterBody, VllmLoadBody, VllmUnloadBody, errors
from loraplex.types import AdapterInfo

Result = TypeVar("Result")

router = APIRouter(tags=["adapters"], route_class=JsonRoute)

UNKNOWN = errors(_404="no such adapter")
UNLOADING = UNKNOWN | errors(_409="a route uses the adapter")
LOADING = errors(
    _409="the name is taken",
    _422="the adapter is not valid, or not below an adapter root; the version that answered before keeps answering",
    _503="the server is not ready or is stopping, the name is being unloaded, or pinned adapters leave no room",
)
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


async def _loaded(loading: Awaitable[Result]) -> Result:
    """Await `loading`, and raise RefusedError (422) if the adapter that the client named is not valid. A client that
    disconnects does not cancel the load. Raises NotReadyError if the server stops first."""
    try:
        return await loading
    except ConfigurationError as exc:
        raise RefusedError(exc) from exc
    except asyncio.CancelledError:
        raise stopping() from None


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> AdapterList:
    """List all adapters with their states, and the bundle's folders that were left out."""
    service = service_of(request)
    return AdapterList(adapters=list(service.adapters()), skipped=list(service.skipped()))


@router.get("/v1/adapters/{name}", responses=UNKNOWN)
async def show_adapter(request: Request, name: str) -> AdapterInfo:
    """Return one adapter and its state."""
    return service_of(request).adapter(name)


@router.put("/v1/adapters/{name}", responses=LOADING)
async def put_adapter(request: Request, name: str, body: AdapterBody) -> AdapterInfo:
    """Load an adapter, or replace the adapter of this name.

    Requests in flight finish on the old version; later requests get the new version. The response is sent when the new
    version has passed its checks and answers requests. If a check fails, the old version keeps answering.
    """
    return await _loaded(service_of(request).load_adapter(name, body.source, pin=body.pinned))


@router.delete("/v1/adapters/{name}", responses=UNLOADING)
async def delete_adapter(request: Request, name: str) -> dict[str, str]:
    """Unload an adapter. The response is sent when its last request is answered and its memory is free."""
    await router_of(request).unload_adapter(name)
    return {"name": name, "state": "unloaded"}


@router.put("/v1/adapters/{name}/pin", responses=UNKNOWN | LOADING)
async def pin_adapter(request: Request, name: str) -> AdapterInfo:
    """Pin an adapter: it keeps its slot on the device. It is loaded first if it has no slot."""
    return await _loaded(service_of(request).pin_adapter(name, True))


@router.delete("/v1/adapters/{name}/pin", responses=UNKNOWN)
async def unpin_adapter(request: Request, name: str) -> AdapterInfo:
    """Unpin an adapter: it can be evicted from its slot again."""
    return await _loaded(service_of(request).pin_adapter(name, False))


@router.post("/v1/load_lora_adapter", responses=TEXT | LOADING, response_model=None)
async def load_lora_adapter(request: Request, body: VllmLoadBody) -> Response:
    """Load an adapter, through vLLM's path. A name that is taken is refused unless `load_inplace` is true."""
    await _loaded(service_of(request).load_adapter(body.lora_name, body.lora_path, replace=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=TEXT | UNLOADING, response_model=None)
async def unload_lora_adapter(request: Request, body: VllmUnloadBody) -> Response:
    """Unload an adapter, through vLLM's path."""
    await router_of(request).unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/adapters", responses=LOADING, tags=["sagemaker"])
async def sagemaker_load(request: Request, body: SageMakerAdapterBody) -> AdapterInfo:
    """Load an adapter, through SageMaker's path. A name that is taken is refused.

    `preload` changes nothing: every adapter is read and checked before it answers requests.
    """
    return await _loaded(service_of(request).load_adapter(body.name, body.src, pin=body.pin, replace=False))


@router.delete("/adapters/{name}", responses=UNLOADING, tags=["sagemaker"])
async def sagemaker_unload(request: Request, name: str) -> dict[str, str]:
    """Unload an adapter, through SageMaker's path."""
    return await delete_adapter(request, name)
