"""The page tells what is wrong: no key, a wrong one, no server, an overload. It stays quick where there is much."""

import json
from typing import Any

import pytest

from loraplex.server import console

sync_api = pytest.importorskip("playwright.sync_api", reason="needs .venv-console: make test-console")
expect = sync_api.expect
pytestmark = pytest.mark.console
pytest_plugins = ["chromium"]

INFER_KEY = "infer-secret-0123456789"


def answer(route: Any, status: int, code: str, message: str, **headers: str) -> None:
    body = {"error": {"code": code, "message": message, "remedy": "wait"}}
    route.fulfill(status=status, content_type="application/json", body=json.dumps(body), headers=headers)


def test_a_key_is_asked_for_once_and_kept_in_this_tab_only(page: Any, expected: list[str]) -> None:
    expected.append("401")
    page.goto("/console")
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    page.get_by_label("API key").fill("not-a-key-of-this-server")
    page.get_by_role("button", name="Open the console").click()
    expect(page.get_by_role("alert")).to_contain_text("does not know this key")
    page.get_by_label("API key").fill(INFER_KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".row")
    page.reload()
    page.wait_for_selector(".row")
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert page.evaluate("Object.keys(sessionStorage)") == ["loraplex.key"]
    other = page.context.new_page()
    other.goto("/")
    expect(other.get_by_label("API key")).to_be_visible()
    other.close()
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_that_may_only_ask_judges_and_is_told_what_it_may_not(page: Any, expected: list[str]) -> None:
    expected.append("403")
    page.add_init_script(f"sessionStorage.setItem('loraplex.key', '{INFER_KEY}')")
    page.goto("/")
    page.get_by_role("button", name="Try an example").click()
    page.get_by_text("Judged after every turn").wait_for()
    page.get_by_role("link", name="Adapters").click()
    expect(page.get_by_role("alert")).to_contain_text("This key may not do that")


def test_an_overload_says_when_it_tries_again_and_does(admin: Any, expected: list[str]) -> None:
    expected.append("429")
    refusals = iter([429, 429])

    def refuse(route: Any) -> None:
        if next(refusals, None):
            answer(route, 429, "queue_full", "the queue is full", **{"Retry-After": "2"})
        else:
            route.continue_()

    admin.route("**/v1/classify", refuse)
    admin.get_by_role("button", name="Try an example").click()
    expect(admin.get_by_role("alert")).to_contain_text("The server is busy")
    expect(admin.get_by_role("button", name="Trying again in")).to_be_visible()
    admin.get_by_text("Judged after every turn").wait_for()
    expect(admin.get_by_role("alert")).to_have_count(0)


