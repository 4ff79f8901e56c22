"""The Space in a headless chromium, as people use it: `make test-browser`. Screenshots go to runs/space/."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from xcllama.publishing.running_space import served

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "runs" / "space"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 600_000  # ms, on a machine that does other work as well
TEXT = "The harbour of Milstead was built in 1812 by Ada Finch. It has two piers; a red light is on the longer one."


@pytest.fixture(scope="module")
def url(smollm2_folder, tmp_path_factory) -> Iterator[str]:
    """The Space with the repository's checkpoint."""
    command = [sys.executable, str(ROOT / "scripts" / "run_space.py")]
    with served(command, dict(os.environ), tmp_path_factory.mktemp("space") / "log") as (address, _):
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed: run `make test-browser`")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, url) -> Iterator[Callable]:
    """Open the page as a new visitor; in the end nothing may have been asked of other machines, and no error shown."""
    contexts, foreign, faults = [], [], []

    def open_page(width: int = 1280, height: int = 900, colors: str = "light"):
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=colors)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: foreign.append(request.url) if not local(request.url) else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Ask", exact=True).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign
    assert not faults


def local(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme in ("data", "blob") or parts.hostname == "127.0.0.1"


def picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def upload(page, *files: tuple[str, bytes]) -> str:
    """Upload files and return what the page says about them."""
    payload = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.locator("input[type=file]").first.set_input_files(payload)
    page.locator("#status .message", has_text=files[-1][0]).wait_for()
    return page.locator("#status").inner_text()


def ask(page, question: str, compare: bool = True) -> str:
    """Ask and wait for all that follows; the answer from the cache."""
    page.get_by_label("Compare with").set_checked(compare)
    page.get_by_label("Question", exact=True).fill(question)
    # the page fills this line again when an answer is complete
    page.evaluate("document.querySelector('#said .prose').textContent = ''")
    page.get_by_role("button", name="Ask", exact=True).click()
    said = "text in the prompt" if compare else "context cache"
    page.locator("#said", has_text=said).wait_for(state="attached")
    return page.get_by_label("Answer from the context cache").input_value()


def test_upload_and_ask(visit):
    page = visit()
    picture(page, "first")
    assert "tokens encoded" in upload(page, ("harbour.txt", TEXT.encode()))
    assert "Ada Finch" in ask(page, "Who built the harbour?")
    for side in ("cache", "prompt"):
        assert "first token" in page.locator(f"#{side}-figures").inner_text()
    assert page.locator("#places mark").inner_text() == "The harbour of Milstead was built in 1812 by Ada Finch."
    assert page.locator("#places .text").inner_text() == TEXT
    headline = page.locator("#headline").inner_text()
    assert "× smaller" in headline
    assert "than with the text in the prompt" in headline
    assert page.locator("#times tr").count() == 2
    assert "KV cache" in page.locator("#costs").inner_text()
    picture(page, "answer")


def test_what_the_documents_do_not_say_is_declined_and_nothing_old_stays(visit):
    page = visit()
    upload(page, ("harbour.txt", TEXT.encode()))
    ask(page, "Who built the harbour?")
    page.get_by_label("Question", exact=True).fill("What is the capital of France?")
    page.get_by_label("Compare with").uncheck()
    page.get_by_role("button", name="Ask", exact=True).click()
    # while it is answered nothing of the question before is there
    cleared = "!document.querySelector('#headline').innerText.trim() && !document.querySelector('#places mark')"
    page.wait_for_function(cleared)
    assert page.get_by_label("Answer with the text in the prompt").input_value() == ""
    assert page.locator("#times tr").count() == 0
    page.locator("#said", has_text="Not found").wait_for(state="attached")
    assert page.get_by_label("Answer from the context cache").input_value() == "Not found in these documents."
    assert "What was read" in page.locator("#places").inner_text()
    picture(page, "decline")


def test_progress_of_a_long_document_and_a_file_that_is_too_big(visit):
    page = visit()
    file = {"name": "long.txt", "mimeType": "text/plain", "buffer": f"{TEXT} ".encode() * 150}
    page.locator("input[type=file]").first.set_input_files([file])
    page.locator("#status", has_text="s left").wait_for()
    picture(page, "progress")
    page.locator("#status .message", has_text="tokens encoded").wait_for()
    # more than the server takes: told without reading it
    page.locator("input[type=file]").first.set_input_files([file | {"name": "big.txt", "buffer": b"x" * 11 * 2**20}])
    page.get_by_text("exceed the maximum allowed size").wait_for()


def test_answers_stream_and_stop(visit):
    page = visit()
    upload(page, ("harbour.txt", TEXT.encode()))
    page.get_by_label("Question", exact=True).fill("Tell me all about the harbour and its piers.")
    page.get_by_role("button", name="Ask", exact=True).click()
    answer = page.get_by_label("Answer with the text in the prompt")
    page.locator("#prompt-figures .figures").wait_for()
    first = answer.input_value()
    page.wait_for_function(
        "first => document.querySelector('#prompt-answer textarea').value.length > first.length", arg=first
    )
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(3000)
    stopped = answer.input_value()
    page.wait_for_timeout(3000)
    assert answer.input_value() == stopped
    # whoever asks next is served
    assert ask(page, "Who built the harbour?", compare=False)


def test_documents_switched_on_and_off(visit):
    page = visit()
    upload(
        page,
        ("harbour.txt", TEXT.encode()),
        ("bakery.md", b"# Bakery\n\nThe bakery opens at six. It sells rye bread."),
    )
    encoded = page.locator("#costs").inner_text()
    both = ask(page, "When does the bakery open?", compare=False)
    assert "bakery.md" in page.locator("#places .hint").inner_text()
    documents = page.locator("#documents")
    documents.get_by_label("harbour.txt").uncheck()
    page.wait_for_function("!document.querySelector('#costs').innerText.includes('harbour.txt')")
    ask(page, "What does it sell?", compare=False)
    assert "harbour.txt" not in page.locator("#places").inner_text()
    # the other order: the same answer as in the beginning
    documents.get_by_label("bakery.md").uncheck()
    documents.get_by_label("harbour.txt").check()
    documents.get_by_label("bakery.md").check()
    page.wait_for_function("document.querySelectorAll('#costs tbody tr').length == 3")
    assert ask(page, "When does the bakery open?", compare=False) == both
    # nothing was encoded again: the same seconds
    assert sorted(page.locator("#costs").inner_text().split()) == sorted(encoded.split())
    page.get_by_role("button", name="Remove what is switched on").click()
    page.locator("#status", has_text="2 document(s) removed").wait_for()
    assert "No document is switched on" in page.locator("#costs").inner_text()


def test_a_second_visitor_sees_nothing_of_the_first(visit):
    first, second = visit(), visit()
    upload(first, ("secret plan.txt", TEXT.encode()))
    ask(first, "Who built the harbour?", compare=False)
    second.reload()
    second.get_by_role("button", name="Ask", exact=True).wait_for()
    assert not second.locator("#documents").is_visible()
    second.get_by_label("Question", exact=True).fill("Who built the harbour?")
    second.get_by_role("button", name="Ask", exact=True).click()
    second.locator("#cache-figures .error", has_text="No document is switched on").wait_for()
    # said once
    assert second.locator(".message.error").count() == 1
    assert "secret" not in second.content()
    assert "Milstead" not in second.content()
    # a page that is loaded anew is a new visitor, too
    first.reload()
    first.get_by_role("button", name="Ask", exact=True).wait_for()
    assert "secret plan" not in first.content()


def test_friendly_messages(visit):
    page = visit()
    shown = upload(
        page,
        ("junk.txt", bytes(range(256)) * 4),
        ("empty.md", b""),
        ("picture.pdf", b"\x89PNG\r\n\x1a\n"),
        ("notes.txt", b"words <b>bold</b>"),
        ("broken.pdf", b"%PDF-1.7 nothing"),
    )
    messages = {"junk": "no readable text", "empty": "is empty", "picture": "an image", "broken": "could not be read"}
    for name, says in messages.items():
        assert any(name in line and says in line for line in shown.splitlines())
    picture(page, "bad-file")
    # what a visitor writes is text, never markup
    page.get_by_role("button", name="Paste a text").click()
    name = "<img src=x onerror=alert(1)>"
    page.get_by_label("Name").fill(name)
    page.get_by_label("Text", exact=True).fill("words <img src=y> words")
    page.get_by_role("button", name="Add this text").click()
    page.locator("#documents label", has_text=name).wait_for()
    assert page.locator("main img[src=x], main img[src=y]").count() == 0
    page.get_by_label("Question", exact=True).fill("  ")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator("#cache-figures .error", has_text="type a question").wait_for()


@pytest.mark.parametrize(("width", "colors"), [(360, "dark"), (390, "light")])
def test_on_a_phone(visit, width, colors):
    page = visit(width, 800, colors)
    example = page.get_by_role("button", name="Example: The clock museum")
    button, question = (page.get_by_role("button", name="Ask", exact=True), page.get_by_label("Question", exact=True))
    # asking comes first
    assert all(one.bounding_box()["y"] < 800 for one in (example, button, question))
    # an example asks its question by itself, and the answer is scrolled to
    example.click()
    page.locator("#said", has_text="text in the prompt").wait_for(state="attached")
    assert "Brandt" in page.get_by_label("Answer from the context cache").input_value()
    assert page.locator("#cache-answer").bounding_box()["y"] < 800
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nothing that is read is smaller than this
    assert page.evaluate(SMALLEST_LETTERS) >= 12
    picture(page, {"light": "phone", "dark": "dark"}[colors])


def test_by_keyboard_alone(visit):
    page = visit()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(e => e.innerText || e.ariaLabel || e.tagName)(document.activeElement)").strip())
    assert {"Example: The clock museum", "Ask", "Stop"} <= reached
    assert any("upload" in name.lower() for name in reached)
    page.get_by_role("button", name="Example: The clock museum").focus()
    page.keyboard.press("Enter")
    page.locator("#said", has_text="text in the prompt").wait_for(state="attached")
    page.locator("#documents input").first.focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('#costs').innerText.includes('No document')")
    page.keyboard.press("Space")
    page.get_by_label("Compare with").focus()
    page.keyboard.press("Space")
    page.get_by_label("Question", exact=True).focus()
    page.evaluate("document.querySelector('#said .prose').textContent = ''")
    page.keyboard.press("Enter")
    page.locator("#said", has_text="Answer, context cache").wait_for(state="attached")
    page.get_by_label("Answer from the context cache").focus()
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_names_and_contrast_for_everyone(visit, colors):
    page = visit(colors=colors)
    page.get_by_role("button", name="Paste a text").click()
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("#status[aria-live=polite], #said[aria-live=polite]").count() == 2
    unnamed = page.evaluate(UNNAMED)
    assert not unnamed
    weak = page.evaluate(WEAK_CONTRAST)
    assert not weak


# in pixels
SMALLEST_LETTERS = """() => Math.min(...[...document.querySelectorAll("p, td, th, li, label, textarea, button")]
  .filter(e => e.checkVisibility()).map(e => parseFloat(getComputedStyle(e).fontSize)))"""
UNNAMED = """() => [...document.querySelectorAll("main button, main input, main textarea")]
  .filter(e => e.checkVisibility() && e.type !== "file")
  .filter(e => !(e.innerText || e.ariaLabel || e.title || [...(e.labels ?? [])].some(l => l.innerText.trim())))
  .map(e => e.outerHTML.slice(0, 200))"""
# texts of less than 4.5 to 1 against the first opaque background behind them (WCAG 2, AA)
WEAK_CONTRAST = """() => {
  const parse = color => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility()) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) weak.push(e.innerText.slice(0, 40) + " " + ((a + .05) / (b + .05)).toFixed(2));
  }
  return weak;
}"""
