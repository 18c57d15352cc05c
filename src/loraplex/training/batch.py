"""What one training pass holds: conversations, and the questions that adapters are trained to answer about them."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A token that should follow. position: of the question's token before it. weight: its share of the loss."""

    position: int
    token_id: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one adapter reads and should answer.

    adapter:    its index.
    token_ids:  the tokens behind the conversation's, which this adapter changes; under a plain adapter, all tokens.
    """

    adapter: int
    token_ids: tuple[int, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Tokens that the base alone computes, once, and the questions about them. Under plain adapters no token is the
    base's alone: `token_ids` is empty."""

    token_ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Questions whose tokens attend in one call.

    rows:          [Q] where their tokens are in `Packed.input_ids`.
    conversation:  index of the conversation that they share; None where they have none. They are of one length then.
    question_of:   [Q] a number for each question, the same for all its tokens.
    positions:     [Q] of their tokens.
    num_questions: how many they are.
    """

    rows: torch.Tensor
    conversation: int | None
    question_of: torch.Tensor
    positions: torch.Tensor
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The questions about some conversations as tensors, in one row.

    lengths:        tokens of each conversation.
    input_ids:      [T] tokens of the questions, in the order of their adapters.
    counts:         [num_adapters] tokens of each.
    rows:           [num_adapters, most tokens of an adapter] where each adapter's tokens are in `input_ids`; T stands
                    for none.
    groups:         what attends together. Each token is in one of them.
    group_rows:     [T] the rows of all groups, one after the other.
    order:          [T] where each token is in `group_rows`.
    answer_rows, answer_ids, weights, adapter_of: [num_answers] the answers: row in `input_ids` after which the token
                    should follow, the token, its weight, and the adapter.
    answer_order:   [num_answers] the answer's place among all answers as the conversations list them.
    """

    lengths: tuple[int, ...]
    input_ids: torch.Tensor
    positions: torch.Tensor
    counts: tuple[int, ...]
    rows: torch.Tensor
    groups: tuple[Group, ...]
    group_rows: torch.Tensor
    order: torch.Tensor
    answer_rows: torch.Tensor
    answer_ids: torch.Tensor
    weights: torch.Tensor
    adapter_of: torch.Tensor
    answer_order: torch.Tensor


@dataclass(slots=True)
class _Rows:
    """Collects the tokens of all questions."""

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    question_of: list[int] = field(default_factory=list)
    # conversation, and the questions' length where there is no conversation -> where each question begins and ends
    groups: dict[tuple[int | None, int], list[tuple[int, int]]] = field(default_factory=dict)


def pack(conversations: Seq[Conversation], num_adapters: int, device: torch.device) -> Packed:
    """Return the conversations as tensors on the device. Those without a question are left out."""
    kept = [one for one in conversations if one.questions]
    found = _Rows()
    answers: list[tuple[int, int, float, int, int]] = []
    by_adapter: list[list[int]] = [[] for _ in range(num_adapters)]
    asked = [(question, index) for index, one in enumerate(kept) for question in one.questions]
    first_answer = list(accumulate((len(question.answers) for question, _ in asked), initial=0))
    order = sorted(range(len(asked)), key=lambda number: asked[number][0].adapter)
    for number in order:
        question, index = asked[number]
        start, past = len(found.input_ids), len(kept[index].token_ids)
        count = len(question.token_ids)
        by_adapter[question.adapter] += range(start, start + count)
        found.input_ids += question.token_ids
        found.positions += range(past, past + count)
        found.question_of += [number] * count
        found.groups.setdefault((index, 0) if past else (None, count), []).append((start, start + count))
        answers += [
            (start + one.position, one.token_id, one.weight, question.adapter, first_answer[number] + place)
            for place, one in enumerate(question.answers)
        ]

    def tensor(values: Seq[int | float], dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    longest, total = max(map(len, by_adapter)), len(found.input_ids)
    groups = []
    for (conversation, _), spans in found.groups.items():
        rows = [row for start, end in spans for row in range(start, end)]
        groups.append(
            Group(
                rows=tensor(rows),
                conversation=conversation,
                question_of=tensor([found.question_of[row] for row in rows]),
                positions=tensor([found.positions[row] for row in rows]),
                num_questions=len(spans),
            )
        )
    group_rows = torch.cat([one.rows for one in groups])
    return Packed(
        lengths=tuple(len(one.token_ids) for one in kept),
        input_ids=tensor(found.input_ids),
        positions=tensor(found.positions),
        counts=tuple(map(len, by_adapter)),
        rows=tensor([row for rows in by_adapter for row in (*rows, *[total] * (longest - len(rows)))]).view(
            -1, longest
        ),
        groups=tuple(groups),
        group_rows=group_rows,
        order=group_rows.argsort(),
        answer_rows=tensor([row for row, _, _, _, _ in answers]),
        answer_ids=tensor([token for _, token, _, _, _ in answers]),
        weights=tensor([weight for _, _, weight, _, _ in answers], torch.float32),
        adapter_of=tensor([adapter for _, _, _, adapter, _ in answers]),
        answer_order=tensor([place for _, _, _, _, place in answers]),
    )
