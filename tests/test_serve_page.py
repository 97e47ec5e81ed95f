"""The web page in headless Chromium, against a service of this file's own that holds the contract of the real one."""

import asyncio
import datetime
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Locator, Page, expect, sync_playwright
from starlette.middleware.base import RequestResponseEndpoint

from cifar.data.decode import BadImage, decode
from cifar.serve.page import load_page
from tests.images import encode, png

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")

HOSTILE = "<img src=x onerror=alert(1)>"
CLASSES = ("red", "green", "blue", HOSTILE)
MAX_BYTES = 1 << 20
PNG = "image/png"


@dataclass
class Service:
    """Where the service listens, what it was asked, and what it is told to do next."""

    url: str = ""
    requests: list[tuple[str | None, list[int]]] = field(default_factory=list)
    """The version and the sizes in bytes of the images, of each request that was answered."""
    refusals: list[Response] = field(default_factory=list)
    """Sent for the next requests in place of answers."""
    at_once: int = 0
    """Most requests that were in work at one time."""
    versions: int = 1
    seconds: float = 0.0
    """How long an answer takes."""
    key: str | None = None
    """The one that it asks for."""


def answer(data: bytes) -> dict[str, Any]:
    """The class whose colour the image has most of, the last one where it has all; never an exception of `decode`."""
    try:
        colour = decode(data, 8, "crop").mean((0, 1)) / 255
    except BadImage as error:
        return {"error": str(error)}
    logits = np.append(7 * colour, 16 * colour.min() - 6)
    shares = (np.exp(logits) / np.exp(logits).sum()).tolist()
    ranked = sorted(zip(CLASSES, shares, strict=True), key=lambda pair: -pair[1])
    return {
        "label": ranked[0][0],
        "probability": ranked[0][1],
        "top_k": [{"label": label, "probability": share} for label, share in ranked],
        "probabilities": dict(zip(CLASSES, shares, strict=True)),
        "abstained": ranked[0][1] < 0.5,
    }


def version(number: int) -> dict[str, Any]:
    return {
        "version": f"20261121-12000{number}-abcd1234",
        "aliases": ["champion"] if number == 0 else [],
        "classes": CLASSES,
        "image_size": 32,
        "data": "colours",
        "published_at": datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC).isoformat(),
        "numbers": {"test_accuracy": 0.9321, "test_count": 10000, "val_accuracy": 0.9402},
    }


def build(service: Service) -> FastAPI:
    app = FastAPI()
    working = 0

    @app.middleware("http")
    async def guard(request: Request, go_on: RequestResponseEndpoint) -> Response:
        if service.key is None or request.url.path == "/" or request.headers.get("x-api-key") == service.key:
            return await go_on(request)
        return JSONResponse({"error": "this service needs an API key"}, 401, {"WWW-Authenticate": "Bearer"})

    @app.get("/")
    def page() -> HTMLResponse:
        html, headers = load_page()
        return HTMLResponse(html, headers=headers)

    @app.get("/models")
    def models() -> dict[str, Any]:
        versions = [version(number) for number in range(service.versions)]
        limits = {"max_image_bytes": MAX_BYTES, "max_images": 64, "top_k": 5}
        return {"name": "colours", "default": versions[0]["version"], "versions": versions, **limits}

    @app.post("/predict")
    async def predict(request: Request, version: str | None = None) -> Response:
        nonlocal working
        working += 1
        service.at_once = max(service.at_once, working)
        async with request.form() as form:
            uploads = [each for each in form.getlist("files") if not isinstance(each, str)]
            images = [(each.filename, await each.read()) for each in uploads]
        await asyncio.sleep(service.seconds)
        working -= 1
        if service.refusals:
            return service.refusals.pop(0)
        service.requests.append((version, [len(data) for _, data in images]))
        predictions = [{"name": name, **answer(data)} for name, data in images]
        answered = any("label" in each for each in predictions)
        asked = version or "20261121-120000-abcd1234"
        return JSONResponse(
            {"model": "colours", "version": asked, "predictions": predictions}, 200 if answered else 422
        )

    return app


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    service = Service()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(build(service), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        service.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        yield service
        server.should_exit = True
        thread.join()


@pytest.fixture
def service(running: Service) -> Service:
    running.__dict__.update(Service(url=running.url).__dict__)
    return running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """The page, opened. At the end: nothing was asked of any other origin, and nothing went wrong unsaid."""
    context = browser.new_context(locale="en-GB", timezone_id="UTC")
    page = context.new_page()
    page.set_default_timeout(5000)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("filechooser", lambda _: None)  # from now on: only to expect one can come too late for a key
    page.goto(service.url)
    expect(page.get_by_role("button", name="About the model")).to_be_visible()
    yield page
    assert [url for url in asked if not url.startswith((service.url, "data:", f"blob:{service.url}"))] == []
    # Chromium logs each answer of 4xx and 5xx and each lost connection, whatever the page makes of it.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []
    context.close()


def colour(name: str, rgb: tuple[int, int, int], side: int = 8) -> FilePayload:
    return {"name": name, "mimeType": PNG, "buffer": encode(Image.new("RGB", (side, side), rgb))}


RED = colour("tomato.png", (255, 0, 0))
GREEN = colour("leaf.png", (0, 255, 0))
WHITE = colour(f"{HOSTILE}.png", (255, 255, 255))
GREY = colour("fog.png", (90, 92, 90))
TEXT: FilePayload = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"not an image at all" * 10}


