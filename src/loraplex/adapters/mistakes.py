"""Recognises mistakes in saving an adapter by what they leave in its file, and says how to save it again."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from loraplex.adapters.peft_config import QA_HEAD, SCORE_HEADS, PeftConfig, refused
from loraplex.adapters.plan import Plan, Shape
from loraplex.adapters.tensor_names import PREFIX, pefts_name, who_named
from loraplex.bundle import ADAPTER_WEIGHTS
from loraplex.errors import AdapterError, quoted

HEADS = (*SCORE_HEADS, QA_HEAD)
EXPERT = re.compile(r"\.experts\.(\d+\.|base_layer\.|lora_)")  # one module for each expert, or one for all
OTHER_TASKS = {
    "TOKEN_CLS": "labels each token, and a verdict is one answer for the whole text",
    "QUESTION_ANS": "marks a part of the text, and a verdict is one answer for the whole text",
}


def check_name(path: Path, key: str) -> None:
    """Raise AdapterError where a wrapper around the trained model changed the tensor's name."""
    if pefts_name(key) != key:
        raise AdapterError(
            path,
            f"tensor {quoted(key)} is not named as PEFT does: {who_named(key)}",
            remedy="save the unwrapped model, or rename the tensors: "
            f"loraplex adapters repair {shlex.quote(str(path.parent))} --base BASE --out NEW_FOLDER",
        )


def check_gathered(path: Path, found: Mapping[str, Shape]) -> None:
    """Raise AdapterError where tensors are the empty placeholders that DeepSpeed leaves in place of its parameters."""
    empty = [name for name, shape in found.items() if shape == (0,)]
    if empty:
        raise AdapterError(
            path,
            f"tensor {quoted(PREFIX + empty[0])} has shape [0] ({len(empty)} such tensors in all): it was saved under "
            "DeepSpeed ZeRO-3 without gathering the weights",
            remedy="save it again with save_pretrained(…, state_dict=accelerator.get_state_dict(model)), or with "
            "stage3_gather_16bit_weights_on_model_save; zero_to_fp32.py gathers a checkpoint that is there already",
        )


def check_experts(path: Path, found: Mapping[str, Shape]) -> None:
    """Raise AdapterError where the file holds LoRA on the experts of a mixture."""
    for name in found:
        if EXPERT.search(name):
            raise AdapterError(
                path,
                f"tensor {quoted(PREFIX + name)} is LoRA on an expert of a mixture, which is not supported",
                remedy="train the adapter with target_modules that name the layers of attention: q_proj, v_proj, …",
            )


def check_task(folder: Path, config: PeftConfig, found: Mapping[str, Shape]) -> None:
    """Raise AdapterError where the file holds a head that the config's task type does not use for a verdict."""
    heads = [head for head in HEADS if f"{head}.weight" in found]
    task = config.task_type
    if task in OTHER_TASKS and heads:
        raise refused(
            folder,
            "task_type",
            f"is {task!r}, which {OTHER_TASKS[task]}",
            "train a classifier: task_type 'SEQ_CLS', or 'CAUSAL_LM' with labels that are tokens",
        )
    if heads and heads[0] in SCORE_HEADS and task not in ("SEQ_CLS", None):
        raise refused(
            folder,
            "task_type",
            f"is {task!r}, but {ADAPTER_WEIGHTS} holds a classification head ({heads[0]}.weight), which PEFT reads "
            "under 'SEQ_CLS' only",
            "if a sequence classifier was trained, set it to 'SEQ_CLS'; else save the adapter without the head",
        )


def warn_of_task(config: PeftConfig) -> tuple[str, ...]:
    if config.task_type in ("CAUSAL_LM", "SEQ_CLS", None):
        return ()
    return (f"its task_type is {config.task_type!r}; it is served as 'CAUSAL_LM', which computes the same",)


def check_head(plan: Plan, name: str, shape: Shape, expected: Shape, path: Path) -> None:
    """Raise AdapterError where a saved output head has far fewer rows than the base's: one for each label, perhaps."""
    layer = name.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".original_module")
    is_cut = len(shape) == 2 and shape[1:] == expected[1:] and 2 * shape[0] < expected[0]
    if layer == plan.output and is_cut:
        raise AdapterError(
            path,
            f"tensor {quoted(PREFIX + name)} has shape {list(shape)}, expected {list(expected)}: the output head was "
            f"cut to {shape[0]} rows, perhaps one for each label; PEFT cannot load it onto this base either",
            remedy=f"train with the whole head ({expected[0]} rows), or as a sequence classifier: task_type 'SEQ_CLS' "
            "with a head 'score' of one row for each label",
        )
