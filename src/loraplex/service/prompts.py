"""Prompts and tokens without an answer: what a classifier is asked, and the tokens of a text."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq

from loraplex.classifier import valid_unicode
from loraplex.engine.sequence import Sequence
from loraplex.generation import GenerateRequest
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.completion import Completion
from loraplex.service.computing import Computing, num_chars
from loraplex.service.questions import QuestionEvaluation
from loraplex.service.verdict import render
from loraplex.service.versions import Versions
from loraplex.text.tokenizer import Conversations
from loraplex.types import ClassifyRequest


class Prompts:
    """Makes prompts and tokens as requests do, under the versions that answer."""

    def __init__(self, base: Base, versions: Versions[ClassifierVersion], computing: Computing) -> None:
        self._base, self._versions, self._computing = base, versions, computing

    async def show(self, names: Seq[str], request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Return (name, prompt, token ids) for each of `names`, and for each question of the request in each order
        of its labels, without computing an answer."""
        conversations = Conversations()
        shown = []
        for name in names:
            lease = await self._versions.lease(name)
            try:
                given = (request.input, self._base, conversations, request.roles)
                prompt = await asyncio.to_thread(render, lease.version, *given)
            finally:
                lease.release()
            shown.append((name, prompt.text, prompt.token_ids))
        for name, question in request.questions.items():
            asked = QuestionEvaluation(name=name, question=question)
            await asyncio.to_thread(asked.tokenize, request, self._base, conversations)
            if asked.error is not None:
                raise asked.error
            shown += [(name, prompt.text, prompt.token_ids) for prompt in asked.prompts]
        return tuple(shown)

    async def tokenize(self, request: GenerateRequest) -> tuple[Seq[int], list[str]]:
        """Return the tokens of a text, or those of the prompt that `generate` makes of messages, and how the vocabulary
        writes them. Raises the errors of `generate`; a text may be of any length and even empty."""
        found: list[tuple[Seq[int], list[str]]] = []

        def tokenize(version: ClassifierVersion | None) -> None:
            text, tokenizer = request.prompt, self._base.chat_of(version).tokenizer
            if isinstance(text, str):
                adds = request.add_special_tokens is not False
                ids: Seq[int] = tokenizer.encode(valid_unicode(text), add_special_tokens=adds)
            else:
                ids = Completion(request, self._base).make_prompt(version).token_ids
            found.append((ids, tokenizer.pieces(ids)))

        await self._in_tokenizer_thread(tokenize, request.adapter, num_chars(request.prompt))
        return found[0]

    async def detokenize(self, token_ids: Seq[int], adapter: str | None = None) -> str:
        """Return the text of tokens under an adapter, or under the bare base where `adapter` is None, with its special
        tokens. Raises InvalidRequestError for an id that is not a token of the base."""
        found: list[str] = []

        def detokenize(version: ClassifierVersion | None) -> None:
            tokenizer = self._base.chat_of(version).tokenizer
            tokenizer.check(token_ids)
            found.append(tokenizer.decode(*token_ids))

        await self._in_tokenizer_thread(detokenize, adapter, len(token_ids))
        return found[0]

    async def _in_tokenizer_thread(
        self, work: Callable[[ClassifierVersion | None], None], adapter: str | None, num_chars: int
    ) -> None:
        """Run `work` with the version that answers for `adapter`. Raises UnknownClassifierError for an unknown one, and
        QueueFullError where too many long texts wait."""
        with self._computing.admission.evaluations(1):
            lease = None if adapter is None else await self._versions.lease(adapter)

            def make() -> list[Sequence]:
                work(None if lease is None else lease.version)
                return []

            await self._computing.tokenize(make, num_chars, None, lambda: None if lease is None else lease.release())
