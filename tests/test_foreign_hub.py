"""What is read by its id, `hf://OWNER/REPO/FOLDER`, over real HTTP: every format, what is fetched, what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from foreign_files import write_dictionary_learning, write_sae_lens, write_sparsify
from hub_server import Hub, point_at, serving
from test_publish import make_atlas, make_dictionary, make_report
from test_releases import autoencoder, gemma, llama, openai

from sememe import artifact, dictionaries, foreign, formats
from sememe import hub as the_hub
from sememe.config import Config
from sememe.convert import ConvertConfig, convert, convert_all
from sememe.errors import ArtifactError, FormatError
from sememe.foreign import opens
from sememe.formats import hub as ids
from sememe.publish import PublishConfig, publish
from sememe.report import ReportConfig
from sememe.report import report as report_verb

# how the hub's client sends and fetches files is its own business
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Look(Config):
    """A verb's."""

    dictionary: Path
    """One."""
    _opens = opens("dictionary")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMEME_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)  # the client waits between its own tries
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 256)  # these files are small
    with serving() as server:
        point_at(monkeypatch, server.url, cache=tmp_path / "hub")
        yield server


def opened(source: str) -> artifact.Artifact:
    return artifact.load(Look(dictionary=Path(source)).dictionary, "dictionary")


# -- every format ------------------------------------------------------------------------------------


