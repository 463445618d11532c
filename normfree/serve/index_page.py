"""The web page, and a content security policy that allows only its own style and script."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def index_page() -> tuple[str, str]:
    """Return the HTML and its Content-Security-Policy.

    The policy identifies the style and the script by their SHA-256. The page may connect only to its own server, and no
    other page may embed it in a frame.
    """
    html = files("normfree.serve").joinpath("page.html").read_text(encoding="utf-8")
    style, script = (_source(html, tag) for tag in ("style", "script"))
    return html, (
        f"default-src 'none'; style-src {style}; script-src {script}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _source(html: str, tag: str) -> str:
    """Return the policy's source expression for the content of the only element `tag`."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    assert len(found) == 1, f"expected one <{tag}>"
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
