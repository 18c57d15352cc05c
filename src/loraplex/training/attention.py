"""Attention of a training pass: conversations by themselves, then questions over the conversation that they share."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from loraplex.errors import UnsupportedModelError
from loraplex.training.batch import Packed

ATTENTION, PASS = "loraplex_training", "loraplex_training_pass"

# Arguments of an attention call that change no answer, whatever their value.
_INERT = frozenset(
    "output_attentions output_hidden_states output_router_logits position_ids return_dict use_cache is_causal".split()
)


@dataclass(slots=True)
class Pass:
    """What runs now, shared by a model's attention layers.

    packed:   the batch. is_prefix: whether its conversations run, or its questions.
    kv:       layer -> keys and values of each conversation, [heads, length, head_dim] each. They need no gradient.
    """

    packed: Packed | None = None
    is_prefix: bool = True
    kv: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, D]
    run, layer = getattr(module, PASS), getattr(module, "layer_idx", None)
    assert isinstance(run, Pass) and run.packed is not None and isinstance(layer, int)
    for name, given in kwargs.items():
        if name not in _INERT and not (given is None or given is False or given == 0):
            raise UnsupportedModelError(
                type(module).__name__,
                f"its attention uses {name!r}, which cannot be trained",
                remedy="use another base",
            )
    q, k, v = query[0], key[0], value[0]
    compute = _of_conversations if run.is_prefix else _of_questions
    attended = compute(run, layer, q, k, v, sliding_window, scaling=scaling, softcap=softcap)
    return attended.transpose(0, 1)[None], None


def _of_conversations(
    run: Pass, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, **options: Any
) -> torch.Tensor:
    """Each conversation attends to itself, and leaves its keys and values."""
    assert run.packed is not None
    lengths = list(run.packed.lengths)
    parts = [x.split(lengths, 1) for x in (q, k, v)]
    run.kv[layer] = list(zip(parts[1], parts[2], strict=True))
    attended = []
    for one, keys, values in zip(*parts, strict=True):
        positions = torch.arange(one.shape[1], device=q.device)
        mask = None if window is None else _visible(positions, positions, window)
        attended.append(
            _attend(one, keys, values, mask, **options) if len(positions) else values.new_empty(len(q), 0, v.shape[-1])
        )
    return torch.cat(attended, 1)


def _of_questions(
    run: Pass, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, **options: Any
) -> torch.Tensor:
    """Each question attends to its conversation and to itself. All questions about a conversation attend in one call,
    so that its keys are not repeated."""
    packed = run.packed
    assert packed is not None
    before = run.kv.get(layer) or [(k[:, :0], v[:, :0])] * len(packed.tokens_of)
    attended = []
    for (keys, values), rows in zip(before, packed.tokens_of, strict=True):
        question, positions = packed.question_of[rows], packed.positions[rows]
        of_conversation = _visible(positions, torch.arange(keys.shape[1], device=q.device), window)
        of_itself = _visible(positions, positions, window) & (question[:, None] == question[None])
        mask = torch.cat([of_conversation, of_itself], 1)
        attended.append(
            _attend(q[:, rows], torch.cat([keys, k[:, rows]], 1), torch.cat([values, v[:, rows]], 1), mask, **options)
        )
    order = torch.cat(packed.tokens_of)
    return torch.cat(attended, 1)[:, order.argsort()]


def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return which keys each query sees, by their positions: [queries, keys]."""
    distance = queries[:, None] - keys[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend(
    q: torch.Tensor,  # [H, Q, D]
    k: torch.Tensor,  # [G, K, D]
    v: torch.Tensor,
    mask: torch.Tensor | None,  # [Q, K]; None: causal
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=mask is None, scale=scaling, enable_gqa=len(q) != len(k)
        )[0]
    times = len(q) // len(k)
    k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
    scores = (q @ k.transpose(1, 2)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v


AttentionInterface.register(ATTENTION, _attention)
