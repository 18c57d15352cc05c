"""Runs steps on the model. One packed step is one forward pass."""

import math
import time
from collections.abc import Sequence as Seq
from itertools import islice

import torch

from loraplex.engine.outcomes import read_outcomes
from loraplex.engine.pack import Batch, pack
from loraplex.engine.sequence import Outcome, Sequence, Target, lone_sequence
from loraplex.engine.step import Step
from loraplex.errors import LoraplexError, UnsupportedModelError
from loraplex.model.model import Model
from loraplex.ops.staging import Staging


class ModelRunner:
    """Runs steps on a Model. All methods are called on one thread at a time."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._staging = Staging(model.device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        """Run one forward pass and return the outcomes. A sequence of which only a chunk ran has none yet."""
        started = time.monotonic()
        batch = pack(step, self._staging, recurs_up_to=self.model.max_captured_tokens)
        for placed in step.placed:
            if placed.sequence.started_s is None:
                placed.sequence.started_s = started
        output = self.model.forward(batch.inputs)
        if not batch.sequences:  # only chunks ran, and nothing that is read below waits for the device
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            return []
        return read_outcomes(
            batch.sequences,
            output.logits,
            batch.target_rows,
            batch.target_ids,
            batch.last_row_ids,
            self._scored(batch, output.hidden),
        )

    def _scored(self, batch: Batch, hidden: torch.Tensor) -> dict[Sequence, tuple[float, ...]]:
        """Return the label log probabilities of the sequences that a score head answers."""
        rows = {
            sequence: row
            for sequence, row in zip(batch.sequences, batch.last_rows, strict=True)
            if sequence.slot in self.model.scores
        }
        if not rows:
            return {}
        log_probs = [self.model.scores.score(sequence.slot, hidden[row]) for sequence, row in rows.items()]
        values = iter(torch.cat(log_probs).tolist())  # waits for the device once
        return {sequence: tuple(islice(values, len(found))) for sequence, found in zip(rows, log_probs, strict=True)}

    def verify_packing(self) -> None:
        """Check that packed texts do not affect each other.

        Raises UnsupportedModelError where a layer mixes packed texts outside our attention (a convolution, a
        recurrence, a global state). A packed text must get the log probabilities that it gets alone, within rounding.
        They must be identical to the last bit beside any other text of the same length, except in a mixture of experts.
        """
        text, one, other = (self._tokens(start, length) for start, length in ((1, 24), (5, 17), (9, 17)))
        alone, beside_one, beside_other = (
            self._log_probs(text),
            self._log_probs(text, one),
            self._log_probs(text, other),
        )
        difference = max(_distance(alone, beside_one), _distance(alone, beside_other))
        is_same = self.model.has_experts or beside_one == beside_other
        # Other shapes round differently. In bfloat16 a logit near 30 is a multiple of 1/8.
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.25
        if not difference <= tolerance or not is_same:
            raise UnsupportedModelError(
                type(self.model).__name__,
                f"a text's log probabilities differ by {difference:.2g} when it is packed with another"
                if is_same
                else "a text's log probabilities depend on the text that it is packed with",
                remedy="serve another base: some layer of this one looks across packed texts",
            )

    def _tokens(self, start: int, length: int) -> list[int]:
        return [(start + 7 * i) % self.model.vocab_size for i in range(length)]

    def _log_probs(self, text: Seq[int], *others: Seq[int]) -> list[float]:
        """Return the log probability of one token after each of the text's last eight, with the text packed before
        the others."""
        targets = [Target(position=-1 - i, token_id=(3 + i) % self.model.vocab_size) for i in range(8)]
        first = lone_sequence(text, *targets)
        outcomes = dict(self.run(Step.of([first, *map(lone_sequence, others)])))
        outcome = outcomes[first]
        if isinstance(outcome, LoraplexError):
            raise UnsupportedModelError(type(self.model).__name__, outcome.message, remedy=outcome.remedy)
        return list(outcome.log_probs)


def _distance(some: Seq[float], others: Seq[float]) -> float:
    """Return the root mean square of the differences."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(some, others, strict=True)) / len(some))
