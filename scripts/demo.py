"""`make demo`: run the demo's recipe, and say how long it took, the set-up included, and how much memory."""

import os
import sys
import time

from sememe.errors import SememeError
from sememe.run import run

if __name__ == "__main__":
    started = float(os.environ.get("SEMEME_DEMO_STARTED", time.time()))
    try:
        results = run("runs/demo.toml")
    except SememeError as error:
        print(f"sememe: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("sememe: interrupted; `make demo` goes on where it was.", file=sys.stderr)
        sys.exit(130)
    seconds = time.time() - started
    peak = max(result.peak_gb for result in results)
    print(f"make demo: {seconds:.0f} s in all, set-up included; peak memory {peak:.2f} GB")
