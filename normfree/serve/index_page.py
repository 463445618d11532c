"""The page and the policy that lets exactly its own style and script run."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def page() -> tuple[str, str]:
    """(HTML, Content-Security-Policy). The policy names the page's style and script by their SHA-256; the page may
    talk to its own server only, and nothing may frame it."""
    html = files("normfree.serve").joinpath("page.html").read_text(encoding="utf-8")
    style, script = (_source(html, tag) for tag in ("style", "script"))
    return html, (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _source(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    assert len(found) == 1, f"one <{tag}> is expected"
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
