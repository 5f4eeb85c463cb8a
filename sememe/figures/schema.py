"""What comparison.json and a page's page.json hold. Their JSON schemas are written beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sememe.config import Config

__all__ = ["FORMAT", "PAGE_FORMAT", "Comparison", "Page"]

FORMAT, PAGE_FORMAT = 4, 1


class Number(Config):
    """A metric. JSON has no NaN: null, and why."""

    value: float | None
    """Over all documents; of directions, over all latents."""
    low: float | None = None
    """Lower end of the 95% bootstrap interval over documents, or latents."""
    high: float | None = None
    """Its upper end."""
    cause: str = ""
    """Why there is no number or no interval."""


class Histogram(Config):
    """Latents per density."""

    edges: tuple[float, ...]
    """Of the bins."""
    counts: tuple[int, ...]
    """Latents in each bin."""
    n_silent: int
    """Latents that never fired."""
    n_below: int
    """Latents that fired more rarely than the first edge."""
    shares: dict[str, Number]
    """Share of the latents below 1e-5, 1e-4, 1e-3, and above 1e-2."""
    l0_quantiles: dict[str, Number]
    """Active latents per row that such a share of the rows does not exceed."""
    l0_histogram: tuple[tuple[int, int], ...]
    """Numbers of active latents that occur, and on how many rows each."""


class Row(Config):
    """One dictionary or null."""

    name: str
    """What the comparison calls it."""
    group: str
    """The frontier it lies on."""
    setting: str
    """Its place there; dictionaries of one group and setting are seeds."""
    null: bool
    """Whether it is a control."""
    description: dict[str, Any]
    """Kind, width, options, hookpoints, fingerprint."""
    metrics: dict[str, Number] = Field(default_factory=dict)
    """On held-out documents; empty if none were read."""
    density: Histogram | None = None
    """How often its latents are active."""


class FrontierPoint(Config):
    """A setting of a group, seeds averaged. Besides, a Number for each metric under its name."""

    model_config = Config.model_config | {"extra": "allow"}

    setting: str
    """How sparse it was asked to be."""
    n_seeds: int
    """Dictionaries averaged."""
    l0: Number
    """Active latents per token."""


class FrontierData(Config):
    """A group, from its sparsest setting on."""

    points: tuple[FrontierPoint, ...]
    """Its settings."""
    mean_over_common_l0: dict[str, Number]
    """Each metric's mean over the l0 that groups share, on a logarithmic axis; empty for a group that is left out."""
    l0_from: float | None = None
    """Where that begins."""
    l0_to: float | None = None
    """Where it ends."""


class DifferenceData(Config):
    """A metric of group a less that of group b."""

    metric: str
    """Its name."""
    a: str
    """One group."""
    b: str
    """The other."""
    l0: float | None
    """Where they are compared: the middle of what both reach; null where they share nothing."""
    a_value: float | None
    """That of a there."""
    b_value: float | None
    """That of b there."""
    difference: float | None
    """a_value - b_value."""
    low: float | None
    """Lower end of its 95% interval: documents, and seeds where there are several, drawn together for both."""
    high: float | None
    """Its upper end."""
    l0_from: float | None
    """Where the range begins that both reach."""
    l0_to: float | None
    """Where it ends."""
    mean_difference: float | None
    """Over that range."""
    mean_low: float | None
    """Lower end of its interval."""
    mean_high: float | None
    """Its upper end."""
    real: bool
    """Whether the interval of `difference` leaves out 0."""
    sentence: str
    """All of it in words."""


class DirectionDifference(Config):
    """The mmcs of a dictionary where it is found best less that in another."""

    of: str
    """Whose latents."""
    best: str
    """Where they are found best."""
    other: str
    """Where else they are looked for."""
    difference: Number
    """Latent by latent: the interval is paired."""
    real: bool
    """Whether the interval leaves out 0."""
    sentence: str
    """All of it in words."""


class Directions(Config):
    """Decoder directions, row by column."""

    names: tuple[str, ...]
    """Of rows and columns."""
    mmcs: tuple[tuple[Number, ...], ...]
    """Mean over the row's latents of the largest cosine with any of the column's."""
    random: tuple[Number, ...]
    """The same of each row in random directions: what no resemblance gives."""
    share_above: tuple[tuple[Number, ...], ...] = Field(alias="share_above_0.9")
    """Share of the row's latents for which it exceeds 0.9."""
    random_share_above: tuple[Number, ...] = Field(alias="random_share_above_0.9")
    """The same of each row in random directions."""
    differences: tuple[DirectionDifference, ...]
    """Of each row: the column that holds it best against every other."""


class GroupArm(Config):
    """A dictionary or null on some of the documents."""

    n_rows: int
    """Kept rows of these."""
    metrics: dict[str, Number]
    """On these alone."""


class GroupData(Config):
    """The documents of one language, source, or value of a tag."""

    n_documents: int
    """Of that value."""
    arms: dict[str, GroupArm]
    """By the name of the dictionary or null."""


class TogetherData(Config):
    """All dictionaries spliced in at once."""

    dictionaries: tuple[str, ...]
    """Their names."""
    hookpoints: tuple[str, ...]
    """Where they write."""
    metrics: dict[str, Number]
    """Of the model that runs on all of them; recovered shares refer to ablation in all places."""
    ablations: dict[str, Number]
    """Cross-entropy unedited (base), and with zeros or means in all places."""


class Comparison(Config):
    """comparison.json."""

    format_version: Literal[4]
    """Of this layout."""
    rows: tuple[Row, ...]
    """Dictionaries, then nulls."""
    frontiers: dict[str, FrontierData]
    """By group."""
    left_out: dict[str, str]
    """By group, why its mean over the l0 that the others share was not taken; empty where no two share any."""
    dropped: dict[str, str]
    """Settings that have no place on a frontier, and why."""
    differences: tuple[DifferenceData, ...]
    """Every pair of groups, every metric."""
    by_language: dict[str, GroupData]
    """Per language of the documents; empty if none were read."""
    by_source: dict[str, GroupData]
    """Per source."""
    by_tag: dict[str, dict[str, GroupData]]
    """Per value of each of the text's tag fields."""
    directions: Directions
    """What dictionaries find of each other."""
    pair: dict[str, Any] | None
    """Of two dictionaries: matches both ways; else null."""
    text: dict[str, Any] | None
    """What was read."""
    bootstrap: dict[str, Any] | None
    """Units, draws and seed of the intervals."""
    stopped: dict[str, Any] | None
    """Why reading ended: all tokens, the budget, or intervals that are narrow enough; with a budget, the seconds
    `spent` on fitting nulls and on reading."""
    together: TogetherData | None
    """All of them spliced in at once, if that was asked."""
    notices: tuple[str, ...]
    """What a reader has to know."""
    attributions: tuple[dict[str, Any], ...]
    """Whose text it is."""


class Page(Config):
    """page.json: what a page of reports shows."""

    format_version: Literal[1]
    """Of this layout."""
    rows: tuple[Row, ...]
    """Dictionaries, each followed by its parts and nulls."""
    frontiers: dict[str, FrontierData]
    """By group; empty where the reports are not of the same documents."""
    differences: tuple[DifferenceData, ...]
    """Every pair of groups, every metric."""
    left_out: dict[str, str]
    """By group, why its mean over shared l0 was not taken."""
    dropped: dict[str, str]
    """Settings that have no place on a frontier, and why."""
    notices: tuple[str, ...]
    """What a reader has to know."""
