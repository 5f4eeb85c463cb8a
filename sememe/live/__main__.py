"""`python -m sememe.live CONFIG`: the child process itself. Knows where its pipes are."""

from __future__ import annotations

import json
import os
import signal
import sys

from sememe.live import LiveConfig, Session, serve

__all__: list[str] = []


def main() -> None:
    """Answer on what was standard output; what libraries print goes to the terminal instead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then ends this process
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def write(line: bytes) -> None:
        answers.write(line)
        answers.flush()

    config = LiveConfig.build(json.loads(sys.argv[1]))
    serve(Session(config), sys.stdin.buffer, write)


if __name__ == "__main__":
    main()
