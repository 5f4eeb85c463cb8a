"""Releases on a stand-in for the hub: sent, cut off and sent again, fetched and opened; and releases of several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Hub, point_at, serving
from test_publish import D, make_atlas, make_dictionary, make_report, whole

from sememe import artifact, dictionaries
from sememe.errors import ArtifactError, MismatchError, ResourceError
from sememe.publish import PublishConfig, publish

# how the hub's client sends large files is its own business
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    dictionary = make_dictionary(tmp_path / "dictionary")
    make_report(tmp_path / "report", dictionary)
    make_atlas(tmp_path / "atlas", dictionary)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving() as server:
        point_at(monkeypatch, server.url, cache=tmp_path / "hub")
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for seconds between its own tries."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


def fetched(hub: Hub, target: Path, repo: str = "owner/tiny") -> Path:
    """What the card tells people to do."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, endpoint=hub.url, local_dir=target))


def test_an_upload_brings_a_release_that_loads(parts: Path, hub: Hub, tmp_path: Path) -> None:
    publication = publish(whole(parts, repo="owner/tiny", private=True))
    assert publication.url == f"{hub.url}/owner/tiny" and hub.private == {"owner/tiny": True}
    assert set(hub.content["owner/tiny"]) == {file.name for file in publication.files}
    assert b'snapshot_download("owner/tiny")' in hub.content["owner/tiny"]["README.md"]
    there = fetched(hub, tmp_path / "downloaded")
    artifact.load(there, "release").verify()
    x = torch.randn(4, D)
    loaded = dictionaries.load(there / "dictionary")
    assert torch.equal(loaded(x), dictionaries.load(parts / "dictionary")(x))


def test_a_card_names_the_repository_that_it_is_in(parts: Path, hub: Hub, tmp_path: Path) -> None:
    """The folder's own card names none; what is sent is written for where it goes, also of a finished release."""
    asks = "in which one writes\n\nfrom sememe import dictionaries\n\nfolder = Path(mine)\n"
    publish(whole(parts, repo="owner/first", description=asks))
    publish(PublishConfig(dictionary=parts / "release", repo="owner/second"))
    downloaded = fetched(hub, tmp_path / "first", "owner/first")
    publish(PublishConfig(dictionary=downloaded, repo="owner/third"))
    for name in ("first", "second", "third"):
        card = hub.content[f"owner/{name}"]["README.md"].decode()
        assert card.count("snapshot_download(") == card.count(f'snapshot_download("owner/{name}")') == 1
        assert "path/to/this/folder" not in card and "folder = Path(mine)" in card
        there = artifact.load(fetched(hub, tmp_path / f"again_{name}", f"owner/{name}"), "release")
        there.verify()
        assert there.meta["config"]["repo"] is None
    card = (parts / "release" / "README.md").read_text()
    assert 'folder = Path("path/to/this/folder")' in card and "snapshot_download" not in card


def test_an_upload_that_is_cut_off_goes_on(parts: Path, hub: Hub, impatient: None) -> None:
    """The files that arrived are not sent again, and nothing shows until all have."""
    hub.cut_uploads = set(range(1, 50))  # the first large file arrives
    config = whole(parts, repo="owner/tiny")
    with pytest.raises(ResourceError, match=r"must be reachable to upload to owner/tiny, got .*run it again"):
        publish(config)
    assert len(hub.objects) == 1 and hub.content["owner/tiny"] == {}
    hub.cut_uploads, before = set(), hub.n_puts
    publication = publish(config)
    names = {file.name for file in publication.files}
    n_large = sum(name.endswith(hub.lfs_suffixes) for name in names)
    assert hub.n_puts - before == n_large - 1 and set(hub.content["owner/tiny"]) == names
    hub.log.clear()
    publish(config)
    assert not [line for line in hub.log if line[0] == "PUT"], "a third run sends nothing"


def test_a_download_that_is_cut_off_goes_on(parts: Path, hub: Hub, tmp_path: Path, impatient: None) -> None:
    publish(whole(parts, repo="owner/tiny"))
    hub.cut_downloads = {"dictionary/weights.safetensors": 100}
    there = fetched(hub, tmp_path / "downloaded")
    artifact.load(there / "dictionary").verify()
    assert not hub.cut_downloads, "it was cut"


def test_a_dry_run_asks_the_hub_nothing(parts: Path, hub: Hub) -> None:
    publish(whole(parts, repo="owner/tiny", dry_run=True))
    assert hub.log == [] and not (parts / "release").exists()


