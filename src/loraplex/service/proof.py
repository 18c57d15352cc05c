"""Proves a version before it goes live: its golden examples come out right, and it changes the base's answers."""

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Seq

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.sequence import Outcome, Sequence, SequenceOutput, Target
from loraplex.errors import AdapterError, BadInputError, ContractError, InputTooLongError, LoraplexError
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.verdict import Evaluation, make_sequence, render
from loraplex.text.tokenizer import Conversations
from loraplex.types import ClassifyRequest

PROBE_TEXT = "Customer: hello, is it done?"

Compute = Callable[[Seq[Sequence]], Awaitable[Seq[Outcome]]]


async def prove(version: ClassifierVersion, slot: int, base: Base, compute: Compute) -> None:
    """Prove the version in `slot`. Raises ContractError or AdapterError, which say what failed. Other errors come from
    the engine and say nothing about the adapter."""
    await _check_golden(version, slot, base, compute)
    if not version.changes_layers or version.has_score:
        return
    if not await _changes_answers(version, slot, base, compute):
        raise AdapterError(
            version.source.path,
            "changes nothing: on a test prompt its answers are exactly the base's",
            remedy="check that it was trained, and with this base",
        )


def activated(version: ClassifierVersion, text: str) -> str:
    """Return `text` with the invocation tokens appended where no template has them, so that the adapter acts on it."""
    if version.template is not None or version.invocation_tokens is None:
        return text
    return text + version.tokenizer.decode(*version.invocation_tokens)


async def _check_golden(version: ClassifierVersion, slot: int, base: Base, compute: Compute) -> None:
    contract = version.source.contract
    for golden in contract.golden if contract is not None else ():
        key = f"{version.source.contract_path}, key 'golden'"
        evaluation = Evaluation(name=version.source.name, version=version, slot=slot)
        request = ClassifyRequest(input=golden.text)
        await asyncio.to_thread(evaluation.tokenize, request, base, Conversations())
        evaluation.take(await compute(evaluation.sequences))
        verdict = evaluation.verdict()
        if evaluation.error is not None:
            if not isinstance(evaluation.error, BadInputError | InputTooLongError):
                raise evaluation.error
            raise ContractError(key, f"{golden.text!r}: {evaluation.error.message}", remedy=evaluation.error.remedy)
        if verdict.label != golden.label:
            raise ContractError(
                key,
                f"{golden.text!r} is answered {verdict.label!r}, not {golden.label!r}",
                remedy="correct the example, or the adapter is not the one that the contract is for",
            )


async def _changes_answers(version: ClassifierVersion, slot: int, base: Base, compute: Compute) -> bool:
    targets = tuple(Target(position=-1, token_id=i) for i in range(16))
    text = activated(version, PROBE_TEXT)
    try:
        prompt = await asyncio.to_thread(render, version, text, base, Conversations())
    except LoraplexError:
        return True  # the adapter takes no such prompt, so nothing can be shown
    sequences = [
        make_sequence(prompt, one, at, keep=False, targets=targets) for one, at in ((version, slot), (None, NO_ADAPTER))
    ]
    answers = await compute(sequences)
    for answer in answers:
        if isinstance(answer, LoraplexError):
            raise answer
    ours, bases = ([*one.log_probs, one.tokens[0].log_prob] for one in answers if isinstance(one, SequenceOutput))
    return any(abs(one - other) > 1e-6 for one, other in zip(ours, bases, strict=True))
