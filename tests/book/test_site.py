"""The real book, built with the smoke profile, read in headless Chromium with the network cut."""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pandas as pd
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from checkout import COMMIT, REPOSITORY
from paramspec.stats.recheck import recheck
from paramspec_book.parameters import toc_pages

pytestmark = pytest.mark.slow
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PAGES = [p.relative_to(REPOSITORY).with_suffix(".html").as_posix() for p in toc_pages(REPOSITORY)]
ORIGIN = "https://github.com/example/book.git"  # of the checkout whose site is read
WIDTHS = (1280, 390)  # a laptop's and a phone's, in px
PATIENCE = 600_000  # ms, on a machine that has other things to do

# Resolves when MathJax has drawn what is there, at once on a page without mathematics.
DRAWN = "window.MathJax?.startup?.promise?.then(() => true) ?? !document.querySelector('.math')"

# Figures that are seen and not drawn, and equations that are not, or wrongly
BROKEN = """[
  ...Array.from(document.images)
    .filter(i => i.offsetParent !== null && !(i.complete && i.naturalWidth > 0))
    .map(i => i.currentSrc || i.src),
  ...Array.from(document.querySelectorAll('.math'))
    .filter(m => !(m.querySelector('mjx-container svg')?.getBoundingClientRect().width > 0)
      || m.querySelector('[data-mjx-error], merror'))
    .map(m => m.textContent.slice(0, 60)),
]"""
# Tables that are wider than their column, and are not folded
WIDE = """Array.from(document.querySelectorAll('.book-scroll > table'))
  .filter(t => t.getBoundingClientRect().width > t.parentElement.clientWidth + 1)
  .map(t => t.innerText.slice(0, 80))"""
# Code that scrolls is reached by the keyboard
REACHED = """Array.from(document.querySelectorAll('pre'))
  .every(p => p.offsetParent === null || p.scrollWidth <= p.clientWidth || p.tabIndex === 0)"""
# Bytes that the first screen waits for, which is drawn in a second from a disk if they are few: a
# stopwatch would measure what else the machine does.
FIRST = """performance.getEntriesByType('navigation')[0].decodedBodySize
  + performance.getEntriesByType('resource').filter(e => e.renderBlockingStatus === 'blocking')
    .reduce((sum, e) => sum + e.decodedBodySize, 0)"""
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"  # scrolled sideways, px


