"""Which token is next by temperature, top_p, biases and what is allowed; log probabilities are the model's own."""

from typing import Any

import pytest
import torch

from loraplex.model.heads import Heads, draw, read_heads

LOGITS = torch.tensor([2.0, -1.0, 3.0, 0.5, 1.0])


def drawn(temperature: float, top_p: float, numbers: torch.Tensor) -> torch.Tensor:
    n = len(numbers)
    return draw(LOGITS.repeat(n, 1), torch.full((n,), temperature), torch.full((n,), top_p), numbers)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_equally_spaced_numbers_draw_each_token_by_its_probability(temperature: float, top_p: float) -> None:
    probs = (LOGITS / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    size = int((probs[order].cumsum(0) < top_p - 1e-6).sum()) + 1  # the smallest set that reaches top_p
    expected = torch.zeros(len(LOGITS)).index_copy(0, order[:size], probs[order[:size]])
    counts = drawn(temperature, top_p, (torch.arange(10_000) + 0.5) / 10_000).bincount(minlength=len(LOGITS))
    torch.testing.assert_close(counts / 10_000, expected / expected.sum(), atol=2e-4, rtol=0)


def test_the_largest_number_draws_a_token_that_counts() -> None:
    assert drawn(1.0, 0.5, torch.tensor([1.0 - 2**-24])).item() == 2
    assert drawn(1e-30, 1.0, torch.tensor([0.999])).item() == 2


@pytest.mark.parametrize("number", [0.0, 0.9999])
def test_numbers_that_only_a_double_holds_are_as_the_smallest_and_the_largest(number: float) -> None:
    def read_one(temperature: float, top_p: float) -> int:
        drawing = torch.tensor([[0.0], [temperature], [top_p], [number]], dtype=torch.float64)
        allowed = torch.tensor([[0, 0], [1, 4]])  # likelier: token 4
        return read(1, drawing=drawing, allowed=allowed).next_ids[0]

    assert read_one(1.0, 1e-300) == read_one(1e-300, 1.0) == 4
    assert {read_one(1e300, 1.0)} < {1, 4}


def test_only_the_sequences_that_ask_for_it_draw() -> None:
    logits = LOGITS.repeat(3, 1)
    drawing = torch.tensor([[1.0], [1.0], [1.0], [0.9999]], dtype=torch.float64)
    heads = read_heads(logits, torch.tensor([0]), torch.tensor([4]), torch.tensor([0, 1, 2]), drawing=drawing)
    assert heads.next_ids == [2, 1, 2]
    expected = LOGITS.log_softmax(-1).tolist()
    assert heads.target_log_probs == pytest.approx([expected[4]])
    assert heads.next_log_probs == pytest.approx([expected[2], expected[1], expected[2]])


NOTHING = torch.tensor([], dtype=torch.long)


def read(num_rows: int, **asked: Any) -> Heads:
    """Rows that differ by their order: row i is rolled by i."""
    logits = torch.stack([LOGITS.roll(i) for i in range(num_rows)])
    return read_heads(logits, NOTHING, NOTHING, torch.arange(num_rows), **asked)


def test_the_likeliest_come_in_order_for_those_who_ask() -> None:
    heads = read(3, top=torch.tensor([0, 2]), num_top=2)
    assert heads.top_ids == [[2, 0], [4, 2]]
    expected = LOGITS.log_softmax(-1)
    for found in heads.top_log_probs:
        assert found == pytest.approx([expected[2].item(), expected[0].item()])
    assert read(1, top=torch.tensor([0]), num_top=20).top_ids == [[2, 0, 4, 3, 1]]
    assert read(3).top_ids == [] and read(3).top_log_probs == []


def test_targets_have_their_likeliest_tokens_behind_the_sequences() -> None:
    logits = torch.stack([LOGITS.roll(i) for i in range(3)])
    rows, ids = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 4])
    heads = read_heads(
        logits, rows, ids, torch.tensor([2]), top=torch.tensor([0]), target_top=torch.tensor([1]), num_top=2
    )
    assert heads.top_ids == [[4, 2], [3, 1]]
    assert heads.top_log_probs[0][0] == heads.target_log_probs[2]  # to the last bit


def test_only_what_is_allowed_is_chosen_and_its_log_probability_is_the_models() -> None:
    allowed = torch.tensor([[0, 0, 2], [1, 3, 0]])  # sequence 0: tokens 1 and 3; sequence 2: token 0
    heads = read(3, allowed=allowed, top=torch.tensor([0]), num_top=1)
    assert heads.next_ids == [3, 3, 0]
    expected = LOGITS.log_softmax(-1).tolist()
    assert heads.next_log_probs == pytest.approx([expected[3], expected[2], expected[3]])
    assert heads.top_ids == [[2]]


def test_what_is_not_allowed_is_not_drawn_either() -> None:
    allowed = torch.tensor([[0, 0], [1, 3]])
    for number, token_id in ((0.0, 3), (0.9999, 1)):
        drawing = torch.tensor([[0.0], [1.0], [1.0], [number]], dtype=torch.float64)
        assert read(1, allowed=allowed, drawing=drawing).next_ids == [token_id]


def test_a_bias_changes_the_choice_and_no_log_probability() -> None:
    biases = torch.tensor([[0.0, 1.0], [1.0, 3.0], [4.5, -100.0]], dtype=torch.float64)
    heads = read(3, biases=biases)
    assert heads.next_ids == [1, 1, 4]
    expected = LOGITS.log_softmax(-1).tolist()
    assert heads.next_log_probs == pytest.approx([expected[1], expected[0], expected[2]])
