"""Judging in a real browser: bars, the slider, flip turns, why, code, feedback, and a version that is replaced."""

import json
from typing import Any

import httpx
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs .venv-console: make test-console")
expect = sync_api.expect
pytestmark = pytest.mark.console
pytest_plugins = ["chromium"]

TURNS = ["I need a table for two.", "Bella Mia has one at 7 pm. Shall I book it?"]
SHIFTS = """() => { window.shifts = 0; new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) window.shifts += one.value;
}).observe({ type: "layout-shift" }); }"""


def row(page: Any, name: str) -> Any:
    return page.locator(f'[data-classifier="{name}"]')


def asked(page: Any) -> list[dict[str, Any]]:
    """The bodies of the page's calls from now on."""
    bodies: list[dict[str, Any]] = []
    page.on(
        "request", lambda one: bodies.append(json.loads(one.post_data)) if one.url.endswith("/v1/classify") else None
    )
    return bodies


def test_an_example_is_judged_turn_by_turn_and_the_last_turn_resolves_it(judged: Any) -> None:
    resolved = row(judged, "issueResolved")
    expect(resolved.locator(".label")).to_have_text("yes")
    expect(resolved.locator(".cell")).to_have_count(7)
    expect(resolved.get_by_text("changed at turn 7")).to_be_attached()
    expect(judged.locator(".row")).to_have_count(16)
    expect(judged.locator(".timeline-work")).to_contain_text("tokens computed")


def test_the_slider_shows_what_was_answered_after_an_earlier_turn(judged: Any) -> None:
    slider = judged.get_by_role("slider")
    slider.focus()
    slider.press("ArrowLeft")
    expect(judged.get_by_text("After turn 6 of 7")).to_be_visible()
    expect(row(judged, "issueResolved").locator(".label")).to_have_text("no")
    slider.press("End")
    expect(row(judged, "issueResolved").locator(".label")).to_have_text("yes")


def test_what_is_known_is_not_asked_again(judged: Any) -> None:
    bodies = asked(judged)
    slider = judged.get_by_role("slider")
    for key in ("Home", "End", "ArrowLeft"):
        slider.press(key)
    judged.locator(".bubble").nth(2).click()
    judged.wait_for_timeout(1000)
    assert bodies == []


def test_verdicts_follow_while_a_turn_is_typed_and_the_page_asks_one_at_a_time(judged: Any) -> None:
    bodies = asked(judged)
    in_flight, most = 0, 0

    def began(one: Any) -> None:
        nonlocal in_flight, most
        if one.url.endswith("/v1/classify"):
            in_flight += 1
            most = max(most, in_flight)

    def ended(one: Any) -> None:
        nonlocal in_flight
        in_flight -= one.url.endswith("/v1/classify")

    judged.on("request", began)
    judged.on("requestfinished", ended)
    judged.on("requestfailed", ended)
    judged.get_by_label("The next turn").press_sequentially("Wait, is there a vegetarian menu?", delay=20)
    expect(judged.get_by_text("After turn 8 of 8 (being typed)")).to_be_visible()
    judged.get_by_text("Judged after every turn").wait_for()
    assert bodies[-1]["input"][-1]["content"] == "Wait, is there a vegetarian menu?"
    assert most == 1 and len(bodies) < 10, "typing is not debounced"
    judged.get_by_label("The next turn").press("Enter")
    expect(judged.locator(".bubble")).to_have_count(8)
    judged.wait_for_timeout(600)
    assert len(bodies) < 10, "the same text is asked again once it is a turn"


def test_a_conversation_is_read_from_text_and_from_json(admin: Any) -> None:
    messages = [{"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": TURNS[1]}]
    for text in (f"Customer: {TURNS[0]}\nAgent: {TURNS[1]}", json.dumps({"messages": messages})):
        bodies = asked(admin)
        admin.get_by_role("button", name="Text", exact=True).click()
        admin.get_by_label("The conversation as text").fill(text)
        admin.get_by_role("button", name="Turns", exact=True).click()
        expect(admin.locator(".bubble-text")).to_have_text(TURNS)
        admin.get_by_text("Judged after every turn").wait_for()
        assert all(one["input"] == messages[: len(one["input"])] for one in bodies)
        admin.get_by_role("button", name="Clear").click()


def test_a_text_without_speakers_is_sent_as_it_is(admin: Any) -> None:
    bodies = asked(admin)
    admin.get_by_role("button", name="Text", exact=True).click()
    admin.get_by_label("The conversation as text").fill("You have won a prize.\nClick here!")
    admin.get_by_text("Judged after every turn").wait_for()
    assert bodies[-1]["input"] == "You have won a prize.\nClick here!"
    admin.get_by_role("button", name="Turns", exact=True).click()
    expect(admin.locator(".bubble-head").first).to_contain_text("Text")


