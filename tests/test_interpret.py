"""The pass over a text on a tiny real model: what the atlas says against the model run again, bounds, kills, errors."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from atlas_fixture import ENGLISH, POLICY, World, corpus, make_world, save_dictionary, sites

from sememe import dictionaries
from sememe import lm as language_models
from sememe.atlas import Atlas
from sememe.dictionaries import Site, Sites
from sememe.dictionaries.topk import TopK, TopKConfig
from sememe.errors import (
    ActivationError,
    ArtifactError,
    ConfigError,
    HookpointError,
    MismatchError,
    TextError,
)
from sememe.harvest import HarvestConfig, harvest
from sememe.interpret import InterpretConfig, interpret
from sememe.text import TextConfig, TokenPolicy, token_blocks

TABLES = (
    "meta",
    "tokens",
    "documents",
    "document_keys",
    "clusters",
    "neighbours",
    "coactive",
    "neurons",
    "history",
    "contexts",
    "latents",
    "logits",
    "logit_histograms",
    "top_tokens",
    "examples",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def atlas(world: World) -> Iterator[Atlas]:
    found = interpret(world.config("atlas"), lm=world.lm)
    yield found
    found.close()


class Slow:
    """The text, run through the model and the dictionary once more, in dictionaries and loops."""

    def __init__(self, world: World, n_tokens: int = 5000) -> None:
        dictionary = dictionaries.load(world.dictionary)
        blocks = token_blocks(world.text, world.lm.tokenizer, POLICY, split="all", n_tokens=n_tokens)
        self.acts: dict[int, dict[tuple[int, int], float]] = defaultdict(dict)
        self.ids, self.docs, self.language, self.key, self.n_kept = [], [], {}, {}, 0
        with torch.no_grad():
            for block in blocks:
                for row in range(block.ids.shape[0]):
                    x = world.lm.capture(torch.from_numpy(block.ids[row : row + 1]).long(), ["resid_post.0"])
                    dense = dictionary.encode(x["resid_post.0"][0]).to_dense()
                    for position in np.flatnonzero(block.keep[row]):
                        self.n_kept += 1
                        for latent in torch.nonzero(dense[position]).flatten().tolist():
                            self.acts[latent][len(self.ids), int(position)] = float(dense[position, latent])
                    self.ids.append(block.ids[row])
                    self.docs.append(block.doc_ids[row])
                self.language |= {i: d.language for i, d in block.documents.items()}
                self.key |= {i: d.key for i, d in block.documents.items()}


@pytest.fixture(scope="module")
def slow(world: World) -> Slow:
    return Slow(world)


def test_statistics_are_those_of_the_model(atlas: Atlas, slow: Slow) -> None:
    assert atlas.meta["text"]["n_tokens"] == slow.n_kept
    assert atlas.meta["text"]["n_rows"] == len(slow.ids)
    rows = atlas.query("SELECT * FROM latents ORDER BY id")
    assert [row["id"] for row in rows] == list(range(48))
    fired = 0
    for row in rows:
        acts = slow.acts[row["id"]]
        fired += bool(acts)
        assert row["n_active"] == len(acts)
        assert row["density"] == pytest.approx(len(acts) / slow.n_kept)
        assert row["max_act"] == pytest.approx(max(acts.values(), default=0), rel=1e-4)
        assert row["mean_act"] == pytest.approx(np.mean(list(acts.values())) if acts else 0, rel=1e-4)
        assert sum(row["histogram"]) == len(acts) and len(row["histogram"]) == 40
        assert row["decoder_norm"] == pytest.approx(1, rel=1e-4)
        mass: Counter[int] = Counter()
        for (r, p), act in acts.items():
            mass[int(slow.ids[r][p])] += act
        if acts:
            assert mass[row["top_token"]] == pytest.approx(mass.most_common(1)[0][1], rel=1e-4)
            assert row["top_token_share"] == pytest.approx(
                mass[row["top_token"]] / sum(mass.values()), rel=1e-4
            )
        else:
            assert row["top_token"] is None and row["n_distinct_tokens"] is None
    assert fired > 20


def test_top_examples_are_the_largest_of_each_document(atlas: Atlas, slow: Slow) -> None:
    for latent, acts in slow.acts.items():
        best: dict[int, float] = {}
        for (r, p), act in acts.items():
            document = int(slow.docs[r][p])
            best[document] = max(best.get(document, 0.0), act)
        truth = sorted(best.values(), reverse=True)[:5]
        found = atlas.query(
            "SELECT act, document FROM examples WHERE latent = ? AND kind = 'top' ORDER BY rank", latent
        )
        assert [row["act"] for row in found] == pytest.approx(truth, rel=1e-4)
        for row in found:
            assert row["act"] == pytest.approx(best[row["document"]], rel=1e-4)


def test_all_pieces_of_a_document_have_one_example(world: World) -> None:
    """One document is as long as all others together and is cut: most latents are strongest in several pieces of it."""
    path = corpus(world.root / "one-long.jsonl", n_documents=24)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines.append({"text": " \n".join(line["text"] for line in lines), "title": "Text 24", "language": "en"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = TextConfig(corpus=(str(path),), max_document_chars=300)
    slow = Slow(world._replace(text=text), n_tokens=10_000)
    with closing(interpret(world.config("atlas-long", text=text, n_tokens=10_000), lm=world.lm)) as atlas:
        keys = {row["id"]: row["key"] for row in atlas.query("SELECT id, key FROM document_keys")}
        assert len(keys) > 2 * len(set(keys.values())), "long documents are cut"
        n_several = 0
        for latent, acts in slow.acts.items():
            best: dict[str, float] = {}
            for (r, p), act in acts.items():
                key = slow.key[int(slow.docs[r][p])]
                best[key] = max(best.get(key, 0.0), act)
            found = atlas.query(
                "SELECT act, document FROM examples WHERE latent = ? AND kind = 'top' ORDER BY rank", latent
            )
            assert [row["act"] for row in found] == pytest.approx(
                sorted(best.values(), reverse=True)[:5], rel=1e-4
            )
            for row in found:
                assert row["act"] == pytest.approx(best[keys[row["document"]]], rel=1e-4)
            strongest = sorted(acts, key=lambda at: -acts[at])[:5]
            n_several += len({slow.key[int(slow.docs[r][p])] for r, p in strongest}) < len(
                {int(slow.docs[r][p]) for r, p in strongest}
            )
        assert n_several > 10, "of many latents several pieces of one document are among the strongest"
        counts = atlas.query(
            """SELECT count(*) AS n, count(DISTINCT key) AS d FROM examples JOIN document_keys ON document = id
            GROUP BY latent, kind"""
        )
        assert counts and all(row["n"] == row["d"] for row in counts), "one example of a kind"


def test_pieces_of_one_document_are_not_documents_enough(world: World) -> None:
    path = world.root / "book.txt"
    words = random.Random(0).choices(ENGLISH.split(), k=5000)
    path.write_text(" ".join(words), encoding="utf-8")
    text = TextConfig(corpus=(str(path),), max_document_chars=400)
    with pytest.raises(TextError, match=r"at least 5 documents.*got 1\..*set split_by to piece"):
        interpret(world.config("atlas-book", text=text), lm=world.lm)
    config = world.config("atlas-book", text=text.replace(split_by="piece"))
    with closing(interpret(config, lm=world.lm)) as atlas:
        assert (
            atlas.query("SELECT count(DISTINCT document) AS n FROM examples WHERE kind = 'top'")[0]["n"] > 4
        )


def test_every_example_shows_what_the_model_did(atlas: Atlas, slow: Slow) -> None:
    """Tokens, documents, windows and activations of every example, found again in the text."""
    place = {}
    for number, ids in enumerate(slow.ids):
        place.setdefault(ids.tobytes() + slow.docs[number].tobytes(), number)
    rows = atlas.query("SELECT e.*, token_ids, doc_ids FROM examples e JOIN contexts c ON c.id = e.context")
    assert len(rows) > 500 and {row["kind"] for row in rows} == {"top", "decile", "random"}
    for row in rows:
        key = np.array(row["token_ids"], np.int32).tobytes() + np.array(row["doc_ids"], np.int32).tobytes()
        r = place[key]
        assert row["doc_ids"][row["position"]] == row["document"]
        assert set(row["doc_ids"][row["start"] : row["stop"]]) == {row["document"]}, (
            "a window is of one document"
        )
        assert row["position"] - row["start"] <= 8 and row["stop"] - row["position"] <= 5
        truth = {
            p: act
            for (rr, p), act in slow.acts[row["latent"]].items()
            if rr == r and row["start"] <= p < row["stop"]
        }
        assert dict(zip(row["positions"], row["acts"], strict=True)) == pytest.approx(
            truth, rel=1e-4, abs=1e-6
        )
        if row["kind"] == "random":
            assert not truth and row["act"] == 0 and row["decile"] is None
        else:
            assert row["act"] == pytest.approx(truth[row["position"]], rel=1e-4)
            assert (row["decile"] is None) == (row["kind"] == "top")
    counts = atlas.query(
        "SELECT count(*) AS n, count(DISTINCT document) AS d FROM examples GROUP BY latent, kind"
    )
    assert all(row["n"] == row["d"] for row in counts), "one example per document"


def test_documents_tokens_and_languages(atlas: Atlas, slow: Slow, world: World) -> None:
    for row in atlas.query("SELECT * FROM documents"):
        assert row["language"] == slow.language[row["id"]] and row["title"].startswith("Text ")
        assert json.loads(row["tags"]) == {}
    missing = """SELECT count(*) AS n FROM (
        SELECT unnest(token_ids) AS token FROM contexts UNION SELECT token FROM logits
        UNION SELECT token FROM top_tokens)
        WHERE token NOT IN (SELECT id FROM tokens)"""
    assert atlas.query(missing)[0]["n"] == 0
    for row in atlas.query("SELECT * FROM tokens LIMIT 50"):
        assert row["text"] == world.lm.token_text(row["id"]) and row["bytes"] == world.lm.token_bytes(
            row["id"]
        )
    languages = atlas.query(
        """SELECT l.id, l.language, l.language_share, list(d.language) AS spoken FROM latents l JOIN examples e
        ON e.latent = l.id AND e.kind <> 'random' JOIN documents d ON d.id = e.document GROUP BY ALL"""
    )
    for row in languages:
        counts = Counter(row["spoken"])
        assert counts[row["language"]] == max(counts.values())
        assert row["language_share"] == pytest.approx(max(counts.values()) / len(row["spoken"]))
    assert {row["language"] for row in languages} == {"en", "de"}


def test_direct_logits_are_decoder_times_unembedding(atlas: Atlas, world: World) -> None:
    dictionary = dictionaries.load(world.dictionary)
    with torch.no_grad():
        directions = dictionary.decoder_directions() * world.lm.hf.model.norm.weight
        logits = directions @ world.lm.hf.lm_head.weight.T
        logits -= logits.mean(1, keepdim=True)
    for latent in (0, 17, 47):
        for sign in (1, -1):
            rows = atlas.query(
                "SELECT token, value FROM logits WHERE latent = ? AND sign = ? ORDER BY rank", latent, sign
            )
            truth = (logits[latent] * sign).topk(6).values * sign
            assert [row["value"] for row in rows] == pytest.approx(truth.tolist(), rel=1e-3, abs=1e-6)
            assert [row["value"] for row in rows] == pytest.approx(
                [float(logits[latent, row["token"]]) for row in rows], rel=1e-3, abs=1e-6
            )
        found = atlas.query("SELECT logit_mean, logit_std FROM latents WHERE id = ?", latent)[0]
        assert found["logit_mean"] == pytest.approx(0, abs=1e-6)
        assert found["logit_std"] == pytest.approx(float(logits[latent].std(correction=0)), rel=1e-3)
        counts = atlas.query("SELECT counts FROM logit_histograms WHERE latent = ?", latent)[0]["counts"]
        z = (logits[latent].double() - found["logit_mean"]) / found["logit_std"]
        truth, edges = np.histogram(z.clamp(-4.999, 4.999).numpy(), bins=40, range=(-5, 5))
        assert (
            atlas.meta["logit_edges"] == pytest.approx(edges.tolist()) and sum(counts) == world.lm.vocab_size
        )
        assert np.abs(np.array(counts) - truth).sum() <= 2  # one that lies on an edge to rounding


def test_meta_says_where_it_comes_from(atlas: Atlas, world: World) -> None:
    assert atlas.meta["dictionary"] == {
        "name": "dictionary",
        "kind": "topk",
        "d_in": 32,
        "d_sae": 48,
        "hookpoint": "resid_post.0",
        "model": world.lm.name,
        "fingerprint": atlas.artifact.meta["parents"]["dictionary"],
    }
    assert atlas.meta["context_length"] == 32 and atlas.meta["window"] == [8, 4]
    assert atlas.meta["histogram_edges"][-1] == 1.0 and len(atlas.meta["histogram_edges"]) == 40
    assert TokenPolicy.build(atlas.meta["policy"]) == POLICY
    assert set(atlas.artifact.meta["files"]) == {"atlas.duckdb"}, "progress files are left out"


def test_made_once(world: World, atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    from sememe import lm as language_models

    def never(*_: Any) -> None:
        raise AssertionError("the model was loaded although the atlas is there")

    monkeypatch.setattr(language_models, "load", never)
    again = interpret(world.config("atlas", batch_rows=3))
    assert again.artifact.fingerprint == atlas.artifact.fingerprint
    again.close()
    with pytest.raises(MismatchError, match=r"the atlas at .* must have been made with this config"):
        interpret(world.config("atlas", n_top=6))


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    from sememe.atlas import open_atlas

    found = open_atlas(path)
    out = {name: found.connection.execute(f"SELECT * FROM {name} ORDER BY ALL").fetchall() for name in TABLES}
    found.close()
    return out


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from sememe.collect import Collector
from sememe.interpret import InterpretConfig, interpret
config = InterpretConfig.model_validate_json(Path({config!r}).read_text())
add, calls = Collector.add, [0]
def dying(self, *args):
    add(self, *args)
    calls[0] += 1
    if calls[0] == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
Collector.add = dying
interpret(config)
"""


