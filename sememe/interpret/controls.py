"""The nulls of an atlas: dictionaries that nobody trained, with as many latents active."""

from __future__ import annotations

from collections.abc import Sequence

from sememe.dictionaries import Dictionary
from sememe.interpret.config import InterpretConfig
from sememe.lm import LanguageModel
from sememe.measure import MeasureConfig, fit, make_null
from sememe.measure.checks import check_nulls
from sememe.store import Store
from sememe.text import TokenPolicy

__all__ = ["controls"]


def controls(
    dictionary: Dictionary,
    names: Sequence[str],
    config: InterpretConfig,
    lm: LanguageModel,
    policy: TokenPolicy,
    store: Store | None,
) -> dict[str, Dictionary]:
    """Each null by name, fitted to training rows, its number of active latents the dictionary's.

    Raises:
        ConfigError: a null cannot stand in for a dictionary that does not reconstruct its input.
    """
    sites = dictionary.sites
    assert sites is not None
    check_nulls(tuple(names), sites)
    measure = MeasureConfig(
        out=config.out,
        model=config.model,
        text=config.text,
        n_fit_rows=config.n_fit_rows,
        nulls=tuple(names),
        seed=config.seed,
    )
    fitted = fit(measure, lm, sites, policy, store)
    k = max(1, round(fitted.sparsity_of(dictionary).compute()["l0"].value))
    return {name: make_null(name, k, dictionary.d_sae, config.seed, sites, fitted)[0] for name in names}