def test_while_the_model_loads_the_page_waits_for_it(page: Any, expected: list[str]) -> None:
    expected.append("503")
    loading = iter([True])

    def not_yet(route: Any) -> None:
        if next(loading, False):
            answer(route, 503, "not_ready", "the model is loading", **{"Retry-After": "1"})
        else:
            route.continue_()

    page.add_init_script(f"sessionStorage.setItem('loraplex.key', '{INFER_KEY}')")
    page.route("**/ready", not_yet)
    page.goto("/")
    expect(page.get_by_role("alert")).to_contain_text("The server is not ready yet")
    page.wait_for_selector(".row")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_server_that_is_gone_is_said_and_the_answers_stay(judged: Any, expected: list[str]) -> None:
    expected.append("ERR_")
    judged.route("**/v1/classify", lambda route: route.abort())
    judged.get_by_label("The next turn").fill("Hello?")
    expect(judged.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(judged.locator('[data-classifier="issueResolved"] .label')).to_have_text("yes")
    judged.unroute("**/v1/classify")
    expect(judged.get_by_role("alert")).to_have_count(0)


def test_text_of_a_conversation_is_text_and_never_markup(admin: Any) -> None:
    admin.get_by_label("The next turn").fill("<img src=x onerror=alert(1)> <b>bold</b> ${1+1}")
    admin.get_by_role("button", name="Add", exact=True).click()
    expect(admin.locator(".bubble-text")).to_have_text("<img src=x onerror=alert(1)> <b>bold</b> ${1+1}")
    assert admin.locator(".bubble img").count() == 0


def test_no_field_for_texts_lets_the_browser_send_or_keep_them(judged: Any) -> None:
    """A spelling service gets the text of a field, and a browser's memory of forms keeps it."""
    judged.get_by_text("Ask in your own words").click()
    for label in ("The next turn", "Your question", "The conversation as text", "Conversations to compare on"):
        if label == "The conversation as text":
            judged.get_by_role("button", name="Text", exact=True).click()
        elif label == "Conversations to compare on":
            judged.get_by_role("link", name="Compare").click()
        field = judged.get_by_label(label)
        assert (field.get_attribute("spellcheck"), field.get_attribute("autocomplete")) == ("false", "off"), label


def test_the_policy_lets_no_inline_script_run(admin: Any, expected: list[str]) -> None:
    expected.append("Content Security Policy")
    admin.evaluate("""() => { const made = document.createElement("script"); made.textContent = "window.ran = true";
        document.body.append(made); }""")
    assert admin.evaluate("window.ran") is None
    assert "unsafe" not in console.HEADERS["Content-Security-Policy"]


def test_a_thousand_classifiers_and_five_thousand_turns_stay_usable(admin: Any) -> None:
    """The page holds only what is on the screen."""
    names = [f"classifier{number}" for number in range(1000)]
    card = {"is_route": False, "version": "v", "question": "Is it so?", "type": "predicate", "labels": ["yes", "no"]}
    card |= {"descriptions": None, "threshold": None, "abstain_below": 0, "min_label_mass": 0, "max_length": None}
    cards = {"classifiers": [{"name": one, "roles": None, **card} for one in names], "answers_questions": False}
    verdict = {"label": "yes", "confidence": 0.9, "scores": {"yes": 0.9, "no": 0.1}, "label_mass": 1.0}
    verdict |= {"abstained": False, "adapter": {"name": "a", "version": "v"}}
    result = {
        "id": "cls-1",
        "verdicts": [{"id": one, "classifier": one, **verdict} for one in names],
        "usage": {"prompt_tokens": 1, "computed_tokens": 1, "cached_tokens": 0},
        "timings": {"tokenize_ms": 1, "queue_ms": 1, "compute_ms": 1, "total_ms": 3},
    }
    admin.route("**/v1/classifiers", lambda route: route.fulfill(json=cards))
    admin.route("**/v1/classify", lambda route: route.fulfill(json=result))
    admin.reload()
    expect(admin.locator(".count").first).to_have_text("1000")
    text = "\n".join(f"{('Customer', 'Agent')[number % 2]}: turn {number}" for number in range(5000))
    admin.get_by_role("button", name="Text", exact=True).click()
    paste = "(area, text) => { area.value = text; area.dispatchEvent(new Event('input', { bubbles: true })); }"
    admin.get_by_label("The conversation as text").evaluate(paste, text)  # fill() takes a minute for so many lines
    admin.get_by_role("button", name="Turns", exact=True).click()
    expect(admin.get_by_text("After turn 5000 of 5000")).to_be_visible()
    expect(admin.locator('[data-classifier="classifier0"] .label')).to_have_text("yes")
    assert admin.locator(".row").count() < 100 and admin.locator(".bubble").count() <= 150
    admin.evaluate("document.querySelector('.rows').scrollIntoView(false)")
    expect(admin.locator('[data-classifier="classifier999"]')).to_be_visible()
    admin.get_by_role("slider").press("Home")
    expect(admin.get_by_text("After turn 1 of 5000")).to_be_visible()
    expect(admin.locator(".bubble-text").first).to_have_text("turn 0")