def test_rows_keep_their_places_while_verdicts_arrive(admin: Any) -> None:
    admin.get_by_label("The next turn").fill(TURNS[0])  # what may move has moved: the timeline has its turn
    admin.get_by_text("Judged after every turn").wait_for()
    admin.evaluate(SHIFTS)
    places = "() => [...document.querySelectorAll('.row')].map((one) => one.dataset.classifier + one.offsetTop)"
    before = admin.evaluate(places)
    admin.get_by_label("The next turn").fill(f"{TURNS[0]} Near the station, please.")
    admin.wait_for_timeout(400)
    admin.get_by_text("Judged after every turn").wait_for()
    assert admin.evaluate(places) == before
    assert admin.evaluate("window.shifts") < 0.01


def test_sorting_and_finding_happen_on_demand(judged: Any) -> None:
    judged.get_by_label("Sort by").select_option("interest")
    first = judged.locator(".row").first
    expect(first).to_have_attribute("data-classifier", "issueResolved")
    judged.get_by_label("Find a classifier").fill("travel")
    expect(judged.locator(".row")).to_have_count(1)
    judged.get_by_label("Find a classifier").fill("nothing has this")
    expect(judged.get_by_text("No classifier has this")).to_be_visible()


def test_why_shows_the_prompt_its_tokens_and_the_turns_that_move_the_answer(judged: Any) -> None:
    row(judged, "issueResolved").get_by_role("button").click()
    judged.get_by_role("tab", name="Why").click()
    prompt = judged.locator("pre.code")
    expect(prompt).to_contain_text("Customer: Great, thank you, that was all. Bye!<|ask|>")
    judged.get_by_role("button", name="tokens").click()
    expect(judged.locator(".token").last).to_contain_text("verdict")
    judged.get_by_role("button", name="Find out").click()
    strongest = judged.get_by_role("list", name="The turns that move the answer most").locator("li").first
    expect(strongest).to_contain_text("7. Customer: Great, thank you")
    expect(judged.locator(".turn").nth(6).locator(".moved")).to_contain_text("points")
    judged.get_by_role("button", name="Remove the shading").click()
    expect(judged.locator(".shade")).to_have_count(0)


@pytest.mark.parametrize("language", ["curl", "Python", "OpenAI", "TypeSafe", "JavaScript"])
def test_code_asks_the_same(judged: Any, language: str) -> None:
    row(judged, "issueResolved").get_by_role("button").click()
    judged.get_by_role("tab", name="Code").click()
    judged.get_by_role("button", name=language, exact=True).click()
    code = judged.locator("pre.code").inner_text()
    assert "issueResolved" in code and "that was all" in code and "LORAPLEX_API_KEY" in code
    assert "secret" not in code, "the key is shown"
    if language == "Python":
        compile(code, "code", "exec")


def test_the_right_answer_is_recorded_and_accuracy_follows(judged: Any, api: httpx.Client) -> None:
    row(judged, "hasHitProblem").get_by_role("button").click()
    choices = judged.get_by_role("group", name="The right answer")
    choices.get_by_role("button", name="yes").click()
    expect(judged.get_by_text("Recorded: “yes” would have been right, not “no”.")).to_be_visible()
    expect(judged.locator(".accuracy")).to_contain_text("0 % right")
    choices.get_by_role("button", name="no").click()
    expect(judged.locator(".accuracy")).to_contain_text("100 % right")
    [stats] = api.get("/v1/routes/hasHitProblem/stats").json()["targets"]
    assert stats["accuracy"]["num_labelled"] == 1 and stats["accuracy"]["share"] == 1.0
    expect(row(judged, "hasHitProblem").locator(".mark.is-corrected")).to_be_visible()


def test_escape_closes_the_details_and_returns_to_the_row(judged: Any) -> None:
    button = row(judged, "issueResolved").get_by_role("button")
    button.click()
    expect(judged.get_by_role("heading", name="issueResolved")).to_be_focused()
    judged.keyboard.press("Escape")
    expect(judged.locator(".details")).to_have_count(0)
    expect(button).to_be_focused()


def test_a_question_in_ones_own_words_is_answered_beside_the_others(judged: Any) -> None:
    judged.get_by_text("Ask in your own words").click()
    judged.get_by_label("Your question").fill("Is the customer polite?")
    judged.get_by_role("button", name="Ask", exact=True).click()
    own = row(judged, "isTheCustomerPolite")
    expect(own.locator(".probability")).to_contain_text("%")
    own.get_by_role("button").click()
    expect(judged.locator(".warning").first).to_contain_text("zero shot")
    judged.get_by_role("button", name="Remove the question isTheCustomerPolite").click()
    expect(own).to_have_count(0)


def test_a_version_that_is_replaced_while_one_looks_answers_anew(judged: Any, api: httpx.Client) -> None:
    row(judged, "isTravelRelated").get_by_role("button").click()
    version = judged.locator(".facts code")
    before = version.inner_text()
    loaded = api.put("/v1/adapters/isTravelRelated", json={"source": "bundle-shared/issueResolved"})
    try:
        assert loaded.status_code == 200, loaded.text
        expect(version).to_have_text(loaded.json()["version"], timeout=30_000)
        assert loaded.json()["version"] != before
        expect(row(judged, "isTravelRelated").locator(".label")).to_have_text("yes")
    finally:
        api.put("/v1/adapters/isTravelRelated", json={"source": "bundle-shared/isTravelRelated"})