@pytest.fixture(scope="module")
def built(tmp_path_factory, unpacked):
    """The folder of a build, of a copy of the checkout so that nothing is left in it."""
    root = tmp_path_factory.mktemp("site") / "checkout"
    (root / "results").mkdir(parents=True)
    (root / "results" / "gguf").symlink_to(unpacked)
    # The appendix on speed runs a benchmark.
    patterns = (
        "book/**/*",
        "tests/benchmarks/*.py",
        "tests/oracles.py",
        "_*.yml",
        "*.lock",
        "*.cff",
    )
    for path in (path for pattern in patterns for path in REPOSITORY.glob(pattern)):
        place = root / path.relative_to(REPOSITORY)
        if path.is_file() and "_executed" not in path.parts:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    for line in (["init", "-q"], ["remote", "add", "origin", ORIGIN], ["add", "-A"], COMMIT):
        subprocess.run(["git", *line], cwd=root, check=True)
    line = [sys.executable, "-m", "paramspec", "build", "--profile", "smoke", "--out", "out"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "out"


@pytest.fixture(scope="module")
def site(built):
    """The address of the site."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=built / "_build/html")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the system's own; it finds no host but this machine."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=PATIENCE)
        yield browser
        browser.close()


def visit(browser, site, page, scheme="light"):
    """Open a page; return it, all that went wrong, and the kind and size of what it loaded."""
    context = browser.new_context(color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    wrong, sizes = [], []

    def begun(request):
        if not request.url.startswith((site, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    tab = context.new_page()
    tab.on("request", begun)
    tab.on("requestfailed", lambda r: wrong.append(f"failed {r.url}: {r.failure}"))
    tab.on("response", lambda r: sizes.append((r.request.resource_type, len(r.body()))))
    tab.on("pageerror", lambda e: wrong.append(f"script error {e}"))
    # An answer of 400 or more is such a message, too.
    tab.on("console", lambda m: wrong.append(f"console {m.text}") if m.type == "error" else None)
    tab.goto(urljoin(site, page), wait_until="load")
    tab.wait_for_function(DRAWN)
    tab.wait_for_load_state("networkidle")
    return tab, wrong, sizes


def severe_violations(tab):
    """What axe-core calls serious or critical, and where."""
    found = Axe().run(tab, options={"preload": False}).response["violations"]  # it requests nothing
    severe = [one for one in found if one["impact"] in ("serious", "critical")]
    return [(one["id"], one["nodes"][0]["html"][:200]) for one in severe]


@dataclass
class Look:
    """What is seen of a page, in light and in dark."""

    colours: list[str] = field(default_factory=list)
    problems: list[tuple] = field(default_factory=list)
    targets: set[str] = field(default_factory=set)
    weight: int = 0  # bytes of all that it loads, scripts left out
    first: int = 0  # bytes that its first screen waits for


@pytest.fixture(scope="module")
def look(browser, site):
    """`look(page)`: opened once in each scheme, for all tests, and seen at both widths."""

    @functools.cache
    def at(page):
        found = Look()
        for scheme in ("light", "dark"):
            tab, wrong, sizes = visit(browser, site, page, scheme)
            assert tab.evaluate(
                "document.title.length > 0 && document.querySelector('h1') !== null"
            )
            found.targets |= set(tab.evaluate("Array.from(document.links, a => a.href)"))
            found.weight = sum(size for kind, size in sizes if kind != "script")
            found.first = tab.evaluate(FIRST)
            for width in WIDTHS:
                tab.set_viewport_size({"width": width, "height": 900})
                tab.wait_for_function(REACHED)  # the theme sees to it, a while after a change
                here = {"broken": tab.evaluate(BROKEN), "wide": tab.evaluate(WIDE)}
                here |= {"sideways": max(0, tab.evaluate(OVERFLOW)), "axe": severe_violations(tab)}
                found.problems += [(width, scheme, *one) for one in here.items() if one[1]]
            found.colours.append(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
            found.problems += [(scheme, one) for one in wrong]
            tab.context.close()
        return found

    return at


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_whole_without_network(look, page):
    seen = look(page)
    assert seen.problems == []
    assert len(set(seen.colours)) == 2
    assert 10_000 < seen.weight < 1_500_000
    assert 100_000 < seen.first < 1_000_000


def test_every_link_within_the_site_leads_somewhere(browser, site, look):
    """Links, view-source and download buttons; links elsewhere must be https."""
    dead, seen, tab = [], set(), browser.new_page()
    for page in PAGES:
        for target in look(page).targets - seen:
            seen.add(target)
            if not target.startswith(site):
                if urlsplit(target).scheme not in ("https", "mailto"):
                    dead.append(f"{page}: {target}")
                continue
            address, _, anchor = target.partition("#")
            response = tab.request.get(address)
            # an id may hold characters that the address quotes, so compare unquoted
            if not response.ok or (anchor and f'id="{unquote(anchor)}"' not in response.text()):
                dead.append(f"{page}: {target}")
    tab.close()
    assert dead == []
    assert any(target.endswith(".md") and "/_sources/" in target for target in seen)


def test_a_card_leads_to_its_chapter(browser, site):
    tab, *_ = visit(browser, site, "book/index.html")
    tab.locator(".claims .sd-card", has_text="C6").click()
    tab.wait_for_url("**/7-pretraining.html")
    tab.context.close()


def test_a_chapter_hands_over_its_numbers_and_its_notebook(browser, site, built):
    tab, *_ = visit(browser, site, "book/3-masking.html")
    figure = tab.locator("figure", has=tab.locator("img")).first
    assert "paramspec run 3-masking --profile smoke" in figure.inner_text()
    address = tab.evaluate("a => a.href", figure.get_by_text("data (CSV)").element_handle())
    numbers = pd.read_csv(io.StringIO(tab.request.get(address).text()))
    assert {"mask", "ratio", "did", "did_low"} <= set(numbers.columns)
    table = tab.locator(".book-scroll + .reproduce a, .cell_output .reproduce a").first
    address = tab.evaluate("a => a.href", table.element_handle())
    assert len(pd.read_csv(io.StringIO(tab.request.get(address).text()))) > 0
    address = tab.evaluate(
        "a => a.href", tab.get_by_text("Download this notebook").element_handle()
    )
    notebook = nbformat.reads(tab.request.get(address).text(), as_version=4)
    assert "%pip install" in notebook.cells[0].source
    links = tab.evaluate("Array.from(document.querySelectorAll('.notebook-links a'), a => a.href)")
    assert [link for link in links if "colab" in link or "mybinder" in link]
    assert all(link.endswith(".ipynb") for link in links if "colab" in link or "mybinder" in link)
    tab.context.close()


def test_an_interactive_figure_answers_its_menu(browser, site):
    tab, wrong, _ = visit(browser, site, "book/4-twenty-models.html")
    place = tab.locator(".interactive").first
    place.locator("svg").wait_for()
    before = place.locator("svg").inner_html()
    place.locator("select").select_option(index=1)
    tab.wait_for_function("([p, old]) => p.innerHTML !== old", arg=[
        place.locator("svg").element_handle(), before])  # fmt: skip
    assert wrong == []
    tab.context.close()


def test_without_scripts_a_figure_is_a_picture(browser, site):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(urljoin(site, "book/4-twenty-models.html"))
    assert tab.locator("figure img").first.is_visible()
    context.close()


def test_the_citation_is_copied(browser, site):
    tab, *_ = visit(browser, site, "book/index.html")
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = tab.locator(".highlight-bibtex").first
    block.hover()
    block.locator("button.copybtn").click()
    tab.wait_for_function(
        "navigator.clipboard.readText().then(text => text.startsWith('@software'))"
    )
    tab.context.close()


@pytest.mark.parametrize(
    ("asked", "page"), [("PSS", "glossary"), ("0.92", "index"), ("scheduler", "3-masking")]
)
def test_search_finds_where_it_is_explained(browser, site, asked, page):
    tab, *_ = visit(browser, site, f"search.html?q={asked}")
    tab.locator("#search-results li a").first.wait_for()
    tab.wait_for_function("!document.querySelector('#search-progress')?.innerText.endsWith('.')")
    found = tab.evaluate(
        "Array.from(document.querySelectorAll('#search-results li a'), a => a.href)"
    )
    assert any(f"/{page}.html" in address for address in found), found
    tab.context.close()


def test_a_page_is_found_and_cited(browser, site):
    tab, *_ = visit(browser, site, "book/3-masking.html")
    named = tab.evaluate("""Object.fromEntries(Array.from(
      document.querySelectorAll('meta[property], meta[name]'),
      m => [m.getAttribute('property') ?? m.name, m.content]))""")
    for name in ("og:title", "og:url", "og:image", "twitter:card", "citation_title", "description"):
        assert named[name], name
    for file in ("sitemap.xml", "404.html"):
        assert tab.request.get(urljoin(site, file)).ok, file
    root = tab.request.get(site).text()
    assert "<title>Parameter specialization" in root
    assert 'href="book/index.html"' in root
    tab.context.close()


def test_every_verdict_is_found_again_from_the_answers(built):
    found = recheck(built / "_executed")
    assert list(found["claim"]) == [f"C{number}" for number in range(1, 10)]
    assert set(found["agrees"]) == {"yes"}, found


NUMBER = r"([-+\u2212]?[\d.,]+)%?"
SMALL = '(?:<small class="interval">)?'
INTERVAL = re.compile(rf"{NUMBER}{SMALL}\u00a0\[{NUMBER},\u00a0{NUMBER}\]")


def intervals_of(path):
    """Every (value, low, high) of an executed notebook: in its tables, and handed to its prose."""
    glued, found = {}, []
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            for text in (data.get("text/html", ""), data.get("text/plain", "")):
                found += INTERVAL.findall(text)
            if name := output.get("metadata", {}).get("scrapbook", {}).get("name"):
                value = next((v for kind, v in data.items() if kind.endswith("text/plain")), "")
                glued[name] = value
    ends = [name for name in glued if {f"{name}-low", f"{name}-high"} <= set(glued)]
    found += [(glued[name], glued[f"{name}-low"], glued[f"{name}-high"]) for name in ends]
    known = str.maketrans({",": "", "'": "", "?": "nan", "\u2212": "-"})
    return [tuple(float(number.translate(known)) for number in one) for one in found]


def test_every_interval_holds_its_point(built):
    """None in a table, and none in a text."""
    found = {path.stem: intervals_of(path) for path in (built / "_executed").glob("*.ipynb")}
    assert sum(map(len, found.values())) > 100
    for page, intervals in found.items():
        for value, low, high in intervals:
            assert not value < low, (page, value, low, high)  # a missing bound is not a number
            assert not value > high, (page, value, low, high)
