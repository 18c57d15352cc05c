"""The generated parts of the documentation are up to date. To write them: LORAPLEX_WRITE_DOCS=1 pytest <this file>"""

import os
import runpy
from pathlib import Path

import pytest

import tiny
from families import DENSE, MIXTURES, VISION_LANGUAGE
from known_clients import client_table
from loraplex.adapters.kinds import KINDS
from loraplex.adapters.peft_config import REFUSED_KEYS, PeftConfig
from loraplex.client.exchange import REFUSED
from loraplex.errors import BY_CODE
from loraplex.executors.capabilities import NATIVE, PEFT, PEFT_MIXED, VLLM
from peft_features import feature_table

DOCS = Path(__file__).parents[2] / "docs"
BACKENDS = (NATIVE, VLLM, PEFT, PEFT_MIXED)
# What a backend does beside serving adapters and bases, and which do it.
ABILITIES = {
    "adapters mixed in one forward pass": (NATIVE, VLLM, PEFT_MIXED),
    "a prefix that activated adapters share, computed once": (NATIVE,),
    "K/V kept for the next turn (`conversation_id`)": (NATIVE, VLLM),
    "long prompts in chunks": (NATIVE, VLLM),
    "text: several tokens, sampling, logit bias, top log probabilities": BACKENDS,
    "log probabilities of the prompt (`echo`)": BACKENDS,
    "quantized bases, and those whose attention cannot be packed": [one for one in BACKENDS if one.other_bases],
}


def backend_table() -> str:
    """The table of docs/backends.md."""

    def row(name: str, has: list[bool]) -> str:
        return f"| {name} | {' | '.join('yes' if one else 'no' for one in has)} |"

    lines = [f"| | {' | '.join(f'`{one.backend}`' for one in BACKENDS)} |", "|---|" + "---|" * len(BACKENDS)]
    lines += [row(words, [kind in one.adapters for one in BACKENDS]) for kind, words in KINDS.items()]
    lines += [row(words, [one in able for one in BACKENDS]) for words, able in ABILITIES.items()]
    return "\n".join(lines)


def base_table() -> str:
    """The table of bases in docs/adapters.md."""
    kinds = {
        "dense": sorted({*DENSE, *(config.model_type for config in tiny.FAMILIES.values())}),
        "mixtures of experts": MIXTURES,
        "vision-language, for texts": sorted({config.model_type for config in VISION_LANGUAGE.values()}),
    }
    rows = [f"| {kind} | {', '.join(f'`{name}`' for name in names)} |" for kind, names in kinds.items()]
    return "\n".join(["| kind | `model_type` |", "|---|---|", *rows])


def error_table() -> str:
    """The table of docs/errors.md."""

    def row(code: str, status: object, name: str, doc: str, is_retried: bool) -> str:
        return f"| `{code}` | {status} | `{name}` | {doc} | {'yes' if is_retried else ''} |"

    lines = ["| code | status | Python | what happened | retried |", "|---|---|---|---|---|"]
    for code, error in sorted(BY_CODE.items(), key=lambda pair: (pair[1].status, pair[0])):
        doc = (error.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        assert doc.endswith("."), f"{error.__name__} has no docstring"
        lines.append(row(code, error.status, error.__name__, doc, error.status in REFUSED))
    lines.append(row("unreachable", "", "ServerError", "No server answered the client.", True))
    lines.append(row("not_loraplex", "", "ServerError", "The answer is not Loraplex's, but perhaps a proxy's.", False))
    return "\n".join(lines)


GENERATED = {
    ("adapters.md", "features"): feature_table,
    ("adapters.md", "bases"): base_table,
    ("backends.md", "backends"): backend_table,
    ("clients.md", "clients"): client_table,
    ("errors.md", "errors"): error_table,
}


@pytest.mark.parametrize(("name", "part"), GENERATED)
def test_generated_parts_are_up_to_date(name: str, part: str) -> None:
    path = DOCS / name
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {part}: begin")
    comment, _, rest = rest.partition("-->\n")
    _, end, after = rest.partition(f"<!-- {part}: end")
    assert begin and end, f"{name} has no markers for {part}"
    expected = f"{before}{begin}{comment}-->\n{GENERATED[name, part]()}\n{end}{after}"
    if os.environ.get("LORAPLEX_WRITE_DOCS"):
        path.write_text(expected, encoding="utf-8")
    else:
        assert text == expected, f"docs/{name} is out of date: LORAPLEX_WRITE_DOCS=1 pytest tests/unit/test_docs.py"


def test_the_feature_table_names_every_key_that_matters() -> None:
    table = feature_table()
    elsewhere = {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "init_lora_weights",
        "velora_config",
        "monteclora_config",
    }
    missing = [
        key for key in (*PeftConfig.model_fields, *REFUSED_KEYS) if f"`{key}`" not in table and key not in elsewhere
    ]
    assert not missing


def test_the_diagram_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(DOCS / "diagrams/one_pass.py"))["draw"]
    assert (DOCS / "one_pass.svg").read_text(encoding="utf-8") == draw(), "run docs/diagrams/one_pass.py"