def _sae_lens(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_sae_lens(folder, {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre"})
    (folder / "sparsity.safetensors").write_bytes((folder / "sae_weights.safetensors").read_bytes())


RELEASES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "sae_lens": ("owner/GPT2-Small-SAEs", "blocks.3.hook_resid_pre", _sae_lens),
    "sparsify": ("owner/sae-tiny-32x", "layers.3.mlp", write_sparsify),
    "dictionary_learning": (
        "owner/saes_tiny",
        "resid_post_layer_4/trainer_2",
        lambda folder: write_dictionary_learning(folder, "BatchTopKSAE"),
    ),
    "dictionary_learning, a release's tree": (
        "owner/pythia-70m-deduped",
        "mlp_out_layer1/10_24",
        autoencoder,
    ),
    "gemma_scope": ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", gemma),
    "llama_scope": ("owner/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", llama),
    "openai": ("owner/gpt2-small", "resid_post_mlp_v5_32k/autoencoders/8.pt", openai),
}


@pytest.mark.parametrize("name", RELEASES)
def test_every_format_is_read_by_its_id(name: str, hub: Hub, tmp_path: Path) -> None:
    """As from the folder itself: what it computes, where it belongs; nothing beside it is fetched, nothing twice."""
    repo, place, write = RELEASES[name]
    tree = tmp_path / "tree" / repo.split("/")[1]
    write(tree / place)
    beside = Path(place).parent / ("9.pt" if place.endswith(".pt") else "another")
    write(tree / beside)
    hub.hold_folder(repo, tree)
    there, here = opened(f"hf://{repo}/{place}"), formats.read(tree / place)
    origin = there.extra["origin"]
    assert origin["format"] == name.split(",")[0]
    told = [origin[key] for key in ("model", "hookpoint", "hookpoint_out")]
    assert told == [here.model, here.hookpoint, here.hookpoint_out] and any(told), (
        "the id says what folders say"
    )
    x = 3 * torch.randn(20, here.dictionary.d_in, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        dictionaries.load(there.path)(x), here.dictionary.fold()(x), rtol=1e-4, atol=1e-4
    )
    fetched = {
        path.split("/resolve/")[1].split("/", 1)[1]
        for verb, path in hub.log
        if verb == "GET" and "/resolve/" in path
    }
    assert fetched and all(
        file == place or file.startswith((f"{place}/", str(Path(place).parent / "config")))
        for file in fetched
    )
    assert not any("checkpoints/ae_" in file for file in fetched)
    hub.log.clear()
    hub.away = True
    assert opened(f"hf://{repo}/{place}").path == there.path and not hub.log, "what is there needs no network"
    assert ids.fetch(f"hf://{repo}/{place}").exists()


def test_verbs_take_ids(hub: Hub, tmp_path: Path) -> None:
    from sememe.circuit import CircuitConfig
    from sememe.erase import EraseConfig
    from sememe.patch import PatchConfig
    from sememe.scrub import ScrubConfig
    from sememe.steer import SteerConfig
    from sememe.trace import TraceConfig

    write_sparsify(tmp_path / "tree" / "layers.3")
    hub.hold_folder("owner/saes", tmp_path / "tree")
    source = "hf://owner/saes/layers.3"
    at = opened(source).path
    for config in (CircuitConfig, PatchConfig, ScrubConfig, TraceConfig):
        needed = {"prompt": "x"} if config is CircuitConfig else {}
        assert config.build({"dictionaries": (source,), **needed}).dictionaries == (at,), config.__name__
    assert EraseConfig.build({"dictionary": source, "task": "names"}).dictionary == at
    assert SteerConfig.build({"dictionary": source, "latents": (1,)}).dictionary == at
    saved = convert(ConvertConfig(source=Path(source), out=tmp_path / "ours"))
    assert saved.kind == "dictionary" and saved.extra["origin"]["hookpoint"] == "resid_post.3"


def test_releases_of_ours_are_named_as_a_whole_or_by_the_dictionary(hub: Hub, tmp_path: Path) -> None:
    saved = make_dictionary(tmp_path / "one")
    publish(PublishConfig(dictionary=tmp_path / "one", out=tmp_path / "release", repo="owner/one"))
    assert artifact.load(ids.fetch("hf://owner/one")).fingerprint == saved.fingerprint
    for number in (2, 10):
        make_dictionary(tmp_path / "all" / f"layer{number}", seed=number)
    publish(PublishConfig(dictionary=tmp_path / "all", out=tmp_path / "releases", repo="owner/all"))
    with pytest.raises(
        FormatError,
        match=r"must be one dictionary, got 2 below it: dictionary/layer10, dictionary/layer2\. Name",
    ):
        ids.fetch("hf://owner/all")
    there = opened("hf://owner/all/dictionary/layer2")
    assert there.fingerprint == artifact.load(tmp_path / "all" / "layer2").fingerprint


# -- what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://owner/repo/a/b", ("owner/repo", "a/b", None)),
        ("hf:/owner/repo", ("owner/repo", "", None)),
        ("hf://owner/repo@v1/a", ("owner/repo", "a", "v1")),
    ],
)
def test_ids(text: str, parts: tuple[str, str, str | None]) -> None:
    assert the_hub.is_id(text) and the_hub.is_id(Path(text)) and tuple(the_hub.parse(Path(text))) == parts
    assert not the_hub.is_id("hf/owner") and not the_hub.is_id("folder/hf://x")


@pytest.mark.parametrize("text", ["hf://owner", "hf://", "hf://own er/repo/x"])
def test_ids_without_a_repository(text: str) -> None:
    with pytest.raises(FormatError, match=r"an id must be hf://OWNER/REPO/FOLDER, got hf:"):
        the_hub.parse(text)


@pytest.mark.parametrize("text", ["hf://owner/repo/../../etc", "hf://../repo/a", "hf://owner/repo/a\\..\\b"])
def test_names_that_would_leave_the_repository(text: str) -> None:
    with pytest.raises(FormatError, match=r"must stay inside its repository, got .* Name the folder without"):
        ids.fetch(text)


@pytest.fixture
def saes(hub: Hub, tmp_path: Path) -> Hub:
    """A repository with two dictionaries, and files whose names lead out of it."""
    for layer in (0, 1):
        write_sparsify(tmp_path / "tree" / f"layers.{layer}")
    hub.hold_folder("owner/repo", tmp_path / "tree")
    evil = hub.content["owner/repo"]["layers.0/sae.safetensors"]
    hub.content["owner/repo"] |= {
        "README.md": b"x",
        "../evil/sae.safetensors": evil,
        "layers.1/../../x/ae.pt": evil,
    }
    return hub


