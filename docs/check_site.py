"""Check a built site: nothing of the repository is missing, each internal link leads somewhere, and
no page needs the network. `python docs/check_site.py build/docs`; says what is wrong, exits with 1.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from repository_pages import ROOT, guides, modules, notebooks

# What a browser loads by itself; links (`a href`) are only followed by a reader.
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "src"), ("video", "src")}


class Page(HTMLParser):
    "The anchors, the links and the loaded addresses of one page."

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value)
            elif (tag, name) in LOADED:
                self.loaded.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


def expected() -> list[str]:
    "The pages that the site must have, as paths in it."
    pages = ["index.html", *(f"api/{name}.html" for name in modules())]
    pages += [f"nbs/{path.stem}.html" for paths in notebooks().values() for path in paths]
    guide_pages = (path.relative_to(ROOT).with_suffix(".html") for path in guides())
    return pages + [path.as_posix() for path in guide_pages]


def link_defect(site: Path, source: Path, link: str, pages: dict[Path, Page]) -> str:
    "What is wrong with an internal link of the page `source`, empty where nothing is."
    parts = urlsplit(link)
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if not target.is_relative_to(site):
        return f"{link} leaves the site"
    if not target.is_file():
        return f"{link} leads to no file"
    anchor = unquote(parts.fragment)
    if anchor and target.suffix == ".html" and anchor not in pages[target].anchors:
        return f"{link} leads to no place in {target.name}"
    return ""


def defects(site: Path, wanted: list[str]) -> list[str]:
    "Everything that is wrong with the site, one line each."
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = [f"{name} is missing" for name in wanted if site / name not in pages]
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.loaded + page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                if link in page.loaded and address.scheme != "data":
                    found.append(f"{name}: {link} is loaded from elsewhere")
            elif defect := link_defect(site, path, link, pages):
                found.append(f"{name}: {defect}")
    return found


def main(site: str) -> int:
    "Print what is wrong with the site; 0 when nothing is."
    wanted = expected()
    found = defects(Path(site), wanted)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    if not found:
        print(f"{len(wanted)} pages, every internal link leads somewhere: {site}/index.html")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