def pick(page: Page, *files: FilePayload) -> None:
    page.locator("#files").set_input_files(list(files))


def cards(page: Page) -> Locator:
    return page.locator(".card")


def card(page: Page, name: str) -> Locator:
    return cards(page).filter(has=page.get_by_role("heading", name=name, exact=True))


def hand_over(page: Page, event: str, file: FilePayload) -> None:
    """Drop or paste a file, as the browser would tell the page of it."""
    script = """([event, name, type, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name, { type }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(event === "drop"
            ? new DragEvent(event, { ...options, dataTransfer: data })
            : new ClipboardEvent(event, { ...options, clipboardData: data }));
    }"""
    page.evaluate(script, [event, file["name"], file["mimeType"], list(file["buffer"])])


def width(page: Page) -> int:
    """Of all there is on the page; a phone zooms out to show more than its own width."""
    return page.evaluate("document.documentElement.scrollWidth")


def test_empty_page_says_what_the_model_knows(page: Page) -> None:
    expect(page.get_by_role("heading", name="It knows 4 classes")).to_be_visible()
    expect(page.locator("#known li")).to_have_text(CLASSES)
    expect(page.get_by_text("32 \u00d7 32 pixels")).to_be_visible()
    expect(page.get_by_label("Version")).to_be_hidden()
    expect(page.locator("#results")).to_be_hidden()


@pytest.mark.parametrize("way", ["drop", "paste", "pick"])
def test_image_gets_its_answer(page: Page, way: str) -> None:
    if way == "pick":
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Drop images here").click()
        assert chooser.value.is_multiple()
        chooser.value.set_files([RED])
    else:
        hand_over(page, way, RED)
    answered = card(page, "tomato.png")
    expect(answered.locator(".label")).to_have_text("red")
    expect(answered.locator(".probability")).to_have_text(re.compile(r"^99\.8\s%$"))
    expect(answered.locator(".bars li")).to_have_count(4)
    expect(answered.locator(".bars li").first).to_have_text(re.compile(r"^red99\.8\s%$"))
    expect(answered.locator(".foot")).to_have_text(re.compile(r"^colours · 20261121-120000-abcd1234\d+\sms$"))
    expect(answered.locator("img")).to_have_class("pixels")
    expect(answered.get_by_text("not sure")).to_be_hidden()
    expect(page.locator("#live")).to_have_text(re.compile(r"tomato\.png: red, 99\.8\s%"))
    first, second = (answered.locator(".bars b").nth(place).bounding_box() for place in (0, 1))
    assert first
    assert second
    assert first["width"] > 20 * second["width"]


def test_several_with_bad_ones_each_get_what_is_theirs(page: Page, service: Service) -> None:
    large = colour("poster.png", (0, 0, 255))
    large["buffer"] += bytes(MAX_BYTES)
    empty: FilePayload = {"name": "empty.png", "mimeType": PNG, "buffer": b""}
    half: FilePayload = {"name": "half.png", "mimeType": PNG, "buffer": png(0)[:1500]}
    pick(page, RED, TEXT, empty, half, large, GREEN, GREY)
    expect(page.locator("#summary")).to_have_text("3 of 7, 4 failed")
    assert cards(page).locator("h3").all_text_contents() == [
        *("tomato.png", "notes.txt", "empty.png", "half.png", "poster.png", "leaf.png", "fog.png")
    ]
    expect(card(page, "leaf.png").locator(".label")).to_have_text("green")
    expect(card(page, "fog.png")).to_contain_text("not sure")
    expect(card(page, "notes.txt")).to_contain_text("Not an image")
    expect(card(page, "notes.txt")).to_contain_text("no preview")
    expect(card(page, "empty.png")).to_contain_text("The file is empty")
    expect(card(page, "half.png")).to_contain_text("Damaged or cut off")
    expect(card(page, "poster.png")).to_contain_text("takes up to 1 MB")
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)
    [(_, sizes)] = service.requests
    assert len(sizes) == 6, "what is too large is not sent"


