"""Attention of a training pass: conversations by themselves, then questions over the conversation that they share."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from loraplex.errors import UnsupportedModelError
from loraplex.training.batch import Group, Packed
from loraplex.training.kept_kv import KV

ATTENTION, PASS = "loraplex_training", "loraplex_training_pass"

# Arguments of an attention call that change no answer, whatever their value.
_INERT = frozenset(
    "output_attentions output_hidden_states output_router_logits position_ids return_dict use_cache".split()
)


class PrefixDone(Exception):
    """All layers have the conversations' keys and values: nothing more of them is needed."""


@dataclass(slots=True)
class Pass:
    """What runs now, shared by a model's attention layers.

    is_prefix: whether a conversation runs, or the questions of a batch.
    prefix_kv: layer -> the keys and values of the conversation that runs, [heads, length, head_dim] each.
    packed:   the batch.
    kv:       the keys and values of each of its conversations. They need no gradient.
    masks:    window of attention -> the mask of each group; layers share them.
    last_layer: the layer that attends last; None until a pass has shown it.
    """

    is_prefix: bool = False
    prefix_kv: KV = field(default_factory=dict)
    packed: Packed | None = None
    kv: Seq[KV] = ()
    masks: dict[int | None, list[torch.Tensor | None]] = field(default_factory=dict)
    last_layer: int | None = None


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
    s_aux: torch.Tensor | None = None,  # [H]
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, D]
    run, layer = getattr(module, PASS, None), getattr(module, "layer_idx", None)
    if not isinstance(run, Pass) or not isinstance(layer, int):
        raise _untrainable(module, "does not say its layer")
    if attention_mask is not None:
        raise _untrainable(module, "has a mask of its own")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _untrainable(module, "sees later tokens, too")
    for name, given in kwargs.items():
        if name not in _INERT and not (given is None or given is False or (name == "dropout" and given == 0)):
            raise _untrainable(module, f"uses {name!r}")
    q, k, v = query[0], key[0], value[0]
    compute = _of_conversation if run.is_prefix else _of_questions
    attended = compute(run, layer, q, k, v, sliding_window, scaling=scaling, softcap=softcap, sinks=s_aux)
    return attended.transpose(0, 1)[None].contiguous(), None


def _untrainable(module: torch.nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        type(module).__name__, f"its attention {what}, which cannot be trained", remedy="train on another base"
    )


def _of_conversation(
    run: Pass, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, **options: Any
) -> torch.Tensor:
    """A conversation attends to itself, and leaves its keys and values. Raises PrefixDone at the last layer."""
    # A layer that computes queries, keys and values in one product gives views of it, which would keep all of it.
    run.prefix_kv[layer] = k.contiguous(), v.contiguous()
    if layer == run.last_layer:
        raise PrefixDone
    positions = torch.arange(q.shape[1], device=q.device)
    return _attend(q, k, v, None if window is None else _visible(positions, positions, window), **options)


def _of_questions(
    run: Pass, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, **options: Any
) -> torch.Tensor:
    """Each question attends to its conversation and to itself. All questions about a conversation attend in one call,
    so that its keys are not repeated; questions of one length without a conversation are a batch."""
    packed = run.packed
    assert packed is not None
    if window not in run.masks:
        lengths = [0 if one.conversation is None else packed.lengths[one.conversation] for one in packed.groups]
        run.masks[window] = [_mask(one, length, window) for one, length in zip(packed.groups, lengths, strict=True)]
    # One selection for all groups: the gradient of one for each would be as many tensors of the whole batch's size.
    sizes = [len(one.rows) for one in packed.groups]
    parts = [x.index_select(1, packed.group_rows).split(sizes, 1) for x in (q, k, v)]
    attended = []
    for group, mask, queries, keys, values in zip(packed.groups, run.masks[window], *parts, strict=True):
        if group.conversation is not None:
            before = run.kv[group.conversation][layer]
            attended.append(_attend_beyond(before, queries, keys, values, mask, **options))
        else:
            batch = [x.unflatten(1, (group.num_questions, -1)).transpose(0, 1) for x in (queries, keys, values)]
            attended.append(_attend(batch[0], batch[1], batch[2], mask, **options).transpose(0, 1).flatten(1, 2))
    return torch.cat(attended, 1).index_select(1, packed.order)


