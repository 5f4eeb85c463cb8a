"""What people say of latents: on disk, over HTTP, and as a view of the atlas; and two atlases compared."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import shutil

import pytest
from served_atlases import SMALL, client_of, two_atlases
from synthetic_atlas import SyntheticConfig, build, build_effects, build_explanations, build_report

from sememe import artifact
from sememe.atlas import open_atlas
from sememe.browse import BrowseConfig, ExportConfig, export
from sememe.browse.compared import Compared, Side
from sememe.browse.notes import notes_path
from sememe.browse.serving import served
from sememe.errors import ArtifactError, ConfigError, CorruptError, MismatchError


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    return two_atlases(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def client(atlases):
    with client_of(BrowseConfig(atlas=atlases[0], against=atlases[1:], write=True)) as client:
        yield client


# ---- notes on disk


def test_notes_are_kept_beside_the_atlas_and_join_it_as_a_view(tmp_path):
    made = build(tmp_path / "atlas", SMALL)
    hostile = "<script>\u202e\x00\U0001f600"
    with client_of(BrowseConfig(atlas=tmp_path / "atlas", write=True)) as client:
        sent = {"star": True, "tags": ["a", "a b"], "note": hostile, "explanation": "rivers"}
        assert client.put("/api/notes/3", json=sent).json().items() >= sent.items()
        client.put("/api/notes/4", json={"star": True})
        client.put("/api/notes/4", json={})  # says nothing: taken away
        rating = {"session": "s", "source": "f", "latent": 5, "verdict": "unclear", "stratum": "x"}
        client.put("/api/ratings", json=rating)
        client.put("/api/ratings", json={**rating, "verdict": "monosemantic"})
        client.put("/api/ratings", json={**rating, "latent": 6})
        client.put("/api/ratings", json={**rating, "latent": 6, "verdict": None})
        assert client.put("/api/ratings", json={**rating, "verdict": "good"}).status_code == 400
    path = notes_path(tmp_path / "atlas")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["atlas"] == made.fingerprint and list(found["latents"]) == ["3"]
    assert [(one["latent"], one["verdict"]) for one in found["ratings"]] == [(5, "monosemantic")]
    assert artifact.load(tmp_path / "atlas", "atlas").fingerprint == made.fingerprint, (
        "the atlas did not change"
    )
    with contextlib.closing(open_atlas(tmp_path / "atlas", notes=path)) as atlas:
        rows = atlas.query(
            "SELECT latent, star, tags, note, n.explanation FROM notes n JOIN latents ON id = latent"
        )
        assert rows == [
            {"latent": 3, "star": True, "tags": ["a", "a b"], "note": hostile, "explanation": "rivers"}
        ]
    with client_of(BrowseConfig(atlas=tmp_path / "atlas")) as client:
        assert client.get("/api/notes").json()["latents"]["3"]["note"] == hostile, "read back, read-only"


def test_exported_notes_are_taken_over(client):
    document = {"kind": "notes", "latents": {"7": {"star": True}, "8": {"tags": ["x"]}}, "ratings": []}
    found = client.post("/api/notes", json=document).json()
    assert found["latents"]["7"] == {"star": True} and found["latents"]["8"] == {"tags": ["x"]}
    for bad, message in (
        ({"kind": "atlas"}, "exported notes"),
        ({"kind": "notes", "latents": {"x": {}}}, "must be a number"),
        ({"kind": "notes", "latents": []}, "latents and ratings"),
        ({"kind": "notes", "latents": {"1": 3}}, "must be an object"),
        ({"kind": "notes", "latents": {}, "ratings": [{"latent": -1}]}, "must be"),
    ):
        answer = client.post("/api/notes", json=bad)
        assert answer.status_code == 400 and message in answer.json()["error"]


def test_notes_of_another_dictionary_are_not_taken_over(client):
    before = client.get("/api/notes").json()
    for said, message in (
        (
            {"atlas": "a" * 64, "dictionary": "b" * 64},
            "must be of this atlas's dictionary .*got notes of bbbb.*Open",
        ),
        ({"atlas": "a" * 64}, "got notes of aaaa"),
        (
            {"atlas": before["atlas"], "latents": {"40": {"star": True}}},
            "got latent 40, which it does not have. Open",
        ),
        ({"latents": {"1": {"star": True}, "999999999": {}}}, "got latent 999999999"),
        (
            {"ratings": [{"session": "s", "source": before["atlas"], "latent": 40, "verdict": "unclear"}]},
            "got latent 40",
        ),
    ):
        document = {"kind": "notes", "latents": {"2": {"star": True}}, "ratings": [], **said}
        answer = client.post("/api/notes", json=document)
        assert answer.status_code == 400 and re.search(message, answer.json()["error"]), answer.text
    assert client.get("/api/notes").json() == before
    rating = {"session": "s", "latent": 40, "verdict": "unclear"}
    assert client.put("/api/ratings", json=rating).status_code == 400
    assert client.put("/api/ratings", json={**rating, "source": "another"}).status_code == 200, (
        "a mixed queue"
    )
    for said in ({"dictionary": before["dictionary"], "atlas": "on other text"}, {"atlas": before["atlas"]}):
        document = {"kind": "notes", "latents": {"2": {"tags": ["same"]}}, "ratings": [], **said}
        assert client.post("/api/notes", json=document).status_code == 200


def test_two_that_write_one_file_keep_each_other_s_notes(tmp_path):
    build(tmp_path / "atlas", SMALL)
    config = BrowseConfig(atlas=tmp_path / "atlas", write=True)
    with client_of(config) as one, client_of(config) as two:
        for i in range(4):
            (one, two)[i % 2].put(f"/api/notes/{i}", json={"star": True})
        kept = json.loads(notes_path(tmp_path / "atlas").read_text())["latents"]
        assert list(kept) == ["0", "1", "2", "3"]
        assert one.get("/api/notes").json()["latents"] == two.get("/api/notes").json()["latents"] == kept


def test_an_atlas_is_named_once(tmp_path):
    build(tmp_path / "atlas", SMALL)
    (tmp_path / "link").symlink_to(tmp_path / "atlas")
    named = {"atlas": tmp_path / "atlas", "against": (tmp_path / "link",)}
    message = r"each atlas must be named once, got .*link, which is .*atlas again\. Leave it out"
    with pytest.raises(ConfigError, match=message), served(BrowseConfig(**named, write=True)):
        pass
    with pytest.raises(ConfigError, match=message):
        export(ExportConfig(**named, out=tmp_path / "site"))


def test_notes_of_another_dictionary_or_damaged_ones_are_not_overwritten(tmp_path):
    build(tmp_path / "atlas", SMALL)
    path = notes_path(tmp_path / "atlas")
    for content, error, message in (
        ("{}", CorruptError, "must be a file of notes.*move it away"),
        ("not json", CorruptError, "must be a file of notes"),
        (
            json.dumps(
                {"kind": "notes", "format_version": 1, "atlas": "a", "dictionary": "b", "latents": {}}
            ),
            MismatchError,
            r"must be of the dictionary of the atlas.*Move the file away",
        ),
    ):
        path.write_text(content)
        with pytest.raises(error, match=message), served(BrowseConfig(atlas=tmp_path / "atlas", write=True)):
            pass
        assert path.read_text() == content
        with client_of(BrowseConfig(atlas=tmp_path / "atlas")) as reader:  # who only reads, reads
            assert reader.get("/api/notes").json()["latents"] == {}
    with pytest.raises(ArtifactError, match="browse --write"):
        open_atlas(tmp_path / "atlas", notes=tmp_path / "none.json")


# ---- comparing


def test_profiles_of_tokens_are_compared_as_by_hand(atlases):
    import numpy as np

    with served(BrowseConfig(atlas=atlases[0], against=atlases[1:])) as shown:
        a, b = (one.data for one in shown)
        found = Compared(Side(a, None), Side(b, None))
        pairs = found.pairs()
        assert pairs["method"] == "tokens" and len(pairs["latent"]) == 40

        def profiles(data):
            out = {}
            for row in data.atlas.query(
                "SELECT latent, t.bytes AS b, share FROM top_tokens JOIN tokens t ON t.id = token"
            ):
                out.setdefault(row["latent"], {})[bytes(row["b"])] = row["share"]
            return out

        mine, theirs = profiles(a), profiles(b)
        likeness = np.zeros((40, 25))
        for i, left in mine.items():
            for j, right in theirs.items():
                dot = sum(share * right.get(token, 0) for token, share in left.items())
                sizes = [np.sqrt(sum(v * v for v in side.values())) for side in (left, right)]
                likeness[i, j] = dot / (sizes[0] * sizes[1])
        for i, (other, value, mutual) in enumerate(
            zip(pairs["other"], pairs["similarity"], pairs["mutual"], strict=True)
        ):
            best = likeness[i].max()
            if best <= 0:
                assert (other, value, mutual) == (None, None, None)
                continue
            assert value == pytest.approx(best, abs=1e-3) and likeness[i, other] == pytest.approx(
                best, abs=1e-5
            )
            assert mutual == (likeness[:, other].argmax() == i)
        one = found.of(3)
        assert one["similarity"] == sorted(one["similarity"], reverse=True)
        assert one["other"][0] == pairs["other"][3] and found.of(40) is None


def test_directions_are_compared_where_the_dictionaries_are_known(tmp_path):
    import torch
    from atlas_fixture import make_world, save_dictionary, sites

    from sememe import dictionaries
    from sememe.interpret import interpret

    world = make_world(tmp_path)
    save_dictionary(tmp_path / "other", sites(world.lm), d_sae=30, k=3)
    interpret(world.config("atlas", against=(tmp_path / "other",)), lm=world.lm).close()
    interpret(world.config("atlas2", dictionaries=(tmp_path / "other",)), lm=world.lm).close()
    config = BrowseConfig(atlas=tmp_path / "atlas", against=(tmp_path / "atlas2",))
    with served(config) as shown:
        sides = [Side(one.data, one.dictionary) for one in shown]
        assert [side.dictionary for side in sides] == [world.dictionary, tmp_path / "other"]
        kept, back = Compared(*sides), Compared(*reversed(sides))
        assert (kept.method, back.method) == ("neighbours", "directions")
        directions = [
            torch.nn.functional.normalize(dictionaries.load(path).decoder_directions(), dim=1)
            for path in (world.dictionary, tmp_path / "other")
        ]
        cosines = (directions[0] @ directions[1].T).detach()
        assert kept.pairs()["other"] == cosines.argmax(dim=1).tolist()
        assert kept.pairs()["similarity"] == pytest.approx(cosines.max(dim=1).values.tolist(), abs=1e-3)
        assert back.pairs()["other"] == cosines.argmax(dim=0).tolist()
        best = cosines.max(dim=0).values
        expected = [float(v) if v > 0 else None for v in best]
        assert back.pairs()["similarity"] == pytest.approx(expected, abs=1e-3)
        assert back.of(4)["other"][0] == back.pairs()["other"][4]
        assert kept.of(4)["similarity"][0] == kept.pairs()["similarity"][4]
        assert kept.back() is None, "neighbours are kept one way"
        assert back.back()["other"] == cosines.argmax(dim=1).tolist(), "the same products, turned"
    with (
        pytest.raises(MismatchError, match=r"must be that of the atlas.*leave --dictionary out"),
        served(config.replace(dictionary=tmp_path / "other")),
    ):
        pass
    site = export(ExportConfig(atlas=config.atlas, against=config.against, out=tmp_path / "site"))
    assert site.meta["parents"]["compared 0 1"] == "neighbours"
    assert site.meta["parents"]["compared 1 0"] == "directions"
    (tmp_path / "other").rename(tmp_path / "moved")
    with pytest.raises(MismatchError, match=str(tmp_path / "site")):  # by tokens now: another site
        export(ExportConfig(atlas=config.atlas, against=config.against, out=tmp_path / "site"))


def test_a_null_s_atlas_is_looked_at_with_the_dictionary_it_keeps(tmp_path):
    from atlas_fixture import make_world

    from sememe.interpret import interpret
    from sememe.prompt import Known

    world = make_world(tmp_path)
    interpret(world.config("atlas", n_tokens=1000, nulls=("randomised",)), lm=world.lm).close()
    null = tmp_path / "atlas" / "null-randomised"
    with served(BrowseConfig(atlas=null)) as shown:
        assert shown[0].dictionary == null / "dictionary"
    assert Known.of(null, None, artifact.load(null / "dictionary", "dictionary")).latents, (
        "the model's process knows it"
    )
    with (
        pytest.raises(MismatchError, match=r"must be that of the atlas.*leave --dictionary out"),
        served(BrowseConfig(atlas=null, dictionary=world.dictionary)),
    ):
        pass
    shutil.rmtree(null / "dictionary")  # of an earlier version
    meta = json.loads((null / "meta.json").read_text())
    meta["files"] = {
        name: about for name, about in meta["files"].items() if not name.startswith("dictionary/")
    }
    (null / "meta.json").write_text(json.dumps(meta))
    with served(BrowseConfig(atlas=null)) as shown:
        assert shown[0].dictionary is None
    with (
        pytest.raises(MismatchError, match=r"the atlas of a null.*Run `sememe interpret` again, which keeps"),
        served(BrowseConfig(atlas=null, dictionary=world.dictionary)),
    ):
        pass


def test_each_atlas_has_explanations_effects_and_a_report_of_its_own(atlases, tmp_path):
    made = [artifact.load(path, "atlas") for path in atlases]
    labels = [{3: "rivers"}, {4: "towns", 5: "salt"}]
    for i, (atlas, words) in enumerate(zip(made, labels, strict=True)):
        build_explanations(tmp_path / f"words-{i}", atlas, words)
        build_effects(tmp_path / f"effects-{i}", atlas, [2])
    build_report(tmp_path / "report")
    named = {
        "atlas": atlases[0],
        "against": atlases[1:],
        "explanations": (tmp_path / "words-1", tmp_path / "words-0"),
        "effects": (tmp_path / "effects-1",),
        "report": tmp_path / "report",
    }
    with served(BrowseConfig(**named)) as shown:
        assert [one.data.explanations for one in shown] == labels
        assert [one.data.overview()["effects"] for one in shown] == [False, True]
        assert all(one.data.overview()["report"] for one in shown), "one dictionary, two atlases"
    site = export(ExportConfig(**named, out=tmp_path / "site"))
    assert {"explanations", "against 0", "against 0 explanations", "against 0 effects"} <= set(
        site.meta["parents"]
    )
    assert "effects" not in site.meta["parents"]
    build_explanations(tmp_path / "more", made[1], {1: "more"})
    twice = (tmp_path / "words-1", tmp_path / "more")
    with (
        pytest.raises(
            ConfigError, match=r"explanations must name one folder for each atlas, got .*Leave out"
        ),
        served(BrowseConfig(**named | {"explanations": twice})),
    ):
        pass
    stranger = build(tmp_path / "stranger", SyntheticConfig(n_latents=20, n_contexts=30, seed=9))
    build_explanations(tmp_path / "theirs", stranger, {1: "x"})
    with (
        pytest.raises(MismatchError, match="theirs"),
        served(BrowseConfig(**named | {"explanations": (tmp_path / "words-1", tmp_path / "theirs")})),
    ):
        pass


def test_a_site_computes_each_pair_once_and_is_of_one_method(atlases, tmp_path, monkeypatch):
    calls, block = [], Compared._block
    monkeypatch.setattr(Compared, "_block", lambda self, rows: calls.append(rows) or block(self, rows))
    out = tmp_path / "site"
    site = export(ExportConfig(atlas=atlases[0], against=atlases[1:], out=out))
    assert len(calls) == 1, "both ways of one product"
    assert site.meta["parents"]["compared 0 1"] == site.meta["parents"]["compared 1 0"] == "tokens"
    text = (out / "data" / "compare-1-0.js").read_text()
    found = json.loads(gzip.decompress(base64.b64decode(text.split('"')[3])))
    with served(BrowseConfig(atlas=atlases[1], against=atlases[:1])) as shown:
        assert found == Compared(*(Side(one.data, None) for one in shown)).pairs()
