"""A report as a browser reads it, and a run whose data tries to inject markup into it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

HOSTILE = """</td><script>alert(1)</script><img src=x onerror=alert(2)> "quoted' & 'such" {{ 7 * 7 }} <b>film</b>"""
SMALL = ["--batch-size=8", "--log-steps=1", "--scratch.hidden-size=16", "--scratch.num-attention-heads=2"]
SMALL += ["--scratch.intermediate-size=32", "--scratch.num-hidden-layers=1", "--precision=fp32"]


class Page(HTMLParser):
    """A page taken apart: its elements with their attributes, and the text of each but those of style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)
