"""Where thresholds and biases start: the share of fresh rows above them, at any width."""

import math

import pytest
import torch

from sememe import dictionaries
from sememe.dictionaries import levels as room
from sememe.dictionaries.cross_layer import CrossLayerConfig
from sememe.dictionaries.jumprelu import JumpReLUConfig
from sememe.dictionaries.levels import levels
from sememe.dictionaries.relu import ReLUConfig

D_IN = 64


def rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.5


def started(config, n_rows: int):
    dictionary, x = dictionaries.build(config, D_IN, D_IN), rows(n_rows, 0)
    dictionary.initialise(x, x, torch.Generator().manual_seed(1))
    return dictionary


def l0_of(dictionary, n: int = 1024) -> float:
    with torch.no_grad():
        return float(dictionary.eval().encode(rows(n, 2)).l0().float().mean())


@pytest.mark.parametrize(("d_sae", "target"), [(2**15, 2.0), (2**12, 8.0)])
def test_jumprelu_starts_at_its_l0_on_fresh_rows_at_any_width(d_sae, target):
    """Of the wider one, 8 / 32,768 of 1,024 rows is a quarter of a row."""
    dictionary = started(JumpReLUConfig(d_sae=d_sae, target_l0=target), 1024)
    assert l0_of(dictionary) == pytest.approx(4 * target, rel=0.2)


def test_biases_start_at_their_density_on_fresh_rows_where_no_row_of_the_sample_is_so_rare():
    dictionary = started(ReLUConfig(d_sae=2**14, start_density=1e-4), 2048)
    assert l0_of(dictionary, 4096) == pytest.approx(1e-4 * 2**14, rel=0.25)


def test_a_cross_layer_transcoder_starts_at_its_l0_at_a_large_width():
    config = CrossLayerConfig(d_sae=2**15, selection="jumprelu", target_l0=2.0, n_layers=2)
    assert l0_of(started(config, 1024)) == pytest.approx(8, rel=0.25)


def test_a_level_is_read_off_between_two_rows():
    x = torch.tensor([[8.0], [1.0], [4.0], [2.0], [0.0], [-1.0], [-3.0], [-5.0], [-9.0]])
    one = torch.ones(1, 1)
    assert float(levels(x, one, None, 0.2)) == 4, "the second of nine: two tenths of fresh rows are above"
    assert float(levels(x, one, torch.tensor([0.5]), 0.1)) == 8.5
    between = math.log(1.5) / math.log(2)
    assert float(levels(x, one, None, 0.15)) == pytest.approx(8 + between * (4 - 8))
    assert float(levels(x[:2], one, None, 0.01)) == 8, "too few for a tail: the largest"


def test_tiles_of_latents_change_nothing(monkeypatch):
    x, W = rows(200, 0), torch.randn(D_IN, 50, generator=torch.Generator().manual_seed(3))
    found = [levels(x, W, None, share) for share in (0.1, 1e-3)]
    monkeypatch.setattr(room, "TILE", 1000)
    for before, share in zip(found, (0.1, 1e-3), strict=True):
        torch.testing.assert_close(levels(x, W, None, share), before)
