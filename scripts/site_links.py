"""A hook of mkdocs: links of a page that lead out of docs/ lead to the repository on the site.

On disk, and where the repository is shown, `../model/README.md` is right; on the site there is no such page.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?P<to>\.\.?/[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    config.repo_url = repository()
    config.repo_name = "decaf-lora"
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return outward(markdown, page.file.src_uri)


def repository() -> str:
    """The one place for the repository's address is pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]


def outward(markdown: str, page: str) -> str:
    """The text of a page with the links that leave docs/ made absolute.

    Args:
        markdown: the page.
        page: its path below docs/.

    Raises:
        ValueError: a link leads to a file that does not exist.
    """

    def absolute(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match["to"]))
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            raise ValueError(f"docs/{page}: there is no {target}")
        return f"]({repository()}/blob/main/{target}{match['anchor'] or ''})"

    return LINK.sub(absolute, markdown)
