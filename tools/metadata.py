"""What a built package has beyond pyproject.toml: addresses, a README without dead links, the results figures read.

hatchling calls it. There is one address, `repository` in `[tool.dn-lib]` of pyproject.toml; while it is empty, a
package names none. On a package index the links of README.md lead nowhere, since they are relative to the repository:
with an address they become whole, without one the text of a link is left and a picture goes.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
PAGES = {"Repository": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}


def repository(root: Path) -> str:
    """The project's address without a slash at the end; "" while it has none.

    >>> repository(Path(__file__).parents[1]).endswith("/")
    False
    """
    own = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["dn-lib"]
    return own["repository"].rstrip("/")


def urls(address: str) -> dict[str, str]:
    """The project's pages.

    >>> urls("https://host/book")["Issues"], urls("")
    ('https://host/book/issues', {})
    """
    return {name: address + page for name, page in PAGES.items()} if address else {}


def readme(text: str, address: str) -> str:
    """`text` with every relative link made whole, or taken out.

    >>> readme("![A row.](a.png) See [the log](log.md) and [fla](https://fla).", "https://host/book")
    '![A row.](https://host/book/raw/main/a.png) See [the log](https://host/book/blob/main/log.md) and [fla](https://fla).'
    >>> readme("![A row.](a.png) See [the log](log.md) and [fla](https://fla).", "")
    ' See the log and [fla](https://fla).'
    """

    def whole(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if not address:
            return "" if picture else words
        return f"{picture}[{words}]({address}/{'raw' if picture else 'blob'}/main/{target})"

    return LINK.sub(whole, text)


class Metadata(MetadataHookInterface):
    """hatchling's hook for what a package says of itself."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        address = repository(root)
        text = readme((root / "README.md").read_text(encoding="utf-8"), address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        if address:
            metadata["urls"] = urls(address)


class Results(BuildHookInterface):
    """hatchling's hook for what goes into a wheel: `book/results`, except where the checkout itself is installed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"]["book/results"] = "dn_lib/book/results"
