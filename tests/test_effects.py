"""Effects of an atlas's latents on a tiny real model: against whole forwards, views, kills, choices, errors."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import forked
import numpy as np
import pytest
import torch
from atlas_fixture import POLICY, World, make_world, save_dictionary, sites

from sememe import dictionaries
from sememe import lm as language_models
from sememe.atlas import EFFECTS, EFFECTS_SCHEMA, REMOVALS, Atlas, open_atlas
from sememe.effects import Effects, EffectsConfig, effects
from sememe.errors import ActivationError, ArtifactError, ConfigError, MismatchError
from sememe.interpret import interpret

OPTIONS: dict[str, Any] = {
    "every": True,
    "n_top": 4,
    "deciles": True,
    "n_removals": 2,
    "n_after": 3,
    "batch_rows": 8,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The model sharpened, so that latents matter to its predictions."""
    made = make_world(tmp_path_factory.mktemp("world"))
    with torch.no_grad():
        for parameter in made.lm.hf.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)
    folder = made.root / "sharp"
    made.lm.hf.save_pretrained(folder)
    made.lm.tokenizer.save_pretrained(folder)
    config = made.model.replace(model=str(folder))
    lm = language_models.load(config)
    save_dictionary(made.root / "sharp-dictionary", sites(lm))
    return made._replace(model=config, lm=lm, dictionary=made.root / "sharp-dictionary")


@pytest.fixture(scope="module")
def atlas(world: World) -> Path:
    interpret(world.config("atlas"), lm=world.lm).close()
    return world.root / "atlas"


def config_of(world: World, out: str, **changes: Any) -> EffectsConfig:
    options = {"out": world.root / out, "atlas": world.root / "atlas", "model": world.model}
    return EffectsConfig.build({**options, **OPTIONS, **changes})


@pytest.fixture(scope="module")
def found(world: World, atlas: Path) -> Effects:
    return effects(config_of(world, "effects"), lm=world.lm)


@pytest.fixture(scope="module")
def opened(atlas: Path, found: Effects) -> Iterator[Atlas]:
    both = open_atlas(atlas, effects=found.artifact.path)
    yield both
    both.close()


def log_softmax(x: torch.Tensor) -> np.ndarray:
    out: np.ndarray = x.double().log_softmax(-1).numpy()
    return out


