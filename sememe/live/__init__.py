"""The browser's child process: answers what needs a language model, one line of JSON at a time.

Knows a dictionary, its model and the verbs that look through it (`prompt`, `intervene`); knows nothing of HTTP, and
the server that asks knows nothing of torch. `python -m sememe.live '{"atlas": ...}'` speaks the protocol of
`sememe.browse.live`, which is only lines on pipes: neither side imports the other.

    config.py     what is loaded
    session.py    the answers, from a model and a dictionary that are loaded when first asked for
    lines.py      questions in, answers out, cancelling in between
"""

from sememe.live.config import LiveConfig
from sememe.live.lines import serve
from sememe.live.session import Session

__all__ = ["LiveConfig", "Session", "serve"]