def test_killed_and_run_again_gives_the_same_atlas(world: World, atlas: Atlas, tmp_path: Path) -> None:
    """SIGKILL twice, in the middle of two different batches; the third run ends with the uninterrupted result."""
    config = world.config("killed", snapshot_seconds=0)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    for after in (4, 7):
        script = KILLED.format(
            tests=str(Path(__file__).parent), config=str(tmp_path / "config.json"), after=after
        )
        done = forked.run(script)
        assert done.returncode == -9, done.stderr
        assert not (world.root / "killed").exists(), "nothing half-written under the final name"
        with np.load(world.root / ".killed.partial" / "snapshot.npz") as state:
            n_rows = int(state["pass_counts"][0])
        assert n_rows == (3 if after == 4 else 3 + 6) * 8, (
            "goes on from the snapshot, and does not start again"
        )
    interpret(config, lm=world.lm).close()
    assert contents(world.root / "killed") == contents(world.root / "atlas")


def test_batch_size_does_not_change_the_atlas(world: World, atlas: Atlas) -> None:
    """Every forward row is computed alone; only the last bits of the model's products may differ."""
    interpret(world.config("batched", batch_rows=5), lm=world.lm).close()
    one, other = contents(world.root / "batched"), contents(world.root / "atlas")
    for name in ("meta", "documents"):
        assert one[name] == other[name]
    counts = [[row[2] for row in found["latents"]] for found in (one, other)]
    assert counts[0] == counts[1]


