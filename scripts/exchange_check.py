"""Read what the peer packages write and let them read what we write: every architecture, the packages themselves.

Each package runs in its environment, made by `make exchange-check`. Prints the largest differences of activations and
reconstructions, as shares of the largest value, and exits with 1 if one is above 1e-6 or a case fails.

    python scripts/exchange_check.py [--only sae_lens] [--environments FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sememe import dictionaries, formats
from sememe.dictionaries import Site, Sites, Trainable
from sememe.errors import FormatError

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "exchange_worker.py"
PEERS = ("sae_lens", "dictionary_learning", "sparsify")
KINDS = (
    "relu", "tied", "p_anneal", "topk", "multi_topk", "batch_topk", "matryoshka", "jumprelu", "gated", "group_max",
)  # fmt: skip
D, N, K, ROWS = 24, 96, 6, 64
MOST = 1e-6


def made(kind: str, centred: bool, transcodes: bool, skip: bool) -> Trainable:
    """One of our dictionaries, random in every part."""
    options: dict[str, Any] = {"kind": kind, "d_sae": N, "skip": skip}
    if kind in ("topk", "multi_topk", "batch_topk", "matryoshka", "group_max"):
        options["k"] = K

    def site(hookpoint: str) -> Site:
        return Site(model="tiny", model_fingerprint="f" * 64, hookpoint=hookpoint, start=0, stop=D)

    sites = Sites(inputs=(site("mlp_in.3"),), outputs=(site("mlp_out.3" if transcodes else "mlp_in.3"),))
    dictionary = dictionaries.TRAINABLE[kind].rebuild(options, D, D, N, sites)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in dictionary.state_dict().items():
            if name.startswith("scale_"):
                continue
            scale = 1 / D**0.5 if tensor.dim() == 2 else 0.3
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
            if "threshold" in name:
                tensor.abs_().add_(0.2)
        if centred:
            dictionary.state_dict()["b_pre"].copy_(dictionary.state_dict()["b_dec"])
    return dictionary.eval()


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def run(python: Path, *arguments: str) -> None:
    environment = os.environ | {
        "TORCH_COMPILE_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), str(WORKER), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


@torch.no_grad()
def check(package: str, python: Path, folder: Path) -> list[tuple[str, str, float, float]]:
    """Every case in both directions: name, direction, differences of activations and reconstructions."""
    results = []
    theirs = folder / "theirs"
    run(python, package, "write", str(theirs))
    for case in sorted(theirs.iterdir()):
        probe = np.load(case / "probe.npz")
        dictionary = formats.read(case).dictionary
        x = torch.from_numpy(probe["x"])
        acts, recon = dictionary.encode(x).to_dense().numpy(), dictionary(x).numpy()
        results.append((case.name, "read", share(acts, probe["acts"]), share(recon, probe["recon"])))
    ours = folder / "ours"
    x = 0.7 + 1.5 * torch.randn(ROWS, D, generator=torch.Generator().manual_seed(99))
    for kind in KINDS:
        for centred, transcodes, skip in (
            (True, False, False), (False, False, False), (False, True, False), (False, True, True),
        ):  # fmt: skip
            case = ours / "-".join(
                [kind, *(["centred"] * centred), *(["transcoder"] * transcodes), *(["skip"] * skip)]
            )
            try:
                dictionary = made(kind, centred, transcodes, skip)
                case.mkdir(parents=True)
                formats.write(dictionary, case, package)
            except FormatError:
                case.rmdir()  # no place for it in the format
                continue
            except Exception as error:  # tied has no transcoders
                if "must read and write the same place" not in str(error) and "skip" not in str(error):
                    raise
                continue
            acts, recon = dictionary.encode(x).to_dense(), dictionary(x)
            np.savez(case / "probe.npz", x=x.numpy(), acts=acts.numpy(), recon=recon.numpy())
    run(python, package, "read", str(ours))
    for case in sorted(ours.iterdir()):
        probe, answer = np.load(case / "probe.npz"), np.load(case / "answer.npz")
        results.append(
            (case.name, "write", share(answer["acts"], probe["acts"]), share(answer["recon"], probe["recon"]))
        )
    return results


def main() -> int:
    """Check all packages that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PEERS)
    parser.add_argument("--environments", type=Path, default=ROOT, help="the folder with .venv-peers-NAME")
    options = parser.parse_args()
    worst = 0.0
    for package in [options.only] if options.only else PEERS:
        python = options.environments / f".venv-peers-{package}" / "bin" / "python"
        with tempfile.TemporaryDirectory() as folder:
            results = check(package, python, Path(folder))
        for name, direction, acts, recon in results:
            print(f"{package:20} {direction:5} {name:40} acts {acts:8.1e}  recon {recon:8.1e}")
            worst = max(worst, acts, recon)
    print(f"largest difference: {worst:.1e} of the largest value (must be <= {MOST:g})")
    return 0 if worst <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
