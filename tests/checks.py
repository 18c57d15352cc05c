"""What must hold after any traffic."""

from loraplex import Loraplex
from loraplex.backends.serving import ServingBackend
from loraplex.engine.engine import Engine


def check_pool(loraplex: Loraplex) -> None:
    """No block is lost, and nobody holds one."""
    assert isinstance(loraplex.backend, ServingBackend)
    assert isinstance(loraplex.backend._engine, Engine)
    pool = loraplex.backend._engine._scheduler.pool
    assert pool.num_blocks > 0
    pool.check()
    assert pool.num_available == pool.num_blocks
