"""Hooks of mkdocs: pages of measured results, which are outside docs/, become part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "experiments")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and images of benchmarks/ and experiments/."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".md", ".png"):
                files.append(
                    File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
                )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to them, which are relative to the repository, to the pages of the site."""
    if page.file.src_uri.startswith(FOLDERS):
        markdown = markdown.replace("](../../docs/", "](../../").replace("](../docs/", "](../")
    return re.sub(rf"\]\((?:\.\./)+({'|'.join(FOLDERS)})/", _relative(page.file.src_uri), markdown)


def _relative(uri: str) -> str:
    return "](" + "../" * uri.count("/") + r"\1/"