def test_no_image_among_the_files(page: Page) -> None:
    """The service answers 422."""
    pick(page, TEXT)
    expect(card(page, "notes.txt")).to_contain_text("Use a JPEG")


def test_many_go_in_few_requests_two_at_a_time(page: Page, service: Service, tmp_path: Path) -> None:
    service.seconds = 0.1
    pick(page, *(colour(f"{number}.png", (255, 0, 0)) for number in range(36)))
    expect(page.locator("#summary")).to_have_text("36 of 36")
    assert sorted(len(sizes) for _, sizes in service.requests) == [4, 16, 16]
    assert service.at_once == 2
    service.requests.clear()
    large = [tmp_path / f"{number}.png" for number in range(10)]
    for path in large:
        path.write_bytes(RED["buffer"] + bytes(900_000))
    page.locator("#files").set_input_files(large)
    expect(page.locator("#summary")).to_have_text("46 of 46")
    assert sorted(len(sizes) for _, sizes in service.requests) == [2, 8], "at most 8 MB together"


def test_newest_come_first_and_clear_takes_all(page: Page) -> None:
    pick(page, RED)
    expect(page.locator("#summary")).to_have_text("1 of 1")
    pick(page, GREEN)
    expect(page.locator("#summary")).to_have_text("2 of 2")
    assert cards(page).locator("h3").all_text_contents() == ["leaf.png", "tomato.png"]
    page.get_by_role("button", name="Clear").click()
    expect(cards(page)).to_have_count(0)
    expect(page.locator("#known")).to_be_visible()
    expect(page.locator("#drop")).to_be_focused()


def test_clear_forgets_requests_on_their_way(page: Page, service: Service) -> None:
    service.seconds = 0.5
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("Looking")
    page.get_by_role("button", name="Clear").click()
    pick(page, GREEN)
    expect(page.locator("#summary")).to_have_text("1 of 1")
    assert cards(page).locator("h3").all_text_contents() == ["leaf.png"]
    expect(page.locator("#live")).not_to_contain_text("tomato.png")


def test_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="About the model")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="colours")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("button", name="About the model")).to_be_focused()
    page.keyboard.press("Tab")
    drop = page.get_by_role("button", name="Drop images here")
    expect(drop).to_be_focused()
    assert drop.evaluate("element => getComputedStyle(element).outlineWidth") == "3px"
    for key in ("Enter", "Space"):
        with page.expect_file_chooser() as chooser:
            page.keyboard.press(key)
        chooser.value.set_files([RED])
    expect(page.locator("#summary")).to_have_text("2 of 2")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Clear")).to_be_focused()
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(0)
    expect(drop).to_be_focused()


def test_busy_service_is_asked_again(page: Page, service: Service) -> None:
    service.refusals = [JSONResponse({"error": "busy"}, 503, {"Retry-After": "1"})]
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("Busy, trying again")
    start = time.perf_counter()
    expect(card(page, "tomato.png").locator(".label")).to_have_text("red")
    assert time.perf_counter() - start > 0.5, "waits as long as Retry-After says"


def test_lost_connection_can_be_tried_again(page: Page, service: Service) -> None:
    page.context.set_offline(True)
    pick(page, RED, GREEN)
    expect(card(page, "leaf.png")).to_contain_text("No connection")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again: leaf.png").click()
    expect(card(page, "leaf.png").locator(".label")).to_have_text("green")
    expect(card(page, "leaf.png")).to_be_focused()
    expect(card(page, "tomato.png")).to_contain_text("No connection")
    page.get_by_role("button", name="Try again: tomato.png").click()
    expect(page.locator("#summary")).to_have_text("2 of 2")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (JSONResponse({"error": f"send less {HOSTILE}"}, 413), f"send less {HOSTILE}"),
        (HTMLResponse("<h1>Bad gateway</h1>", 502), "The service answered with status 502."),
        (JSONResponse({"predictions": []}), "The service answered with status 200."),
    ],
)
def test_refused_request_says_why_and_can_be_tried_again(
    page: Page, service: Service, refusal: Response, words: str
) -> None:
    service.refusals = [refusal]
    pick(page, RED, GREEN)
    expect(cards(page).get_by_text(words, exact=True)).to_have_count(2)
    page.get_by_role("button", name="Try 2 again").click()
    expect(page.locator("#summary")).to_have_text("2 of 2")