def test_norm_outliers_are_left_out(world: World) -> None:
    norms = []
    with torch.no_grad():
        for block in token_blocks(world.text, world.lm.tokenizer, POLICY, split="all", n_tokens=2000):
            x = world.lm.capture(torch.from_numpy(block.ids).long(), ["resid_post.0"])["resid_post.0"]
            norms.append(x.norm(dim=-1)[torch.from_numpy(block.keep)])
    limit = float(torch.cat(norms).quantile(0.75))
    save_dictionary(world.root / "bounded", sites(world.lm, max_norm=limit))
    found = interpret(
        world.config("atlas-bounded", dictionaries=world.root / "bounded", n_tokens=2000), lm=world.lm
    )
    n_kept = int((torch.cat(norms) <= limit).sum())
    assert found.meta["text"]["n_tokens"] == pytest.approx(n_kept, abs=2)
    assert found.artifact.extra["n_outliers"] > 0.2 * n_kept
    found.close()


def test_one_document_per_row_with_padding(world: World) -> None:
    """Padding is neither counted nor shown, and every context holds one document."""
    policy = POLICY.replace(packing=False)
    save_dictionary(world.root / "unpacked", sites(world.lm), policy=policy)
    found = interpret(
        world.config("atlas-unpacked", dictionaries=world.root / "unpacked", n_tokens=3000), lm=world.lm
    )
    blocks = list(token_blocks(world.text, world.lm.tokenizer, policy, split="all", n_tokens=3000))
    assert found.meta["text"]["n_tokens"] == sum(int(block.keep.sum()) for block in blocks)
    rows = found.query(
        "SELECT doc_ids, start, stop, document FROM examples e JOIN contexts c ON c.id = e.context"
    )
    assert any(-1 in row["doc_ids"] for row in rows)
    for row in rows:
        assert set(row["doc_ids"]) <= {-1, row["document"]}
        assert -1 not in row["doc_ids"][row["start"] : row["stop"]]
    found.close()


