"""Makes the pictures of docs/console.md from the real page: `make console-pictures`, or pictures.py FOLDER."""

import json
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `import serving`, as in pytest

import serving
from chromium import ARGUMENTS, CHROMIUM

BUNDLE = serving.ROOT / "examples/support_desk/bundle-shared"
NUM_COLOURS = 128
SET = [
    ("Great, thank you, that was all. Bye!", "yes"),
    ("No, that is everything. Thanks for your help.", "yes"),
    ("I need a table for four in San Jose on Friday.", "no"),
    ("Is there anything else, maybe Mexican?", "no"),
    ("Perfect, thanks. Goodbye!", "yes"),
    ("How long does the evening flight take?", "no"),
    ("That does not help me at all.", "no"),
    ("Thanks, and could you book a taxi, too?", "no"),
]


def save(page: Any, path: Path) -> None:
    """Save what is on the screen in few colours, which makes the file a third as large."""
    picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(NUM_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


def opened(browser: Any, url: str, width: int, height: int, scheme: str) -> Any:
    """The page with the first example judged."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    page.goto(url)
    page.get_by_role("button", name="Try an example").click()
    page.get_by_text("Judged after every turn").wait_for()
    return page


def take(browser: Any, url: str, folder: Path) -> None:
    page = opened(browser, url, 1280, 960, "light")
    page.get_by_label("Sort by").select_option("interest")
    page.mouse.move(0, 0)
    save(page, folder / "judge-1280-light.png")
    page.close()

    page = opened(browser, url, 360, 1560, "light")
    save(page, folder / "judge-360-light.png")
    page.close()

    page = opened(browser, url, 1920, 1080, "dark")
    page.locator('[data-classifier="issueResolved"]').get_by_role("button").click()
    page.get_by_role("group", name="The right answer").get_by_role("button", name="yes").click()
    page.locator(".accuracy").wait_for()
    save(page, folder / "judge-1920-dark.png")
    page.close()

    page = opened(browser, url, 1280, 860, "dark")
    page.locator('[data-classifier="wantsAlternatives"]').get_by_role("button").click()
    page.locator(".bubble").nth(2).click()
    page.get_by_role("tab", name="Why").click()
    page.get_by_role("button", name="Find out").click()
    page.get_by_role("button", name="Find out").wait_for()
    page.locator("pre.code").wait_for()
    page.evaluate("scrollTo(0, 0)")
    save(page, folder / "why-1280-dark.png")
    for example in ("1", "2"):
        page.get_by_label("Load an example").select_option(example)
        page.get_by_text("Judged after every turn").wait_for()
    page.close()

    page = browser.new_page(viewport={"width": 1280, "height": 960}, color_scheme="light")
    page.set_default_timeout(60_000)
    page.goto(f"{url}/#compare")
    page.get_by_label("First").select_option("issueResolved")
    page.get_by_label("Second").select_option("transactionCompleted")
    lines = [json.dumps({"input": f"Customer: {text}", "labels": {"issueResolved": label}}) for text, label in SET]
    page.get_by_label("Conversations to compare on").fill("\n".join(lines))
    page.get_by_role("button", name="Compare on 8 conversations").click()
    page.locator(".figure").first.wait_for()
    page.get_by_role("button", name="Compare on 8 conversations").wait_for()
    save(page, folder / "compare-1280-light.png")
    page.close()

    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
    page.goto(f"{url}/#traffic")
    with httpx.Client(base_url=url, timeout=60) as client:
        for index in range(14):
            page.wait_for_timeout(700)
            for text, _ in SET[: 1 + index % len(SET)]:
                client.post("/v1/classify", json={"input": f"Customer: {text} {index}"}).raise_for_status()
    save(page, folder / "traffic-1280-dark.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as state, serving.serve(BUNDLE, "--state-dir", f"{state}/state") as server:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            take(browser, server.url, folder)
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
