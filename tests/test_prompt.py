"""The view of a prompt on a tiny real model: against whole forwards and plain counting; table, JSON, page, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atlas_fixture import POLICY, World, make_world, save_dictionary, sites

from sememe import dictionaries
from sememe.atlas import open_atlas
from sememe.browse.data.texts import text_files
from sememe.browse.inputs import Inputs, opened
from sememe.errors import ArtifactError, ConfigError, MismatchError, ModelError
from sememe.explain import ExplainConfig, explain
from sememe.interpret import interpret
from sememe.prompt import CHOSEN, PromptConfig, PromptsConfig, PromptView, print_prompt, prompt, prompts

TEXT = "the river runs past the old town <b>"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    interpret(made.config("atlas"), lm=made.lm).close()
    explain(
        ExplainConfig(
            atlas=made.root / "atlas", out=made.root / "explanations", n_bootstrap=20, label_score=0
        )
    )
    return made


def config_of(world: World, **changes: Any) -> PromptConfig:
    options = {
        "prompt": TEXT,
        "dictionary": world.dictionary,
        "model": world.model,
        "atlas": world.root / "atlas",
    }
    return PromptConfig.build({**options, "explanations": world.root / "explanations", **changes})


@pytest.fixture(scope="module")
def view(world: World) -> PromptView:
    return prompt(config_of(world, n_latents=3), lm=world.lm)


def test_chosen_texts_hold_every_latent_on_every_token(world: World, tmp_path: Path) -> None:
    config = PromptsConfig(
        dictionary=world.dictionary, model=world.model, atlas=world.root / "atlas", out=tmp_path / "prompts"
    )
    made = prompts(config, lm=world.lm)
    files = text_files([made.path])
    assert len(files) == len(CHOSEN) >= 20 and "meta.json" not in [file.name for file in files]
    with opened(Inputs(atlas=world.root / "atlas", prompts=(made.path,))) as (data, _):
        texts = data.texts
    cut = 0
    for text, (name, whole) in zip(texts, CHOSEN.items(), strict=True):
        assert whole.startswith(text["prompt"]), name
        cut += whole != text["prompt"]
        assert len(text["tokens"]["token"]) <= 64 and not text["ablated"]
        for here, n in zip(text["latents"], text["tokens"]["n_active"], strict=True):
            assert len(here["latent"] if here else ()) == (n or 0), "every latent"
    assert 0 < cut < len(CHOSEN), "this model spells Japanese in bytes, and has room for 64 of them"
    odd = next(text for text in texts if any(text["tokens"]["bytes"]))
    raw = b"".join(
        bytes.fromhex(exact) if exact else piece.encode()
        for exact, piece in zip(odd["tokens"]["bytes"], odd["tokens"]["text"], strict=True)
    )
    assert raw.decode(errors="replace") == odd["prompt"], "tokens that are part of a letter keep their bytes"
    before = made.meta
    assert prompts(config, lm=world.lm).meta == before, "made once"
    one = prompts(config.replace(texts=(TEXT,), out=tmp_path / "mine"), lm=world.lm)
    assert [file.name for file in text_files([one.path])] == ["00-1.json"]
    save_dictionary(world.root / "another", sites(world.lm), k=3)
    other = prompts(PromptsConfig.build({"dictionary": world.root / "another", "model": world.model,
        "texts": (TEXT,), "out": tmp_path / "other"}), lm=world.lm)  # fmt: skip
    with (
        pytest.raises(
            MismatchError, match=r"the texts .*other must be of the atlas's dictionary.*sememe prompts"
        ),
        opened(Inputs(atlas=world.root / "atlas", prompts=(other.path,))),
    ):
        pass
    with pytest.raises(ConfigError, match="n_latents must be left out when every latent is shown"):
        config_of(world, every=True, n_latents=3)


def test_rows_are_what_whole_forwards_give(world: World, view: PromptView) -> None:
    lm, dictionary = world.lm, dictionaries.load(world.dictionary)
    ids = torch.tensor([lm.tokenizer(TEXT, add_special_tokens=False).input_ids])
    n = ids.shape[1]
    assert [token.token for token in view.tokens] == ids[0].tolist()
    assert [token.kept for token in view.tokens] == [False] + [True] * (n - 1), "the policy drops the first"
    with torch.no_grad():
        x = lm.capture(ids, ["resid_post.0"])["resid_post.0"][0]
        dense = dictionary.encode(x).to_dense()
        before = lm.logits(lm.hidden(ids))[0].double().log_softmax(-1)
    directions = dictionary.decoder_directions().detach()
    for token in view.tokens:
        p = token.position
        assert token.n_active == (int((dense[p] != 0).sum()) if p else None)
        assert (token.loss_of_next is None) == (p == n - 1)
        if p < n - 1:
            assert token.loss_of_next == pytest.approx(-float(before[p, ids[0, p + 1]]), rel=1e-4)
        mine = [row for row in view.rows if row.position == p]
        writes = dense[p].abs() * directions.norm(dim=1)
        strongest = writes.argsort(descending=True)[: min(3, int((writes > 0).sum()))]
        assert [row.latent for row in mine] == (strongest.tolist() if p else [])
    assert len(view.rows) > 2 * (n - 1)
    for row in view.rows[::2]:
        p = row.position
        assert row.act == pytest.approx(float(dense[p, row.latent]), rel=1e-4)
        assert row.writes == pytest.approx(abs(row.act) * float(directions[row.latent].norm()), rel=1e-4)

        def taken_out(
            h: torch.Tensor, p: int = p, part: torch.Tensor = row.act * directions[row.latent]
        ) -> Any:
            h = h.clone()
            h[0, p] -= part
            return h

        with torch.no_grad(), lm.edit({"resid_post.0": taken_out}):
            after = lm.logits(lm.hidden(ids))[0].double().log_softmax(-1)
        change = [float(before[t, ids[0, t + 1]] - after[t, ids[0, t + 1]]) for t in range(p, n - 1)]
        if change:
            assert row.loss_change == pytest.approx(change[0], rel=1e-3, abs=1e-6)
            assert row.loss_change_after == pytest.approx(sum(change[1:]), rel=1e-3, abs=1e-5)
            assert row.n_after == len(change) - 1
        else:
            assert row.loss_change is None and row.loss_change_after is None and row.n_after == 0
        truth = float((before[p].exp() * (before[p] - after[p])).sum())
        assert row.kl == pytest.approx(truth, rel=1e-2, abs=1e-7)
        for item in (*row.raised, *row.lowered):
            assert item.change == pytest.approx(
                float(after[p, item.token] - before[p, item.token]), rel=1e-2, abs=1e-6
            )
    assert max(abs(row.loss_change or 0) for row in view.rows) > 1e-4


def test_what_the_atlas_says(world: World, view: PromptView) -> None:
    """The quantile is the share of the histogram below the activation, the last bar by its part."""
    atlas = open_atlas(world.root / "atlas", explanations=world.root / "explanations")
    latents = {row["id"]: row for row in atlas.query("SELECT * FROM latents")}
    labels = {row["latent"]: row["label"] for row in atlas.query("SELECT latent, label FROM explanations")}
    atlas.close()
    assert any(row.label for row in view.rows)
    for row in view.rows:
        about = latents[row.latent]
        assert row.density == about["density"] and row.label == labels[row.latent]
        assert row.share_of_max == pytest.approx(row.act / about["max_act"])
        width = about["max_act"] / len(about["histogram"])
        below = sum(
            count * min(max((row.act - i * width) / width, 0), 1)
            for i, count in enumerate(about["histogram"])
        )
        assert row.quantile == pytest.approx(below / about["n_active"], abs=1e-6)
    assert len({round(row.quantile or 0, 3) for row in view.rows}) > 10


def test_chosen_latents_without_ablation_or_atlas(world: World, view: PromptView) -> None:
    latent = view.rows[0].latent
    plain = config_of(world, latents=(latent,), ablate=False, atlas=None, explanations=None)
    found = prompt(plain, lm=world.lm)
    assert found.rows and {row.latent for row in found.rows} == {latent}
    assert all(row.loss_change is None and row.quantile is None and not row.raised for row in found.rows)
    assert found.columns() == ["latent", "act"]
    few = prompt(config_of(world, n_after=1, n_latents=1), lm=world.lm)
    assert max(row.n_after or 0 for row in few.rows) == 1


def test_table(view: PromptView, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width, there, missing in (
        (150, ("without it", "KL", "density", "label"), ()),
        (80, ("loss",), ("KL",)),
    ):
        monkeypatch.setenv("COLUMNS", str(width))
        print_prompt(view)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        head = next(line for line in lines if "latent" in line)
        assert all(name in head for name in there) and not any(name in head for name in missing)
        body = "\n".join(lines)
        assert "·river" in body and "not looked at" in body and "…" not in head
        for row in view.rows:
            assert str(row.latent) in body


def test_json_and_page(world: World, view: PromptView, tmp_path: Path) -> None:
    out, page = tmp_path / "deep" / "rows.json", tmp_path / "page.html"
    again = prompt(config_of(world, n_latents=3, out=out, page=page), lm=world.lm)
    data = json.loads(out.read_text())
    assert data == json.loads(json.dumps(again.as_json())) and data["prompt"] == TEXT
    assert data["rows"][0]["latent"] == view.rows[0].latent
    assert set(data["rows"][0]["raised"][0]) == {"token", "text", "change"}
    text = page.read_text()
    assert "<b>" not in text.replace("<body>", "") and "&lt;b&gt;" in text, "texts are escaped"
    assert "http" not in text and text.count("<tr>") >= len(view.rows)
    assert view._repr_html_() == view.page()


def test_the_command_prints_it(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from sememe.cli import _run

    arguments = ["prompt", TEXT, "--dictionary", str(world.dictionary), "--model", world.model.model]
    arguments += ["--dtype", "float32", "--n-latents", "2", "--out", str(tmp_path / "rows.json")]
    assert _run(arguments) == 0
    shown = capsys.readouterr().out
    assert "·river" in shown and f"rows: {tmp_path / 'rows.json'}" in shown
    assert _run([*arguments[:-1], str(tmp_path / "rows.txt")]) == 2
    assert "out must be a .json file" in capsys.readouterr().err


def test_norm_outliers_are_not_looked_at(world: World) -> None:
    ids = torch.tensor([world.lm.tokenizer(TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        norms = world.lm.capture(ids, ["resid_post.0"])["resid_post.0"][0].norm(dim=1)
    limit = float(norms[1:].median())
    save_dictionary(world.root / "bounded", sites(world.lm, max_norm=limit))
    found = prompt(
        config_of(world, dictionary=world.root / "bounded", atlas=None, explanations=None), lm=world.lm
    )
    kept = [token.kept for token in found.tokens]
    assert kept == [False, *(norms[1:] <= limit).tolist()] and 1 < sum(kept) < len(kept) - 1
    assert {row.position for row in found.rows} <= set(np.flatnonzero(kept).tolist())


# -- bad input -----------------------------------------------------------------------------------------


def test_options_that_contradict(world: World) -> None:
    with pytest.raises(ConfigError, match=r"n_latents must be left out when latents are named"):
        config_of(world, latents=(1,), n_latents=2)
    with pytest.raises(ConfigError, match=r"n_after must be left out when nothing is ablated"):
        config_of(world, ablate=False, n_after=2)
    with pytest.raises(ConfigError, match=r"explanations must go with the atlas .*Pass --atlas as well"):
        config_of(world, atlas=None)
    with pytest.raises(ConfigError, match=r"page must be a \.html file, got page\.txt"):
        config_of(world, page="page.txt")


def test_texts_that_cannot_be_shown(world: World) -> None:
    with pytest.raises(ConfigError, match=r"a prompt must have at least one token, got ''"):
        prompt(config_of(world, prompt=""), lm=world.lm)
    with pytest.raises(
        ConfigError, match=r"must have a token that the dictionary's policy keeps, got 1 tokens"
    ):
        prompt(config_of(world, prompt="<|endoftext|>"), lm=world.lm)
    with pytest.raises(ModelError, match=r"a prompt must fit the context of 64 tokens .*Shorten it"):
        prompt(config_of(world, prompt="the old river " * 40), lm=world.lm)


def test_latents_and_atlases_that_do_not_fit(world: World) -> None:
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 47\], got 48"):
        prompt(config_of(world, latents=(48,)), lm=world.lm)
    save_dictionary(world.root / "second", sites(world.lm), k=5, policy=POLICY)
    with pytest.raises(MismatchError, match=r"must be of the dictionary .*second .*got an atlas of"):
        prompt(config_of(world, dictionary=world.root / "second"), lm=world.lm)
    with pytest.raises(ArtifactError, match=r"must be a finished dictionary, got nothing there"):
        prompt(config_of(world, dictionary=world.root / "nowhere"), lm=world.lm)


def test_a_dictionary_that_never_fires_shows_the_tokens(world: World) -> None:
    save_dictionary(world.root / "silent", sites(world.lm), silent=True)
    found = prompt(
        config_of(world, dictionary=world.root / "silent", atlas=None, explanations=None), lm=world.lm
    )
    assert not found.rows and len(found.tokens) > 5 and "not looked at" in found.page()
