"""Turns the logits of the wanted rows into an outcome for each sequence."""

import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import islice
from typing import Any

import torch

from loraplex.engine.sequence import NEXT_TOKEN, Outcome, Sequence, SequenceOutput, Token
from loraplex.errors import EngineError
from loraplex.model.heads import read_heads


def read_outcomes(
    sequences: Seq[Sequence],
    logits: torch.Tensor,  # [L, vocab]
    target_rows: torch.Tensor,  # [N] indices into the rows, sequence by sequence
    target_ids: torch.Tensor,  # [N]
    last_rows: torch.Tensor,  # [S] indices into the rows
    scored: Mapping[Sequence, tuple[float, ...]],
) -> list[tuple[Sequence, Outcome]]:
    """Return the outcome of each sequence: its targets' log probabilities and its next token. Waits for the device.

    scored: label log probabilities of the sequences that a score head answers. A sequence with NaN or infinite log
    probabilities gets an EngineError as its outcome.
    """
    heads = read_heads(logits, target_rows, target_ids, last_rows, **_sampling(sequences, logits))
    ended = time.monotonic()
    outcomes: list[tuple[Sequence, Outcome]] = []
    remaining = iter(heads.target_log_probs)
    tops = (tuple(zip(*one, strict=True)) for one in zip(heads.top_ids, heads.top_log_probs, strict=True))
    of_tokens = [next(tops)[: one.sampling.num_top] if one.sampling.num_top else () for one in sequences]
    chosen = map(Token, heads.next_ids, heads.next_log_probs, of_tokens)
    for sequence, token in zip(sequences, chosen, strict=True):
        num_tops = len(sequence.targets) if sequence.num_target_top else 0
        assert sequence.started_s is not None
        output = SequenceOutput(
            log_probs=scored.get(sequence) or tuple(islice(remaining, len(sequence.targets))),
            tokens=(*sequence.tokens, token),
            tops=tuple(one[: sequence.num_target_top] for one in islice(tops, num_tops)),
            queued_s=sequence.started_s - sequence.arrived_s,
            computed_s=ended - sequence.started_s,
        )
        outcomes.append((sequence, checked(output)))
    return outcomes


def checked(output: SequenceOutput) -> Outcome:
    """Return the output, or an EngineError where one of its log probabilities is NaN or infinite."""
    if math.isfinite(output.tokens[-1].log_prob) and all(map(math.isfinite, output.log_probs)):
        return output
    return EngineError(
        "the model's output is NaN or infinite",
        remedy="check the weights of the base and the adapter, or compute in --dtype float32",
    )


def _sampling(sequences: Seq[Sequence], logits: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of `read_heads` that say how tokens are chosen. Options that no sequence uses are left
    out."""
    device, vocab_size = logits.device, logits.shape[-1]
    asked = [(i, one.sampling, one) for i, one in enumerate(sequences) if one.sampling is not NEXT_TOKEN]
    biases = [(i, token_id, bias) for i, one, _ in asked for token_id, bias in one.biases]
    for i, one, sequence in asked:
        if len(sequence.tokens) < one.min_tokens:
            biases += [(i, token_id, -math.inf) for token_id in one.stop_ids if 0 <= token_id < vocab_size]
    drawing = [(i, one.temperature, one.top_p, sequence.draw()) for i, one, sequence in asked if one.temperature > 0]
    allowed = [(i, token_id) for i, one, _ in asked for token_id in one.allowed_ids]
    top = [i for i, one, _ in asked if one.num_top]
    target_top, num_targets = list[int](), 0
    for sequence in sequences:
        end = num_targets + len(sequence.targets)
        target_top += range(num_targets, end) if sequence.num_target_top else ()
        num_targets = end
    told: dict[str, Any] = {}
    if drawing:
        told["drawing"] = torch.tensor(drawing, dtype=torch.float64).T.to(device)
    if biases:
        told["biases"] = torch.tensor(biases, dtype=torch.float64).T.to(device)
    if allowed:
        told["allowed"] = torch.tensor(allowed).T.to(device)
    if top or target_top:
        told["top"] = torch.tensor(top, dtype=torch.long, device=device)
        told["target_top"] = torch.tensor(target_top, dtype=torch.long, device=device)
        told["num_top"] = max(max(one.sampling.num_top, one.num_target_top) for one in sequences)
    return told
