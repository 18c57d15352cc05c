"""A tiny base that chats, and questions for it that no adapter was trained for."""

from pathlib import Path
from typing import Any

from transformers import MistralConfig, PreTrainedConfig

import tiny
from loraplex.types import Question

CHATML = "{% for m in messages %}<|ask|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}{{ '<|ask|>assistant\n' }}"
QUESTIONS = {
    "isDone": Question(type="predicate", instructions="Is the payment done?"),
    "topic": Question(
        type="choice",
        instructions="What is it about?",
        labels=("table", "payment", "other"),
        descriptions={"table": "a table for two"},
    ),
    "hurry": Question(type="score", instructions="How urgent is it?", labels=("calm", "soon", "now")),
    "alike": Question(
        type="choice", instructions="When?", labels=("done before the end of today", "done before the end of the week")
    ),
    "untold": Question(type="choice", instructions="", labels=("hello", "thanks")),
}


def config(max_model_len: int = 1024) -> PreTrainedConfig:
    """With room for questions."""
    values: dict[str, Any] = tiny.FAMILIES["mistral"].to_dict() | {"max_position_embeddings": max_model_len}
    return tiny.fitted(MistralConfig(**values))


def save_chat_bundle(folder: Path, *, is_activated: bool = True, max_model_len: int = 1024) -> Path:
    """A base that chats, and three adapters whose prompts the chat template writes."""
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    tiny.save_base(folder, config(max_model_len), tokenizer)
    invocation = [tiny.SPECIAL_TOKENS.index("<|ask|>")] if is_activated else None
    for index in range(3):
        tiny.save_adapter(
            folder,
            folder / f"task{index}",
            contract={"labels": ["yes", "no"]},
            seed=index + 1,
            r=2 + index,
            alora_invocation_tokens=invocation,
        )
    return folder
