"""A look into a `Loraplex`, and what must hold after any traffic."""

import time

from loraplex import Loraplex
from loraplex.engine.engine import Engine
from loraplex.executors.native import NativeExecutor
from loraplex.model.decoder import Decoder
from loraplex.model.model import Model
from loraplex.model.step_memo import StepMemo
from loraplex.text.frame import Taken
from loraplex.text.template import Template
from sound import check_blocks


def engine_of(loraplex: Loraplex) -> Engine:
    engine = loraplex.service.computing.computation
    assert isinstance(engine, Engine)
    return engine


def model_of(loraplex: Loraplex) -> Model:
    executor = loraplex.service.executor
    assert isinstance(executor, NativeExecutor)
    return executor.model


def memo_of(loraplex: Loraplex) -> StepMemo:
    model = model_of(loraplex)
    assert isinstance(model, Decoder)
    return model.memo


def num_bytes_of(memo: StepMemo) -> int:
    return sum(one.num_bytes for one in memo._memos.values())


def check_pool(loraplex: Loraplex) -> None:
    """No block is lost, and nobody holds one."""
    engine, end = engine_of(loraplex), time.monotonic() + 10
    pool = engine.scheduler.pool
    assert pool.num_blocks > 0
    # A request that was late may be in a step still.
    while engine.num_waiting or engine.num_running or pool.num_available != pool.num_blocks:
        assert time.monotonic() < end, "blocks are held although nothing runs"
        time.sleep(0.001)
    check_blocks(pool)


def prompt_text(template: Template, conversation: Taken) -> str:
    """Return the text of a prompt with all of the conversation."""
    head, tail = template.parts(conversation)
    return head + (tail or "")


def tail(template: Template) -> str:
    """Return the text behind a conversation."""
    return template.parts("x")[1] or ""