def test_every_row_is_what_a_whole_forward_gives(world: World, opened: Atlas) -> None:
    rows = opened.query(
        "SELECT f.*, e.act AS kept_act, e.document, c.token_ids, c.doc_ids FROM effects f JOIN examples e ON "
        "e.latent = f.latent AND e.kind = f.kind AND e.decile IS NOT DISTINCT FROM f.decile AND e.rank = f.rank "
        "JOIN contexts c ON c.id = f.context ORDER BY f.latent, f.kind, f.decile, f.rank"
    )
    assert len(rows) == len(opened.query("SELECT 1 FROM effects")) > 500
    assert {row["kind"] for row in rows} == {"top", "decile"}
    dictionary, lm = dictionaries.load(world.dictionary), world.lm
    sizes, unscored, n_after = [], 0, set()
    for row in rows[:: len(rows) // 60]:
        ids, p = torch.tensor([row["token_ids"]]), row["position"]
        assert row["act"] == row["kept_act"]
        part = row["act"] * dictionary.decoder_directions()[row["latent"]].detach()

        def taken_out(x: torch.Tensor, p: int = p, part: torch.Tensor = part) -> torch.Tensor:
            x = x.clone()
            x[0, p] -= part
            return x

        with torch.no_grad():
            plain = lm.logits(lm.hidden(ids))
            before = log_softmax(plain)[0]
            with lm.edit({"resid_post.0": taken_out}):
                hidden = lm.hidden(ids)
            edited = lm.logits(hidden)
            after = log_softmax(edited)[0]
        change, scored = [], []
        for t in range(p, p + 4):
            scored.append(t + 1 < len(row["doc_ids"]) and row["doc_ids"][t + 1] == row["document"])
            if not scored[-1]:
                break
            change.append(before[t, ids[0, t + 1]] - after[t, ids[0, t + 1]])
        n_after.add(row["n_after"])
        assert row["n_after"] == max(len(change) - 1, 0)
        if change:
            assert row["loss"] == pytest.approx(-before[p, ids[0, p + 1]], rel=1e-4)
            assert row["loss_change"] == pytest.approx(change[0], rel=1e-3, abs=1e-5)
            assert row["loss_change_after"] == pytest.approx(sum(change[1:]), rel=1e-3, abs=1e-5)
            sizes.append(abs(change[0]))
            moved = (edited - plain)[0, p].double()
            drop = float(moved[ids[0, p + 1]] - moved.mean())
            assert row["logit_change"] == pytest.approx(drop, rel=1e-3, abs=1e-5)
        else:
            unscored += 1
            assert row["loss"] is None and row["loss_change"] is None and row["loss_change_after"] is None
            assert row["logit_change"] is None
        kl = (np.exp(before[p]) * (before[p] - after[p])).sum()
        assert row["kl"] == pytest.approx(kl, rel=2e-3, abs=1e-6)
        moved = after[p] - before[p]
        for end, sign in (("raised", 1), ("lowered", -1)):
            changes = [item["change"] for item in row[end]]
            assert changes == sorted(changes, reverse=sign > 0) and all(c * sign > 0 for c in changes)
            assert changes == pytest.approx([moved[item["token"]] for item in row[end]], rel=1e-3, abs=1e-5)
            assert [item["text"] for item in row[end]] == [lm.token_text(item["token"]) for item in row[end]]
    assert np.median(sizes) > 1e-3, "the ablations change something"
    assert n_after >= {0, 3}, "documents end soon after some of the peaks"


def test_removals_are_the_text_without_each_token(world: World, opened: Atlas) -> None:
    rows = opened.query(
        "SELECT r.*, e.start, e.act AS kept_act, c.token_ids FROM removals r JOIN examples e ON e.latent = r.latent "
        "AND e.kind = 'top' AND e.rank = r.rank JOIN contexts c ON c.id = r.context ORDER BY ALL"
    )
    assert {row["rank"] for row in rows} == {0, 1}
    dictionary = dictionaries.load(world.dictionary)
    n_changed = 0
    for row in rows[:: len(rows) // 60]:
        ids, p, j = row["token_ids"], row["position"], row["removed"]
        assert row["start"] <= j < p and row["token"] == ids[j]
        assert row["act"] == pytest.approx(row["kept_act"], rel=1e-4)
        shorter = torch.tensor([ids[:j] + ids[j + 1 : p + 1]])
        with torch.no_grad():
            x = world.lm.capture(shorter, ["resid_post.0"])["resid_post.0"][0, -1:]
            truth = float(dictionary.encode(x).to_dense()[0, row["latent"]])
        assert row["act_without"] == pytest.approx(truth, rel=1e-3, abs=1e-4)
        n_changed += abs(row["act_without"] - row["act"]) > 1e-3
    assert n_changed > 10, "the context matters"
    windows = opened.query("SELECT sum(position - start) AS n FROM examples WHERE kind = 'top' AND rank < 2")
    assert windows[0]["n"] == opened.query("SELECT count(*) AS n FROM removals")[0]["n"], "every token, once"


def test_the_tables_are_as_the_schema_says(found: Effects) -> None:
    connection = duckdb.connect()
    connection.execute(EFFECTS_SCHEMA)
    for name, file in (("effects", EFFECTS), ("removals", REMOVALS)):
        said = connection.execute(f"DESCRIBE {name}").fetchall()
        there = connection.execute(
            "DESCRIBE SELECT * FROM read_parquet(?)", [str(found.artifact.file(file))]
        ).fetchall()
        assert [row[:2] for row in there] == [row[:2] for row in said]
    connection.close()


def test_summary(found: Effects) -> None:
    rows = found.rows()
    assert found.summary["n_ablations"] == len(rows)
    assert found.summary["n_removals"] == len(found.removals())
    assert found.summary["n_latents"] == len({row["latent"] for row in rows})
    changes = [row["loss_change"] for row in rows if row["loss_change"] is not None]
    assert found.summary["n_scored"] == len(changes) < len(rows)
    assert found.summary["loss_change"] == pytest.approx(np.mean(changes), rel=1e-4)
    assert found.summary["kl"] == pytest.approx(np.mean([row["kl"] for row in rows]), rel=1e-4)
    assert 0 < found.summary["noise"] < np.std(changes) / 10, "a hundredth taken out does little"
    assert "loss change" in found._repr_html_()


def test_views_in_every_thread_and_of_this_atlas_only(
    world: World, atlas: Path, found: Effects, tmp_path: Path
) -> None:
    plain = open_atlas(atlas)
    with pytest.raises(duckdb.CatalogException):
        plain.query("SELECT * FROM effects")
    plain.close()
    interpret(world.config("other", n_top=3), lm=world.lm).close()
    with pytest.raises(
        MismatchError, match=r"the effects .* must be of the atlas .*Run `sememe effects` on this"
    ):
        open_atlas(world.root / "other", effects=found.artifact.path)
    with pytest.raises(ArtifactError, match=r"must be an effects, got an atlas"):
        open_atlas(atlas, effects=atlas)


# -- which latents -------------------------------------------------------------------------------------


def test_choices_of_latents(world: World, atlas: Path, found: Effects) -> None:
    plain = open_atlas(atlas)
    alive = [
        row["id"] for row in plain.query("SELECT id FROM latents WHERE n_active > 0 ORDER BY density, id")
    ]
    plain.close()
    assert found.artifact.extra["latents"] == sorted(alive)
    some = effects(
        config_of(world, "spread", every=False, n_latents=5, n_top=2, deciles=False, n_removals=0),
        lm=world.lm,
    )
    chosen = some.artifact.extra["latents"]
    assert len(chosen) == 5 and {alive[0], alive[-1]} <= set(chosen), "from the rarest to the densest"
    rows = some.rows()
    assert {row["latent"] for row in rows} == set(chosen) and {row["kind"] for row in rows} == {"top"}
    assert max(row["rank"] for row in rows) == 1 and not some.removals()
    named = effects(
        config_of(world, "named", every=False, latents=(alive[3], alive[1]), n_removals=0, n_after=0),
        lm=world.lm,
    )
    assert {row["latent"] for row in named.rows()} == {alive[1], alive[3]}
    assert all(row["loss_change_after"] is None and row["n_after"] == 0 for row in named.rows())
    whole = {(r["latent"], r["kind"], r["decile"], r["rank"]): r for r in found.rows()}
    for row in named.rows():  # on its own or among all, with other neighbours in its batch
        other = whole[row["latent"], row["kind"], row["decile"], row["rank"]]
        assert row["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)


def test_options_that_contradict(world: World) -> None:
    with pytest.raises(ConfigError, match=r"n_latents must be left out when latents are named"):
        config_of(world, "x", every=False, latents=(1,), n_latents=3)
    with pytest.raises(ConfigError, match=r"every must be left out when latents are named"):
        config_of(world, "x", latents=(1,))
    with pytest.raises(ConfigError, match=r"n_latents must be left out when every latent is asked for"):
        config_of(world, "x", n_latents=3)
    with pytest.raises(ConfigError, match=r"a latent must be >= 0, got -1"):
        config_of(world, "x", every=False, latents=(-1,))
    with pytest.raises(ConfigError, match=r"each latent must be named once, got 4 4"):
        config_of(world, "x", every=False, latents=(4, 4))


# -- again, killed, interrupted ------------------------------------------------------------------------


def test_made_once(world: World, found: Effects, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded although the effects are there")

    monkeypatch.setattr(language_models, "load", never)
    again = effects(config_of(world, "effects", batch_rows=3))
    assert again.artifact.fingerprint == found.artifact.fingerprint
    with pytest.raises(
        MismatchError, match=r"the effects at .* must have been made with this config.*n_top 4 there"
    ):
        effects(config_of(world, "effects", n_top=3))


STOPPED = """
import os, signal, sys
from pathlib import Path
from sememe.effects import EffectsConfig, effects
import sememe.effects as verb
config = EffectsConfig.model_validate_json(Path({config!r}).read_text())
measure, calls = verb.measure, [0]
def stopping(*args):
    found = measure(*args)
    calls[0] += 1
    if calls[0] == {after}:
        os.kill(os.getpid(), signal.{signal})
    return found
verb.measure = stopping
effects(config)
"""


def test_killed_and_interrupted_and_run_again_gives_the_same_bits(
    world: World, found: Effects, tmp_path: Path
) -> None:
    config = config_of(world, "killed", snapshot_seconds=0)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    work = world.root / ".killed.partial"
    for name, after, n_parts in (("SIGKILL", 3, 2), ("SIGINT", 2, 4)):
        script = STOPPED.format(config=str(path), after=after, signal=name)
        done = forked.run(script)
        assert done.returncode == -signal.Signals[name], done.stderr
        assert not (world.root / "killed").exists(), "nothing half-written under the final name"
        assert len(list(work.glob("part-*.npz"))) == n_parts, "what was done is kept, and not done again"
    (work / "part-000000005-000000099.tmp").write_bytes(b"half a file")  # killed while writing
    again = effects(config, lm=world.lm)
    assert {n: f["sha256"] for n, f in again.artifact.meta["files"].items()} == {
        n: f["sha256"] for n, f in found.artifact.meta["files"].items()
    }
    assert again.summary == found.summary


# -- bad input -----------------------------------------------------------------------------------------


def test_latents_that_do_not_exist_or_never_fire(world: World, atlas: Path) -> None:
    with pytest.raises(ConfigError, match=r"a latent must be in \[0, 47\], got 48"):
        effects(config_of(world, "bad", every=False, latents=(48,)), lm=world.lm)
    save_dictionary(world.root / "wide", sites(world.lm), d_sae=3000)
    config = world.config("atlas-wide", dictionaries=world.root / "wide", n_tokens=1500)
    plain = interpret(config, lm=world.lm)
    dead = plain.query("SELECT id FROM latents WHERE n_active = 0 LIMIT 1")[0]["id"]
    plain.close()
    with pytest.raises(ActivationError, match=r"must fire on the atlas's text, got none that does"):
        effects(config_of(world, "bad", atlas=config.out, every=False, latents=(dead,)), lm=world.lm)
    assert not list(world.root.glob("*bad*"))


def test_the_dictionary_and_model_must_be_the_atlass(world: World, atlas: Path, tmp_path: Path) -> None:
    save_dictionary(world.root / "second", sites(world.lm), k=5)
    with pytest.raises(MismatchError, match=r"must be of the dictionary .*second .*got an atlas of"):
        effects(config_of(world, "bad", dictionary=world.root / "second"), lm=world.lm)
    with pytest.raises(
        ArtifactError, match=r"must be at .*nowhere, got nothing there\. Name its folder with"
    ):
        effects(config_of(world, "bad", dictionary=tmp_path / "nowhere"), lm=world.lm)
    with pytest.raises(
        MismatchError, match=r"must be the atlas's, got an atlas of .*sharp.*Pass --model .*sharp"
    ):
        effects(config_of(world, "bad", model=world.model.replace(model=str(world.root / "model"))))
    with pytest.raises(ArtifactError, match=r"must be a finished atlas, got nothing there"):
        effects(config_of(world, "bad", atlas=tmp_path / "no"), lm=world.lm)
    assert not list(world.root.glob("*bad*"))


def test_the_dictionary_is_found_where_it_was_or_beside_the_atlas(
    world: World, atlas: Path, tmp_path: Path
) -> None:
    """Both folders on another machine: what the atlas remembers is gone, the names are the same."""
    first, made = tmp_path / "first", tmp_path / "atlases" / "first"
    shutil.copytree(world.dictionary, first)
    interpret(world.config("x", dictionaries=(first,), n_tokens=2000).replace(out=made), lm=world.lm).close()
    options: dict[str, Any] = {"every": False, "n_latents": 1, "n_removals": 0, "atlas": made}
    one = effects(config_of(world, "one", **options), lm=world.lm)
    assert one.summary["n_latents"] == 1
    first.rename(tmp_path / "moved")
    with pytest.raises(
        ArtifactError, match=r"the dictionary of the atlas .* must be at .*first or .*nothing there"
    ):
        effects(config_of(world, "two", **options), lm=world.lm)
    named = effects(config_of(world, "two", **options, dictionary=tmp_path / "moved"), lm=world.lm)
    assert named.summary == one.summary
    shutil.copytree(made, tmp_path / "elsewhere" / "atlas")
    shutil.copytree(tmp_path / "moved", tmp_path / "elsewhere" / "first")
    options["atlas"] = tmp_path / "elsewhere" / "atlas"
    assert effects(config_of(world, "three", **options), lm=world.lm).summary == one.summary
    save_dictionary(tmp_path / "elsewhere" / "second", sites(world.lm), k=5)
    shutil.rmtree(tmp_path / "elsewhere" / "first")
    (tmp_path / "elsewhere" / "second").rename(tmp_path / "elsewhere" / "first")
    with pytest.raises(MismatchError, match=r"must be of the dictionary .*first.*Name the dictionary that"):
        effects(config_of(world, "four", **options), lm=world.lm)


def test_nan_in_the_model_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch, atlas: Path
) -> None:
    hidden = type(world.lm).hidden

    calls = [0]

    def broken(self: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return hidden(self, *args) * (torch.nan if calls[0] > 20 else 1)

    world.lm.goes_on()
    world.lm.skips(0)
    monkeypatch.setattr(type(world.lm), "hidden", broken)
    with pytest.raises(ActivationError, match=r"finite, got NaN or infinity"):
        effects(config_of(world, "broken", snapshot_seconds=0), lm=world.lm)
    assert calls[0] > 20
    assert not list(world.root.glob("*broken*"))


# -- other hookpoints, policies, models ----------------------------------------------------------------


@pytest.mark.parametrize("hookpoint", ["mlp_out.1", "attn_out.0"])
def test_other_hookpoints_from_the_verb(world: World, hookpoint: str) -> None:
    name = hookpoint.replace(".", "-")
    save_dictionary(world.root / name, sites(world.lm, hookpoint))
    config = world.config(f"atlas-{name}", dictionaries=world.root / name, n_tokens=2000)
    interpret(config, lm=world.lm).close()
    made = effects(config_of(world, f"effects-{name}", atlas=config.out, deciles=False), lm=world.lm)
    assert made.summary["n_ablations"] > 50 and made.summary["kl"] > 1e-6


def test_one_document_per_row_with_padding(world: World) -> None:
    save_dictionary(world.root / "unpacked", sites(world.lm), policy=POLICY.replace(packing=False))
    config = world.config("atlas-unpacked", dictionaries=world.root / "unpacked", n_tokens=2000)
    interpret(config, lm=world.lm).close()
    made = effects(config_of(world, "effects-unpacked", atlas=config.out), lm=world.lm)
    rows = open_atlas(config.out, effects=made.artifact.path)
    found = rows.query(
        "SELECT f.n_after, f.loss, f.position, c.doc_ids FROM effects f JOIN contexts c ON c.id = context"
    )
    rows.close()
    for row in found:
        left = sum(document >= 0 for document in row["doc_ids"]) - row["position"] - 1
        assert (row["loss"] is None) == (left == 0) and row["n_after"] == max(min(left - 1, 3), 0)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_over_kept_keys_is_smollm2(tmp_path: Path) -> None:
    """The real model in float32 at resid_post.8, packed rows: over kept keys and by whole forwards."""
    from sememe.downstream import Predictions, Reruns
    from sememe.lm import ModelConfig

    lm = language_models.load(ModelConfig(model="smollm2-135m", dtype="float32"))
    from sememe.dictionaries import Site, Sites
    from sememe.dictionaries.topk import TopK, TopKConfig

    site = Site(
        model=lm.name, model_fingerprint=lm.fingerprint, hookpoint="resid_post.8", start=0, stop=lm.d_model
    )
    dictionary = TopK(TopKConfig(k=32), lm.d_model, lm.d_model, 512, Sites(inputs=(site,), outputs=(site,)))
    generator = torch.Generator().manual_seed(0)
    dictionary.initialise(*[torch.randn(1024, lm.d_model, generator=generator)] * 2, generator)
    text = (
        "The river runs past the old town. In 44 BC Caesar was killed, and nobody knew what would come next. "
    )
    ids = torch.tensor([lm.tokenizer(text * 6).input_ids[:96], lm.tokenizer(text[::-1] * 6).input_ids[:96]])
    rows, positions = torch.tensor([0, 1, 0, 1]), torch.tensor([5, 40, 80, 17])
    fast, slow = (Reruns(lm, dictionary, keep_keys=keep) for keep in (True, False))
    assert fast.goes_on and fast.first_layer == 9 and not slow.goes_on
    found = []
    with torch.inference_mode():
        for reruns in (fast, slow):
            run = reruns.unedited(ids)
            encoded = reruns.encode(run, rows, positions)
            latents = encoded.topk_view().indices[:, 0].long()
            acts = reruns.acts(run, rows, positions, latents)
            hidden = reruns.ablated(run, rows, positions, latents, acts, 5)
            predictions = Predictions(lm, ids, run.base.hidden, torch.ones(ids.shape, dtype=torch.bool))
            scored = torch.ones(4, 6, dtype=torch.bool)
            changes = predictions.changes(hidden, rows, positions, scored, n_shown=5, n_likeliest=50)
            found.append((changes, reruns.acts_without(run, rows, positions, positions // 2, latents)))
    (one, acts_one), (other, acts_other) = found
    assert one.loss_change.abs().max() > 0.01
    for name in ("loss", "loss_change", "loss_change_after", "kl"):
        assert getattr(one, name).numpy() == pytest.approx(
            getattr(other, name).numpy(), rel=1e-2, abs=1e-3
        ), name
    assert torch.equal(one.raised, other.raised) and torch.equal(one.lowered, other.lowered)
    assert torch.allclose(acts_one, acts_other, rtol=1e-3, atol=1e-2)
