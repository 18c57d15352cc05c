"""One request for text: makes its sequence, and turns its tokens into text."""

import functools
import math
import uuid

from loraplex.engine.sequence import Sampling, Sequence, SequenceOutput, Token
from loraplex.errors import InvalidRequestError, quoted
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.evaluation import make_sequence, render
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.detokenizer import Detokenizer
from loraplex.text.prompt import Prompt, chat, tokenized, verbatim
from loraplex.text.tokenizer import Conversations
from loraplex.types import (
    MAX_TOP,
    GeneratedToken,
    GenerateRequest,
    GenerateResult,
    LikelyToken,
    Message,
    OnToken,
    Timings,
    Usage,
)

MAX_BIAS = 100.0


class Completion:
    """Makes the sequence of a request (`make_sequence`), then, once the engine is done, its `result`."""

    def __init__(self, request: GenerateRequest, base: Base, tell: OnToken | None = None) -> None:
        """tell: called with each token on the engine's thread. Raises InvalidRequestError, which names the parameter
        that is out of range."""
        _check(request)
        base.tokenizer.check((*request.logit_bias, *request.allowed_token_ids))
        self._request, self._base, self._tell = request, base, tell
        self._tokens: list[GeneratedToken] = []
        self._texts: list[str] = []

    def make_sequence(self, version: ClassifierVersion | None, slot: int) -> Sequence:
        """Return the sequence under an adapter's version; None is the bare base. Raises InvalidRequestError or
        InputTooLongError where the request makes no prompt."""
        request = self._request
        if version is not None and version.has_score:
            raise InvalidRequestError(
                f"{version.source.name!r} has a score head and generates no text", remedy="ask it through /v1/classify"
            )
        chat_template = self._base.chat if version is None else version.chat
        self._version, self._tokenizer = version, chat_template.tokenizer
        self._prompt = self._make_prompt(version, chat_template)
        # The last token is not computed, so it needs no position.
        num_positions = self._base.max_model_len - len(self._prompt.token_ids) + 1
        self._max_tokens = num_positions if request.max_tokens is None else min(request.max_tokens, num_positions)
        decode = functools.partial(self._tokenizer.decode_part, skip_special_tokens=request.skip_special_tokens)
        self._detokenizer = Detokenizer(decode, self._prompt.token_ids, request.stop)
        sampling = Sampling(
            max_tokens=self._max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_ids=self._base.stop_ids,
            biases=tuple(request.logit_bias.items()),
            allowed_ids=request.allowed_token_ids,
            num_top=request.num_top,
        )
        keep = request.conversation_id is not None
        self._sequence = sequence = make_sequence(self._prompt, version, slot, keep=keep, sampling=sampling)
        if request.stop or self._tell is not None:  # else `result` does the work, off the engine's thread
            sequence.on_token = self._take
        return sequence

    def result(self, output: SequenceOutput, timings: Timings) -> GenerateResult:
        """Return the text, its tokens, and the usage. `make_sequence` must have been called."""
        for token in output.tokens[len(self._tokens) :]:
            self._take(token)
        ended = self._detokenizer.stopped or self._tokens[-1].id in self._base.stop_ids
        num_prompt = len(self._prompt.token_ids)
        # All generated tokens but the last were computed too, and do not belong to the prompt.
        num_computed = max(0, self._sequence.num_computed_tokens - len(self._tokens) + 1)
        return GenerateResult(
            id=f"gen-{uuid.uuid4().hex}",
            text="".join(self._texts),
            tokens=tuple(self._tokens),
            finish_reason="stop" if ended else "length",
            adapter=None if self._version is None else self._version.ref,
            usage=Usage(
                prompt_tokens=num_prompt,
                computed_tokens=num_computed,
                cached_tokens=max(0, num_prompt - num_computed),
            ),
            timings=timings,
            warnings=self._prompt.warnings,
        )

    def _make_prompt(self, version: ClassifierVersion | None, chat_template: ChatTemplate) -> Prompt:
        request, limit, tokenizer = self._request, self._base.max_model_len, chat_template.tokenizer
        prompt, options = request.prompt, request.chat_template_kwargs
        invocation = None if version is None else version.invocation_tokens
        if isinstance(prompt, str):
            return verbatim(prompt, tokenizer, limit, invocation, add_special_tokens=request.add_special_tokens)
        messages = tuple(one for one in prompt if isinstance(one, Message))
        if not messages:
            return tokenized([one for one in prompt if isinstance(one, int)], tokenizer, limit, invocation)
        if version is None or version.template is None:
            return chat(messages, options, chat_template, limit, invocation)
        if options:
            raise InvalidRequestError(
                f"{version.source.name!r} has a contract, whose template takes no chat_template_kwargs",
                remedy="leave them out",
            )
        return render(version, messages, self._base, Conversations())

    def _take(self, token: Token) -> bool:
        """Take one token and its text. Return whether to go on."""
        detokenizer, ends = self._detokenizer, token.id in self._base.stop_ids
        offset = detokenizer.num_chars
        text = "" if ends else detokenizer.push(token.id)
        if ends or len(self._tokens) + 1 == self._max_tokens:
            text += detokenizer.finish()
        spelled, utf8 = self._tokenizer.spell(token.id)
        top = tuple(self._likely(*one) for one in token.top)
        taken = GeneratedToken(id=token.id, text=spelled, utf8=utf8, log_prob=token.log_prob, offset=offset, top=top)
        self._tokens.append(taken)
        self._texts.append(text)
        if self._tell is not None:
            self._tell(taken, text)
        return not detokenizer.stopped

    def _likely(self, token_id: int, log_prob: float) -> LikelyToken:
        text, utf8 = self._tokenizer.spell(token_id)
        return LikelyToken(id=token_id, text=text, utf8=utf8, log_prob=log_prob)


def _check(request: GenerateRequest) -> None:
    max_tokens, biases = request.max_tokens, request.logit_bias.values()
    for name, value, wanted, is_good in (
        ("max_tokens", max_tokens, "a number, at least 1", max_tokens is None or max_tokens >= 1),
        ("temperature", request.temperature, "a number, 0 or above", 0 <= request.temperature < math.inf),
        ("top_p", request.top_p, "a number above 0, at most 1", 0 < request.top_p <= 1),
        ("num_top", request.num_top, f"a number from 0 to {MAX_TOP}", 0 <= request.num_top <= MAX_TOP),
        ("stop", request.stop, "texts that are not empty", all(request.stop)),
        (
            "logit_bias",
            request.logit_bias,
            f"numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}",
            all(abs(bias) <= MAX_BIAS for bias in biases),
        ),
    ):
        if not is_good:
            raise InvalidRequestError(f"{name} is {quoted(value)}", remedy=f"give {wanted}")
