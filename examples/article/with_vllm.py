"""The article's second implementation: vLLM, with a LoRARequest for each request.

    python examples/article/with_vllm.py    # in an environment with vLLM: see docs/backends.md

vLLM has renamed `lora_local_path` to `lora_path`. `max_loras` is raised from its default 1, because requests for other
adapters would wait otherwise.
"""

import math
from pathlib import Path
from typing import Any

from prompt import BUNDLE, CONVERSATION, TASKS, format_prompt
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

prompt2adapter = {task: LoRARequest(task, i, lora_path=str(BUNDLE / task)) for i, task in enumerate(TASKS, start=1)}


def model_fn(model_dir: Path) -> LLM:
    return LLM(
        model=str(model_dir),
        tokenizer=str(model_dir),
        enable_lora=True,
        max_model_len=1024,
        max_lora_rank=32,
        max_loras=16,
        dtype="float32",  # as in with_peft.py, to compare answers
        enforce_eager=True,  # a faster start
        kv_cache_memory_bytes=64 * 2**20,
    )


def predict_fn(inputs: dict[str, Any], model: LLM) -> list[dict[str, Any]]:
    sampling_params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    name = inputs.get("adapter_name")
    adapter = prompt2adapter[name] if name else None  # an unknown name raises KeyError, and is never the base
    [output] = model.generate(inputs["input_text"], sampling_params, lora_request=adapter, use_tqdm=False)
    [completion] = output.outputs
    return [
        {"confidence_score": math.exp(completion.cumulative_logprob), "predicted_text": completion.text},
    ]


def preload(model: LLM) -> None:
    """Ask each adapter once, so that no user's request waits until vLLM has read it."""
    for adapter in prompt2adapter.values():
        model.generate("test", SamplingParams(max_tokens=1), lora_request=adapter, use_tqdm=False)


if __name__ == "__main__":  # vLLM starts processes that import this file
    served = model_fn(BUNDLE)
    preload(served)
    for task in TASKS:
        [answer] = predict_fn({"input_text": format_prompt(CONVERSATION, task), "adapter_name": task}, served)
        print(f"{task:24} {answer['predicted_text']:4} {answer['confidence_score']:.6f}")
