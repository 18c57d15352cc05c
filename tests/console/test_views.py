"""The other views, and what holds for all: no serious finding of axe-core, no sideways scrolling, in light and dark."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs .venv-console: make test-console")
expect = sync_api.expect
pytestmark = pytest.mark.console
pytest_plugins = ["chromium"]

AXE = serving.ROOT / "console/node_modules/axe-core/axe.min.js"
VIEWS = ["Judge", "Compare", "Adapters", "Traffic"]


def findings(page: Any) -> list[str]:
    """axe-core's serious and critical findings, each with its first element."""
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


@pytest.fixture
def route(api: httpx.Client) -> Any:
    targets = {"targets": {"issueResolved": 3, "isConfirming": 1}, "shadows": ["transactionCompleted"]}
    api.put("/v1/routes/done", json=targets).raise_for_status()
    yield targets
    api.delete("/v1/routes/done")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_view(judged: Any, route: Any, scheme: str) -> None:
    judged.get_by_label("Colours").select_option(scheme)
    for view in VIEWS:
        judged.get_by_role("link", name=view, exact=True).click()
        judged.wait_for_selector(".panel h2")
        judged.wait_for_timeout(500)
        assert findings(judged) == [], view
    judged.get_by_role("link", name="Judge", exact=True).click()
    judged.locator('[data-classifier="issueResolved"]').get_by_role("button").click()
    for tab in ("Answer", "Why", "Code"):
        judged.get_by_role("tab", name=tab).click()
        judged.wait_for_timeout(500)
        assert findings(judged) == [], tab


def test_axe_finds_nothing_serious_where_a_key_is_asked_for(page: Any, expected: list[str]) -> None:
    expected.append("401")
    page.goto("/")
    page.get_by_label("API key").wait_for()
    assert findings(page) == []


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_nothing_scrolls_sideways(judged: Any, route: Any, width: int) -> None:
    judged.set_viewport_size({"width": width, "height": 900})
    for view in VIEWS:
        judged.get_by_role("link", name=view, exact=True).click()
        judged.wait_for_selector(".panel h2")
        judged.wait_for_timeout(300)
        assert judged.evaluate("document.documentElement.scrollWidth") <= width, view


def test_all_of_judging_can_be_reached_by_keyboard(admin: Any) -> None:
    admin.keyboard.press("Tab")
    expect(admin.get_by_role("link", name="Skip to the content")).to_be_focused()
    reached = set()
    for _ in range(40):
        admin.keyboard.press("Tab")
        reached.add(admin.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText.trim()"))
    assert {"Try an example", "The next turn", "Find a classifier"} <= reached
    assert any(one.startswith("hasHitProblem") and "not judged yet" in one for one in reached)


def test_an_adapter_is_loaded_pinned_and_unloaded_after_a_confirmation(admin: Any, api: httpx.Client) -> None:
    admin.get_by_role("link", name="Adapters").click()
    admin.get_by_label("Name").fill("copied")
    admin.get_by_label("Source").fill("bundle-shared/isConfirming")
    admin.get_by_role("button", name="Load", exact=True).click()
    row = admin.locator('[data-adapter="copied"]')
    expect(row.locator(".state")).to_have_text("ready")
    row.get_by_role("button", name="Pin").click()
    expect(row).to_contain_text("pinned")
    row.get_by_role("button", name="Unload").click()
    expect(admin.get_by_role("dialog")).to_contain_text("nobody can ask copied")
    admin.get_by_role("button", name="Cancel").click()
    expect(row).to_be_visible()
    row.get_by_role("button", name="Unload").click()
    admin.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(row).to_have_count(0)
    assert api.get("/v1/adapters/copied").status_code == 404


def test_an_adapter_that_cannot_be_loaded_says_why(admin: Any, expected: list[str]) -> None:
    expected.append("422")
    admin.get_by_role("link", name="Adapters").click()
    admin.get_by_label("Name").fill("nowhere")
    admin.get_by_label("Source").fill("no/such/folder")
    admin.get_by_role("button", name="Load", exact=True).click()
    alert = admin.get_by_role("alert")
    expect(alert).to_contain_text("The adapter cannot be used")
    expect(alert).to_contain_text("adapter_error")


def test_two_versions_are_compared_disagreements_first(admin: Any, tmp_path: Path) -> None:
    lines = [
        {"input": "Customer: Great, thank you, that was all. Bye!", "labels": {"issueResolved": "yes"}},
        {"input": "Customer: I need a table for four.", "labels": {"issueResolved": "no"}},
        {"input": "Customer: Is there anything else, maybe Mexican?", "label": "no"},
    ]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in lines))
    admin.get_by_role("link", name="Compare").click()
    admin.get_by_label("First").select_option("issueResolved")
    admin.get_by_label("Second").select_option("wantsAlternatives")
    admin.get_by_label("or open a file").set_input_files(file)
    admin.get_by_role("button", name="Compare on 3 conversations").click()
    expect(admin.locator(".figure")).to_have_count(3)
    expect(admin.locator(".figure").nth(1)).to_contain_text("issueResolved right")
    expect(admin.locator(".case-row").first).to_have_class("row case-row is-different")