def test_page_waits_for_a_service_that_starts_and_says_when_there_is_none(page: Page) -> None:
    page.route("**/models", lambda route: route.abort())
    page.reload()
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("can\u2019t be reached")
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("Waiting")
    starting = [{"status": 503, "headers": {"Retry-After": "0.5"}, "json": {"error": "starting"}}]
    page.unroute("**/models")
    page.route("**/models", lambda route: route.fulfill(**starting.pop()) if starting else route.continue_())
    notice.get_by_role("button", name="Try again").click()
    expect(notice).to_contain_text("The service is starting")
    expect(card(page, "tomato.png").locator(".label")).to_have_text("red")
    expect(notice).to_be_hidden()


def test_names_are_text(page: Page) -> None:
    pick(page, WHITE)
    answered = card(page, f"{HOSTILE}.png")
    expect(answered.locator(".label")).to_have_text(HOSTILE)
    expect(answered.locator(".bars span").first).to_have_text(HOSTILE)
    page.get_by_role("button", name="About the model").click()
    expect(page.locator("#classes li").last).to_have_text(HOSTILE)
    assert page.locator("img[src=x]").count() == 0


def test_policy_lets_nothing_else_run(page: Page, service: Service) -> None:
    """Even if a text became an element, its handler would not run, nor could a form or a request leave."""
    policy = load_page().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # Not on the page of the fixture: the refusals are logged as errors.
    other = page.context.new_page()
    other.goto(service.url)
    script = """async elsewhere => {
        document.body.insertAdjacentHTML("beforeend", "<img src=data: onerror='window.ran = true'>");
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        const left = await fetch(elsewhere, { mode: "no-cors" }).then(() => true, () => false);
        return [window.ran ?? false, left];
    }"""
    ran = other.evaluate(script, service.url.replace("127.0.0.1", "localhost") + "models")
    assert ran == [False, False]


def test_card_of_the_model(page: Page) -> None:
    page.get_by_role("button", name="About the model").click()
    shown = page.get_by_role("dialog", name="colours")
    for words in (
        *("93.2\u00a0%", "of 10,000 test images", "20261121-120000-abcd1234", "champion", "32 \u00d7 32 pixels"),
        "21 November 2026 at 12:00",
    ):
        expect(shown).to_contain_text(words)
    shown.get_by_role("button", name="Close").click()
    expect(shown).to_be_hidden()


def test_other_version_answers_anew(page: Page, service: Service) -> None:
    service.versions = 2
    page.reload()
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("20261121-120000")
    page.get_by_label("Version").select_option("20261121-120001-abcd1234")
    expect(card(page, "tomato.png")).to_contain_text("20261121-120001")
    assert [version for version, _ in service.requests] == [None, "20261121-120001-abcd1234"]
    page.get_by_role("button", name="About the model").click()
    expect(page.get_by_role("dialog")).to_contain_text("20261121-120001")


def test_dropped_link_says_what_to_do(page: Page) -> None:
    page.evaluate("""() => {
        const data = new DataTransfer();
        data.setData("text/uri-list", "https://example.invalid/cat.png");
        document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
    }""")
    expect(page.get_by_role("alert")).to_contain_text("Save the picture")


KEY_OF_SERVICE = "key-of-this-service-0123456789"
STORED = "[sessionStorage.length, localStorage.length, document.cookie.length]"


def key_field(page: Page) -> Locator:
    return page.get_by_label("API key", exact=True)


def test_without_a_key_of_the_service_nothing_is_asked_for(page: Page) -> None:
    expect(key_field(page)).to_be_hidden()
    expect(page.locator("#curl")).to_have_text(re.compile(r"^curl -F files=@cat\.png "))
    pick(page, RED)
    expect(page.locator("#summary")).to_have_text("1 of 1")
    assert page.evaluate(STORED) == [0, 0, 0]


