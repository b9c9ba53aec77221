"""Pages of the site that lie outside ``docs``, and links to files that are no pages.

README.md is the start page; CONTRIBUTING.md and CHANGELOG.md are pages too. A link to another file of the repository
(a module, an example) keeps its text and loses its address, as the sources have no public one yet; that the file exists
is checked.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
INFO = re.compile(r"^(```\w+) .*$", re.MULTILINE)  # what follows a block's language is for tests/test_pages.py
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of ``OUTSIDE``, with links as from ``docs``."""
    for source, page in OUTSIDE.items():
        text = outside_code(lambda part: LINK.sub(_from_docs, part), (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """``markdown`` without addresses of files that are no pages."""
    here = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match[str]) -> str:
        mark, text, address = match.groups()
        path = address.partition("#")[0]
        if "://" in address or not path:
            return match[0]
        place = posixpath.normpath(posixpath.join("docs", here, path))
        if place in OUTSIDE:
            home = posixpath.relpath(OUTSIDE[place], here or ".")
            return f"{mark}[{text}]({home}{address[len(path) :]})"
        if place.startswith("docs/"):
            return match[0]
        if not (ROOT / place).exists():
            log.warning("%s: links to %s, which is no file of the repository", page.file.src_uri, place)
        return text

    return INFO.sub(r"\1", outside_code(lambda part: LINK.sub(kept, part), markdown))


def outside_code(change, text: str) -> str:
    """``text`` with ``change`` made to what lies between fenced blocks."""
    done, end = [], 0
    for fence in FENCED.finditer(text):
        done += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*done, change(text[end:])])


def _from_docs(match: re.Match[str]) -> str:
    """A link of a file beside ``docs`` as a file in it would write it."""
    mark, text, address = match.groups()
    path = address.partition("#")[0]
    if "://" in address or not path:
        return match[0]
    return f"{mark}[{text}]({posixpath.relpath(address, 'docs')})"
