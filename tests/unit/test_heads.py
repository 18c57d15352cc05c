"""Drawing a token follows the distribution that temperature and top_p leave."""

import pytest
import torch

from loraplex.model.heads import draw, read_heads

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


def test_only_the_sequences_that_ask_for_it_draw() -> None:
    logits = LOGITS.repeat(3, 1)
    drawing = torch.tensor([[1.0], [1.0], [1.0], [0.9999]], dtype=torch.float64)
    log_probs, ids, next_log_probs = read_heads(
        logits, torch.tensor([0]), torch.tensor([4]), torch.tensor([0, 1, 2]), drawing
    )
    assert ids == [2, 1, 2]
    expected = LOGITS.log_softmax(-1).tolist()
    assert log_probs == pytest.approx([expected[4]])
    assert next_log_probs == pytest.approx([expected[2], expected[1], expected[2]])