def test_no_direct_effect_where_the_dictionary_does_not_write_to_the_residual(world: World) -> None:
    save_dictionary(world.root / "heads", sites(world.lm, "attn_z.1"))
    found = interpret(
        world.config("atlas-heads", dictionaries=world.root / "heads", n_tokens=2000), lm=world.lm
    )
    assert found.query("SELECT count(*) AS n FROM logits")[0]["n"] == 0
    assert found.query("SELECT count(logit_mean) AS n FROM latents")[0]["n"] == 0
    found.close()


def no_forward(*_: object) -> None:
    raise AssertionError("the model ran")


# -- bad input -----------------------------------------------------------------------------------------


def test_a_dictionary_that_never_fires(world: World) -> None:
    save_dictionary(world.root / "dead", sites(world.lm), silent=True)
    with pytest.raises(
        ActivationError, match=r"must fire on some token of the text, got no activation on [\d,]+ tokens"
    ):
        interpret(world.config("atlas-dead", dictionaries=world.root / "dead"), lm=world.lm)
    assert not list(world.root.glob("*atlas-dead*")), "nothing is left behind"


def test_a_text_too_short_for_the_examples(world: World) -> None:
    path = corpus(world.root / "short.jsonl", n_documents=6)
    config = world.config("atlas-short", text=TextConfig(corpus=(str(path),)), n_top=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(world.lm), "capture", no_forward)
        with pytest.raises(TextError, match=r"must have at least 20 documents.*got 6\. Give more text"):
            interpret(config, lm=world.lm)
    assert not list(world.root.glob("*atlas-short*"))


