"""Where the built web page lies, and what is served in its place when it was not built."""

from __future__ import annotations

from pathlib import Path

_STATIC = Path(__file__).resolve().parent / "static"

# The page needs nothing but its own files. The fallback page below keeps to the same policy: nothing inline.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

FALLBACK_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>swarmd</title>
<h1>swarmd is running; its page was not built</h1>
<p>The node and its API work. The page is built when swarmd is installed from a checkout; that needs
packages from the npm registry, and it failed. With a network connection, in the checkout:</p>
<pre>pip install -v -e .</pre>
<p>(<code>-v</code> shows why it fails, if it does), then start the node again. Until then,
<code>swarmd status</code> shows the nodes and stages, <code>swarmd run</code> is a chat in the terminal, and
<a href="/api/swarm">/api/swarm</a> holds the same state as JSON.</p>
</html>
"""


def static_dir() -> Path | None:
    """The folder whose `index.html` is the page, to be served whole; None when the page was not built."""
    return _STATIC if (_STATIC / "index.html").is_file() else None
