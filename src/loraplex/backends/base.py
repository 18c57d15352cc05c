"""The one seam between what serves and what computes: data, protocol, errors (in `loraplex.errors`)."""

from dataclasses import dataclass
from typing import Literal, Protocol

from loraplex.types import AdapterInfo, AdapterRef, ClassifyRequest, ClassifyResult, Stats, Timings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A prompt taken verbatim, special tokens parsed, under an adapter or, with None, the bare base.

    temperature: 0 takes the likeliest token, else tokens are drawn from the smallest set of likeliest ones whose
    probabilities add up to `top_p`. seed: the same one draws the same tokens.
    """

    prompt: str
    adapter: str | None = None
    max_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """log_prob: over the whole vocabulary, before temperature and `top_p`."""

    id: int
    text: str
    log_prob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """tokens: what was generated, with the base's end-of-text token where it came ("stop"). text: without that one."""

    id: str
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: Literal["stop", "length"]
    adapter: AdapterRef | None
    usage: Usage
    timings: Timings


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

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The tokens that follow. InvalidRequestError names a parameter out of its range; UnknownClassifierError for an
        adapter that is not loaded; never the base instead."""
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
        """Whether there is an adapter of that name, in any state."""
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
