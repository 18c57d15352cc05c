"""The table of `loraplex classify` fits the terminal, and any encoding."""

import io
import re

import pytest
from rich.console import Console

from loraplex.cli.verdict_table import print_verdicts
from loraplex.types import AdapterRef, ClassifyResult, ErrorInfo, Timings, Usage, Verdict

NAMES = ("issueResolved", "isTransactionalEmail", "customerIsAboutToCancelNow")
ADAPTER = AdapterRef(name="a", version="0123456789abcdef")
TOPICS = {f"topic number {index} of many": 1 / 12 for index in range(12)}


def verdict(name: str, scores: dict[str, float], **more: object) -> Verdict:
    label = max(scores, key=scores.__getitem__)
    given = {"label": label, "confidence": scores[label], "scores": scores, "adapter": ADAPTER, **more}
    return Verdict(classifier=name, **given)  # type: ignore[arg-type]


def printed(*verdicts: Verdict, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding), width=width)
    print_verdicts(console, ClassifyResult(id="x", verdicts=verdicts, usage=Usage(), timings=Timings()))
    console.file.flush()
    return raw.getvalue().decode(encoding).splitlines()


YES_NO = [verdict(name, {"yes": 0.993, "no": 0.007}, abstained=name == NAMES[0]) for name in NAMES]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_name_is_cut_and_no_bar_is_broken(width: int) -> None:
    lines = printed(*YES_NO, verdict("topic", TOPICS), width=width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert len(re.findall(r"yes [█░]+ 0\.993", text)) == len(re.findall(r"no +[█░]+ 0\.007", text)) == len(NAMES)
    assert len(re.findall(r"[█░]{5,} 0\.083", text)) == 8 and "… 4 more" in text


def test_names_are_whole_in_80_columns() -> None:
    text = "\n".join(printed(*YES_NO))
    assert all(name in text for name in NAMES)


def test_versions_are_shown_where_there_is_room() -> None:
    assert ADAPTER.version in "\n".join(printed(*YES_NO, width=120))
    assert ADAPTER.version not in "\n".join(printed(*YES_NO))


def test_a_terminal_of_another_encoding_gets_all_the_same() -> None:
    lines = printed(
        verdict("topic", {**TOPICS, "größer": 0.0}), verdict("size", {"größer": 0.9, "no": 0.1}), encoding="ascii"
    )
    text = "\n".join(lines)
    assert len({len(line) for line in lines[:-1]}) == 1, "the table is a rectangle"
    assert "... 5 more" in text and "####. 0.900" in text and r"gr\xf6\xdfer" in text


def test_errors_and_gates_are_said() -> None:
    error = ErrorInfo(code="adapter_error", message="a file is cut short", remedy="copy it again")
    text = "\n".join(
        printed(*YES_NO, Verdict(classifier="bad", error=error), Verdict(classifier="x", skipped_by="bad"))
    )
    assert "error: bad: a file is cut short (copy it again)" in text and "skipped" in text and "by bad" in text
