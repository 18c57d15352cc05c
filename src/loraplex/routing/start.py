"""Opens what a router keeps: routes, verdicts, and texts where the operator wants them. Starts the router."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex.cascades import Gate
from loraplex.config import RouteSettings
from loraplex.routing.kept_inputs import KeptInputs
from loraplex.routing.route_store import RouteStore
from loraplex.routing.router import Router
from loraplex.routing.verdict_log import VerdictLog

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

logger = logging.getLogger(__name__)

INPUTS = "inputs"  # the folder of kept texts


def open_stores(
    state_dir: str | None, *, max_verdicts: int, keep_inputs: str = "0", max_input_bytes: int = 0
) -> tuple[RouteStore, VerdictLog | None]:
    """Open the stores for routes and verdicts in `state_dir`; None keeps both in memory. Erases kept texts whose time
    is over, and all of them if no texts are to be kept any more.

    max_verdicts:     number of newest verdicts that are kept; 0 keeps none.
    keep_inputs:      how long texts are kept, such as 7d; 0 keeps none.
    max_input_bytes:  of the texts; beyond it the oldest are erased.
    Raises StateError if a file cannot be read or written."""
    folder = None if state_dir is None else Path(state_dir)
    store = RouteStore(None if folder is None else folder / "routes.sqlite")
    texts = None if folder is None else folder / INPUTS
    inputs = None
    if keep_inputs != "0":
        inputs = KeptInputs(texts, keep=keep_inputs, max_bytes=max_input_bytes)
        inputs.start()
        logger.warning(
            "--keep-inputs %s: THE TEXTS OF ALL CLASSIFIED REQUESTS ARE STORED for %s, unencrypted, in %s; every admin "
            "key can read them. They may hold personal data: see docs/improving.md",
            keep_inputs,
            keep_inputs,
            "memory" if texts is None else texts,
        )
    elif texts is not None and texts.is_dir():
        KeptInputs(texts, keep="0", max_bytes=0)
        with suppress(OSError):  # something else lies in it
            texts.rmdir()
        logger.warning("%s: all texts that were stored there are erased, because --keep-inputs is off now", texts)
    file = None if folder is None else folder / "verdicts.sqlite"
    return store, VerdictLog(file, max_verdicts=max_verdicts, inputs=inputs) if max_verdicts else None


async def start_router(
    service: "Service",
    from_file: Mapping[str, RouteSettings],
    store: RouteStore | None = None,
    log: VerdictLog | None = None,
    gates: Mapping[str, Gate] | None = None,
) -> Router:
    """Return a router that has started. If the start fails, the service is closed."""
    router = Router(service, from_file, store, log, gates)
    try:
        await router.start()
    except BaseException:
        await router.close()
        raise
    return router
