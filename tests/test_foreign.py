"""Foreign dictionaries where a verb takes one: brought in once, tied to the model in use; and ids on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from sememe import artifact, dictionaries, foreign
from sememe.config import Config
from sememe.convert import ConvertConfig, convert
from sememe.dictionaries import TopKConfig
from sememe.errors import FormatError, MismatchError
from sememe.foreign import opens, own
from sememe.formats import hub
from sememe.intervene import InterveneConfig

D, N = 8, 24
FINGERPRINTS = {"gpt2": "a" * 64, "other": "b" * 64}


def sparsify(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"encoder.weight": rand(N, D), "encoder.bias": rand(N), "W_dec": rand(N, D), "b_dec": rand(D)}
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 3}))
    return folder


def sae_lens(folder: Path, model: str = "gpt2-small") -> Path:
    dictionary = dictionaries.build(TopKConfig(k=3, d_sae=N), D, D)
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    dictionary.save(folder.parent / "ours", x, fresh=True)
    convert(ConvertConfig(source=folder.parent / "ours", out=folder, to="sae_lens"), fresh=True)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"model_name": model, "hook_name": "blocks.5.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from sememe import lm

    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "fingerprint_of", lambda model: FINGERPRINTS[getattr(model, "model", model)])
    return tmp_path / "cache" / "dictionaries"


class Look(Config):
    """A verb's."""

    dictionary: Path
    """One."""
    others: tuple[Path, ...] = ()
    """Several."""
    model: str = "other"
    """A model."""
    _opens = opens("dictionary", "others")


