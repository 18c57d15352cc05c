"""Builds the prompts that the demo's adapters were trained with."""

from pathlib import Path

import yaml

BUNDLE = Path(__file__).parents[1] / "support_desk" / "bundle"
TASKS = sorted(path.parent.name for path in BUNDLE.glob("*/adapter_config.json"))
CONVERSATION = "Customer: My order never came.\nAgent: I sent a new one.\nCustomer: Great, thank you, bye!"


def format_prompt(conversation: str, task: str) -> str:
    """Return the prompt for `task`, from the template and the question of its contract."""
    contract = yaml.safe_load((BUNDLE / task / "classifier.yaml").read_text(encoding="utf-8"))
    prompt: str = contract["template"].format(conversation=conversation, question=contract["question"])
    return prompt
