"""What PEFT answers: the oracle that an adapter can be compared with where PEFT is installed."""

import importlib.util
import warnings
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch


class PeftOracle:
    """One base and one adapter, in float32 on the CPU."""

    def __init__(self, base: Path, adapter: Path, *, num_labels: int | None) -> None:
        """num_labels: of a score head; None for a causal language model."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        options: dict[str, Any] = dict(dtype=torch.float32, local_files_only=True, use_safetensors=True)
        options["attn_implementation"] = "eager"  # sdpa ignores soft-capped scores
        model: Any
        if num_labels is None:
            model = AutoModelForCausalLM.from_pretrained(base, **options)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own use of transformers
            self._model: Any = PeftModel.from_pretrained(model, adapter).eval()

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("peft") is not None

    @torch.inference_mode()
    def label_log_probs(self, prompt: Seq[int], labels: Seq[Seq[int]]) -> list[float]:
        """Of each label's tokens behind the prompt, added up, over the whole vocabulary."""
        found = []
        for label in labels:
            ids = [*prompt, *label[:-1]]
            log_probs = self._model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            found.append(sum(log_probs[i, token_id].item() for i, token_id in enumerate(label)))
        return found

    @torch.inference_mode()
    def score_log_probs(self, prompt: Seq[int]) -> list[float]:
        """Of the score head's labels."""
        found: list[float] = self._model(input_ids=torch.tensor([list(prompt)])).logits[0].log_softmax(-1).tolist()
        return found
