"""Comparing dictionaries: known matches both ways, reports beside them, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import report_data

from sememe import artifact, figures
from sememe.compare import CompareConfig, compare
from sememe.config import Config
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import ArtifactError, MismatchError, ShapeError


def dictionary(path: Path, directions: torch.Tensor) -> artifact.Artifact:
    d_sae, d = directions.shape
    made = TopK(TopKConfig(k=1, d_sae=d_sae), d, d, d_sae)
    made.W_dec.data.copy_(directions)
    made.W_enc.data.copy_(directions.T)
    return made.save(path, torch.randn(16, d, generator=torch.Generator().manual_seed(0)))


def config_for(tmp_path: Path, **changes: object) -> CompareConfig:
    return CompareConfig.build({"a": tmp_path / "a", "b": tmp_path / "b", "out": tmp_path / "out", **changes})


@pytest.fixture
def pair(tmp_path: Path) -> tuple[artifact.Artifact, artifact.Artifact]:
    """b holds the first four of a's eight directions, in another order and length, and one opposite."""
    a = torch.eye(8)
    b = torch.cat([a[:4].flip(0) * 3, -a[7:]])
    return dictionary(tmp_path / "a", a), dictionary(tmp_path / "b", b)


def test_recall_and_precision_by_name(tmp_path: Path, pair: object) -> None:
    done = compare(config_for(tmp_path))
    data = json.loads((done.path / "comparison.json").read_text())
    assert data["mmcs_a_to_b"] == pytest.approx(4 / 8)
    assert data["mmcs_b_to_a"] == pytest.approx(4 / 5)  # the opposite direction is not found: cosine 0
    assert data["a_to_b"]["share_above_0.9"] == 0.5 and data["b_to_a"]["share_above_0.9"] == 0.8
    assert sum(data["a_to_b"]["histogram"]["counts"]) == 8
    assert data["a"]["d_sae"] == 8 and data["b"]["d_sae"] == 5
    assert done.extra == {"mmcs_a_to_b": data["mmcs_a_to_b"], "mmcs_b_to_a": data["mmcs_b_to_a"]}


def test_nearest_latents_are_stored_both_ways(tmp_path: Path, pair: object) -> None:
    done = compare(config_for(tmp_path, n_nearest=7))
    forth = np.load(done.path / "matches_a_to_b.npz")
    assert forth["indices"].shape == (8, 5) and forth["indices"][:4, 0].tolist() == [3, 2, 1, 0]
    back = np.load(done.path / "matches_b_to_a.npz")
    assert back["indices"].shape == (5, 7) and back["indices"][:4, 0].tolist() == [3, 2, 1, 0]
    assert np.all(np.diff(back["cosines"], axis=1) <= 1e-6)
    markdown = (done.path / "comparison.md").read_text()
    assert "| 0 | 3 | 1.0000 |" in markdown and "| a to b | 0.5000 |" in markdown


def test_a_dictionary_compared_with_itself_is_found_whole(tmp_path: Path, pair: object) -> None:
    done = compare(config_for(tmp_path, b=tmp_path / "a"))
    assert done.extra["mmcs_a_to_b"] == done.extra["mmcs_b_to_a"] == 1


def test_reports_stand_side_by_side_and_must_belong(tmp_path: Path, pair) -> None:
    for side, folder in zip("ab", pair, strict=True):
        with artifact.building(
            tmp_path / f"report_{side}",
            kind="report",
            version=1,
            config=Config(),
            parents={"dictionary": folder.fingerprint},
        ) as work:
            artifact.write_json(work.path / figures.REPORT, report_data(side, folder.fingerprint))
    done = compare(config_for(tmp_path, report_a=tmp_path / "report_a", report_b=tmp_path / "report_b"))
    markdown = (done.path / "comparison.md").read_text()
    assert "| a: a | 0.12" in markdown and "| b: b | 0.12" in markdown
    data = json.loads((done.path / "comparison.json").read_text())
    assert data["reports"]["b"]["fvu"]["value"] == 0.12
    wanted, found = pair[1].fingerprint[:16], pair[0].fingerprint[:16]
    with pytest.raises(MismatchError, match=rf"report_b must be of .*{wanted}.*got a report of {found}"):
        compare(config_for(tmp_path, report_b=tmp_path / "report_a", out=tmp_path / "out2"))


def test_the_second_run_opens_it(tmp_path: Path, pair: object) -> None:
    first = compare(config_for(tmp_path))
    assert compare(config_for(tmp_path)).fingerprint == first.fingerprint
    assert compare(config_for(tmp_path), fresh=True).fingerprint == first.fingerprint
    with pytest.raises(MismatchError, match="the comparison at"):
        compare(config_for(tmp_path, n_nearest=2))


def test_what_cannot_be_compared(tmp_path: Path, pair: object) -> None:
    dictionary(tmp_path / "wide", torch.eye(9))
    with pytest.raises(ShapeError, match=r"must write outputs of one width, 8 like .*, got 9 of .*wide"):
        compare(config_for(tmp_path, b=tmp_path / "wide"))
    with pytest.raises(ArtifactError, match="must be a finished dictionary, got nothing there"):
        compare(config_for(tmp_path, b=tmp_path / "no"))
    assert not (tmp_path / "out").exists()
