"""`python -m sememe`: the command line, for where the command `sememe` is not on the PATH. Knows nothing else."""

from __future__ import annotations

from sememe.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
