"""mkdocs hooks: pages of the repository that are outside of docs/, and the links between all pages.

Links are written as they work in the repository. In the site, a link to a file that is no page of
the site is its text alone.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parent
_OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md", "launch/**/*.md")
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, each under its path in the repository."""
    for path in (path for pattern in _OUTSIDE for path in sorted(_ROOT.glob(pattern))):
        name = path.relative_to(_ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: object) -> str:
    """Turn links of the repository into links of the site."""
    here = posixpath.dirname(page.file.src_uri)
    is_outside = page.file.generated_by is not None
    in_repository = here if is_outside else posixpath.join("docs", here)

    def in_site(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(in_repository, target)).removeprefix("docs/")
        if files.get_file_from_path(path) is None:
            return text
        return f"[{text}]({posixpath.relpath(path, here or '.')}{anchor})"

    return _LINK.sub(in_site, markdown)
