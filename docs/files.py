"""A hook of mkdocs: the first page is the README, and a file outside docs/ that a page links to is a page of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository's root."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "sh", ".yml": "yaml"}


def place(target: str) -> str:
    """Where the site has a path of the repository; files outside docs/ are under files/."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return {root: page for page, root in PAGES.items()}.get(target, f"files/{target}.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and lead the links of all pages to where the site has their targets."""
    linked: set[str] = set()
    for uri, path in ({file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()} | PAGES).items():

        def moved(link: re.Match[str], uri: str = uri, path: str = path) -> str:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
            if not (ROOT / target).is_file():
                return link[0]  # mkdocs warns
            linked.add(target)
            return posixpath.relpath(place(target), posixpath.dirname(uri) or ".")

        text = LINK.sub(moved, (ROOT / path).read_text(encoding="utf-8"))
        if uri in files.src_uris:
            files.remove(files.src_uris[uri])
        files.append(File.generated(config, uri, content=text))
    for target in sorted(linked):
        if place(target).startswith("files/"):
            files.append(shown(config, target))
    return files


def shown(config: MkDocsConfig, target: str) -> File:
    """A page that shows a file of the repository."""
    text = (ROOT / target).read_text(encoding="utf-8")
    content = f"# {target}\n\n~~~~~~{LANGUAGES.get(Path(target).suffix, 'text')}\n{text}~~~~~~\n"
    return File.generated(config, place(target), content=content, inclusion=InclusionLevel.NOT_IN_NAV)
