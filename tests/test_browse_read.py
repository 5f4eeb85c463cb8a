"""Reading a latent on the page: explanation and scores, effects, relations, charts; served and static."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack

import numpy as np
import pytest
from page_in_browser import a_browser, exported, go, served, settle, violations, watched
from synthetic_atlas import SyntheticConfig, build_all

from sememe.browse.inputs import Inputs, opened

pytestmark = pytest.mark.browser

EXPLANATIONS = {5: "names of </script><b>rivers</b>", 30: "\u202etricks\u200b of letters"}
EVIL = "article script, article img, article b, article s, article td td"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("read"), SyntheticConfig(), EXPLANATIONS)


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


@pytest.fixture(scope="module")
def open_at(inputs, tmp_path_factory):
    with ExitStack() as stack:
        browser = stack.enter_context(a_browser())
        site = exported(inputs, tmp_path_factory.mktemp("sites") / "site")
        yield browser, {"served": stack.enter_context(served(inputs)), "static": site}


@pytest.fixture(params=["served", "static"])
def address(request, open_at):
    return open_at[1][request.param]


@pytest.fixture
def page(open_at, address):
    with watched(open_at[0], address) as page:
        yield page


def latent_page(page, address, latent: int, rest: str = "") -> None:
    go(page, address, f"#/latent/{latent}{rest}")
    page.wait_for_selector(".latent:not(.stale) .example")


def test_an_explanation_stands_beside_its_scores_and_the_nulls(page, address):
    latent_page(page, address, 5)
    section = page.locator(".explanation")
    words = section.locator("dl").inner_text()
    assert "in <i>words</i> 0" in words and "a rule <b>0</b>" in words and "words </td>" in words
    assert "(its label)" in section.locator("dl > div").first.inner_text()
    rows = section.locator("tbody tr")
    assert rows.first.locator("td").all_inner_texts() == ["0.5", "", "0.5", "0.2"]
    label = rows.first.locator("svg").get_attribute("aria-label")
    assert label.endswith("0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9")
    assert rows.nth(2).locator("td").first.inner_text() == "–"  # undefined for this latent
    assert page.locator(EVIL).count() == 0
    latent_page(page, address, 31)
    assert page.locator(".explanation").count() == 0


def test_relations_lead_to_other_latents(page, address, data):
    latent_page(page, address, 30)
    found = data.latent(30)
    grid = page.locator(".relation-grid")
    titles = grid.locator("h3").all_inner_texts()
    expected = (
        "Nearest in what it writes", "Nearest in what it reads", "Active together", "Tokens", "Neurons",
        "In other <i>",
    )  # fmt: skip
    assert [title.startswith(name) for title, name in zip(titles, expected, strict=True)] == [True] * 6
    nearest = grid.locator(".related").first
    near = found["neighbours"][0]["other"]
    assert nearest.locator(".c-id").all_inner_texts() == [str(other) for other in near]
    flags = nearest.locator("tbody tr").all_inner_texts()
    together = set(found["coactive"]["other"])
    assert [("fires with it" in text) for text in flags] == [other in together for other in near]
    assert ["split?" in text for text in flags] == [
        other not in together and cosine >= 0.4
        for other, cosine in zip(near, found["neighbours"][0]["cosine"], strict=True)
    ]
    other = grid.locator(".related").nth(2).locator("tbody tr").first
    chance = f"{found['coactive']['expected'][0]:.3g}"
    assert other.locator("td").all_inner_texts()[1:] == ["20", chance, "0.6"]
    facts = page.locator(".latent .facts").inner_text()
    for text in ("effective neurons", "since a checkpoint", "0.97", "outlier share", "mcs", "encoder bias"):
        assert text in facts
    other.locator("a").click()
    page.wait_for_function(
        "(id) => document.querySelector('.latent:not(.stale) .number')?.textContent === 'Latent ' + id",
        arg=found["coactive"]["other"][0],
    )


def test_a_latent_s_group_leads_to_the_list_of_it(page, address, data):
    latent = next(row for row, c in enumerate(data.details()["cluster"]) if c == 0)
    latent_page(page, address, latent)
    link = page.locator(".in-cluster a")
    assert link.inner_text() == "<u>water</u> words"
    link.click()
    page.wait_for_selector(".toolbar .found b")
    page.wait_for_selector(".map-legend")
    n = sum(1 for c in data.details()["cluster"] if c == 0)
    page.wait_for_function("(n) => document.querySelector('.toolbar .found b').textContent === n", arg=str(n))


def test_tokens_are_underlined_by_effect(page, address, data):
    latent_page(page, address, 30)
    examples = page.locator("#top .example")
    top = data.latent(30)["examples"]
    helps = examples.nth(0).locator(".tok.peak")
    assert "helps" in helps.get_attribute("class")
    assert float(helps.evaluate("(e) => e.style.getPropertyValue('--e')")) == pytest.approx(1)
    assert "hurts" in examples.nth(6).locator(".tok.peak").get_attribute("class")
    drop = {p: 1 - a / top["act"][0] for p, a in zip(*top["removals"][0].values(), strict=True)}
    needed = examples.nth(0).locator(".tok.needed")
    assert needed.count() == sum(share >= 0.05 for share in drop.values()) > 0
    strengths = needed.evaluate_all("(all) => all.map((e) => Number(e.style.getPropertyValue('--r')))")
    assert strengths == pytest.approx([share for share in drop.values() if share >= 0.05], abs=2e-3)
    page.get_by_label("underline effects").uncheck()
    settle(page)
    assert "mark=plain" in page.url and page.locator(".tok.needed, .tok.helps").count() == 0
    page.reload()
    page.wait_for_selector(".example")
    assert page.locator(".tok.helps").count() == 0


def test_hovering_tells_quantile_loss_and_predictions(page, address, data):
    latent_page(page, address, 30)
    example = page.locator("#top .example").first
    example.locator(".tok.peak").hover()
    tip = page.get_by_role("tooltip")
    text = re.sub(r"\s+", " ", tip.inner_text())
    assert "quantile 100%" in text and "loss without the latent +0.5 nats" in text
    assert "over the next 2 +0.25" in text and "KL 0.05" in text
    assert "</script><b>up" in text and "\\u202Edown" in text and tip.locator("b").count() == 0
    removal = data.latent(30)["examples"]["removals"][0]
    example.locator(".tok.needed").first.hover()
    share = removal["act"][0] / data.latent(30)["examples"]["act"][0] - 1
    assert f"peak without it {removal['act'][0]:.4g}".rstrip("0") in re.sub(r"\s+", " ", tip.inner_text())
    assert f"{abs(share) * 100:.3g}%" in tip.inner_text()


def test_tokens_are_reached_by_the_keyboard_alone(page, address, data):
    latent_page(page, address, 30)
    example = page.locator("#top .example").first
    assert example.locator(".tok[tabindex]").count() == 1, "one stop in each example"
    page.locator(".legend input").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.dataset.i"
    peak = data.latent(30)["examples"]["position"][0]
    assert page.evaluate(focused) == str(peak)
    tip = page.get_by_role("tooltip")
    assert "quantile" in tip.inner_text() and "loss without the latent" in tip.inner_text()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == tip.get_attribute("id")
    removed = data.latent(30)["examples"]["removals"][0]["removed"]
    for step in range(peak - max(removed)):
        page.keyboard.press("ArrowLeft")
        settle(page)
        assert (
            page.evaluate(focused) == str(peak - step - 1) and example.locator(".tok[tabindex]").count() == 1
        )
    assert "peak without it" in tip.inner_text()
    page.keyboard.press("End")
    settle(page)
    assert int(page.evaluate(focused)) == data.latent(30)["examples"]["stop"][0] - 1
    page.keyboard.press("ArrowRight")
    assert "#/latent/30" in page.url, "arrows stay among the tokens"
    page.keyboard.press("Escape")
    assert tip.count() == 0 and "#/latent/30" in page.url
    page.keyboard.press("Tab")
    assert tip.count() == 0
    page.keyboard.press("ArrowRight")
    page.wait_for_function("!location.hash.startsWith('#/latent/30')")


def test_a_quantile_is_the_share_of_smaller_activations(page, address, data):
    latent_page(page, address, 30)
    found = data.latent(30)
    example = page.locator("#top .example").nth(3)
    example.locator(".tok.peak").hover()
    said = float(re.search(r"quantile\s+([\d.]+)%", page.get_by_role("tooltip").inner_text())[1]) / 100
    counts = np.array(found["histogram"])
    edges = np.linspace(0, 1, len(counts) + 1)
    share = found["examples"]["act"][3] / found["max_act"]
    assert said == pytest.approx(np.interp(share, edges, np.r_[0, counts.cumsum() / counts.sum()]), abs=2e-3)


def test_the_histograms_are_of_activations_by_token_and_of_losses(page, address, data):
    latent_page(page, address, 30)
    found = data.latent(30)
    charts = page.locator(".charts").first
    bars = charts.locator("section").first.locator(".bar")
    assert bars.count() == len(found["histogram"])
    # The parts of a bar fill it.
    heights = bars.evaluate_all(
        """(all) => all.filter((g) => g.querySelector('.part')).map((g) =>
        [Number(g.querySelector('rect').getAttribute('height')),
         [...g.querySelectorAll('.part')].reduce((sum, r) => sum + Number(r.getAttribute('height')), 0)])"""
    )
    assert len(heights) > 8 and all(math.isclose(a, b, abs_tol=0.01) for a, b in heights)
    names = page.locator(".hue-name").all_inner_texts()
    assert len(names) == len(found["top_tokens"]["token"]) + 1 and names[-1].strip() == "other"
    drop = charts.locator("section").nth(1)
    assert "Logit drop" in drop.inner_text() and "12 examples" in drop.inner_text()
    loss = charts.locator("section").nth(2)
    assert "11 examples" in loss.inner_text()
    n = loss.locator(".bar title").all_text_contents()
    assert sum(int(text.split()[0]) for text in n) == 11
    assert page.locator(".direct .mark-line").count() == 24
    assert page.locator(".by-position .bar").count() == 16
    counts = page.locator(".direct .bar title").all_text_contents()
    assert [int(text.split()[0].replace(",", "")) for text in counts] == found["logit_histograms"]["counts"][
        0
    ]
    latent_page(page, address, 40)
    assert page.locator("text=Loss rise").count() == 0 and page.locator(".keys-of").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_s_width_is_enough(open_at, scheme):
    address = open_at[1]["static"]
    for width in (1280, 360):
        with watched(
            open_at[0], address, viewport={"width": width, "height": 800}, color_scheme=scheme
        ) as page:
            latent_page(page, address, 30, "?open=0")
            page.locator("#top .tok.peak").first.hover()
            settle(page)
            assert violations(page, scheme) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot()
            for hash in ("#/about", "#/latent/99999", "#/text/99"):
                go(page, address, hash)
                settle(page)
                assert violations(page, scheme) == [], hash


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_a_page_that_cannot_be_shown(open_at, inputs, tmp_path, scheme):
    address = exported(inputs, tmp_path / "site")
    (tmp_path / "site" / "data" / "overview.js").unlink()
    page = open_at[0].new_page(color_scheme=scheme)
    page.goto(address)
    assert "could not be loaded" in page.locator(".failed .problem").inner_text()
    assert violations(page, scheme) == []
    page.close()


def test_a_latent_s_page_does_not_shift(open_at, address):
    with watched(open_at[0], address) as page:
        page.add_init_script(
            """window.moved = 0;
            const add = (list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.moved += e.value; });
            new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });"""
        )
        latent_page(page, address, 5)
        page.wait_for_timeout(200)
        assert page.evaluate("window.moved") < 0.02
