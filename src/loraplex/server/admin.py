"""Adapters at run time: our routes, vLLM's names for them, and SageMaker's."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from loraplex.errors import ConfigurationError, RefusedError
from loraplex.server.lifecycle import stopping
from loraplex.server.routes import router_of, service_of
from loraplex.server.schemas import (
    AdapterBody,
    AdapterList,
    SageMakerAdapterBody,
    VllmLoadBody,
    VllmUnloadBody,
    errors,
)
from loraplex.types import AdapterInfo

Result = TypeVar("Result")

router = APIRouter(tags=["adapters"])

UNKNOWN = errors(_404="no such adapter")
UNLOADING = UNKNOWN | errors(_409="a route leads to it")
LOADING = errors(
    _409="the name is taken",
    _422="not sound, or not below an adapter root; what answered before goes on",
    _503="not ready, stopping, the name is being unloaded, or pinned adapters leave no room",
)
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}


async def _sound(loading: Awaitable[Result]) -> Result:
    """What is wrong with an adapter that a client names is the client's to mend. The work goes on to its end though
    the client may leave."""
    try:
        return await loading
    except ConfigurationError as exc:
        raise RefusedError(exc) from exc
    except asyncio.CancelledError:
        raise stopping() from None


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> AdapterList:
    """All adapters with their states."""
    return AdapterList(adapters=list(service_of(request).adapters()))


@router.get("/v1/adapters/{name}", responses=UNKNOWN)
async def show_adapter(request: Request, name: str) -> AdapterInfo:
    return service_of(request).adapter(name)


@router.put("/v1/adapters/{name}", responses=LOADING)
async def put_adapter(request: Request, name: str, body: AdapterBody) -> AdapterInfo:
    """Load it, or replace the one of that name: requests in flight finish on the old version, later ones get the new.
    Answers when the new one has proven itself and is live; where it does not, the old one goes on."""
    return await _sound(service_of(request).load_adapter(name, body.source, pin=body.pinned))


@router.delete("/v1/adapters/{name}", responses=UNLOADING)
async def delete_adapter(request: Request, name: str) -> dict[str, str]:
    """Unload it. Answers when its last request is answered and its memory is free."""
    await router_of(request).unload_adapter(name)
    return {"name": name, "state": "unloaded"}


@router.put("/v1/adapters/{name}/pin", responses=UNKNOWN | LOADING)
async def pin_adapter(request: Request, name: str) -> AdapterInfo:
    """Keep its place on the device."""
    return await _sound(service_of(request).pin_adapter(name, True))


@router.delete("/v1/adapters/{name}/pin", responses=UNKNOWN)
async def unpin_adapter(request: Request, name: str) -> AdapterInfo:
    return await _sound(service_of(request).pin_adapter(name, False))


@router.post("/v1/load_lora_adapter", responses=TEXT | LOADING, response_model=None)
async def load_lora_adapter(request: Request, body: VllmLoadBody) -> Response:
    """vLLM's. A name that is taken is refused unless `load_inplace`."""
    await _sound(service_of(request).load_adapter(body.lora_name, body.lora_path, replace=body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=TEXT | UNLOADING, response_model=None)
async def unload_lora_adapter(request: Request, body: VllmUnloadBody) -> Response:
    """vLLM's."""
    await router_of(request).unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/adapters", responses=LOADING, tags=["sagemaker"])
async def sagemaker_load(request: Request, body: SageMakerAdapterBody) -> AdapterInfo:
    """SageMaker's. A name that is taken is refused. `preload` changes nothing: an adapter is always read and proven
    before it is live."""
    return await _sound(service_of(request).load_adapter(body.name, body.src, pin=body.pin, replace=False))


@router.delete("/adapters/{name}", responses=UNLOADING, tags=["sagemaker"])
async def sagemaker_unload(request: Request, name: str) -> dict[str, str]:
    """SageMaker's."""
    return await delete_adapter(request, name)