def test_a_dictionary_of_another_model(world: World) -> None:
    save_dictionary(world.root / "foreign", sites(world.lm, model="other", model_fingerprint="0" * 64))
    with pytest.raises(
        MismatchError, match=r"must belong to the model .* got one that reads other .*--model other"
    ):
        interpret(world.config("atlas-foreign", dictionaries=world.root / "foreign"), lm=world.lm)


def test_a_dictionary_of_another_width(world: World) -> None:
    save_dictionary(world.root / "narrow", sites(world.lm, "mlp_act.0"))
    with pytest.raises(MismatchError, match=r"must read all 96 features of mlp_act.0 .*got d_in 32"):
        interpret(world.config("atlas-narrow", dictionaries=world.root / "narrow"), lm=world.lm)


def test_a_dictionary_that_reads_no_model(world: World) -> None:
    save_dictionary(world.root / "siteless", None)
    with pytest.raises(MismatchError, match=r"must say which hookpoints it reads"):
        interpret(world.config("atlas-siteless", dictionaries=world.root / "siteless"), lm=world.lm)


def test_not_a_dictionary(world: World, atlas: Atlas) -> None:
    with pytest.raises(ArtifactError, match=r"must be a finished dictionary, got nothing there"):
        interpret(world.config("atlas-none", dictionaries=world.root / "nowhere"), lm=world.lm)
    with pytest.raises(ArtifactError, match=r"must be a dictionary, got an atlas"):
        interpret(world.config("atlas-none", dictionaries=world.root / "atlas"), lm=world.lm)


