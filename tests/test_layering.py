"""The diagram: every import points strictly down, the ones inside functions included."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import sememe

ROOT = Path(sememe.__file__).parent

LAYERS = [
    ["errors", "paths"],
    ["config", "progress", "interrupt", "remote", "hub"],
    ["artifact", "encoded", "options", "frontier", "recompute"],
    ["metrics", "tracking", "checkpoint", "registry"],
    ["kernels"],
    ["dictionaries"],
    ["text", "pairs", "toy", "formats", "atlas", "graph", "lm", "needs", "optimiser"],
    ["store", "splice", "figures", "collect", "judge", "tuned", "labelled", "shuffled"],
    ["capture", "join", "downstream", "edits", "foreign"],
    ["source", "end_to_end", "measure", "continuations", "sae_bench"],
    ["probes"],
    [
        "harvest", "train", "fit", "evaluate", "compare", "concepts", "geometry", "interpret", "explain",
        "effects", "prompt", "circuit", "intervene", "erase", "steer", "patch", "scrub", "trace", "lens",
        "pretrain", "convert", "publish", "report",
    ],
    ["browse", "live", "grid", "recover", "results", "experiments"],
    ["recipe"],
    ["plan"],
    ["run", "estimator"],
    ["cli"],
    ["__main__"],
]  # fmt: skip
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names}
VERBS = set(LAYERS[11])
TORCH_FREE = {
    "errors",
    "config",
    "paths",
    "progress",
    "artifact",
    "options",
    "frontier",
    "registry",
    "remote",
    "hub",
    "atlas",
    "graph",
    "browse",
    "cli",
    "__main__",
}
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Every imported module's full name, with its line; relative imports resolved."""
    package = ["sememe", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((module, node.lineno))
            if module == "sememe":
                found += [(f"sememe.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_every_room_has_a_place_in_the_diagram():
    rooms = {module.name for module in pkgutil.iter_modules([str(ROOT)])}
    assert rooms == set(LAYER), "the diagram and the house must name the same rooms"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    room = room_of(path)
    if room == "__init__":
        assert not [name for name, _ in imports_of(path) if name != "__future__"]
        return
    for name, line in imports_of(path):
        parts = name.split(".")
        if parts[0] != "sememe" or len(parts) == 1 or parts[1] in (room, "__version__"):
            continue
        other = parts[1]
        assert LAYER[other] < LAYER[room], f"{path.name}:{line}: {room} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_may_import_what(path):
    room = room_of(path)
    for name, line in imports_of(path):
        top = name.split(".")[0]
        assert top != "transformers" or room == "lm", f"{path.name}:{line}: only lm may import transformers"
        if room in TORCH_FREE:
            assert top != "torch", f"{path.name}:{line}: {room} must stay free of torch"


def test_modules_without_torch_do_not_load_it():
    rooms = ", ".join(f"sememe.{room}" for room in sorted(TORCH_FREE))
    code = f"import sys, {rooms}; bad = {{'torch', 'transformers'}} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(LAYER))
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(f"sememe.{name}")
    assert list(module.__all__) == sorted(
        module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    ) or list(module.__all__) == sorted(module.__all__), f"sememe.{name}.__all__ is not sorted"
    for public in module.__all__:
        assert hasattr(module, public), f"sememe.{name}.__all__ names {public}, which is not there"
    assert module.__doc__, f"sememe.{name} has no docstring"
