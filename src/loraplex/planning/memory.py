"""The memory that a base with adapters takes, line by line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loraplex.amounts import counted, size
from loraplex.config import EngineConfig
from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.machine import budget_of
from loraplex.model.decoder import MEMO_MEMORY
from loraplex.model.loader import step_token_bytes
from loraplex.model.step_memo import MAX_MEMOS, SMALL_STEP
from loraplex.planning.adapter_size import FLOAT32_BYTES, AdapterSize
from loraplex.planning.allowances import allowances
from loraplex.planning.base_shape import BaseSizes

DEVICE, HOST = "device", "host"
# Stacks of all adapters that are kept, with the holes that they leave in malloc's heap: where a call takes several
# small steps, and where most of its steps are too large to be kept. Measured by benchmarks.plan.
SPLIT_KINDS, LARGE_KINDS = MAX_MEMOS - 1, 2
MEMO_SHARE = float(MEMO_MEMORY.removesuffix("%")) / 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One part of the memory, in bytes.

    where:     on the device, or in host memory. On a CPU both are the same memory.
    limit:     what arithmetic needs at least.
    expected:  with what a process takes besides, as measured or assumed.
    note:      how the figure comes about.
    """

    name: str
    where: str
    limit: int
    expected: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How the server is used.

    item_bytes:       of the base's number format.
    num_classifiers:  asked together about a conversation.
    max_step_tokens:  tokens of one forward pass.
    call_tokens:      tokens to compute for a call about a new conversation.
    free_bytes:       memory that is free before the base is loaded; None where nobody says.
    tokenizer_bytes:  size of tokenizer.json; None where it is not known.
    """

    item_bytes: int
    is_cuda: bool
    num_classifiers: int
    max_step_tokens: int
    call_tokens: int = 0
    free_bytes: int | None = None
    tokenizer_bytes: int | None = None


class Budgets(NamedTuple):
    """What the settings allow, in bytes; None where a share of unknown memory is meant, which bounds nothing."""

    kv: int | None
    adapters: int | None
    host: int | None


def budgets(config: EngineConfig, left: int | None, host_left: int | None, *, is_cuda: bool) -> Budgets:
    """Return the budgets as the server resolves them. left, host_left: bytes that are free on the device and in host
    memory once the base is loaded; None where nobody says."""
    kv = _budget(config.kv_cache, left)
    # On a GPU the K/V is there when the adapters' share is counted. On a CPU no page of it has been touched.
    rest = left if left is None or not is_cuda else max(0, left - (kv or 0))
    return Budgets(kv=kv, adapters=_budget(config.adapter_memory, rest), host=_budget(config.host_memory, host_left))


def _budget(budget: str, free: int | None) -> int | None:
    return None if free is None and budget.endswith("%") else budget_of(budget, max(0, free or 0))


def weights_line(base: BaseSizes, use: Use) -> Line:
    num_bytes = base.num_weights * use.item_bytes
    note = f"{base.num_weights:,} parameters of {use.item_bytes} bytes"
    return Line(name="weights", where=DEVICE, limit=num_bytes, expected=num_bytes, note=note)


def adapter_lines(
    adapters: Sequence[AdapterSize], num_placed: int, use: Use, host_budget: int | None = None
) -> tuple[Line, Line]:
    """Return the lines of the adapters on the device, and of those in host memory. num_placed: how many have a slot,
    the largest first. host_budget: the bytes of --host-memory; None bounds nothing."""
    placed = sorted((one.num_placed for one in adapters), reverse=True)[:num_placed]
    on_device, on_host = sum(placed) * use.item_bytes, sum(one.host_bytes for one in adapters)
    kept = on_host if host_budget is None else min(on_host, host_budget)
    note = f"{len(adapters)}, as their files hold them, to place them again without a read"
    if kept < on_host:
        note = f"--host-memory keeps as much of {size(on_host)}; the others are read again"
    each = f"{placed[0] * use.item_bytes / 1e6:,.1f} MB for the largest" if placed else "none"
    return (
        Line(name="adapters", where=DEVICE, limit=on_device, expected=on_device, note=f"{len(placed)}, {each}"),
        Line(
            name="adapters in host memory",
            where=HOST,
            limit=0,
            expected=kept,
            note=note,
        ),
    )


def kv_token_bytes(base: BaseSizes, use: Use) -> int:
    return base.num_kv * use.item_bytes


def kv_conversation_bytes(base: BaseSizes, use: Use, num_tokens: int, num_copies: int = 1) -> int:
    """Return the bytes of a conversation's K/V in whole blocks. num_copies: one for the base, or one an adapter."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    return num_copies * num_blocks * BLOCK_SIZE * kv_token_bytes(base, use)


