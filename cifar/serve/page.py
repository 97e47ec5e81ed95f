"""The web page of the service: one file, and the headers that let nothing run but what is in it."""

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

_FILE = Path(__file__).with_name("page.html")


class Page(NamedTuple):
    html: str
    headers: dict[str, str]
    """To send with it: a policy that names the page's own style and script by their hashes."""


@functools.cache
def load_page() -> Page:
    html = _FILE.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
        f"frame-ancestors 'none'; style-src {_hash(html, 'style')}; script-src {_hash(html, 'script')}"
    )
    return Page(
        html,
        {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def _hash(html: str, tag: str) -> str:
    """The policy's word for what the page's only element of this kind holds."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
