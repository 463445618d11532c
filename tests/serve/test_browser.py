"""The web page in a browser. Screenshots are written to the folder in NORMFREE_SHOTS, if it is set."""

import base64
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
DROP = """([name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  for (const what of ["dragover", "drop"])
    document.getElementById("drop").dispatchEvent(
      new DragEvent(what, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""
PASTE = """(data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "", { type: "image/png" }));
  dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer }));
}"""


def disc_png(channel, strength=200):
    """Return a PNG of a soft disc of one color on a pale background."""
    y, x = np.mgrid[:180, :240]
    disc = np.clip(1.2 - np.hypot(x - 120, y - 90) / 70, 0, 1)
    pixels = np.full((180, 240, 3), 225.0)
    for c in range(3):
        pixels[..., c] -= disc * (0 if c == channel else strength)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


RED, GREEN, BLUE = (disc_png(c) for c in range(3))


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "these tests need chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    """Return the errors and warnings of the console, which grow during a test."""
    return []


@pytest.fixture
def page(chromium, serving, colors, complaints):
    """Open the page. An error or warning in the console fails the test."""
    with serving(colors, name="nf_colors") as (port, _):
        context = chromium.new_context(viewport={"width": 1000, "height": 820})
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_default_timeout(8000)
        yield page
        context.close()
    # The console also reports responses with status 4xx or 5xx, which some tests cause.
    assert [c for c in complaints if "server responded with a status of" not in c] == []


def drop(page, name, data, kind="image/png"):
    page.evaluate(DROP, [name, kind, base64.b64encode(data).decode()])


def shoot(page, name):
    if os.environ.get("NORMFREE_SHOTS"):
        page.screenshot(path=Path(os.environ["NORMFREE_SHOTS"]) / f"{name}.png", full_page=True)


def first_class(page, name):
    card = page.locator(".card", has=page.get_by_text(name, exact=True))
    return card.locator(".label").first.inner_text()


def test_a_dropped_image_shows_its_class_and_a_bar_as_long_as_the_probability(page):
    page.get_by_text("3 classes · 8 × 8 pixels · cpu").wait_for()
    assert page.locator("h1").inner_text() == "nf_colors"
    drop(page, "disc.png", RED)
    page.locator(".bars").wait_for()
    assert first_class(page, "disc.png") == "red"
    values = page.locator(".value").all_inner_texts()
    widths = [
        float(w)
        for w in page.locator(".fill").evaluate_all("all => all.map((f) => parseFloat(f.style.width))")
    ]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert widths == sorted(widths, reverse=True)
    assert values[0] == f"{widths[0]:.1f} %"
    track = page.locator(".track").first.bounding_box()["width"]
    assert page.locator(".fill").first.bounding_box()["width"] == pytest.approx(
        track * widths[0] / 100, abs=1
    )
    assert page.locator(".thumb img").evaluate("i => i.complete && i.naturalWidth") == 240


def test_an_invalid_file_shows_its_error_and_the_next_image_works(page):
    drop(page, "notes.txt", b"not an image", "text/plain")
    page.locator(".error").wait_for()
    text = "not an image, or not one of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"  # and AVIF, if Pillow has it
    assert page.locator(".error").inner_text().startswith(text)
    page.get_by_text("no preview").wait_for()
    drop(page, "disc.png", GREEN)
    page.locator(".bars").wait_for()
    assert first_class(page, "disc.png") == "green"
    assert page.locator(".error").count() == 1


def test_names_of_classes_and_files_are_text(page):
    name = "<img src=x onerror=document.title='owned'>.png"
    drop(page, name, BLUE)
    page.locator(".bars").wait_for()
    assert first_class(page, name) == "<b>blue</b>"
    assert page.locator("#answers b").count() == 0
    assert page.locator("#answers img").count() == 1  # the thumbnail
    assert page.title() == "nf_colors · normfree"


def test_several_files_chosen_with_the_keyboard_and_a_pasted_image(page):
    with page.expect_file_chooser() as chooser:  # takes time to take effect, so it comes before the Tab key
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "drop"
        page.keyboard.press("Enter")
    names = [f"{i}.png" for i in range(7)]
    chooser.value.set_files(
        [
            {"name": n, "mimeType": "image/png", "buffer": (RED, GREEN, BLUE)[i % 3]}
            for i, n in enumerate(names)
        ]
    )
    page.locator(".bars").nth(6).wait_for()
    assert [first_class(page, n) for n in names[:3]] == ["red", "green", "<b>blue</b>"]
    page.evaluate(PASTE, base64.b64encode(GREEN).decode())
    page.locator(".bars").nth(7).wait_for()
    assert first_class(page, "pasted image") == "green"
    page.locator("#top").select_option("1")
    assert page.locator(".row:visible").count() == 8
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".card").count() == 0
    assert page.evaluate("document.activeElement.id") == "drop"


def lightness(page, selector, what):
    """Return the lightness of a computed color, from 0 (black) to 1."""
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
    return sum(int(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]) / 765


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 360])
def test_the_page_is_legible_on_a_phone_and_in_dark_mode(page, scheme, width):
    page.set_viewport_size({"width": width, "height": 820})
    page.emulate_media(color_scheme=scheme)
    for name, data in (("a rather long name of a photograph, as people make them, 2021-07-14 10.22.31.png", RED),
                       ("meadow.png", disc_png(1, 25)), ("sea.png", BLUE)):  # fmt: skip
        drop(page, name, data)
    drop(page, "notes.txt", b"not an image", "text/plain")
    page.locator(".error").wait_for()
    page.locator(".bars").nth(2).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    assert all(b["width"] > 40 for b in map(lambda t: t.bounding_box(), page.locator(".track").all()))
    ground, ink = lightness(page, "body", "backgroundColor"), lightness(page, "body", "color")
    assert (ground > 0.9 and ink < 0.2) if scheme == "light" else (ground < 0.15 and ink > 0.85)
    assert (
        page.locator(".fill").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(0, 114, 178)"
    )
    shoot(page, f"{scheme}-{width}")


def test_an_unreachable_server_is_reported(page):
    page.get_by_text("3 classes").wait_for()
    page.route(
        "**/predict*", lambda route: route.fulfill(status=500, content_type="text/html", body="<b>proxy</b>")
    )
    drop(page, "disc.png", RED)
    page.locator(".error").wait_for()
    assert page.locator(".error").inner_text() == "the server did not respond; try again"
    page.unroute("**/predict*")


def test_the_policy_stops_foreign_script(page, complaints):
    page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "document.title = 'owned'";
      document.body.append(script);
      document.body.insertAdjacentHTML("beforeend", "<img src='data:,' onerror=\\"document.title = 'owned'\\">");
    }""")
    page.wait_for_timeout(100)
    assert page.title() == "nf_colors · normfree"
    assert [c.split(" violates ")[0] for c in complaints] == [
        "Executing inline script",
        "Executing inline event handler",
    ]
    complaints.clear()