def step_line(base: BaseSizes, use: Use) -> Line:
    """Return the workspace of one step: activations, and rows of logits, which are computed again in float32."""
    activations = use.max_step_tokens * step_token_bytes(base.hidden_size, base.inner_size, use.item_bytes)
    logits = use.num_classifiers * base.vocab_size * (use.item_bytes + 2 * FLOAT32_BYTES)
    return Line(
        name="workspace of a step",
        where=DEVICE,
        limit=0,
        expected=activations + logits,
        note=f"{counted(use.max_step_tokens, 'token')}, {counted(use.num_classifiers, 'row')} of logits",
    )


def memo_line(adapters: Sequence[AdapterSize], num_placed: int, use: Use) -> Line:
    """Return the stacked copies of adapters that are asked together, as `model/step_memo.py` keeps them: within their
    budget between steps, and one step's copies beside them while it runs. num_placed: how many adapters have a slot.

    A call that one small step computes always needs the same stack. A call that takes several steps is divided in many
    ways, and each has a stack of its own; larger steps keep none. malloc's heap holds more than what is kept then."""
    asked = sorted((one.num_lora for one in adapters), reverse=True)[: min(use.num_classifiers, num_placed)]
    one_stack = sum(asked) * use.item_bytes if len(asked) > 1 else 0
    num_kinds = 1
    if use.call_tokens > min(SMALL_STEP, use.max_step_tokens):
        num_kinds = SPLIT_KINDS if use.max_step_tokens <= SMALL_STEP else LARGE_KINDS
    kept = (num_kinds - 1) * one_stack
    note = f"copies for steps of at most {SMALL_STEP:,} tokens: {size(one_stack)} of one step"
    if use.free_bytes is not None and one_stack:
        budget = int(MEMO_SHARE * use.free_bytes)
        kept = min(kept, budget)
        note += f", and at most {MEMO_MEMORY} of the free memory between steps"
        if one_stack > budget:
            note += f"; they exceed these {size(budget)}, so each step makes them again"
    return Line(name="stacked adapters", where=DEVICE, limit=0, expected=kept + one_stack, note=note)


def overhead_lines(use: Use) -> tuple[Line, ...]:
    found = allowances()
    tokenizer = found.cpu.tokenizer_bytes + round(found.cpu.tokenizer_factor * (use.tokenizer_bytes or 0))
    dtype = "float32" if use.item_bytes == FLOAT32_BYTES else "bfloat16"
    first = 0 if use.is_cuda else found.cpu.first_steps_bytes[dtype]
    process = Line(
        name="process",
        where=HOST,
        limit=0,
        expected=found.cpu.libraries_bytes + tokenizer + first,
        note=f"Python, libraries, tokenizer, threads; {_source(found.cpu.measured, found.cpu.read)}",
    )
    if not use.is_cuda:
        return (process,)
    context = found.cuda.context_bytes
    note = f"CUDA's context; {_source(found.cuda.measured, found.cuda.read)}"
    return process, Line(name="context", where=DEVICE, limit=0, expected=context, note=note)


def _source(measured: bool, read: str) -> str:
    return f"measured {read}" if measured else "assumed, not measured"
