"""A hook of mkdocs: what pages link to outside of `docs/` becomes part of the site.

Pages link to committed results and examples as they lie in the repository, so that the links work
there, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
_OUT = re.compile(r"\]\(\.\./(?!README\.md)([\w./-]+)")
"""A link of a page of `docs/` to a file outside."""


def on_files(files: Files, config: Any) -> Files:
    """Add the committed results, and what the docs folder has no page of."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    linked = {ROOT / target for page in pages for target in _OUT.findall(page.read_text())}
    results = {p for p in (ROOT / RESULTS).iterdir() if p.suffix in (".md", ".png")}
    for path in sorted(results | linked):
        uri = path.relative_to(ROOT).as_posix()
        added = File.generated(config, uri, abs_src_path=str(path))
        added.inclusion = added.inclusion.NOT_IN_NAV
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links out of `docs/` lead to the same files in the site."""
    if "/" not in page.file.src_uri:
        markdown = _OUT.sub(r"](\1", markdown)
        markdown = markdown.replace("](../README.md)", "](index.md)")
    if page.file.src_uri.startswith(RESULTS):
        # A report names other files of the repository, which are no part of the site.
        markdown = re.sub(r"(?<!!)\[([^]]+)\]\(\.\.[^)]*\)", r"\1", markdown)
    return markdown