def test_nan_activations_say_where(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = type(world.lm).capture
    seen = {}

    def broken(self: Any, ids: torch.Tensor, *args: Any) -> dict[str, torch.Tensor]:
        out = capture(self, ids, *args)
        if len(seen) == 3:
            out["resid_post.0"][2, 7] = float("nan")
            seen["ids"] = ids[2]
        seen[len(seen)] = True
        return out

    monkeypatch.setattr(type(world.lm), "capture", broken)
    rows = list(
        token_blocks(world.text, world.lm.tokenizer, POLICY, split="all", n_tokens=5000, block_rows=8)
    )
    document, position = rows[3].doc_ids[2, 7], rows[3].doc_positions[2, 7]
    where = (
        rf"activations at resid_post.0 must be finite, got NaN .* in document {document}, position {position}"
    )
    with pytest.raises(ActivationError, match=where):
        interpret(world.config("atlas-nan"), lm=world.lm)
    assert not (world.root / "atlas-nan").exists()


def test_a_store_in_the_place_of_the_model_gives_the_same_atlas(world: World, tmp_path: Path) -> None:
    """In bfloat16 a store holds the model's activations to the bit, and so must every number of the atlas."""
    model = world.model.replace(dtype="bfloat16")
    lm = language_models.load(model)
    made = HarvestConfig(
        out=tmp_path / "store",
        model=model,
        text=world.text,
        policy=POLICY.replace(max_norm_ratio=1.2),
        hookpoints=("mlp_out.0", "resid_post.0"),
        n_tokens=4000,
        split="all",
        batch_rows=8,
        shard_contexts=24,
    )
    store = harvest(made, lm=lm)
    assert store.info.n_norm_outliers > 0
    # the store leaves a row out if it is over the limit at any of its hookpoints: read both, so that the pass does too
    places = [
        Site(
            model=lm.name,
            model_fingerprint=lm.fingerprint,
            hookpoint=name,
            start=32 * i,
            stop=32 * i + 32,
            max_norm=store.info.hookpoints[name].max_norm,
        )
        for i, name in enumerate(made.hookpoints)
    ]
    where = Sites(inputs=tuple(places), outputs=tuple(places))
    dictionary = TopK(TopKConfig(k=4), 64, 64, 48, where)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    dictionary.initialise(x, x, torch.Generator().manual_seed(0))
    dictionary.save(tmp_path / "d", x, extra={"policy": made.policy.resolved()})
    asked = {"dictionaries": tmp_path / "d", "model": model}
    live = world.config(str(tmp_path / "live"), **asked, split="all", n_tokens=4000)
    stored = InterpretConfig.build(
        live.resolved() | {"out": tmp_path / "stored", "store": tmp_path / "store", "batch_rows": 5}
        | {name: InterpretConfig.model_fields[name].default for name in ("text", "split", "n_tokens")}
    )  # fmt: skip
    interpret(live, lm=lm).close()

    assert store.n_documents == len(store.documents()) > 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lm), "capture", no_forward)
        patch.delattr(type(store), "documents")  # a table in memory that grows with the text
        interpret(stored, lm=lm).close()
    one, two = contents(tmp_path / "live"), contents(tmp_path / "stored")
    for table in TABLES:
        assert one[table] == two[table], table

    with pytest.raises(ConfigError, match="n_tokens must be left out when store is given, got 7"):
        InterpretConfig.build({"store": tmp_path / "store", "n_tokens": 7})
    with pytest.raises(TextError, match=r"must have at least 9000 documents.* got \d+\. Give more text"):
        interpret(stored.replace(n_top=9000, out=tmp_path / "o"), lm=lm)
    with pytest.raises(HookpointError, match=r"must be in the store .*got 'resid_post.1'"):
        other = save_dictionary(tmp_path / "other", sites(lm, "resid_post.1"), policy=made.policy)
        interpret(stored.replace(dictionaries=other, out=tmp_path / "o"), lm=lm)
    with pytest.raises(MismatchError, match="the store must have the dictionary's token policy"):
        other = save_dictionary(tmp_path / "policy", sites(lm))
        interpret(stored.replace(dictionaries=other, out=tmp_path / "o"), lm=lm)
