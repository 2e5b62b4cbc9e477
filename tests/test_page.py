"""The page of `pumice serve` in Debian's Chromium: each walk as a person takes it, and what the page must never do.

The walks run against a stub (page_stub.py). With PUMICE_PAGE_URL they run against the server at that address, which has
`pebble` and `pebble:1.5`; those that need a fault on demand are skipped there.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from page_stub import Stub, stub

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
expect = playwright.expect

PAGE = Path(__file__).resolve().parent.parent / "src" / "pumice" / "server" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH: apt install chromium"
)
PATIENCE_MS = 30_000
"""For one thing to appear; machines that test are busy."""
EXIF_ORIENTATION = 0x0112


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        yield running
        running.close()


@pytest.fixture
def faulty() -> Iterator[Stub]:
    """A server that does what the test wants."""
    with stub() as one:
        yield one


@pytest.fixture
def base_url(request: pytest.FixtureRequest) -> str:
    """Of any server with the models `pebble` and `pebble:1.5`."""
    if os.environ.get("PUMICE_PAGE_URL"):
        if "faulty" in request.fixturenames:
            pytest.skip("PUMICE_PAGE_URL names a real server, and this walk needs one that fails on demand")
        return os.environ["PUMICE_PAGE_URL"].rstrip("/")
    served: Stub = request.getfixturevalue("faulty")
    return served.url


class Visit:
    """A page in a fresh browser profile, and all that it asked for or complained about."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        self.url = url
        viewport = {"width": width, "height": height}
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.set_default_navigation_timeout(2 * PATIENCE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda each: self.requests.append(each.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda each: self.complaints.append(each.text) if each.type == "error" else None)

    def open(self) -> Visit:
        self.page.goto(self.url)
        expect(self.page.get_by_label("Model", exact=True)).not_to_have_value("")
        return self

    def attach(self, *files: dict[str, Any]) -> None:
        self.page.set_input_files("#files", list(files))
        expect(self.page.locator(".attached .remove")).to_have_count(len(files))

    def ask(self, text: str) -> None:
        self.page.get_by_label("Your question", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answered(self, count: int = 1) -> Any:
        """The answers, of which `count` have ended well."""
        expect(self.page.locator(".answer .timings")).to_have_count(count)
        return self.page.locator(".answer")

    def foreign(self) -> list[str]:
        """Addresses asked for that are not the server's."""
        return [each for each in self.requests if not each.startswith((self.url, "data:", f"blob:{self.url}"))]


@pytest.fixture
def visit(browser: Any, base_url: str) -> Iterator[Callable[..., Visit]]:
    """Opens pages; at the end none may have asked another server or broken the page's own policy."""
    visits: list[Visit] = []

    def begin(**how: Any) -> Visit:
        visits.append(Visit(browser, base_url, **how))
        expect.set_options(timeout=PATIENCE_MS)
        return visits[-1].open()

    yield begin
    for each in visits:
        each.context.close()
    for each in visits:
        assert each.foreign() == []
        assert not [words for words in each.complaints if "Failed to load resource" not in words]


def picture(name: str = "red.png", size: tuple[int, int] = (64, 48), form: str = "PNG", **how: Any) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, form, **how)
    return {"name": name, "mimeType": f"image/{form.lower()}", "buffer": file.getvalue()}


def sent(server: Stub, at: int = -1) -> list[bytes]:
    """The pictures of a question's last message, as they arrived."""
    return [base64.b64decode(each) for each in server.bodies("/api/chat")[at]["messages"][-1]["images"]]


DROP = """([kind, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([bytes], name, { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true })
    : new DragEvent(kind, { dataTransfer: carried, bubbles: true, cancelable: true });
  document.querySelector("#main").dispatchEvent(event);
}"""


def bring(visit: Visit, kind: str, file: dict[str, Any]) -> None:
    visit.page.evaluate(DROP, [kind, file["name"], base64.b64encode(file["buffer"]).decode()])


# ---- what the server says without a browser


def fetched(url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {name.lower(): value for name, value in error.headers.items()}, error.read()


def test_the_root_is_a_page_for_browsers_and_ollama_for_all_others(base_url: str) -> None:
    for accept in ("*/*", "application/json", ""):
        status, headers, body = fetched(f"{base_url}/", Accept=accept)
        assert (status, body) == (200, b"Ollama is running")
        assert headers["content-type"] == "text/plain; charset=utf-8"
    status, headers, body = fetched(f"{base_url}/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert body == (PAGE / "index.html").read_bytes()
    assert headers["vary"] == "Accept"
    head = urllib.request.Request(f"{base_url}/", method="HEAD")
    with urllib.request.urlopen(head) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_every_file_of_the_page_comes_with_its_type_and_policy(base_url: str) -> None:
    types = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
    names = [path.name for path in PAGE.iterdir()]
    assert len(names) > 15
    for name in names:
        status, headers, body = fetched(f"{base_url}/page/{name}")
        assert (status, body) == (200, (PAGE / name).read_bytes())
        assert headers["content-type"] == types.get(Path(name).suffix, headers["content-type"])
        assert headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_a_file_that_is_known_is_not_sent_again(base_url: str) -> None:
    url = f"{base_url}/page/app.js"
    tag = fetched(url)[1]["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        assert fetched(url, **{"If-None-Match": known})[::2] == (304, b"")
    assert fetched(url, **{"If-None-Match": '"other"'})[0] == 200


@pytest.mark.parametrize(
    "name",
    ["", "..%2fstatic.py", "%2e%2e/static.py", "static.py", "..%5cstatic.py", "/etc/passwd", "app.js%00", "APP.JS"],
)
def test_no_other_file_can_be_named(base_url: str, name: str) -> None:
    status, _, body = fetched(f"{base_url}/page/{name}")
    assert status == 404
    assert b"def add_page" not in body


def test_the_page_writes_no_markup_and_names_no_other_server() -> None:
    """What the policy forbids is not tried either, and every file that is named is there."""
    for path in PAGE.glob("*.js"):
        code = path.read_text(encoding="utf-8")
        assert len(code.splitlines()) < 450
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function"
        assert not re.search(markup, code), path.name
        assert set(re.findall(r"https?://[^\"'`\s]+", code)) <= {"http://www.w3.org/2000/svg"}, path.name
        for named in re.findall(r'from "\./([^"]+)"', code):
            assert (PAGE / named).is_file(), f"{path.name} imports {named}"
    markup = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"\sstyle=|\son[a-z]+=|<style|<script(?![^>]*\ssrc=)", markup)
    for named in re.findall(r'(?:src|href)="([^#"]+)"', markup):
        assert (PAGE.parent / named).is_file(), named


# ---- walks


@needs_chromium
def test_first_visit(visit: Callable[..., Visit]) -> None:
    page = visit().page
    expect(page.get_by_role("heading", name="Ask about your pictures")).to_be_visible()
    expect(page.locator("#promise")).to_contain_text("stay on it: nothing is uploaded")
    expect(page.get_by_role("group", name="Sample questions").get_by_role("button")).to_have_count(2)
    expect(page.get_by_label("Your question", exact=True)).to_be_focused()
    expect(page.get_by_role("navigation", name="Chats")).to_contain_text("kept in this browser only")
    expect(page.get_by_label("Model", exact=True)).to_contain_text("pebble")


@needs_chromium
def test_a_sample_question_brings_its_picture(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.page.get_by_role("button", name="What does the sign say?").click()
    expect(there.page.locator(".attached")).to_contain_text("384 × 384")
    there.page.keyboard.press("Enter")
    expect(there.answered()).to_contain_text("STOP")
    assert sent(faulty) == [(PAGE / "sample-sign.png").read_bytes()]


@needs_chromium
def test_a_sample_question_is_asked_about_ones_own_picture(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    mine = picture()
    there.attach(mine)
    there.page.get_by_role("button", name="Describe the picture.").click()
    there.page.keyboard.press("Enter")
    there.answered()
    assert sent(faulty) == [mine["buffer"]]


@needs_chromium
def test_pictures_are_dropped_and_pasted_and_asked_about(visit: Callable[..., Visit]) -> None:
    there = visit()
    bring(there, "dragenter", picture())
    expect(there.page.get_by_text("Drop pictures to ask about them")).to_be_visible()
    bring(there, "drop", picture("dropped.png"))
    bring(there, "paste", picture("pasted.png"))
    expect(there.page.get_by_text("Drop pictures to ask about them")).to_be_hidden()
    expect(there.page.locator(".attached .name")).to_have_text(["dropped.png", "pasted.png"])
    there.page.get_by_role("button", name="Remove dropped.png").click()
    expect(there.page.locator(".attached .name")).to_have_text(["pasted.png"])
    there.ask("What is it?")
    expect(there.answered().locator(".text")).not_to_be_empty()
    expect(there.page.locator(".asked .bubble")).to_have_text("What is it?")
    expect(there.page.locator(".asked img")).to_have_count(1)
    expect(there.page.locator("#announcer")).to_contain_text("pebble:1.6:")


@needs_chromium
def test_a_conversation_is_sent_whole_and_its_pictures_with_it(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    first, second = picture("1.png"), picture("2.png", (32, 32))
    there.attach(first, second)
    there.ask("Which is larger?")
    answer = there.answered().locator(".text").inner_text()
    there.page.reload()
    expect(there.page.get_by_label("Model", exact=True)).not_to_have_value("")
    there.ask("And why?")
    there.answered(2)
    told = faulty.bodies("/api/chat")[-1]["messages"]
    images = [base64.b64encode(each["buffer"]).decode() for each in (first, second)]
    assert told == [
        {"role": "user", "content": "Which is larger?", "images": images},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And why?", "images": []},
    ]


@needs_chromium
def test_a_large_picture_is_scaled_down_and_upright(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned by a quarter: 5000 × 1000 as it lies, 1000 × 5000 as it is seen
    there.attach(picture("camera.jpg", (5000, 1000), "JPEG", exif=exif))
    expect(there.page.locator(".attached")).to_contain_text("819 × 4096")
    expect(there.page.locator(".attached")).to_contain_text("scaled down from 1000 × 5000")
    there.ask("What is it?")
    there.answered()
    (arrived,) = [Image.open(io.BytesIO(each)) for each in sent(faulty)]
    assert (arrived.size, arrived.format) == ((819, 4096), "JPEG")
    assert EXIF_ORIENTATION not in arrived.getexif()


@needs_chromium
def test_what_is_no_picture_is_refused_in_words(visit: Callable[..., Visit]) -> None:
    there = visit()
    there.page.set_input_files("#files", [{"name": "notes.txt", "mimeType": "image/png", "buffer": b"hello"}])
    expect(there.page.get_by_role("alert")).to_contain_text("notes.txt is not a picture that can be read")
    there.page.set_input_files("#files", [picture() | {"name": "torn.png", "buffer": picture()["buffer"][:40]}])
    expect(there.page.get_by_role("alert")).to_contain_text("torn.png could not be opened: it is damaged")
    expect(there.page.locator(".attached")).to_be_hidden()


@needs_chromium
def test_a_photo_that_only_the_server_can_read_is_sent_as_it_is(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    there.attach({"name": "IMG_1.HEIC", "mimeType": "image/heic", "buffer": heic})
    there.ask("What is it?")
    there.answered()
    assert sent(faulty) == [heic]


@needs_chromium
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped(visit: Callable[..., Visit], faulty: Stub, how: str) -> None:
    there = visit()
    there.ask("Go on and on.")
    expect(there.page.locator(".answer .text")).to_contain_text("so on")
    assert there.page.locator(".answer").get_attribute("aria-busy") == "true"
    if how == "button":
        there.page.get_by_role("button", name="Stop").click()
    else:
        there.page.keyboard.press("Escape")
    expect(there.page.locator(".answer")).to_contain_text("Stopped.")
    expect(there.page.locator(".answer")).to_have_attribute("aria-busy", "false")
    words = there.page.locator(".answer .text").inner_text()
    there.ask("What does the sign say?")
    there.answered()
    assert faulty.bodies("/api/chat")[-1]["messages"][1]["content"].strip() == words.strip()


@needs_chromium
def test_who_stops_an_answer_asks_the_next_at_once(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.ask("Go on and on.")
    expect(there.page.locator(".answer .text")).to_contain_text("so on")
    there.page.get_by_label("Your question", exact=True).fill("What does the sign say?")
    there.page.evaluate("""() => {  // in one task, so that the end of the first is not saved yet
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        document.querySelector("#composer").requestSubmit();
    }""")
    expect(there.answered().last).to_contain_text("STOP")
    expect(there.page.locator(".answer").first).to_contain_text("Stopped.")


@needs_chromium
def test_who_stops_two_answers_asks_again_at_once(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.page.get_by_role("button", name="Compare").click()
    there.page.get_by_label("Second model").select_option("pebble:1.5")
    there.ask("Go on and on.")
    expect(there.page.locator(".answer .text").first).to_contain_text("so on")
    asked = len(faulty.bodies("/api/chat"))
    there.page.evaluate("""() => {  // as soon as there is a button, while the second answer is still to be saved
        const seen = new MutationObserver(() => {
            const again = document.querySelector(".again");
            if (!again) return;
            seen.disconnect();
            again.click();
            document.body.dataset.again = "pressed";
        });
        seen.observe(document.querySelector("#turns"), { childList: true, subtree: true });
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
    }""")
    expect(there.page.locator("body")).to_have_attribute("data-again", "pressed")
    expect(there.page.locator(".answer").first).to_have_attribute("aria-busy", "true")
    expect(there.page.locator(".answer .text").first).to_contain_text("so on")
    expect(there.page.locator("#trouble")).to_be_hidden()
    assert len(faulty.bodies("/api/chat")) == asked + 1


@needs_chromium
def test_a_chat_that_is_left_takes_its_question_along(visit: Callable[..., Visit], faulty: Stub) -> None:
    """Who goes to a new chat while a question waits for the end of another does not ask it there."""
    there = visit()
    there.ask("Go on and on.")
    expect(there.page.locator(".answer .text")).to_contain_text("so on")
    there.page.get_by_label("Your question", exact=True).fill("What does the sign say?")
    asked = len(faulty.bodies("/api/chat"))
    there.page.evaluate("""() => {
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        document.querySelector("#composer").requestSubmit();
        document.querySelector("#new-chat").click();
    }""")
    expect(there.page.locator(".answer")).to_have_count(0)
    there.ask("Hello?")
    expect(there.answered()).to_have_count(1)
    assert len(faulty.bodies("/api/chat")) == asked + 1
    assert [each["content"] for each in faulty.bodies("/api/chat")[-1]["messages"]] == ["Hello?"]


@needs_chromium
def test_what_is_shown_as_ended_is_in_the_history(visit: Callable[..., Visit]) -> None:
    there = visit()
    there.page.evaluate("""async () => {
        const request = indexedDB.open("pumice", 1);
        await new Promise((resolve) => (request.onsuccess = resolve));
        const seen = new MutationObserver(() => {
            if (!document.querySelector(".timings")) return;
            seen.disconnect();
            const all = request.result.transaction("chats").objectStore("chats").getAll();
            all.onsuccess = () => (document.body.dataset.kept = all.result[0].turns[0].answers[0].state);
        });
        seen.observe(document.querySelector("#turns"), { childList: true, subtree: true });
    }""")
    there.ask("What does the sign say?")
    expect(there.page.locator("body")).to_have_attribute("data-kept", "done")


@needs_chromium
def test_an_answer_goes_on_while_another_chat_is_open(visit: Callable[..., Visit], faulty: Stub) -> None:
    faulty.pause_s = 0.3
    there = visit()
    there.ask("What does the sign say?")
    expect(there.page.locator(".answer .text")).to_contain_text("The sign")
    there.page.get_by_role("button", name="New chat").click()
    expect(there.page.locator(".answer")).to_have_count(0)
    there.ask("Meanwhile?")
    expect(there.page.get_by_role("alert")).to_contain_text("An answer is still being written")
    there.page.get_by_role("button", name="What does the sign say?", exact=True).click()
    expect(there.answered()).to_contain_text("on a red board.")
    assert len(faulty.bodies("/api/chat")) == 1


@needs_chromium
def test_a_question_is_asked_again_of_another_model(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    for count, text in enumerate(("One.", "Two."), 1):
        there.ask(text)
        there.answered(count)
    expect(there.page.get_by_role("button", name="Ask again")).to_have_count(1)  # of the last turn alone
    there.page.get_by_label("Model", exact=True).select_option("pebble:1.5")
    there.page.get_by_role("button", name="Ask again").click()
    expect(there.page.locator(".answer .who")).to_have_text(["pebble:1.6", "pebble:1.5"])
    there.answered(2)
    assert [len(each["messages"]) for each in faulty.bodies("/api/chat")] == [1, 3, 3]


@needs_chromium
def test_two_models_are_asked_the_same(visit: Callable[..., Visit]) -> None:
    there = visit()
    there.page.get_by_role("button", name="Compare").click()
    there.page.get_by_label("Second model").select_option("pebble:1.5")
    there.attach(picture())
    there.ask("What colour is it?")
    answers = there.answered(2)
    expect(answers.nth(0).get_by_role("heading")).to_have_text("pebble:1.6")
    expect(answers.nth(1).get_by_role("heading")).to_have_text("pebble:1.5")
    left, right = answers.nth(0).bounding_box(), answers.nth(1).bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


@needs_chromium
def test_each_of_two_models_keeps_its_own_conversation(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.page.get_by_role("button", name="Compare").click()
    there.attach(picture())
    there.ask("break here")
    expect(there.page.locator(".answer .problem")).to_have_count(2)
    there.ask("And now?")
    there.answered(2)
    one, two = faulty.bodies("/api/chat")[-2:]
    assert [one["model"], two["model"]] == ["pebble:1.6", "pebble:1.5"]
    # An answer that broke off is still what was said.
    assert [each["content"] for each in one["messages"]] == ["break here", "The sign says", "And now?"]
    assert [each["content"] for each in two["messages"]] == ["break here", "The sign", "And now?"]
    assert one["messages"][0]["images"] == two["messages"][0]["images"] != []


@needs_chromium
def test_what_the_model_sees(visit: Callable[..., Visit]) -> None:
    there = visit()
    there.attach(picture("wide.png", (300, 200)))
    there.page.get_by_role("button", name="What the model sees").click()
    dialog = there.page.get_by_role("dialog", name="What the model sees")
    expect(dialog).to_contain_text("300 × 200 pixels")
    expect(dialog).to_contain_text(re.compile(r"[\d,]+ tokens"))
    expect(dialog.get_by_alt_text("wide.png, whole, as the model sees it")).to_be_visible()
    expect(dialog.get_by_alt_text(re.compile(r"Tile in row \d, column \d of wide.png")).first).to_be_visible()
    assert dialog.locator("img").evaluate_all("(all) => all.every((each) => each.naturalWidth > 0)")
    there.page.keyboard.press("Escape")
    there.ask("What is it?")
    there.answered()
    there.page.get_by_role("button", name="What the model sees of wide.png").click()
    expect(dialog).to_contain_text("300 × 200 pixels")


@needs_chromium
def test_timings_tell_each_phase(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.attach(picture())
    there.ask("What does the sign say?")
    answer = there.answered()
    answer.locator("summary").click()
    rows = answer.get_by_role("row").filter(has=there.page.locator("td"))
    # The stub: load 210 ms; the prompt 640 ms, of which the picture 410 ms; 2928 + 31 tokens, of which 12 known.
    expect(rows.nth(0)).to_have_text(re.compile("Load the model0.2 s"))
    expect(rows.nth(1)).to_have_text(re.compile("Look at pictures0.4 s2,928"))
    expect(rows.nth(2)).to_have_text(re.compile("Read the prompt0.2 s2,947"))
    expect(rows.nth(3)).to_have_text(re.compile(r"Write the answer.*s11[\d.,]+"))
    expect(answer).to_contain_text("12 tokens of the prompt were known from before.")


@needs_chromium
def test_pull_shows_progress_and_brings_the_model(visit: Callable[..., Visit], faulty: Stub) -> None:
    faulty.pause_s = 0.06
    there = visit()
    there.page.get_by_role("button", name="Models", exact=True).click()
    dialog = there.page.get_by_role("dialog", name="Models")
    expect(dialog.locator(".installed")).to_contain_text("in memory")
    dialog.get_by_label("Pull a model").fill("llava:7b")
    there.page.keyboard.press("Enter")
    bar = dialog.get_by_role("progressbar").first
    expect(bar).to_be_visible()
    expect(dialog.locator(".layers")).to_contain_text(re.compile(r"GB of 4\.1 GB · [\d.]+ .B/s · .* left"))
    expect(dialog.get_by_role("status")).to_have_text("llava:7b is here.")
    assert bar.evaluate("(each) => each.value / each.max") == 1
    expect(dialog.locator(".installed")).to_contain_text("llava:7b")
    there.page.keyboard.press("Escape")
    expect(there.page.get_by_label("Model", exact=True)).to_have_value("llava:7b")


@needs_chromium
def test_pull_of_an_absent_model_says_why(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.page.get_by_role("button", name="Models", exact=True).click()
    dialog = there.page.get_by_role("dialog", name="Models")
    dialog.get_by_label("Pull a model").fill("absent")
    dialog.get_by_role("button", name="Pull").click()
    expect(dialog.get_by_role("alert")).to_have_text("pull model manifest: file does not exist")
    expect(dialog.get_by_role("button", name="Pull")).to_be_enabled()


@needs_chromium
def test_a_pull_is_stopped(visit: Callable[..., Visit], faulty: Stub) -> None:
    faulty.pause_s = 0.3
    there = visit()
    there.page.get_by_role("button", name="Models", exact=True).click()
    dialog = there.page.get_by_role("dialog", name="Models")
    dialog.get_by_label("Pull a model").fill("llava:13b")
    dialog.get_by_role("button", name="Pull").click()
    dialog.get_by_role("button", name="Stop").click()
    expect(dialog.get_by_role("alert")).to_contain_text("Pull llava:13b again and it goes on where it stopped.")
    assert "llava:13b" not in faulty.models


@needs_chromium
def test_reload_keeps_history(visit: Callable[..., Visit]) -> None:
    there = visit()
    there.attach(picture())
    there.ask("What colour is it?")
    answer = there.answered().locator(".text").inner_text()
    there.page.reload()
    expect(there.page.locator(".answer .text")).to_have_text(answer)
    expect(there.page.locator(".asked img")).to_have_js_property("complete", True)
    assert there.page.locator(".asked img").evaluate("(image) => image.naturalWidth") == 64
    there.page.get_by_role("button", name="New chat").click()
    expect(there.page.get_by_role("heading", name="Ask about your pictures")).to_be_visible()
    there.page.get_by_role("navigation").get_by_role("button", name="What colour is it?", exact=True).click()
    expect(there.page.locator(".answer .text")).to_have_text(answer)


@needs_chromium
def test_history_is_renamed_and_deleted(visit: Callable[..., Visit]) -> None:
    there = visit()
    for text in ("First question", "Second question"):
        there.page.get_by_role("button", name="New chat").click()
        there.attach(picture())
        there.ask(text)
        there.answered()
    chats = there.page.locator(".chats .chat")
    expect(chats).to_have_text(["Second question", "First question"])
    chats.nth(1).hover()  # what can be done with a chat appears under the pointer
    there.page.get_by_role("button", name="Rename First question").click()
    there.page.get_by_label("Name", exact=True).fill("Renamed")
    there.page.keyboard.press("Enter")
    expect(chats).to_have_text(["Second question", "Renamed"])
    there.page.get_by_role("button", name="Delete Second question").click()
    there.page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(chats).to_have_count(2)
    there.page.get_by_role("button", name="Delete Second question").click()
    there.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chats).to_have_text(["Renamed"])
    assert there.page.evaluate(COUNT_KEPT) == [1, 1]
    expect(there.page.get_by_role("heading", name="Ask about your pictures")).to_be_visible()
    there.page.get_by_role("button", name="Delete all chats").click()
    there.page.get_by_role("dialog").get_by_role("button", name="Delete all").click()
    expect(chats).to_have_count(0)
    assert there.page.evaluate(COUNT_KEPT) == [0, 0]


COUNT_KEPT = """async () => {
  const done = (request) => new Promise((resolve) => (request.onsuccess = () => resolve(request.result)));
  const stores = (await done(indexedDB.open("pumice", 1))).transaction(["chats", "pictures"]);
  return Promise.all(["chats", "pictures"].map((name) => done(stores.objectStore(name).count())));
}"""


@needs_chromium
def test_wrong_key_then_right_key(visit: Callable[..., Visit], faulty: Stub, browser: Any) -> None:
    faulty.key = "right"
    there = Visit(browser, faulty.url)
    there.page.goto(faulty.url)
    dialog = there.page.get_by_role("dialog", name="This server asks for a key")
    expect(dialog.get_by_role("alert")).to_be_hidden()
    dialog.get_by_label("API key").fill("wrong")
    there.page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("the API key is missing or wrong")
    dialog.get_by_label("API key").fill("right")
    there.page.keyboard.press("Enter")
    expect(there.page.get_by_label("Model", exact=True)).to_have_value("pebble:1.6")
    expect(dialog).to_be_hidden()
    there.ask("What is it?")
    there.answered()
    there.page.reload()  # kept as long as the tab
    expect(there.page.get_by_label("Model", exact=True)).to_have_value("pebble:1.6")
    assert there.page.evaluate("() => JSON.stringify({ ...localStorage })").count("right") == 0
    there.context.close()


@needs_chromium
def test_the_server_goes_and_comes_back(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.ask("Go on and on.")
    expect(there.page.locator(".answer .text")).to_contain_text("so on")
    faulty.stop()
    banner = there.page.get_by_role("alert").filter(has_text="The server does not answer")
    expect(banner).to_be_visible()
    expect(there.page.locator(".answer .problem")).to_contain_text("broke")
    faulty.start()
    banner.get_by_role("button", name="Try now").click()
    expect(banner).to_be_hidden()
    there.page.get_by_role("button", name="Ask again").click()
    expect(there.page.locator(".answer .text")).to_contain_text("so on")
    there.page.keyboard.press("Escape")
    there.ask("What does the sign say?")
    expect(there.answered().last).to_contain_text("STOP")


@needs_chromium
def test_the_page_notices_by_itself_that_the_server_is_back(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    faulty.stop()
    there.ask("Hello?")
    banner = there.page.get_by_role("alert").filter(has_text="The server does not answer")
    expect(banner).to_be_visible()
    faulty.models = ["llava:latest"]
    faulty.start()
    expect(banner).to_be_hidden()
    expect(there.page.get_by_label("Model", exact=True)).to_have_value("llava:latest")


@needs_chromium
def test_what_the_server_refuses_is_told_in_its_words(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    faulty.models = ["another:latest"]
    there.ask("Hello?")
    expect(there.page.locator(".answer .problem")).to_have_text("model 'pebble:1.6' not found")
    faulty.models = ["pebble:1.6"]
    there.ask("break")
    expect(there.page.locator(".answer .problem").last).to_contain_text("3.1 GB are needed, 2.0 GB are free")
    expect(there.page.locator(".answer .text").last).to_have_text("The sign says")
    assert [each["content"] for each in faulty.bodies("/api/chat")[-1]["messages"]] == ["break"]


@needs_chromium
def test_without_a_model_the_page_says_what_to_do(visit: Callable[..., Visit], faulty: Stub, browser: Any) -> None:
    faulty.models = ["all-minilm:latest"]  # which answers nothing
    there = Visit(browser, faulty.url)
    there.page.goto(faulty.url)
    expect(there.page.get_by_label("Model", exact=True)).to_contain_text("no model yet")
    there.ask("Hello?")
    expect(there.page.get_by_role("alert")).to_contain_text("There is no model on this server yet")
    expect(there.page.get_by_label("Your question", exact=True)).to_have_value("Hello?")
    assert faulty.asked == []
    there.context.close()


@needs_chromium
def test_a_browser_that_keeps_nothing_still_asks(browser: Any, base_url: str) -> None:
    there = Visit(browser, base_url)
    for name in ("localStorage", "sessionStorage", "indexedDB"):
        refuse = (
            f"Object.defineProperty(window, '{name}', {{ get() {{ throw new DOMException('no', 'SecurityError'); }} }})"
        )
        there.page.add_init_script(refuse)
    there.open()
    expect(there.page.get_by_role("alert")).to_contain_text("This browser keeps no history")
    there.attach(picture())
    there.ask("What is it?")
    expect(there.answered().locator(".text")).not_to_be_empty()
    assert there.complaints == []
    there.context.close()


@needs_chromium
def test_what_a_model_writes_is_text(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.ask("script")
    text = there.answered().locator(".text")
    expect(text).to_contain_text("<script>document.title = 'taken'</script>")
    expect(text).to_contain_text("![x](http://evil.example/b.png)")
    expect(text.locator("strong")).to_have_text("bold")
    expect(text.locator("code")).to_have_text("code")
    assert text.locator("img, script, a").count() == 0
    assert "taken" not in there.page.title()
    assert there.foreign() == []
    there.page.reload()  # from history too
    expect(text).to_contain_text("onerror=alert(1)>")
    assert text.locator("img, script, a").count() == 0


@needs_chromium
def test_the_policy_stops_what_the_page_would_not_do(browser: Any, base_url: str) -> None:
    """Were markup of a model's ever to reach the page, its scripts, styles and pictures would still do nothing."""
    there = Visit(browser, base_url).open()
    there.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'taken'";
          const image = document.createElement("img");
          image.src = "http://evil.example/leak.png";
          const frame = document.createElement("iframe");
          frame.src = "http://evil.example/";
          document.querySelector("main").append(script, image, frame);
        }"""
    )
    there.page.wait_for_timeout(500)
    assert there.page.title() == "pumice"
    policy = [words for words in there.complaints if "Content Security Policy" in words]
    assert len(policy) == 3  # the script, the picture and the frame
    assert there.page.locator("main img[src*=evil]").evaluate("(image) => image.naturalWidth") == 0
    there.context.close()


@needs_chromium
def test_markdown_of_an_answer(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.ask("list")
    text = there.answered().locator(".text")
    assert text.evaluate("(each) => each.innerHTML") == (
        '<p class="heading"><strong>Things</strong></p><p>Two <strong>things</strong>:</p>'
        "<ol><li>a red *square*</li><li>a <code>ring</code><ul><li>inner</li></ul></li></ol>"
        '<pre tabindex="0" role="group" aria-label="code"><code>print(\'&lt;b&gt;\')</code></pre><p>End.</p>'
    )


@needs_chromium
def test_an_answer_by_a_schema(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.page.get_by_role("button", name="Settings").click()
    dialog = there.page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("JSON by a schema").check()
    dialog.get_by_label("JSON schema").fill('{"type": }')
    expect(dialog.locator("#schema-problem")).to_contain_text("This is not JSON")
    there.page.keyboard.press("Escape")
    there.ask("What is it?")  # is not sent: the settings open at the field
    expect(dialog.get_by_label("JSON schema")).to_be_focused()
    dialog.get_by_label("JSON schema").fill('{"type": "object"}')
    expect(dialog.locator("#schema-problem")).to_have_text("Valid JSON.")
    dialog.get_by_role("button", name="Done").click()
    there.ask("What is it?")
    expect(there.answered().locator(".text code")).to_have_text(
        '{\n  "title": "A sign",\n  "objects": [\n    "sign",\n    "word"\n  ]\n}'
    )
    assert [each["format"] for each in faulty.bodies("/api/chat")] == [{"type": "object"}]


@needs_chromium
def test_settings_go_into_the_request_and_stay(visit: Callable[..., Visit], faulty: Stub) -> None:
    there = visit()
    there.ask("Plain.")
    there.answered()
    there.page.get_by_role("button", name="Settings").click()
    dialog = there.page.get_by_role("dialog", name="Settings")
    for label, value in (("Temperature", "0.2"), ("Seed", "7"), ("Most tokens", "33"), ("Keep in memory", "5")):
        dialog.get_by_label(label).fill(value)
    expect(dialog.locator("#keep-alive-problem")).to_contain_text("Write a time with its unit")
    dialog.get_by_label("Keep in memory").fill("1h30m")
    dialog.get_by_label("System text").fill("Answer in one word.")
    there.page.keyboard.press("Escape")
    there.page.reload()
    expect(there.page.get_by_label("Model", exact=True)).not_to_have_value("")
    there.page.get_by_role("button", name="New chat").click()
    there.ask("Set.")
    there.answered()
    plain, changed = faulty.bodies("/api/chat")
    assert (plain["options"], "keep_alive" in plain, plain["messages"][0]["role"]) == ({}, False, "user")
    assert changed["options"] == {"temperature": 0.2, "seed": 7, "num_predict": 33}
    assert changed["keep_alive"] == "1h30m"
    assert changed["messages"][0] == {"role": "system", "content": "Answer in one word."}


@needs_chromium
def test_light_and_dark(visit: Callable[..., Visit]) -> None:
    there = visit(scheme="dark")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    assert there.page.evaluate(ground) == "rgb(23, 21, 19)"
    there.page.get_by_role("button", name="Dark appearance", pressed=True).click()
    assert there.page.evaluate(ground) == "rgb(251, 250, 248)"
    there.page.reload()
    assert there.page.evaluate(ground) == "rgb(251, 250, 248)"


@needs_chromium
def test_by_keyboard_alone(visit: Callable[..., Visit]) -> None:
    """From the skip link through every control that is in view, each with a visible focus, to an answer."""
    there = visit()
    page = there.page
    expect(page.get_by_label("Your question", exact=True)).to_be_focused()
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        if reached and name == reached[0]:
            break
        assert outline, f"no visible focus on {name!r}"
        reached.append(name)
    for control in ("Skip to your question", "New chat", "Dark appearance", "Model", "Compare", "Models", "Settings"):
        assert control in reached
    assert {"Add pictures", "Send", "Your question"} <= set(reached)
    page.get_by_label("Your question", exact=True).focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    there.answered()
    expect(page.locator(".bubble")).to_have_text("One\nTwo")
    expect(page.get_by_label("Your question", exact=True)).to_be_focused()


FOCUSED = """() => {
  const at = document.activeElement;
  const words = at.labels?.[0]?.innerText || at.getAttribute("aria-label") || at.innerText || at.title || "";
  const frame = getComputedStyle(at.id === "question" ? at.closest(".box") : at); // its box has the outline
  const none = at === document.body; // between the page's end and its start
  return [none ? "" : words.trim().split("\\n")[0], none || frame.outlineStyle !== "none"];
}"""


TOO_WIDE = """() => [...document.querySelectorAll("#stage *, dialog[open] *")]
  .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5)
  .map((each) => each.outerHTML.slice(0, 100))"""
"""What reaches beyond the right edge of the window."""


@needs_chromium
def test_on_a_phone(visit: Callable[..., Visit]) -> None:
    there = visit(width=390, height=844)
    page = there.page
    assert page.evaluate(TOO_WIDE) == []
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.get_by_role("button", name="Compare").click()
    there.attach(picture("a name that is longer than a phone is wide, as cameras and chat programs give them.png"))
    there.ask("What is it?")
    answers = there.answered(2)
    assert answers.nth(0).bounding_box()["y"] < answers.nth(1).bounding_box()["y"]
    assert page.evaluate(TOO_WIDE) == []
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(TOO_WIDE) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Chats", exact=True).click()
    expect(page.get_by_role("navigation")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    expect(page.get_by_role("button", name="Chats", exact=True)).to_be_focused()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install '.[test]'"
    )
    there = visit(width=width, scheme=scheme)
    page = there.page

    # What is no matter of colours is the same in both schemes, and looked for once at each width.
    all_rules = (width, scheme) in ((1280, "light"), (390, "dark"))

    def check(where: str) -> None:
        page.wait_for_timeout(300)  # until what fades in has its colours
        options = None if all_rules else {"runOnly": ["color-contrast"]}
        found = axe.Axe().run(page, options=options).response["violations"]
        faults = [each for each in found if each["impact"] in ("serious", "critical", "moderate")]
        assert not faults, f"{where}: {[(each['id'], [node['html'] for node in each['nodes']]) for each in faults]}"

    check("empty")
    page.get_by_role("button", name="Compare").click()
    there.attach(picture(), picture("second.png"))
    check("attached")
    page.get_by_role("button", name="What the model sees").click()
    expect(page.locator(".seen-picture")).to_have_count(4)
    check("seen")
    page.keyboard.press("Escape")
    there.ask("What is it?")
    there.answered(2).first.locator("summary").click()
    check("answered")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("JSON by a schema").check()
    check("settings")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Models", exact=True).click()
    expect(page.locator(".installed li").first).to_be_visible()
    check("models")
    page.keyboard.press("Escape")
    if width < 900:
        page.get_by_role("button", name="Chats", exact=True).click()
        check("chats")
    page.get_by_role("button", name=re.compile("^Delete What")).click()
    check("confirm")
