"""The status page in a real headless browser, beside a live server under load: what it shows is
what /metrics says, in light and in dark and without scripts; its text can be read against its
ground; the browser has nothing to complain of and asks nobody else. Run by `make ops-test`; needs
chromium. With KVSERVICE_PICTURES=FOLDER the pictures are left there (docs/images)."""

import os
import pathlib
import re
import urllib.parse

import pytest
from playwright.sync_api import sync_playwright

from live_server import LIMIT_S, LiveServer, fetch

# WCAG 2.1, 1.4.3: text of ordinary size, level AA.
CONTRAST_MIN = 4.5
PICTURE_BYTES_MAX = 150_000
SCHEMES = ["light", "dark"]

# Every piece of text with its colour and the first ground behind it that is not see-through.
TEXTS = """() => {
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
    }
    return "none";
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("meter")) continue;
    texts.push({text, colour: getComputedStyle(element).color, ground: ground(element)});
  }
  return texts;
}"""


def luminance(colour):
    """Relative luminance of a solid "rgb(r, g, b)", as WCAG defines it."""
    red, green, blue = map(int, re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups())
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
              for value in (red / 255, green / 255, blue / 255)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = LiveServer(tmp_path_factory.mktemp("status"))
    running.wait_until(lambda: running.kvctl("health").returncode == 0)
    running.load()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            # Names lead nowhere: whatever the page asked for elsewhere would fail, and be seen.
            args=["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                  "--disable-lcd-text"])
        yield chromium
        chromium.close()


class Visit:
    """A page that is looked at, and everything the browser asks for and complains of meanwhile."""

    def __init__(self, browser, server, path, **options):
        self.context = browser.new_context(viewport={"width": 1100, "height": 840}, **options)
        self.page = self.context.new_page()
        self.complaints = []
        self.requests = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.origin = f"http://{server.metrics}"
        self.page.goto(self.origin + path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def numbers(self):
        """Expression, value and text of each number."""
        return self.page.eval_on_selector_all(
            "data", "all => all.map(one => [one.title, Number(one.value), one.innerText])")

    def assert_nothing_else_happened(self):
        assert self.complaints == []
        asked = {urllib.parse.urlsplit(url) for url in self.requests}
        assert {f"{url.scheme}://{url.netloc}" for url in asked} <= {self.origin, "data://"}
        assert {url.path for url in asked if url.scheme == "http"} <= {"/", "/status",
                                                                       "/status.css"}


def sum_in(scrape, expression):
    """What `sum(name{labels})` adds up in a scrape."""
    name, labels = re.fullmatch(r"sum\((\w+)(?:\{(.*)\})?\)", expression).groups()
    wanted = re.findall(r'\w+="[^"]*"', labels or "")
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", scrape, re.MULTILINE)
    return sum(float(value) for has, value in lines
               if all(label in has.split(",") for label in wanted))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_shows_what_the_metrics_say(browser, server, scheme):
    server.wait_until(lambda: server.number("kvservice_audit_rows_waiting") == 0)
    with Visit(browser, server, "/status", color_scheme=scheme) as visit:
        scrape = fetch(f"{visit.origin}/metrics")
        assert visit.page.title() == "KVService: serving"
        assert visit.page.inner_text("#health") == "serving"
        compared = 0
        for expression, value, text in visit.numbers():
            assert text.strip(), expression
            simple = re.fullmatch(r"sum\(kvservice_[^()]*\)", expression)
            if simple and "uptime" not in expression:
                assert value == pytest.approx(sum_in(scrape, expression), rel=1e-14), expression
                compared += 1
        assert compared > 50
        headings = visit.page.eval_on_selector_all("h2", "all => all.map(one => one.innerText)")
        assert headings == sorted(set(headings), key=headings.index) and len(headings) == 11
        visit.assert_nothing_else_happened()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_text_can_be_read(browser, server, scheme, tmp_path):
    with server.under_load(), Visit(browser, server, "/status", color_scheme=scheme) as visit:
        texts = visit.page.evaluate(TEXTS)
        assert len(texts) > 150
        for one in texts:
            assert contrast(one["colour"], one["ground"]) >= CONTRAST_MIN, one
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) > 0.5) == (scheme == "light")
        folder = pathlib.Path(os.environ.get("KVSERVICE_PICTURES", tmp_path))
        picture = folder / f"status_{scheme}.png"
        visit.page.screenshot(path=picture)
        assert 10_000 < picture.stat().st_size < PICTURE_BYTES_MAX


def test_every_colour_of_health_can_be_read(browser, server):
    """Health in trouble is rare: its colours are looked at without it."""
    for scheme in SCHEMES:
        with Visit(browser, server, "/status", color_scheme=scheme) as visit:
            for name in ("good", "poor", "bad"):
                colour, ground = visit.page.evaluate(
                    """name => {
                      document.querySelector("#health").className = name;
                      return [getComputedStyle(document.querySelector("#health")).color,
                              getComputedStyle(document.body).backgroundColor];
                    }""", name)
                assert contrast(colour, ground) >= CONTRAST_MIN, (scheme, name)


def test_it_needs_no_scripts_and_follows_the_load(browser, server):
    with Visit(browser, server, "/", java_script_enabled=False) as visit:
        calls = 'data[title*="rpc_calls_total"][title*="\\"Attend\\"})"]'
        before = int(visit.page.locator(calls).first.get_attribute("value"))
        assert before > 0
        # It loads itself again.
        with server.under_load(), visit.page.expect_event("load", timeout=LIMIT_S * 1000):
            pass
        assert int(visit.page.locator(calls).first.get_attribute("value")) > before
        assert "per second" in visit.page.inner_text("main")
        visit.assert_nothing_else_happened()


def test_it_fits_a_telephone(browser, server):
    with Visit(browser, server, "/status") as visit:
        visit.page.set_viewport_size({"width": 360, "height": 740})
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_policy_is_enforced_by_the_browser(browser, server):
    """Neither a script nor a style that somebody smuggled into the page would do anything."""
    with Visit(browser, server, "/status") as visit:
        done = visit.page.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "window.smuggled = true";
              document.body.append(script);
              const style = document.createElement("style");
              style.textContent = "body { display: none }";
              document.body.append(style);
              return [window.smuggled === true, getComputedStyle(document.body).display];
            }""")
        assert done == [False, "block"]
        assert len([text for text in visit.complaints if "Content Security Policy" in text]) == 2
