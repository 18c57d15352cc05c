"""The log probabilities of a prompt's own tokens, as `echo` asks for them."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import chain, repeat

from loraplex.engine.sequence import Sequence, SequenceOutput, Target
from loraplex.generation import LikelyToken, PromptToken
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.verdict import make_sequence
from loraplex.text.prompt import Prompt

WINDOW = 256  # tokens that one sequence scores


def scoring_sequences(prompt: Prompt, version: ClassifierVersion | None, slot: int, num_top: int) -> list[Sequence]:
    """Return the sequences that read the log probability of each token of the prompt but the first.

    Each sequence scores WINDOW tokens, so that a step holds the logits of few positions. Where there are several, their
    K/V is kept: each finds the tokens before its window in blocks. The tokens of its window are computed, because
    blocks hold no logits.
    """
    ids, sequences = prompt.token_ids, []
    for start in range(1, len(ids), WINDOW):
        end = min(start + WINDOW, len(ids))
        part = replace(prompt, token_ids=ids[: end - 1], activation=min(prompt.activation, end - 1))
        targets = tuple(Target(position=i - end, token_id=ids[i]) for i in range(start, end))
        sequence = make_sequence(part, version, slot, keep=False, targets=targets)
        sequence.num_target_top = num_top
        if len(ids) > WINDOW + 1:
            sequence.num_kept = sequence.num_tokens
        sequences.append(sequence)
    return sequences


def scored_tokens(
    prompt: Prompt,
    outputs: Seq[SequenceOutput],
    offsets: Seq[int],
    spell: Callable[[int], tuple[str, bytes | None]],
) -> tuple[PromptToken, ...]:
    """Return the prompt's tokens with what `scoring_sequences` found. offsets: the character at which each begins."""
    log_probs = chain([None], *(output.log_probs for output in outputs))
    tops = chain([()], *(output.tops or repeat((), len(output.log_probs)) for output in outputs))

    def likely(token_id: int, log_prob: float) -> LikelyToken:
        text, utf8 = spell(token_id)
        return LikelyToken(id=token_id, text=text, utf8=utf8, log_prob=log_prob)

    return tuple(
        PromptToken(id=id, text=spell(id)[0], log_prob=log_prob, offset=offset, top=tuple(likely(*one) for one in top))
        for id, log_prob, offset, top in zip(prompt.token_ids, log_probs, offsets, tops, strict=True)
    )
