"""What the service knows of the base."""

from dataclasses import dataclass

from loraplex.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """name: by which the base is asked. max_model_len: tokens of a prompt at most. stop_ids: the tokens with which a
    text ends."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    pad_token_id: int | None
    stop_ids: frozenset[int]