def test_key_is_asked_for_and_kept_in_this_tab_alone(page: Page, service: Service) -> None:
    """With the keyboard alone, and images chosen before it are answered after it."""
    service.key = KEY_OF_SERVICE
    page.reload()
    field = key_field(page)
    expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    expect(field).to_have_accessible_description(re.compile("whoever runs it can give you one"))
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#curl")).to_contain_text('-H "X-API-Key: $CIFAR_API_KEY"')
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("Waiting")
    field.focus()
    page.keyboard.type(f" {KEY_OF_SERVICE} ")
    page.keyboard.press("Enter")
    expect(card(page, "tomato.png").locator(".label")).to_have_text("red")
    expect(field).to_be_hidden()
    expect(page.get_by_role("button", name="Drop images here")).to_be_focused()
    assert page.evaluate(STORED) == [1, 0, 0]
    assert KEY_OF_SERVICE not in page.content()
    page.reload()
    expect(page.get_by_role("button", name="About the model")).to_be_visible()
    expect(field).to_be_hidden()
    other = page.context.new_page()
    other.goto(service.url)
    expect(key_field(other)).to_be_focused()


@pytest.mark.parametrize(
    ("wrong", "words"), [("not-the-key-of-this-service", "does not accept this key"), ("schlüssel", "letters, digits")]
)
def test_wrong_key_says_so_and_is_asked_for_again(page: Page, service: Service, wrong: str, words: str) -> None:
    service.key = KEY_OF_SERVICE
    page.reload()
    field = key_field(page)
    field.fill(wrong)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#wrong")).to_contain_text(words)
    expect(field).to_have_attribute("aria-invalid", "true")
    assert page.evaluate("sessionStorage.getItem('cifar-api-key') || ''") == ""
    field.fill(KEY_OF_SERVICE)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="It knows 4 classes")).to_be_visible()
    expect(field).to_be_hidden()
    expect(field).to_have_value("")


def test_key_that_is_taken_back_is_asked_for_while_images_wait(page: Page, service: Service) -> None:
    service.key = KEY_OF_SERVICE
    pick(page, RED, *(colour(f"{number}.png", (0, 255, 0)) for number in range(40)))
    field = key_field(page)
    expect(field).to_be_focused()
    expect(page.locator("#summary")).to_have_text("0 of 41")
    assert service.requests == []
    field.fill(KEY_OF_SERVICE)
    page.keyboard.press("Enter")
    expect(page.locator("#summary")).to_have_text("41 of 41")
    assert sorted(len(sizes) for _, sizes in service.requests) == [9, 16, 16], "each image is sent once"


def test_pasting_a_key_is_not_pasting_a_picture(page: Page, service: Service) -> None:
    service.key = KEY_OF_SERVICE
    page.reload()
    paste = """element => element.dispatchEvent(
        new ClipboardEvent("paste", { bubbles: true, clipboardData: new DataTransfer() }))"""
    key_field(page).evaluate(paste)
    expect(page.locator("#notice")).to_be_hidden()
    page.locator("body").evaluate(paste)
    expect(page.locator("#notice")).to_contain_text("no picture")


def test_page_works_where_storage_is_forbidden(page: Page, service: Service) -> None:
    service.key = KEY_OF_SERVICE
    page.add_init_script("Object.defineProperty(window, 'sessionStorage', { get() { throw new Error('no'); } });")
    page.reload()
    key_field(page).fill(KEY_OF_SERVICE)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="It knows 4 classes")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(page: Page, service: Service, browser: Browser, scheme: Any) -> None:
    """At 360 pixels nothing is cut off, with the longest of names, and the camera is a tap away."""
    service.versions = 2
    context = browser.new_context(
        viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True, color_scheme=scheme
    )
    phone = context.new_page()
    phone.goto(service.url)
    expect(phone.get_by_role("button", name="Take a photo")).to_be_visible()
    assert phone.locator("#camera").get_attribute("capture") == "environment"
    assert width(phone) == 360
    service.key = KEY_OF_SERVICE
    phone.reload()
    key_field(phone).fill("k" * 300)
    phone.keyboard.press("Enter")
    expect(phone.locator("#wrong")).to_contain_text("does not accept")
    assert width(phone) == 360
    key_field(phone).fill(KEY_OF_SERVICE)
    phone.keyboard.press("Enter")
    long = colour("a" * 200 + ".png", (255, 255, 255))
    pick(phone, RED, long, TEXT)
    expect(phone.locator("#summary")).to_have_text("2 of 3, 1 failed")
    assert width(phone) == 360
    paper = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == (scheme == "dark")
    phone.get_by_role("button", name="About the model").tap()
    box = phone.get_by_role("dialog").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    context.close()


def test_reduced_motion_stops_all_animations(page: Page, service: Service) -> None:
    service.seconds = 0.5
    page.emulate_media(reduced_motion="reduce")
    pick(page, RED)
    expect(card(page, "tomato.png")).to_contain_text("Looking")
    assert page.evaluate("document.getAnimations().length") == 0