def test_a_path_that_is_no_foreign_dictionary_is_left_alone(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none", tmp_path / "folder"):
        assert Look(dictionary=path).dictionary == path == own(path)
    saved = dictionaries.build(TopKConfig(k=3, d_sae=N), D, D).save(tmp_path / "ours", torch.zeros(1, D))
    assert own(saved.path) == saved.path
    assert not cache.exists()


def test_a_foreign_dictionary_is_brought_in_once(tmp_path: Path, cache: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    first = Look(dictionary=source, others=(source, tmp_path / "none"))
    assert first.dictionary.parent == cache and first.others == (first.dictionary, tmp_path / "none")
    assert artifact.load(first.dictionary, "dictionary").extra["origin"]["hookpoint"] == "resid_post.3"
    assert dictionaries.load(first.dictionary).sites is None, "nobody named a model"
    before = (first.dictionary / "meta.json").stat().st_mtime_ns
    assert Look(dictionary=source).dictionary == first.dictionary
    assert (first.dictionary / "meta.json").stat().st_mtime_ns == before
    assert first.replace(model="gpt2").dictionary == first.dictionary, "what is ours stays"
    sparsify(source, seed=1)
    assert Look(dictionary=source).dictionary != first.dictionary, "the files changed"


def test_it_belongs_to_the_model_that_it_is_used_with(tmp_path: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    sites = dictionaries.load(Look(dictionary=source, model="gpt2").dictionary).sites
    assert sites is not None and sites.inputs == sites.outputs
    assert sites.inputs[0].resolved() | {"max_norm": None} == {
        "model": "gpt2", "model_fingerprint": "a" * 64, "hookpoint": "resid_post.3", "start": 0, "stop": D,
        "max_norm": None,
    }  # fmt: skip
    config = InterveneConfig.build(
        {"dictionary": source, "model": {"model": "gpt2"}}
    )  # as the command line has it
    sites = dictionaries.load(config.dictionary).sites
    assert sites is not None and sites.inputs[0].model_fingerprint == "a" * 64


def test_files_that_name_a_model_are_held_to_it(tmp_path: Path) -> None:
    source = sae_lens(tmp_path / "theirs")
    assert dictionaries.load(Look(dictionary=source).dictionary).sites is None, "the default is another one"
    sites = dictionaries.load(Look(dictionary=source, model="gpt2").dictionary).sites
    assert sites is not None and sites.inputs[0].hookpoint == "resid_post.5"
    with pytest.raises(
        MismatchError,
        match=r"must be used with the model that its files name, gpt2-small, got other. Pass --model",
    ):
        Look(dictionary=source, model="other")


def test_a_damaged_foreign_dictionary_says_so_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = sparsify(tmp_path / "layers.3")
    (source / "cfg.json").write_text("{")
    with pytest.raises(FormatError, match=r"must be JSON, got .* Fetch the file again"):
        Look(dictionary=source)
    assert not list(cache.glob("*"))


# -- the hub -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://owner/repo/a/b", ("owner/repo", "a/b", None)),
        ("hf:/owner/repo", ("owner/repo", "", None)),
        ("hf://owner/repo@v1/a", ("owner/repo", "a", "v1")),
    ],
)
def test_ids(text: str, parts: tuple[str, str, str | None]) -> None:
    assert hub.is_id(text) and hub.is_id(Path(text)) and tuple(hub.parse(Path(text))) == parts
    assert not hub.is_id("hf/owner") and not hub.is_id("folder/hf://x")


@pytest.mark.parametrize("text", ["hf://owner", "hf://", "hf://own er/repo/x"])
def test_ids_without_a_repository(text: str) -> None:
    with pytest.raises(FormatError, match=r"an id must be hf://OWNER/REPO/FOLDER, got hf:"):
        hub.parse(text)


@pytest.mark.parametrize("text", ["hf://owner/repo/../../etc", "hf://../repo/a", "hf://owner/repo/a\\..\\b"])
def test_names_that_would_leave_the_repository(text: str) -> None:
    with pytest.raises(FormatError, match=r"must stay inside its repository, got .* Name the folder without"):
        hub.fetch(text)


class Hub:
    """A hub with one repository, and the client's cache in a folder."""

    def __init__(self, store: Path, names: list[str]) -> None:
        self.store, self.names, self.asked = store, names, []
        self.error: Exception | None = None

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        if self.error is not None:
            raise self.error
        return self.names

    def download(self, repo: str, *, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only and not self.store.exists():
            raise FileNotFoundError("not cached")
        if not local_files_only:
            self.asked.append(options["allow_patterns"])
            for name in options["allow_patterns"]:
                place = self.store / name
                sparsify(place.parent)
        return str(self.store)


@pytest.fixture
def make_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Hub]:
    def make(names: list[str]) -> Hub:
        made = Hub(tmp_path / "snapshot", names)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
        return made

    return make


NAMES = [
    "README.md",
    "layers.0/cfg.json",
    "layers.0/sae.safetensors",
    "layers.1/cfg.json",
    "layers.1/sae.safetensors",
]


def test_an_id_fetches_its_own_files_and_no_more(
    make_hub: Callable[[list[str]], Hub], tmp_path: Path
) -> None:
    made = make_hub(NAMES)
    path = Look(dictionary=Path("hf://owner/repo/layers.1")).dictionary
    assert artifact.load(path).extra["origin"]["hookpoint"] == "resid_post.1"
    assert made.asked == [["layers.1/cfg.json", "layers.1/sae.safetensors"]]
    made.error = ConnectionError("down")
    assert Look(dictionary=Path("hf://owner/repo/layers.1")).dictionary == path, (
        "the cache serves without a network"
    )
    saved = convert(ConvertConfig(source=Path("hf://owner/repo/layers.1"), out=tmp_path / "out"))
    assert saved.kind == "dictionary"


def test_a_release_of_ours_is_named_as_a_whole(make_hub: Callable[[list[str]], Hub]) -> None:
    made = make_hub(
        ["meta.json", "report/meta.json", "dictionary/meta.json", "dictionary/checkpoints/step-1/meta.json"]
    )
    assert hub.fetch("hf://owner/repo") == made.store / "dictionary"
    assert made.asked == [["dictionary/checkpoints/step-1/meta.json", "dictionary/meta.json"]]


def test_what_an_id_may_be_wrong_about(make_hub: Callable[[list[str]], Hub]) -> None:
    made = make_hub([*NAMES, "../evil/sae.safetensors", "/evil/sae.safetensors"])
    with pytest.raises(
        FormatError, match=r"must be one dictionary, got 2 below it: layers.0, layers.1. Name one"
    ):
        hub.fetch("hf://owner/repo")
    with pytest.raises(
        FormatError, match=r"must be a dictionary .* got no such folder. Did you mean 'layers.1'"
    ):
        hub.fetch("hf://owner/repo/layer.1")
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    made.error = RepositoryNotFoundError("404", response=response)
    with pytest.raises(
        FormatError, match=r"owner/repo must be a repository on the hub, got no such repository"
    ):
        hub.fetch("hf://owner/repo/layers.0")
    make_hub(["README.md"])
    with pytest.raises(
        FormatError, match=r"got no such folder. The repository holds no dictionary in a known f"
    ):
        hub.fetch("hf://owner/repo/layers.0")


def test_without_a_network_it_says_what_is_cached(
    make_hub: Callable[[list[str]], Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_hub(NAMES)
    made.error = ConnectionError("no route to the hub")
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: _scan(tmp_path / "c"))
    with pytest.raises(
        FormatError,
        match=r"hf://owner/repo/layers.7 must be in the local cache, or the hub must be reachable, got no route "
        r"to the hub. Check the network. The cache holds of it: layers.0.",
    ):
        hub.fetch("hf://owner/repo/layers.7")
    with pytest.raises(FormatError, match=r"The cache holds dictionaries of: owner/repo."):
        hub.fetch("hf://owner/other/layers.7")
    assert foreign.source_of(tmp_path) == tmp_path


def _scan(root: Path) -> Any:
    """A cache in the client's layout, as the client itself sees it."""
    from huggingface_hub.utils import scan_cache_dir

    snapshot = root / "models--owner--repo" / "snapshots" / "abc"
    sparsify(snapshot / "layers.0")
    (root / "models--owner--repo" / "blobs").mkdir(exist_ok=True)
    (root / "models--owner--repo" / "refs").mkdir(exist_ok=True)
    (root / "models--owner--repo" / "refs" / "main").write_text("abc")
    return scan_cache_dir(root)
