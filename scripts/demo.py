"""`make demo`: run the demo's recipe and say how long it took and how much memory, the set-up included."""

import resource
import sys
import time

from sememe.cli import main

BUDGET_SECONDS, BUDGET_GB = 600, 6

if __name__ == "__main__":
    started = time.monotonic()
    code = 0
    try:
        main(["run", "runs/demo.toml"])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    if code == 0:
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"make demo: {seconds:.0f} s after the set-up, peak memory {peak:.1f} GB")
    sys.exit(code)
