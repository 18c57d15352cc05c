"""What must hold after any traffic."""

import time

from loraplex import Loraplex
from loraplex.backends.serving import ServingBackend
from loraplex.engine.engine import Engine


def check_pool(loraplex: Loraplex) -> None:
    """No block is lost, and nobody holds one."""
    assert isinstance(loraplex.backend, ServingBackend)
    assert isinstance(loraplex.backend._engine, Engine)
    engine, end = loraplex.backend._engine, time.monotonic() + 10
    pool = engine._scheduler.pool
    assert pool.num_blocks > 0
    # A request that was late may be in a step still.
    while engine.num_waiting or engine.num_running or pool.num_available != pool.num_blocks:
        assert time.monotonic() < end, "blocks are held although nothing runs"
        time.sleep(0.001)
    pool.check()