def test_what_an_id_may_be_wrong_about(saes: Hub, tmp_path: Path) -> None:
    for source, message in {
        "hf://owner/repo": r"must be one dictionary, got 2 below it: layers.0, layers.1\. Name one",
        "hf://owner/repo/layer.1": r"must be a dictionary in .*, got no such folder\. Did you mean 'layers\.1'",
        "hf://owner/repo/evil": r"got no such folder\.",
        "hf://owner/nothing": r"owner/nothing must be a repository on the hub, got no such repository\. Check its n",
        "hf://owner/repo@v9/layers.1": r"owner/repo must have the revision v9, got no such branch, tag or commit\. C",
    }.items():
        with pytest.raises(FormatError, match=message):
            ids.fetch(source)
    saes.hold("owner/empty", {"README.md": b""})
    with pytest.raises(
        FormatError, match=r"got no such folder\. The repository holds no dictionary in a known f"
    ):
        ids.fetch("hf://owner/empty/layers.0")
    ids.fetch("hf://owner/repo/layers.1")
    assert {path.name for path in (tmp_path / "hub").rglob("*.safetensors")} == {"sae.safetensors"}
    assert not list(tmp_path.glob("**/evil")) and not list(tmp_path.glob("**/x"))


def test_without_a_network_it_says_what_is_cached(
    saes: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as there:
        point_at(there, "http://127.0.0.1:9", cache=tmp_path / "hub")  # nothing listens there
        with pytest.raises(
            FormatError,
            match=r"hf://owner/repo/layers.1 must be in the local cache, or the hub must be reachable, got .*"
            r"Check the network\. The cache holds nothing\.",
        ):
            ids.fetch("hf://owner/repo/layers.1")
    ids.fetch("hf://owner/repo/layers.0")
    point_at(monkeypatch, "http://127.0.0.1:9", cache=tmp_path / "hub")
    with pytest.raises(FormatError, match=r"Check the network\. The cache holds of it: layers\.0\."):
        ids.fetch("hf://owner/repo/layers.1")
    with pytest.raises(FormatError, match=r"The cache holds parts of: owner/repo\."):
        ids.fetch("hf://owner/other/layers.7")
    assert ids.fetch("hf://owner/repo/layers.0").is_dir(), "which needs no network"
    assert foreign.source_of(tmp_path) == tmp_path


def test_a_download_that_is_cut_off_goes_on(saes: Hub) -> None:
    weights = "layers.1/sae.safetensors"
    saes.cut_downloads = {weights: 1000}
    folder = ids.fetch("hf://owner/repo/layers.1")
    assert (folder / "sae.safetensors").read_bytes() == saes.content["owner/repo"][weights]
    assert not saes.cut_downloads and all(int(asked[6:-1]) >= 256 for asked in saes.ranges)
    assert saes.ranges, "what had come is not sent again"


def test_half_a_download_is_not_taken_for_a_whole_one(saes: Hub) -> None:
    """The cable is pulled for good: what a dictionary is known by comes last, so none is there; what came is kept."""
    weights = "layers.0/sae.safetensors"
    saes.cut_downloads, saes.unplugged = {weights: 1000}, True
    for _ in range(2):
        with pytest.raises(FormatError, match=r"or the hub must be reachable, got .*Check the network"):
            ids.fetch("hf://owner/repo/layers.0")
    saes.away = saes.unplugged = False
    saes.log.clear()
    folder = ids.fetch("hf://owner/repo/layers.0")
    assert (folder / "sae.safetensors").read_bytes() == saes.content["owner/repo"][weights]
    assert (folder / "cfg.json").is_file() and not any(
        "cfg.json" in path for verb, path in saes.log if verb == "GET"
    )


def test_a_file_that_is_damaged_there_says_so_and_leaves_nothing(saes: Hub, tmp_path: Path) -> None:
    files = saes.content["owner/repo"]
    files["layers.0/sae.safetensors"] = files["layers.0/sae.safetensors"][:-100]
    files["layers.1/cfg.json"] = json.dumps({"d_in": 12}).encode()
    for layer, message in (
        (0, r"must be a whole safetensors file, got .*Fetch the file again"),
        (1, r"must hold "),
    ):
        with pytest.raises(FormatError, match=message):
            opened(f"hf://owner/repo/layers.{layer}")
    assert not list((tmp_path / "cache").rglob("meta.json"))


def test_what_is_no_dictionary_says_so_when_it_is_opened(hub: Hub) -> None:
    hub.hold(
        "owner/report",
        {"meta.json": json.dumps({"format_version": 1, "kind": "report", "files": {}}).encode()},
    )
    with pytest.raises(ArtifactError, match=r"must be a dictionary, got a report"):
        opened("hf://owner/report")


def test_a_releases_tree_is_converted_by_its_id(hub: Hub, tmp_path: Path) -> None:
    """Marks and Mueller's layout, SUBMODULE/RUN; of a folder that is a repository the name is the model."""
    tree = tmp_path / "tree"
    for seed, place in enumerate(("embed", "mlp_out_layer0", "mlp_out_layer1")):
        autoencoder(tree / place / "10_24", seed)
    hub.hold_folder("owner/pythia-70m-deduped", tree)
    config = ConvertConfig(
        source=Path("hf://owner/pythia-70m-deduped"), out=tmp_path / "out", select="mlp_out_*"
    )
    made = convert_all(config)
    assert list(made) == ["mlp_out_layer0/10_24", "mlp_out_layer1/10_24"]
    for layer, saved in enumerate(made.values()):
        origin = saved.extra["origin"]
        assert (origin["model"], origin["hookpoint"]) == ("pythia-70m-deduped", f"mlp_out.{layer}")
        assert saved.path == tmp_path / "out" / f"mlp_out_layer{layer}" / "10_24"
    assert not any("embed" in path for _, path in hub.log)
    with pytest.raises(
        FormatError, match=r"select must match .*, got 'resid\*'\. There are embed/10_24, mlp_out_layer0"
    ):
        convert_all(config.replace(select="resid*"))


def test_reports_and_atlases_are_read_by_the_id_of_their_release(hub: Hub, tmp_path: Path) -> None:
    from sememe.atlas import open_atlas
    from sememe.figures import open_report

    saved = make_dictionary(tmp_path / "dictionary")
    make_report(tmp_path / "report", saved)
    make_atlas(tmp_path / "atlas", saved)
    parts = {role: tmp_path / role for role in ("dictionary", "report", "atlas")}
    publish(PublishConfig.build({**parts, "out": tmp_path / "release", "repo": "owner/one"}))
    hub.log.clear()
    report = open_report("hf://owner/one")
    assert (
        report.value("fvu") == 0.1234
        and report.artifact.fingerprint == artifact.load(tmp_path / "report").fingerprint
    )
    assert not any("atlas" in path for verb, path in hub.log if verb == "GET" and "/resolve/" in path)
    atlas = open_atlas("hf:/owner/one/atlas")
    assert atlas.meta["attributions"][0]["title"] == "Code"
    atlas.close()
    hub.away = True
    assert open_report("hf://owner/one/report").value("fvu") == 0.1234, "what is there needs no network"
    with pytest.raises(
        ArtifactError, match=r"the page must be written to a folder or an address, got the id hf:/"
    ):
        report_verb(ReportConfig(reports=(tmp_path / "report",), out=Path("hf://owner/one/page")))


def test_what_a_release_lacks(hub: Hub, tmp_path: Path) -> None:
    for number in (1, 2):
        make_dictionary(tmp_path / "all" / f"layer{number}", seed=number)
    publish(PublishConfig(dictionary=tmp_path / "all", out=tmp_path / "release", repo="owner/all"))
    with pytest.raises(
        FormatError,
        match=r"hf://owner/all must hold the report that is asked for, got a folder without it\. There are "
        r"dictionary/layer1, dictionary/layer2",
    ):
        artifact.load("hf://owner/all", "report")
    hub.hold("owner/none", {"README.md": b""})
    with pytest.raises(FormatError, match=r"The repository holds nothing of ours"):
        artifact.load("hf://owner/none", "atlas")
