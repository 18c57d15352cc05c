"""Logits of the wanted rows -> log probabilities of the targets and the next token of each sequence.

Shapes: L rows, N targets, S sequences, D of which draw their token.
"""

import torch


def read_heads(
    logits: torch.Tensor,  # [L, vocab]
    target_rows: torch.Tensor,  # [N] indices into the rows
    target_ids: torch.Tensor,  # [N] token ids
    last_rows: torch.Tensor,  # [S] indices into the rows
    drawing: torch.Tensor | None = None,  # [4, D] float64: index into last_rows, temperature, top_p, number in [0, 1)
) -> tuple[list[float], list[int], list[float]]:
    """N target log probabilities, S next token ids and their S log probabilities, over the whole vocabulary, in fp32.
    The likeliest token is next, but for the sequences that draw it."""
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)  # [L]
    target_log_probs = logits[target_rows, target_ids] - normalizer[target_rows]
    next_logits, next_ids = logits[last_rows].max(dim=-1)
    if drawing is not None:
        which = drawing[0].long()
        rows = last_rows[which]
        ids = draw(logits[rows], *drawing[1:].float())
        next_ids[which], next_logits[which] = ids, logits[rows, ids]
    next_log_probs = next_logits - normalizer[last_rows]
    return target_log_probs.tolist(), next_ids.tolist(), next_log_probs.tolist()


def draw(
    logits: torch.Tensor,  # [D, vocab] float32
    temperature: torch.Tensor,  # [D] above 0
    top_p: torch.Tensor,  # [D] above 0, at most 1
    number: torch.Tensor,  # [D] in [0, 1)
) -> torch.Tensor:  # [D] token ids
    """The token at which the cumulative distribution, likeliest first, passes `number`; only the smallest set of
    likeliest tokens that reaches `top_p` counts."""
    probs, ids = (logits / temperature[:, None]).softmax(dim=-1).sort(dim=-1, descending=True)
    cumulative = probs.cumsum(dim=-1)
    probs = probs.where(cumulative - probs < top_p[:, None], 0.0)
    cumulative = probs.cumsum(dim=-1)
    place = (cumulative <= number[:, None] * cumulative[:, -1:]).sum(dim=-1)
    last = (probs > 0).sum(dim=-1) - 1  # rounding must not lead past the last one that counts
    return ids.gather(-1, place.minimum(last)[:, None])[:, 0]
