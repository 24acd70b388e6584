"""The built book: its images, links and downloads, and that it needs no network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
VOID_LINKS = {"canonical", "license", "author"}  # <link>s that a browser does not load


class Page(HTMLParser):
    """The tags of one HTML page, its anchors, its scripts and styles, and its prose."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.tags, self.anchors, self.inline, self.prose = [], set(), [], []
        self.inside = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.tags.append((tag, attributes))
        self.anchors |= {attributes[key] for key in ("id", "name") if key in attributes}
        if tag in ("script", "style", "pre", "code"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.prose.append(data)
        elif self.inside[-1] in ("script", "style"):
            self.inline.append(data)

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def pages():
    if not (HTML / "index.html").exists():
        pytest.fail("_build/html is missing: run `make book` first")
    paths = [p for p in HTML.rglob("*.html") if "_static" not in p.parts]
    return {path.resolve(): Page(path) for path in paths}


def is_remote(address):
    return bool(re.match(r"\s*(https?:|//|wss?:)", address, re.IGNORECASE))


def loads(page):
    """The addresses that a browser fetches to show the page."""
    for tag in page.all("script", "img", "iframe", "source", "video", "audio", "embed"):
        yield from [tag[key] for key in ("src", "data-src", "poster") if key in tag]
        yield from [
            part.split()[0] for part in tag.get("srcset", "").split(",") if part
        ]
    for tag in page.all("link"):
        if tag.get("rel") not in VOID_LINKS:
            yield tag.get("href", "")


def css_addresses(text):
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
    return [url or imported for url, imported in found]


def missing_target(page, address, pages):
    """What an internal address lacks: its file, its anchor, or (None) nothing."""
    parts = urlsplit(address)
    path = page.path.parent / unquote(parts.path) if parts.path else page.path
    path = (path / "index.html" if path.is_dir() else path).resolve()
    if not path.exists():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and path in pages and anchor not in pages[path].anchors:
        return "no such anchor"
    return None


def poor_alt(alt):
    """Whether an alt text describes nothing: empty, a file's name, a hash."""
    return len(alt.split()) < 2 or re.search(r"\.(png|svg|jpe?g)$|[0-9a-f]{16,}", alt)


def test_every_image_has_real_alt_text(pages):
    bad = [
        f"{page.path.name}: {image.get('src')} has alt {image.get('alt')!r}"
        for page in pages.values()
        for image in page.all("img")
        if poor_alt(image.get("alt", ""))
    ]
    assert not bad


def test_every_internal_link_and_anchor_resolves(pages):
    bad = []
    for page in pages.values():
        addresses = [link.get("href", "") for link in page.all("a")]
        addresses += [a for a in loads(page) if not a.startswith("data:")]
        for address in addresses:
            if not address or re.match(r"[a-z]+:|//", address) or address == "#":
                continue
            if lacks := missing_target(page, address, pages):
                bad.append(f"{page.path.name}: {address}: {lacks}")
    assert not bad


def test_no_page_loads_anything_from_the_network(pages):
    bad = [
        f"{page.path.name}: {address}"
        for page in pages.values()
        for address in [*loads(page), *css_addresses("\n".join(page.inline))]
        if is_remote(address)
    ]
    assert not bad


def test_no_style_sheet_loads_anything_from_the_network(pages):
    sheets = {path: path.read_text(encoding="utf-8") for path in HTML.rglob("*.css")}
    bad = [
        f"{path.name}: {address}"
        for path, text in sheets.items()
        for address in css_addresses(text)
        if is_remote(address)
    ]
    assert sheets and not bad


def test_every_local_font_and_image_of_a_style_sheet_exists(pages):
    bad = []
    for path in HTML.rglob("*.css"):
        for address in css_addresses(path.read_text(encoding="utf-8")):
            name = unquote(urlsplit(address).path)
            if name and not address.startswith("data:") and not is_remote(address):
                target = path.parent / name
                bad += [] if target.exists() else [f"{path.name}: {address}"]
    assert not bad


def test_mathjax_and_its_fonts_are_local(pages):
    index = pages[(HTML / "book" / "index.html").resolve()]
    scripts = [
        tag["src"] for tag in index.all("script") if "mathjax" in tag.get("src", "")
    ]
    assert scripts
    for script in scripts:
        assert (index.path.parent / urlsplit(script).path).exists()
    assert list(HTML.glob("_static/mathjax/output/chtml/fonts/woff-v2/*.woff"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
def test_a_chapter_s_notebook_downloads_from_its_page(path, pages):
    page = pages[(HTML / "notebooks" / f"{path.stem}.html").resolve()]
    links = [link["href"] for link in page.all("a") if "download" in link]
    links += [
        link["href"] for link in page.all("a") if "btn-download-source" in str(link)
    ]
    files = [page.path.parent / urlsplit(link).path for link in links]
    notebooks = [file for file in files if file.name == path.name]
    assert notebooks and notebooks[0].read_bytes() == path.read_bytes()


def test_clone_command_and_launch_buttons_name_one_repository_or_none(pages):
    page = pages[(HTML / "book" / "how-to-run.html").resolve()]
    clone = re.search(r"git clone (\S+)", page.path.read_text(encoding="utf-8"))
    for path in CHAPTERS:
        links = pages[(HTML / "notebooks" / f"{path.stem}.html").resolve()].all("a")
        launch = [
            link["href"] for link in links if "Launch on" in link.get("title", "")
        ]
        repository = urlsplit(clone[1]).path if clone else None
        assert all(repository and f"{repository}/" in link for link in launch)


def test_every_page_offers_light_and_dark_mode(pages):
    book = [p for p in pages.values() if p.path.parent.name in ("book", "notebooks")]
    assert book
    for page in book:
        assert any(
            "theme-switch-button" in t.get("class", "") for t in page.all("button")
        )
    for name in ("pygments.css", "custom.css"):
        text = (HTML / "_static" / name).read_text(encoding="utf-8")
        assert 'data-theme="light"' in text and 'data-theme="dark"' in text


def test_no_markup_is_left_unrendered(pages):
    left = re.compile(r"\{(ref|numref|eq|doc|term|cite(:\w+)?)\}`|:::|\bTODO\b|\$\$")
    bad = [
        f"{page.path.name}: {found[0]!r}"
        for page in pages.values()
        if (found := left.search("".join(page.prose)))
    ]
    assert not bad


# ---------------------------------------------- the checks themselves, on something bad


@pytest.mark.parametrize(
    "alt", ["", "bars", "plot.png", "../_images/0123456789abcdef01.png"]
)
def test_a_poor_alt_text_is_found(alt):
    assert poor_alt(alt)


def test_what_a_bad_page_lacks_is_found(tmp_path):
    other = tmp_path / "other.html"
    other.write_text("<h1 id='there'>Title</h1>")
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<script src='https://cdn.example/x.js'></script>"
        "<link rel='stylesheet' href='//fonts.example/x.css'>"
        "<style>@import 'https://a.example/y.css';"
        "p {background: url(//b.example/z)}</style>"
    )
    pages = {path.resolve(): Page(path) for path in (other, bad)}
    page = pages[bad.resolve()]
    assert [is_remote(address) for address in loads(page)] == [True, True]
    assert [is_remote(a) for a in css_addresses("".join(page.inline))] == [True, True]
    assert missing_target(page, "gone.html", pages) == "no such file"
    assert missing_target(page, "other.html#gone", pages) == "no such anchor"
    assert missing_target(page, "other.html#there", pages) is None
