"""Releases: what is in the folder, and what the card says. Uploads are in test_publish_hub.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sememe import artifact, atlas, dictionaries, figures
from sememe.config import Config
from sememe.dictionaries import Site, Sites, TopK, TopKConfig
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError
from sememe.publish import PublishConfig, publish

D, N = 6, 20


def make_dictionary(path: Path, seed: int = 0, model: str = "owner/tiny") -> artifact.Artifact:
    site = Site(model=model, model_fingerprint="f" * 64, hookpoint="resid_post.1", start=0, stop=D)
    dictionary = TopK(TopKConfig(k=3, d_sae=N), D, D, N, Sites(inputs=(site,), outputs=(site,)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return dictionary.save(path, torch.randn(16, D, generator=generator))


def statistic(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def make_report(path: Path, dictionary: artifact.Artifact) -> None:
    """As `evaluate` lays it out, with numbers that are easy to find on the card."""
    data = {
        "dictionary": {"name": "tiny", "model": "owner/tiny", "model_fingerprint": "f" * 64},
        "metrics": {"fvu": statistic(0.1234), "kl": statistic(0.0567)},
        "nulls": {"pca": {"fvu": statistic(0.4321), "kl": statistic(0.9876)}},
        "text": {"n_rows_kept": 12_345, "n_documents": 67},
        "attributions": [
            {
                "source": "w",
                "title": "Wiki",
                "licence": "CC BY-SA 4.0",
                "url": "https://wiki.example/",
                "notice": "By | all",
            }
        ],
    }
    parents = {"dictionary": dictionary.fingerprint}
    with artifact.building(path, kind="report", version=1, config=Config(), parents=parents) as work:
        artifact.write_json(work.path / figures.REPORT, data)
        (work.path / "report.md").write_text("# Report\n")
        (work.path / "figures").mkdir()
        (work.path / "figures" / "density.svg").write_text("<svg/>")


def make_atlas(path: Path, dictionary: artifact.Artifact) -> None:
    """An empty atlas with its attributions."""
    parents = {"dictionary": dictionary.fingerprint}
    with artifact.building(path, kind="atlas", version=1, config=Config(), parents=parents) as work:
        database = atlas.create(work.path / atlas.DATABASE)
        note = [{"source": "c", "title": "Code", "licence": "PSF", "url": "", "notice": ""}]
        database.execute("INSERT INTO meta VALUES ('attributions', ?)", [json.dumps(note)])
        database.close()


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    dictionary = make_dictionary(tmp_path / "dictionary")
    make_report(tmp_path / "report", dictionary)
    make_atlas(tmp_path / "atlas", dictionary)
    return tmp_path


def whole(parts: Path, **changes: Any) -> PublishConfig:
    base = {role: parts / role for role in ("dictionary", "report", "atlas")}
    return PublishConfig.build({**base, "out": parts / "release", **changes})


def test_a_release_holds_every_part_as_it_was(parts: Path) -> None:
    publication = publish(whole(parts))
    assert publication.url is None and publication.folder == parts / "release"
    names = {file.name for file in publication.files}
    expected = {
        "README.md",
        "LICENSE",
        "meta.json",
        "dictionary/weights.safetensors",
        "report/figures/density.svg",
    }
    assert expected | {"atlas/meta.json", "report/report.json"} <= names
    for role in ("dictionary", "report", "atlas"):
        inner = artifact.load(parts / "release" / role, role)
        inner.verify()
        assert inner.fingerprint == artifact.load(parts / role).fingerprint
    x = torch.randn(5, D)
    there, here = (dictionaries.load(p / "dictionary") for p in (parts / "release", parts))
    assert torch.equal(there(x), here(x))
    for file in publication.files:
        assert (parts / "release" / file.name).stat().st_size == file.n_bytes


def test_the_card_has_front_matter_tables_and_credits(parts: Path) -> None:
    publish(whole(parts, title='A "quoted" | title', description="Made for a test.", repo=None))
    card = (parts / "release" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    fields = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}
    assert fields["license"] == "apache-2.0" and fields["base_model"] == "owner/tiny"
    assert '# A "quoted" \\| title' in body and "Made for a test." in body
    assert "| this dictionary | 0.1234 (0.1134 to 0.1334) |" in body
    assert "| null: pca | 0.4321" in body and "12,345 tokens of 67 held-out documents" in body
    assert "| latents | 20 |" in body and "| k | 3 |" in body and "resid_post.1" in body
    assert "- Wiki; CC BY-SA 4.0; https://wiki.example/; By \\| all" in body and "- Code; PSF" in body
    assert "![How often latents are active](report/figures/density.svg)" in body and "figures/fvu" not in body
    assert "Apache License 2.0" in (parts / "release" / "LICENSE").read_text()


def test_a_dictionary_alone_is_enough(tmp_path: Path) -> None:
    make_dictionary(tmp_path / "dictionary", model="smollm2-135m")
    publication = publish(PublishConfig(dictionary=tmp_path / "dictionary", out=tmp_path / "release"))
    card = (tmp_path / "release" / "README.md").read_text()
    assert "# topk dictionary of smollm2-135m, resid_post.1" in card
    assert "base_model" not in card and "Results" not in card and "Texts" not in card and "browse" not in card
    assert not any(file.name.startswith("report") for file in publication.files)


def test_a_dry_run_lists_what_a_run_writes_and_writes_nothing(
    parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = publish(whole(parts, dry_run=True))
    assert not (parts / "release").exists()
    printed = capsys.readouterr().out
    assert "dictionary/weights.safetensors" in printed and f"{len(dry.files)} files" in printed
    real = publish(whole(parts))
    assert [f for f in real.files if f.name != "meta.json"] == list(dry.files)


def test_a_second_run_keeps_the_first_and_a_changed_part_is_a_mismatch(parts: Path) -> None:
    publish(whole(parts))
    before = (parts / "release").stat().st_mtime_ns
    publish(whole(parts))
    assert (parts / "release").stat().st_mtime_ns == before
    with pytest.raises(MismatchError, match=r"Delete .*release, write elsewhere, or pass --fresh"):
        publish(whole(parts, title="Another"))
    publish(whole(parts, title="Another"), fresh=True)
    assert "# Another" in (parts / "release" / "README.md").read_text()


# -- bad input ---------------------------------------------------------------------------------------


def test_parts_that_do_not_belong_together(parts: Path, tmp_path: Path) -> None:
    make_dictionary(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match=r"the report .* must be of the dictionary .*other .*got one of"):
        publish(whole(parts, dictionary=tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r"must be a report, got a dictionary"):
        publish(whole(parts, report=parts / "dictionary"))
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got nothing there"):
        publish(whole(parts, atlas=parts / "nowhere"))
    assert not (parts / "release").exists()


def test_damaged_parts_are_not_published(parts: Path) -> None:
    path = parts / "dictionary" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    for dry_run in (True, False):
        with pytest.raises(CorruptError, match=r"weights.safetensors must have SHA-256"):
            publish(whole(parts, dry_run=dry_run))
    assert not (parts / "release").exists()


def test_a_name_that_would_leave_the_folder(parts: Path) -> None:
    meta_path = parts / "dictionary" / "meta.json"
    meta = json.loads(meta_path.read_text())
    (parts / "secret").write_text("x")
    meta["files"]["../secret"] = {"bytes": 1, "sha256": artifact.file_sha256(parts / "secret")}
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(CorruptError, match=r"(hold files inside its own folder|inside).*got '?\.\./secret"):
        publish(whole(parts, report=None, atlas=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"licence": "apache"},
            r"licence must be known, or come with licence_file, got 'apache'. Did you mean 'apache-2",
        ),
        ({"private": True}, r"private must go with repo, got no repo"),
        ({"repo": "tiny"}, r"repo must be of the form"),
        ({"repo": "../tiny/x"}, r"repo must be of the form"),
        (
            {"repo": "a/b..c"},
            r"repo must be a name that the hub takes, got 'a/b\.\.c' \(.*\)\. Change --repo",
        ),
        ({"repo": "a/-b"}, r"repo must be a name that the hub takes, got 'a/-b' .*Change --repo"),
        ({"repo": "a/b.git"}, r"repo must be a name that the hub takes, got 'a/b\.git'"),
        ({"repo": "a--b/c"}, r"repo must be a name that the hub takes, got 'a--b/c'"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PublishConfig.build(options)


def test_a_licence_of_ones_own(parts: Path) -> None:
    with pytest.raises(ConfigError, match=r"licence_file must be a text file, got .*nowhere"):
        publish(whole(parts, licence="my-own", licence_file=parts / "nowhere"))
    (parts / "mine.txt").write_text("Do as you like.")
    publish(whole(parts, licence="my-own", licence_file=parts / "mine.txt"))
    assert (parts / "release" / "LICENSE").read_text() == "Do as you like."
    assert 'license: "other"' in (parts / "release" / "README.md").read_text()
