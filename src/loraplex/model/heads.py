"""Logits of the wanted rows -> log probabilities of the targets and the top token of each sequence.

Shapes: L rows, N targets, S sequences.
"""

import torch


def read_heads(
    logits: torch.Tensor,  # [L, vocab]
    target_rows: torch.Tensor,  # [N] indices into the rows
    target_ids: torch.Tensor,  # [N] token ids
    last_rows: torch.Tensor,  # [S] indices into the rows
) -> tuple[list[float], list[int], list[float]]:
    """N target log probabilities, S top token ids and their S log probabilities, over the whole vocabulary, in fp32."""
    logits = logits.float()
    normalizer = logits.logsumexp(dim=-1)  # [L]
    target_log_probs = logits[target_rows, target_ids] - normalizer[target_rows]
    top_logits, top_ids = logits[last_rows].max(dim=-1)
    top_log_probs = top_logits - normalizer[last_rows]
    return target_log_probs.tolist(), top_ids.tolist(), top_log_probs.tolist()
