"""One request for text: makes its sequences, and turns its tokens into text."""

import functools
import math
import uuid
from collections.abc import Sequence as Seq

from loraplex.engine.sequence import Sampling, Sequence, SequenceOutput, Token
from loraplex.errors import InvalidRequestError, quoted
from loraplex.generation import MAX_TOP, GeneratedToken, GenerateRequest, GenerateResult, LikelyToken, OnToken
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.service.scoring import scored_tokens, scoring_sequences
from loraplex.service.verdict import make_sequence, render
from loraplex.text.detokenizer import Detokenizer
from loraplex.text.prompt import Prompt, chat, tokenized, verbatim
from loraplex.text.tokenizer import Conversations
from loraplex.types import Message, Timings, Usage

MAX_BIAS = 100.0


class Completion:
    """Makes the sequences of a request (`make_sequences`), then, once the engine is done, its `result`."""

    def __init__(self, request: GenerateRequest, base: Base, tell: OnToken | None = None) -> None:
        """tell: called with each token on the engine's thread. Raises InvalidRequestError, which names the parameter
        that is out of range."""
        _check(request)
        base.tokenizer.check((*request.logit_bias, *request.allowed_token_ids, *request.stop_token_ids))
        self._request, self._base, self._tell = request, base, tell
        self._stop_ids = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else base.stop_ids)
        allowed = frozenset(request.allowed_token_ids)
        if request.min_tokens and allowed and allowed <= self._stop_ids:
            raise InvalidRequestError(
                f"min_tokens is {request.min_tokens}, and every one of `allowed_token_ids` ends the text",
                remedy="allow other tokens, or leave `min_tokens` out",
            )
        self._tokens: list[GeneratedToken] = []
        self._texts: list[str] = []

    def make_sequences(self, version: ClassifierVersion | None, slot: int) -> list[Sequence]:
        """Return the sequences under an adapter's version; None is the bare base. The last one generates, unless no
        token is asked for; the others score the prompt. Raises the errors of `make_prompt`."""
        request = self._request
        if version is not None and version.has_score:
            raise InvalidRequestError(
                f"{version.source.name!r} has a score head and generates no text", remedy="ask it through /v1/classify"
            )
        self._version, self._prompt = version, self.make_prompt(version)
        self._tokenizer = self._base.chat_of(version).tokenizer
        if self._tokenizer.owner == "adapter" and self._tokenizer.eos_token_id is not None and not request.ignore_eos:
            self._stop_ids |= {self._tokenizer.eos_token_id}  # such as <|im_end|>, where the base's ends otherwise
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
            stop_ids=self._stop_ids,
            min_tokens=request.min_tokens,
            biases=tuple(request.logit_bias.items()),
            allowed_ids=request.allowed_token_ids,
            num_top=request.num_top,
        )
        scoring = scoring_sequences(self._prompt, version, slot, request.num_top) if request.scores_prompt else []
        self._sequences = scoring
        if self._max_tokens:
            keep = request.conversation_id is not None or len(scoring) > 1
            sequence = make_sequence(self._prompt, version, slot, keep=keep, sampling=sampling)
            if request.stop or self._tell is not None:  # else `result` does the work, off the engine's thread
                sequence.on_token = self._take
            self._sequences = [*scoring, sequence]
        return self._sequences

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt.token_ids)

    def result(self, outputs: Seq[SequenceOutput], timings: Timings) -> GenerateResult:
        """Return the text, its tokens, and the usage. outputs: one for each of `make_sequences`."""
        request, scored, ended = self._request, outputs, False
        if self._max_tokens:
            *scored, output = outputs
            for token in output.tokens[len(self._tokens) :]:
                self._take(token)
            ended = self._detokenizer.stopped or self._tokens[-1].id in self._stop_ids
        num_prompt = self.num_prompt_tokens
        # All generated tokens but the last were computed too, and do not belong to the prompt.
        num_computed = sum(sequence.num_computed_tokens for sequence in self._sequences)
        num_computed = max(0, num_computed - max(0, len(self._tokens) - 1))
        prompt_text, offsets = self._echo() if request.echo or request.scores_prompt else ("", ())
        return GenerateResult(
            id=f"gen-{uuid.uuid4().hex}",
            text="".join(self._texts),
            tokens=tuple(self._tokens),
            finish_reason="stop" if ended else "length",
            adapter=None if self._version is None else self._version.ref,
            usage=Usage(
                prompt_tokens=num_prompt,
                computed_tokens=num_computed,
                cached_tokens=0 if request.scores_prompt or not self._sequences else max(0, num_prompt - num_computed),
            ),
            timings=timings,
            warnings=self._prompt.warnings,
            prompt_text=prompt_text if request.echo else "",
            prompt_tokens=scored_tokens(self._prompt, scored, offsets, self._tokenizer.spell)
            if request.scores_prompt
            else (),
        )

    def _echo(self) -> tuple[str, Seq[int]]:
        """Return the prompt's text, and the character at which each of its tokens begins."""
        request, tokenizer = self._request, self._tokenizer
        if isinstance(request.prompt, str):
            adds = request.add_special_tokens is not False
            return request.prompt, tokenizer.offsets(request.prompt, add_special_tokens=adds)
        decode = functools.partial(tokenizer.decode_part, skip_special_tokens=False)
        detokenizer, offsets, texts = Detokenizer(decode), [], []
        for token_id in self._prompt.token_ids:
            offsets.append(detokenizer.num_chars)
            texts.append(detokenizer.push(token_id))
        return "".join((*texts, detokenizer.finish())), offsets

    def make_prompt(self, version: ClassifierVersion | None) -> Prompt:
        """Return the prompt under an adapter's version; None is the bare base. Raises InvalidRequestError or
        InputTooLongError where the request makes no prompt."""
        chat_template = self._base.chat_of(version)
        request, tokenizer, limit = self._request, chat_template.tokenizer, self._base.max_model_len
        prompt, options = request.prompt, request.chat_template_kwargs
        invocation = None if version is None else version.invocation_tokens
        if isinstance(prompt, str):
            adds = request.add_special_tokens is not False
            return verbatim(prompt, tokenizer, limit, invocation, add_special_tokens=adds)
        messages = tuple(one for one in prompt if isinstance(one, Message))
        if not messages:
            return tokenized([one for one in prompt if isinstance(one, int)], tokenizer, limit, invocation)
        if version is None or version.template is None:
            if request.roles:
                raise InvalidRequestError(
                    "roles: there is no contract, and the chat template writes the roles", remedy="leave it out"
                )
            adds = bool(request.add_special_tokens)
            return chat(messages, options, chat_template, limit, invocation, add_special_tokens=adds)
        for name, value in (("chat_template_kwargs", options), ("add_special_tokens", request.add_special_tokens)):
            if value:
                raise InvalidRequestError(
                    f"{version.source.name!r} has a contract, whose template takes no {name}", remedy="leave it out"
                )
        return render(version, messages, self._base, Conversations(), request.roles)

    def _take(self, token: Token) -> bool:
        """Take one token and its text. Return whether to go on."""
        detokenizer, ends = self._detokenizer, token.id in self._stop_ids
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
        (
            "max_tokens",
            max_tokens,
            "a number, at least 1; 0 is for `echo`",
            max_tokens is None or max_tokens >= (0 if request.echo or request.scores_prompt else 1),
        ),
        (
            "min_tokens",
            request.min_tokens,
            "a number, 0 or above, at most `max_tokens`",
            0 <= request.min_tokens <= (math.inf if max_tokens is None else max_tokens),
        ),
        ("stop", request.stop, "no stop texts beside `min_tokens`", not (request.stop and request.min_tokens)),
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
