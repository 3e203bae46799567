"""The page in a real browser (Debian's Chromium): rounds arrive, both methods are compared, errors are shown kindly."""

import json
import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
SHOTS = os.environ.get("AXN_SCREENSHOTS")  # a folder, to look at

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[("desktop", "light", 1200, 900), ("phone", "dark", 390, 844)], ids=["desktop", "phone"])
def page(request, browser, url):
    name, scheme, width, height = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    opened = context.new_page()
    complaints = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.complaints, opened.name, opened.is_phone = complaints, name, name == "phone"
    opened.goto(url)
    expect(opened.locator("#about")).to_contain_text("60 items")
    yield opened
    context.close()


PRESS_SLASH = """(modifiers) => {
  document.activeElement.blur();
  return document.dispatchEvent(new KeyboardEvent("keydown", { key: "/", cancelable: true, ...modifiers }));
}"""  # whether the browser may act on it


def shoot(page, name):
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}-{page.name}.png", full_page=True)


def ask(page, query, budget=20, rounds=4):
    page.locator("#budget").fill(str(budget))
    page.locator("#rounds").fill(str(rounds))
    page.keyboard.press("Escape")
    page.locator("#query").fill(query)
    page.keyboard.press("Enter")


def test_rounds_arrive_and_both_methods_are_compared(page, client):
    ask(page, "slow somebody sang on a stage")
    seen = set()
    status = page.locator("#status")
    for _ in range(400):
        seen.add(status.inner_text())
        if "each" in status.inner_text():
            break
        page.wait_for_timeout(20)
    assert len({said for said in seen if re.match(r"Round \d of 4: \d+ CE calls spent", said)}) >= 2
    body = {"query": "slow somebody sang on a stage", "top_k": 10, "budget": {"ce_calls": 20, "rounds": 4}}
    for method in ("axn", "rnr"):
        expected = client.post("/v1/search", json={**body, "method": method}).json()["results"]
        rows = page.locator(f"#{method} li")
        assert [row.get_attribute("data-id") for row in rows.all()] == [hit["id"] for hit in expected]
        shown = [score.inner_text().split("\n") for score in rows.locator(".score").all()]
        assert shown == [[f"{hit['score']:.2f}", f"round {hit['round']}"] for hit in expected]
        expect(page.locator(f"#{method} header p")).to_contain_text("20 CE calls")
    ours, theirs = ({row.get_attribute("data-id") for row in page.locator(f"#{m} li").all()} for m in ("axn", "rnr"))
    assert page.locator(".mark").count() == len(ours - theirs)
    assert page.locator("#chart circle").count() == 3  # after the first round there are fewer than ten results
    shoot(page, "compared")
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_two_columns_stand_beside_or_below_each_other(page):
    ask(page, "a fire at night")
    expect(page.locator("#status")).to_contain_text("each")
    left, right = (page.locator(f"#{method}").bounding_box() for method in ("axn", "rnr"))
    if page.is_phone:
        assert right["y"] >= left["y"] + left["height"]
    else:
        assert right["y"] == left["y"]
        assert right["x"] >= left["x"] + left["width"]


def test_by_keyboard_alone(page):
    page.locator("#examples button").first.focus()
    page.keyboard.press("/")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type("they carry water")
    page.keyboard.press("Tab")
    expect(page.locator("#top_k")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("3")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    expect(page.locator("#axn li")).to_have_count(3)
    expect(page.locator("#status")).to_contain_text("12 CE calls each")
    page.locator("#query").fill("sleepy")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator("#problem")).to_have_text("Stopped.")
    assert not page.evaluate(PRESS_SLASH, {})
    for modifier in ("ctrlKey", "metaKey", "altKey"):
        assert page.evaluate(PRESS_SLASH, {modifier: True}), "the browser's own shortcut"


@pytest.mark.parametrize("how", ["pressed", "search ends"])
def test_the_stop_button_leaves_the_keyboard_at_the_query(page, how):
    ask(page, "slow somebody sang")
    page.locator("#stop").focus()
    if how == "pressed":
        page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#query")).to_be_focused()


def test_an_example_can_be_clicked(page):
    page.locator("#examples button").first.click()
    expect(page.locator("#axn li").first).to_be_visible()
    expect(page.locator("#query")).to_have_value("they run often")


def test_errors_are_shown_kindly(page):
    ask(page, "broken")
    expect(page.locator("#problem")).to_contain_text("The model is broken; mend it.")
    shoot(page, "error")
    ask(page, "a fire", budget=3, rounds=9)
    expect(page.locator("#problem")).to_contain_text("Rounds=9 exceeds budget=3")
    ask(page, "a fire")
    expect(page.locator("#status")).to_contain_text("each")
    expect(page.locator("#problem")).to_be_hidden()


def test_a_number_that_is_missing_is_asked_for(page):
    page.locator("#query").fill("a fire")
    for name in ("top_k", "budget", "rounds"):
        value = page.locator(f"#{name}").input_value()
        page.locator(f"#{name}").fill("")
        page.locator("#query").press("Enter")
        expect(page.locator(f"#{name}")).to_be_focused()
        page.locator("#examples button").first.click()
        expect(page.locator(f"#{name}")).to_be_focused()
        page.locator(f"#{name}").fill(value)
    expect(page.locator("#status")).to_be_empty()
    expect(page.get_by_role("group", name="example queries")).to_be_visible()


def test_a_rival_that_fails_leaves_the_adaptive_search_alone(page):
    late = {"id": "1", "message": "no result within 9 ms; raise deadline_ms"}

    def fail(route):
        if route.request.post_data_json["method"] == "rnr":
            route.fulfill(status=504, body=json.dumps(late), content_type="application/json")
        else:
            route.continue_()

    page.route("**/v1/search", fail)
    ask(page, "slow somebody sang")
    expect(page.locator("#status")).to_contain_text("20 CE calls spent. Retrieve and rerank failed")
    expect(page.locator("#axn li")).to_have_count(10)
    expect(page.locator("#rnr header p")).to_have_text("No result within 9 ms; raise deadline_ms.")
    expect(page.locator("#problem")).to_be_hidden()
    shoot(page, "rival-failed")


def test_a_missing_key_is_asked_for_and_a_lost_server_is_said(page):
    refused = {"id": "1", "message": "no valid API key", "error": {"message": "no valid API key"}}

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer open":
            route.continue_()
        else:
            route.fulfill(status=401, body=json.dumps(refused), content_type="application/json")

    for path in ("**/v1/search", "**/info"):
        page.route(path, guard)
    page.reload()
    expect(page.locator("#problem")).to_contain_text("wants an API key")
    expect(page.locator("#about")).to_be_empty()
    ask(page, "a fire")
    expect(page.locator("#problem")).to_contain_text("wants an API key")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("open")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("each")
    expect(page.locator("#about")).to_contain_text("60 items")
    expect(page.locator("#budget")).to_have_value("20")
    expect(page.locator("#examples button").first).to_be_visible()
    page.unroute("**/v1/search")
    page.route("**/v1/search", lambda route: route.abort())
    ask(page, "a fire")
    expect(page.locator("#problem")).to_contain_text("The server cannot be reached")
