"""Turns the logits of the wanted rows into the targets' log probabilities and the next token of each sequence.

Shapes: L rows, N targets, S sequences; D sequences draw their token; W sequences and V targets also want the likeliest
tokens.
"""

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """Log probabilities (natural logarithm) over the whole vocabulary, from the unchanged logits. top: likeliest
    first, for the sequences, then for the targets."""

    target_log_probs: list[float]  # [N]
    next_ids: list[int]  # [S]
    next_log_probs: list[float]  # [S]
    top_ids: list[list[int]]  # [W + V][num_top]
    top_log_probs: list[list[float]]  # [W + V][num_top]


def read_heads(
    logits: torch.Tensor,  # [L, vocab]
    target_rows: torch.Tensor,  # [N] indices into the rows
    target_ids: torch.Tensor,  # [N] token ids
    last_rows: torch.Tensor,  # [S] indices into the rows
    *,
    drawing: torch.Tensor | None = None,  # [4, D] float64: index into last_rows, temperature, top_p, number in [0, 1)
    biases: torch.Tensor | None = None,  # [3, B] float64: index into last_rows, token id, number added to its logit
    allowed: torch.Tensor | None = None,  # [2, A]: index into last_rows, token id; these rows choose no other token
    top: torch.Tensor | None = None,  # [W] indices into last_rows
    target_top: torch.Tensor | None = None,  # [V] indices into target_rows
    num_top: int = 0,
) -> Heads:
    """Return the log probabilities and next tokens, computed in float32. Waits for the device.

    The next token is the likeliest of the allowed tokens after the biases. Sequences in `drawing` draw it instead.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)  # [L]
    target_log_probs = logits[target_rows, target_ids] - normalizer[target_rows]
    chosen_from = logits[last_rows]  # [S, vocab], a copy
    if biases is not None:
        index = (biases[0].long(), biases[1].long())
        chosen_from.index_put_(index, biases[2].float(), accumulate=True)
    if allowed is not None:
        kept = chosen_from[allowed[0], allowed[1]]
        chosen_from[allowed[0]] = -torch.inf
        chosen_from[allowed[0], allowed[1]] = kept
    next_ids = chosen_from.argmax(dim=-1)
    if drawing is not None:
        which = drawing[0].long()
        next_ids[which] = draw(chosen_from[which], *drawing[1:].float())
    next_log_probs = logits[last_rows, next_ids] - normalizer[last_rows]
    top_ids: list[list[int]] = []
    top_log_probs: list[list[float]] = []
    if top is not None:
        rows = last_rows[top]
        if target_top is not None:
            rows = torch.cat((rows, target_rows[target_top]))
        values, ids = logits[rows].topk(min(num_top, logits.shape[-1]), dim=-1)
        top_ids, top_log_probs = ids.tolist(), (values - normalizer[rows, None]).tolist()
    return Heads(target_log_probs.tolist(), next_ids.tolist(), next_log_probs.tolist(), top_ids, top_log_probs)


def draw(
    logits: torch.Tensor,  # [D, vocab] float32
    temperature: torch.Tensor,  # [D] above 0
    top_p: torch.Tensor,  # [D] above 0, at most 1
    number: torch.Tensor,  # [D] in [0, 1)
) -> torch.Tensor:  # [D] token ids
    """Return the token at which the cumulative distribution, likeliest first, passes `number`. Only the smallest set of
    likeliest tokens whose probabilities reach `top_p` counts."""
    temperature = temperature.clamp(1e-30, 1e30)  # a float64 may have become 0 or infinite in float32
    probs, ids = (logits / temperature[:, None]).softmax(dim=-1).sort(dim=-1, descending=True)
    cumulative = probs.cumsum(dim=-1)
    top_p = top_p.clamp(min=torch.finfo(top_p.dtype).tiny)
    probs = probs.where(cumulative - probs < top_p[:, None], 0.0)
    cumulative = probs.cumsum(dim=-1)
    place = (cumulative <= number[:, None] * cumulative[:, -1:]).sum(dim=-1)
    last = (probs > 0).sum(dim=-1) - 1  # rounding must not lead past the last token that counts
    return ids.gather(-1, place.minimum(last)[:, None])[:, 0]
