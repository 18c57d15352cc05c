"""How much a call took: tokens and milliseconds."""

import time
from collections.abc import Sequence as Seq

from loraplex.engine.sequence import SequenceOutput
from loraplex.service.questions import QuestionEvaluation
from loraplex.service.verdict import Evaluation
from loraplex.types import Timings, Usage

AnyEvaluation = Evaluation | QuestionEvaluation


def usage_of(evaluations: Seq[AnyEvaluation]) -> Usage:
    num_prompt = sum(evaluation.num_prompt_tokens for evaluation in evaluations)
    num_computed = sum(one.num_computed_tokens for evaluation in evaluations for one in evaluation.sequences)
    of_questions = sum(one.num_prompt_tokens for one in evaluations if isinstance(one, QuestionEvaluation))
    return Usage(
        prompt_tokens=num_prompt,
        computed_tokens=num_computed,
        cached_tokens=max(0, num_prompt - num_computed),
        question_tokens=of_questions or None,
    )


def timings_of(started: float, tokenized: float, outputs: Seq[SequenceOutput]) -> Timings:
    return Timings(
        tokenize_ms=(tokenized - started) * 1000,
        queue_ms=max((output.queued_s for output in outputs), default=0.0) * 1000,
        compute_ms=max((output.computed_s for output in outputs), default=0.0) * 1000,
        total_ms=(time.monotonic() - started) * 1000,
    )
