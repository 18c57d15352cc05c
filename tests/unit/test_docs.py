"""The generated parts of the documentation are up to date. To write them: LORAPLEX_WRITE_DOCS=1 pytest <this file>"""

import os
import runpy
from pathlib import Path

import pytest

from loraplex.adapters.peft_config import REFUSED_KEYS, PeftConfig
from loraplex.executors.capabilities import backend_table
from peft_features import feature_table

DOCS = Path(__file__).parents[2] / "docs"
GENERATED = {("adapters.md", "features"): feature_table, ("backends.md", "backends"): backend_table}


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
    elsewhere = {"peft_type", "task_type", "init_lora_weights", "velora_config", "monteclora_config"}
    missing = [
        key for key in (*PeftConfig.model_fields, *REFUSED_KEYS) if f"`{key}`" not in table and key not in elsewhere
    ]
    assert not missing


def test_the_diagram_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(DOCS / "diagrams/one_pass.py"))["draw"]
    assert (DOCS / "one_pass.svg").read_text(encoding="utf-8") == draw(), "run docs/diagrams/one_pass.py"
