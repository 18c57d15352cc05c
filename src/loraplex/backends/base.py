"""The one seam between what serves and what computes: data, protocol, errors (in `loraplex.errors`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from loraplex.types import AdapterInfo, AdapterRef, ClassifyRequest, ClassifyResult, Message, Stats, Timings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt under an adapter or, with None, the bare base.

    prompt:        text, taken verbatim, special tokens parsed; or token ids; or messages: in the adapter's contract if
                   it has one, else in the base's chat template, special tokens in them kept as text.
    max_tokens:    None: up to what the base takes.
    temperature:   0 takes the likeliest token, else tokens are drawn from the smallest set of likeliest ones whose
                   probabilities add up to `top_p`.
    seed:          the same one draws the same tokens.
    stop:          texts of which the first one ends the answer and is no part of it.
    num_top:       likeliest tokens that come with each one, 20 at most.
    logit_bias:    token id -> -100 to 100, added before a token is chosen; its log probability is as without.
    allowed_token_ids:    where there are any, no other token is chosen.
    add_special_tokens:   to a prompt that is text, as the tokenizer does by itself.
    skip_special_tokens:  in the answer's text.
    chat_template_kwargs: variables of the base's chat template.
    conversation_id:      keeps what was computed for the conversation's next turn.
    """

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    adapter: str | None = None
    max_tokens: int | None = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_top: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    add_special_tokens: bool = True
    skip_special_tokens: bool = False
    chat_template_kwargs: Mapping[str, bool | int | str] = field(default_factory=dict)
    conversation_id: str | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyToken:
    """text: of the token alone. utf8: its bytes, which may be a part of a character; None where they are not known.
    log_prob: over the whole vocabulary, before anything of the request changes it."""

    id: int
    text: str
    utf8: bytes | None
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """As LikelyToken. offset: characters of the answer before it. top: the likeliest tokens in its place, `num_top` of
    them, likeliest first; it need not be among them."""

    id: int
    text: str
    utf8: bytes | None
    log_prob: float
    offset: int
    top: tuple[LikelyToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """tokens: what was generated, with the base's end-of-text token, or the tokens of a stop text, where they came
    ("stop"). text: without these. warnings: what of the prompt was not taken as it was given."""

    id: str
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: Literal["stop", "length"]
    adapter: AdapterRef | None
    usage: Usage
    timings: Timings
    warnings: tuple[str, ...] = ()


# A token, and the text that became final with it: what may be the beginning of a stop text, or of a character, waits.
OnToken = Callable[[GeneratedToken, str], None]


class Backend(Protocol):
    """Answers for one bundle. All methods are called from one event loop; none of them blocks it."""

    @property
    def name(self) -> str:
        """What `--backend` calls it."""
        ...

    @property
    def base_name(self) -> str:
        """What `/v1/models` calls the base."""
        ...

    async def start(self) -> None:
        """Load the base and the adapters; returns when ready. ConfigurationError where something on disk is wrong."""
        ...

    async def close(self) -> None:
        """Finish what was accepted, then free everything. Safe to call twice."""
        ...

    @property
    def alive(self) -> bool:
        """Started, and able to compute."""
        ...

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        """One verdict a classifier, in order. A classifier that fails carries its error in its verdict; where all fail,
        the first one's error is raised."""
        ...

    async def generate(self, request: GenerateRequest, on_token: OnToken | None = None) -> GenerateResult:
        """The tokens that follow; `on_token` is called on the event loop with each as it comes, with all of them before
        this returns. InvalidRequestError names a parameter out of its range, or says why messages make no prompt;
        UnknownClassifierError for an adapter that is not loaded; never the base instead."""
        ...

    def stats(self) -> Stats:
        """Cheap: asked at every scrape and every answer."""
        ...

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """All that are known, in the order in which they came."""
        ...

    def adapter(self, name: str) -> AdapterInfo:
        """UnknownClassifierError where there is none."""
        ...

    @property
    def num_waiting(self) -> int:
        """Evaluations that were accepted and do not run yet. Cheap."""
        ...

    def names(self) -> tuple[str, ...]:
        """What `"*"` asks."""
        ...

    def knows(self, name: str) -> bool:
        """Whether there is an adapter of that name that can be asked."""
        ...

    async def load_adapter(
        self, name: str, source: str, *, pin: bool | None = None, replace: bool = True
    ) -> AdapterInfo:
        """Load what `source` (a path below an adapter root, hf://…, s3://…) holds now as `name`, in place of what has
        the name: requests in flight finish on the old version, later ones get the new. Returns when it answers.
        Where it is not sound, AdapterError or ContractError says why, and the old version goes on answering.
        AdapterExistsError where there is one and `replace` is False."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Nobody finds it from now on; returns when its last request is answered and its memory is free."""
        ...

    async def pin_adapter(self, name: str, is_pinned: bool) -> AdapterInfo:
        """A pinned adapter keeps its place on the device; it is loaded where it was not."""
        ...

    async def show_prompt(self, request: ClassifyRequest) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """(classifier, prompt, token ids) for each classifier of the request, as they would be computed."""
        ...