def test_a_routes_target_and_its_shadow_are_compared_on_what_was_corrected(
    admin: Any, route: Any, api: httpx.Client
) -> None:
    for text, label in (("Great, thank you. Bye!", "yes"), ("I need a table for four.", "no")):
        body = {"input": f"Customer: {text}", "classifiers": ["done"]}
        [verdict] = api.post("/v1/classify", json=body).json()["verdicts"]
        api.post("/v1/feedback", json={"verdict_id": verdict["id"], "label": label}).raise_for_status()
    admin.get_by_role("link", name="Compare").click()
    panel = admin.get_by_role("region", name="Route done")
    panel.get_by_role("row", name="transactionCompleted").get_by_role("button", name="Compare").click()
    expect(admin.get_by_label("First")).to_have_value("issueResolved")
    admin.get_by_role("button", name="Use what was corrected here").click()
    admin.get_by_role("button", name="Compare on 2 conversations").click()
    expect(admin.locator(".figure").nth(1)).to_contain_text("of 2")


def test_what_was_corrected_is_downloaded_as_training_reads_it(judged: Any, tmp_path: Path) -> None:
    judged.locator('[data-classifier="isRejecting"]').get_by_role("button").click()
    judged.get_by_role("group", name="The right answer").get_by_role("button", name="no").click()
    judged.get_by_text("Recorded: “no” is right.").wait_for()
    with judged.expect_download() as download:
        judged.get_by_role("button", name="Download what was corrected").click()
    download.value.save_as(tmp_path / "corrected.jsonl")
    [line] = map(json.loads, (tmp_path / "corrected.jsonl").read_text().splitlines())
    assert line["labels"] == {"isRejecting": "no"} and len(line["messages"]) == 7 and len(line["ids"]) == 1
    assert line["conversation_id"].startswith("console-")


def test_a_shadow_is_promoted_and_the_route_rolled_back(admin: Any, route: Any, api: httpx.Client) -> None:
    admin.get_by_role("link", name="Compare").click()
    panel = admin.get_by_role("region", name="Route done")
    panel.get_by_role("row", name="transactionCompleted").get_by_role("button", name="Promote").click()
    dialog = admin.get_by_role("dialog")
    expect(dialog).to_contain_text("From now on every request for done is answered by transactionCompleted")
    expect(dialog).to_contain_text("issueResolved 75 %")
    dialog.get_by_role("button", name="Promote").click()
    expect(panel.get_by_text("transactionCompleted now answers for done.")).to_be_visible()
    assert api.get("/v1/routes/done").json()["targets"] == {"transactionCompleted": 1}
    panel.get_by_role("button", name="Roll back").click()
    admin.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    expect(panel.get_by_text("done is what it was before.")).to_be_visible()
    assert api.get("/v1/routes/done").json()["targets"] == route["targets"]


def test_traffic_shows_what_each_classifier_answered(judged: Any) -> None:
    judged.get_by_role("link", name="Traffic").click()
    expect(judged.get_by_role("img", name="Requests a second: ")).to_be_visible()
    expect(judged.locator(".share-row").first).to_contain_text("%")
    expect(judged.get_by_role("img", name="Requests a second: 0.0 now")).to_be_visible()  # a second reading
