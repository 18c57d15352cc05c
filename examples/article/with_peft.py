"""The article's first implementation: one PeftModel, `set_adapter` before each request.

    python examples/article/with_peft.py

Requests run one at a time. The active adapter is state of the model, so a second thread would switch the adapter of the
first.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from prompt import BUNDLE, CONVERSATION, TASKS, format_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(BUNDLE)


def model_fn(model_dir: Path) -> Any:
    # On a GPU: dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="flash_attention_2".
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, model_dir / TASKS[0], adapter_name=TASKS[0])
    for task in TASKS[1:]:
        model.load_adapter(model_dir / task, adapter_name=task)
    return model.eval()


@torch.inference_mode()
def predict_fn(inputs: dict[str, Any], model: Any) -> list[dict[str, Any]]:
    tokenized = tokenizer(inputs["input_text"], return_tensors="pt").to(model.device)
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    if inputs.get("adapter_name"):
        model.set_adapter(inputs["adapter_name"], inference_mode=True)
        outputs = model.generate(**tokenized, **options)
    else:
        with model.disable_adapter():
            outputs = model.generate(**tokenized, **options)
    probs = torch.stack(outputs.scores, dim=1).softmax(-1)  # [1, 1, vocab]
    confidence, token = probs[0, 0].max(-1)
    return [{"confidence_score": confidence.item(), "predicted_text": tokenizer.decode(token)}]


if __name__ == "__main__":
    served = model_fn(BUNDLE)
    for name in TASKS:
        [answer] = predict_fn({"input_text": format_prompt(CONVERSATION, name), "adapter_name": name}, served)
        print(f"{name:24} {answer['predicted_text']:4} {answer['confidence_score']:.6f}")