def test_a_hub_that_refuses_or_is_away(parts: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refuse = True
    with pytest.raises(ResourceError, match=r"must accept the upload to owner/tiny, got .*403.*run it again"):
        publish(whole(parts, repo="owner/tiny"))
    assert (parts / "release" / "README.md").is_file()
    point_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        ResourceError, match=r"must be reachable to upload to owner/tiny, got .*Check the network"
    ):
        publish(whole(parts, repo="owner/tiny"))


# -- several -----------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Two dictionaries with a report each, as a recipe leaves them; reports under other names."""
    for number in (2, 10):
        saved = make_dictionary(tmp_path / "dictionary" / f"layer{number}", seed=number)
        make_report(tmp_path / "report" / f"of{number}", saved)
    make_atlas(tmp_path / "atlas" / "of10", saved)
    return tmp_path


def test_several_dictionaries_are_one_release(layers: Path, hub: Hub, tmp_path: Path) -> None:
    publication = publish(whole(layers, repo="owner/all", title="All layers"))
    names = {file.name for file in publication.files}
    for role in ("dictionary/layer2", "dictionary/layer10", "report/layer2", "atlas/layer10"):
        assert f"{role}/meta.json" in names
    card = hub.content["owner/all"]["README.md"].decode()
    rows = [line for line in card.splitlines() if line.startswith("| layer")]
    assert [row.split("|")[1].strip() for row in rows] == ["layer2", "layer10"], "2 before 10"
    assert all("0.1234 (0.1134 to 0.1334)" in row and "resid_post.1" in row for row in rows)
    assert "# All layers" in card and 'base_model: "owner/tiny"' in card and "- Wiki; CC BY-SA 4.0" in card
    assert card.count("- Wiki") == 1 and "- Code; PSF" in card and "densities.svg" not in card
    assert 'dictionaries.load(folder / "dictionary/layer2")' in card
    there = fetched(hub, tmp_path / "downloaded", "owner/all")
    index = json.loads((there / "dictionaries.json").read_text())["dictionaries"]
    assert [(one["name"], one["metrics"]["fvu"]) for one in index] == [
        ("layer2", 0.1234),
        ("layer10", 0.1234),
    ]
    x = torch.randn(4, D)
    for one in index:
        loaded = dictionaries.load(there / one["path"])
        assert torch.equal(loaded(x), dictionaries.load(layers / one["path"])(x))
        assert artifact.load(there / one["path"]).fingerprint == one["fingerprint"]


def test_the_picture_shows_each_dictionarys_densities(layers: Path) -> None:
    for number in (2, 10):
        log = [{"step": 0, "edges": [0.1, 0.5, 1.0], "density": [15, 5]}, {"step": 9, "density": [9, number]}]
        place = layers / "watched" / f"layer{number}"
        saved = artifact.load(layers / "dictionary" / f"layer{number}")
        with artifact.building(
            place, kind="dictionary", version=1, config=PublishConfig(), parents={}
        ) as work:
            work.extra = saved.extra
            for name in saved.meta["files"]:
                (work.path / name).write_bytes((saved.path / name).read_bytes())
            (work.path / "watched.jsonl").write_text("\n".join(json.dumps(line) for line in log))
    publish(PublishConfig(dictionary=layers / "watched", out=layers / "release"))
    picture = (layers / "release" / "densities.svg").read_text()
    assert picture.count("<!-- layer2, 9 silent -->") == picture.count("<!-- layer10, 1 silent -->") == 1
    assert "![How often latents are active" in (layers / "release" / "README.md").read_text()


def test_reports_of_others_are_not_published(layers: Path, tmp_path: Path) -> None:
    other = make_dictionary(tmp_path / "other", seed=7)
    make_report(layers / "report" / "stray", other)
    with pytest.raises(MismatchError, match=r"the report .*stray must be of one of the dictionaries"):
        publish(whole(layers, atlas=None))
    make_report(layers / "again", artifact.load(layers / "dictionary" / "layer2"))
    (layers / "again").rename(layers / "report" / "again")
    (layers / "report" / "stray").rename(layers / "stray")
    with pytest.raises(MismatchError, match=r"must have one report, got two of layer2"):
        publish(whole(layers, atlas=None))
    (layers / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty must be a finished dictionary"):
        publish(whole(layers, dictionary=layers / "empty", report=None, atlas=None))
