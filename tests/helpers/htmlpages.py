"""A page as a reader sees it: its words, and which tags it has."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The words of an HTML file, white space made single, and its tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._words: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self._words.append(data)
