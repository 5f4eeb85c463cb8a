"""Strict, frozen configs and their errors."""

import pytest

from sememe.config import Config, canonical_json, read_toml
from sememe.errors import ConfigError, SememeError, nearest


class Inner(Config):
    depth: int = 1


class Outer(Config):
    not_identity = frozenset({"out"})

    width: int = 2
    """How wide."""
    inner: Inner = Inner()
    out: str = "x"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"widht": 3}, "widht must be a known option of Outer, got 3. Did you mean 'width'?"),
        (
            {"inner": {"depht": 3}},
            "inner.depht must be a known option of Outer, got 3. Did you mean 'depth'?",
        ),
        ({"width": "many"}, "width must be a whole number, got 'many'. Change width."),
        ({"width": 1.5}, "width must be a whole number, got 1.5"),
    ],
)
def test_wrong_options_are_three_part_errors(data, message):
    with pytest.raises(ConfigError, match=message):
        Outer.build(data)


def test_configs_are_frozen_and_json_round_trips():
    config = Outer(width=5)
    with pytest.raises(Exception, match="frozen"):
        config.width = 6
    assert Outer.build(config.resolved()) == config
    assert config.replace(width=7).width == 7
    with pytest.raises(ConfigError, match="known option"):
        config.replace(wdith=7)


def test_identity_leaves_out_places():
    assert Outer(out="a").identity() == Outer(out="b").identity()
    assert Outer(width=3).identity() != Outer(width=4).identity()
    assert canonical_json({"b": 1, "a": [2]}) == '{"a":[2],"b":1}'


def test_toml_errors(tmp_path):
    (tmp_path / "demo.toml").write_text("a = ")
    with pytest.raises(ConfigError, match=r"demo.toml must be TOML, got .* Mend the line"):
        read_toml(tmp_path / "demo.toml")
    with pytest.raises(
        ConfigError, match=r"a recipe must be a file that exists, got .*dmeo.toml. Did you mean .*demo.toml"
    ):
        read_toml(tmp_path / "dmeo.toml")


def test_errors_have_three_parts_and_one_line():
    error = SememeError("k must be in [1, d_sae=8]", "9\n", "Lower k.")
    assert str(error) == "k must be in [1, d_sae=8], got 9 . Lower k."
    assert "\n" not in str(error)
    assert nearest("resid_pots.3", ["resid_post.3", "mlp_out.3"]) == "Did you mean 'resid_post.3'?"
    assert nearest("zzz", ["a", "b"]) == "Known: a, b."
