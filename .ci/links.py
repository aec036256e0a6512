"""Looks through a built site: every internal link and anchor leads somewhere, nothing is fetched.

`python .ci/links.py build/site` prints what is wrong, one line each, and exits 1 if there is any.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, against what a person follows.
_FETCHED = dict.fromkeys(("script", "img", "iframe", "source", "video", "audio"), "src")
_FETCHED_RELS = {"stylesheet", "preload", "prefetch", "preconnect", "icon", "dns-prefetch"}


@dataclass
class Page(HTMLParser):
    """The links, the anchors and the fetched things of one page."""

    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect from one tag."""
        values = {k: v for k, v in attrs if v}
        self.anchors |= {values[k] for k in ("id", "name") if k in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values:
            fetched = set(values.get("rel", "").split()) & _FETCHED_RELS
            (self.fetched if fetched else self.links).append(values["href"])
        if tag in _FETCHED and _FETCHED[tag] in values:
            self.fetched.append(values[_FETCHED[tag]])


def problems(site: Path) -> list[str]:
    """One line for everything wrong in a site."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    out = [] if pages else [f"{site}: no page"]
    for path, page in pages.items():
        name = path.relative_to(site)
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.fetched and parts.scheme != "data":
                    out.append(f"{name}: fetches {link}")
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if parts.path.startswith("/"):
                if path.name != "404.html":  # served at any depth, so its links are absolute
                    out.append(f"{name}: {link} is absolute")
                continue
            if target.is_dir():
                target /= "index.html"
            if not target.is_file() or not target.is_relative_to(site):
                out.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages:
                known = pages[target].anchors
                out += [] if unquote(parts.fragment) in known else [f"{name}: no anchor {link}"]
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected the folder of a site")
    found = problems(Path(sys.argv[1]).resolve())
    print("\n".join(found) or "all links lead somewhere")
    sys.exit(bool(found))