def _mask(group: Group, length: int, window: int | None) -> torch.Tensor | None:
    """Return which keys each query of a group sees, [Q, length + Q], or [length of a question, the same] where there is
    no conversation; None where they are just causal. length: tokens of the conversation."""
    positions = group.positions
    if group.conversation is None:
        one = positions[: len(positions) // group.num_questions]
        return None if window is None else _visible(one, one, window)
    of_conversation = _visible(positions, torch.arange(length, device=positions.device), window)
    is_same = group.question_of[:, None] == group.question_of[None]
    return torch.cat([of_conversation, _visible(positions, positions, window) & is_same], 1)


def _visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return which keys each query sees, by their positions: [queries, keys]."""
    distance = queries[:, None] - keys[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _attend_beyond(
    before: tuple[torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to a conversation's keys and values, which need no gradient, and to one's own."""
    if softcap is None and sinks is None:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        found: torch.Tensor = _Beyond.apply(q, k, v, *before, mask, scale)  # type: ignore[no-untyped-call]
        return found
    return _attend(q, torch.cat([before[0], k], 1), torch.cat([before[1], v], 1), mask, scaling, softcap, sinks)


class _Beyond(torch.autograd.Function):
    """PyTorch's fused attention, whose own way back would compute the gradients of the conversation's keys and values,
    too. This one leaves them out, and keeps no scores: it computes them again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [H, Q, D]
        k: torch.Tensor,  # [G, Q, D]
        v: torch.Tensor,  # [G, Q, E]
        k_before: torch.Tensor,  # [G, P, D]
        v_before: torch.Tensor,  # [G, P, E]
        mask: torch.Tensor,  # [Q, P + Q]
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, k_before, v_before, mask)
        ctx.scale = scale
        return _attend(q, torch.cat([k_before, k], 1), torch.cat([v_before, v], 1), mask, scale, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, k_before, v_before, mask = ctx.saved_tensors
        num_groups, past = k_before.shape[:2]
        # The heads that share keys are rows of one product: [G, heads of a group * Q, …].
        queries = (q.float() * ctx.scale).reshape(num_groups, -1, q.shape[-1])
        gradient = gradient.float().reshape(num_groups, -1, v.shape[-1])
        keys, values = torch.cat([k_before, k], 1).float(), torch.cat([v_before, v], 1).float()
        hidden = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, -torch.inf)
        scores = (queries @ keys.transpose(1, 2)).unflatten(1, (-1, q.shape[1])).add_(hidden)
        shares = scores.softmax(-1).flatten(1, 2)
        to_scores = gradient @ values.transpose(1, 2)
        to_scores.sub_((to_scores * shares).sum(-1, keepdim=True)).mul_(shares)
        to_q = (to_scores @ keys).mul_(ctx.scale).view(q.shape)
        to_k = to_scores[..., past:].transpose(1, 2) @ queries
        to_v = shares[..., past:].transpose(1, 2) @ gradient
        return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype), None, None, None, None


def _attend(
    q: torch.Tensor,  # [(batch,) H, Q, D]
    k: torch.Tensor,  # [(batch,) G, K, D]
    v: torch.Tensor,  # [(batch,) G, K, E]
    mask: torch.Tensor | None,  # [Q, K]; None: causal
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,  # [H] scores of a key without a value
) -> torch.Tensor:  # [(batch,) H, Q, E]
    times = q.shape[-3] // k.shape[-3]
    if softcap is None and sinks is None:
        parts = (q, k, v) if q.ndim == 4 else (q[None], k[None], v[None])
        found = F.scaled_dot_product_attention(
            *parts, mask, is_causal=mask is None, scale=scaling, enable_gqa=times > 1
        )
        return found if q.ndim == 4 else found[0]
    k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
    scores = (q @ k.transpose(-2, -1)).float() * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : k.shape[-2]].to(v.dtype) @ v


AttentionInterface.register(ATTENTION, _attention)
