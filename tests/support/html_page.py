"""What is in a report."""

import base64
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags, their attributes and all text of a report."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data + "\n"

    @property
    def images(self) -> dict[str, bytes]:
        found = [attrs for tag, attrs in self.tags if tag == "img"]
        return {attrs["alt"]: base64.b64decode(attrs["src"].partition("svg+xml;base64,")[2]) for attrs in found}
