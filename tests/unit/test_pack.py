"""How a step is packed."""

import pytest
import torch

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.pack import pack
from loraplex.engine.sequence import EngineRequest, Sequence
from loraplex.engine.step import Step
from loraplex.ops.staging import Staging

CPU = torch.device("cpu")


def packed(*lengths: tuple[int, int], recurs_up_to: int = 0) -> tuple[list[tuple[int, int]], list[int]]:
    """(slot, tokens) of the segments of a step with a sequence for each (slot, tokens), and the packed ids, which count
    up from 100 * the place of their sequence."""
    sequences = [
        Sequence(token_ids=tuple(range(100 * i, 100 * i + n)), slot=slot) for i, (slot, n) in enumerate(lengths)
    ]
    for sequence in sequences:
        EngineRequest([sequence])
    batch = pack(Step.of(sequences), Staging(CPU), recurs_up_to=recurs_up_to)
    inputs = batch.inputs
    assert inputs.input_ids.shape == inputs.position_ids.shape == (inputs.segments.num_tokens,)
    for span in inputs.layout.spans:
        assert inputs.position_ids[span.start : span.end].tolist() == list(range(span.end - span.start))
    assert [row.item() + 1 for row in inputs.logit_rows] == [span.end for span in inputs.layout.spans]
    assert sum(inputs.last_segments.lengths) == len(inputs.logit_rows) == len(sequences)
    segments = [(slot, end - start) for slot, start, end in inputs.segments.all]
    return segments, inputs.input_ids.tolist()


def test_segments_of_nearly_one_length_are_made_of_one_length() -> None:
    segments, ids = packed((1, 33), (2, 31), (3, 32), (4, 20), (5, 33))
    assert segments == [(4, 20), (2, 33), (3, 33), (1, 33), (5, 33)]
    assert ids[20:53] == [*range(100, 131), 0, 0]


def test_little_is_filled() -> None:
    segments, _ = packed(*((slot, 10 + 3 * slot) for slot in range(1, 9)))
    assert sum(length for _, length in segments) <= 17 / 16 * sum(10 + 3 * slot for slot in range(1, 9))
    assert [slot for slot, _ in segments] == list(range(1, 9))


def test_the_base_comes_first_and_is_not_filled() -> None:
    assert packed((3, 10), (NO_ADAPTER, 9))[0] == [(NO_ADAPTER, 9), (3, 10)]


@pytest.mark.parametrize(
    ("lengths", "same"),
    [([1, 3, 4], 4), ([9, 12], 12), ([61, 64], 64), ([65, 72], 72), ([113, 120], 120), ([961, 1024], 1024)],
)
def test_where_steps_are_to_recur_lengths_are_few(lengths: list[int], same: int) -> None:
    for length in lengths:
        assert packed((2, length), (NO_ADAPTER, length), recurs_up_to=2 * same)[0] == [
            (NO_ADAPTER, same),
            (2, same),
        ]
        assert packed((2, length), (NO_ADAPTER, length), recurs_up_to=2 * same - 1)[0] == [
            (NO_ADAPTER, length),
            (2, length),
        ]


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_several_sequences_of_an_adapter_are_one_segment(num_sequences: int) -> None:
    segments, _ = packed(*[(1, 40)] * num_sequences, (2, 38 * num_sequences))
    assert segments == [(2, 40 * num_sequences), (1, 40 * num_sequences)]
