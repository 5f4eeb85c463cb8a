"""The page in a real browser, served and from disk: every feature clicked and typed as a person would."""

from __future__ import annotations

import re

import page_in_browser
import pytest
from page_in_browser import a_browser, go, ids, settle, watched
from synthetic_atlas import (
    NASTY,
    VOCABULARY,
    SyntheticConfig,
    build_all,
)

from sememe.browse import ExportConfig, export

pytestmark = pytest.mark.browser

EXPLANATIONS = {5: "names of rivers </script><b>bold</b>", 30: "\u202etricks\u200b of letters"}
CONFIG = SyntheticConfig()


@pytest.fixture(scope="module")
def browser():
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return build_all(tmp_path_factory.mktemp("page"), CONFIG, EXPLANATIONS)


@pytest.fixture(scope="module")
def served(inputs):
    with page_in_browser.served(inputs) as address:
        yield address


@pytest.fixture(scope="module")
def static(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("a folder") / "site #1"  # blanks and signs in a path are no obstacle
    return (export(ExportConfig(**inputs, out=out)).path / "index.html").as_uri()


@pytest.fixture(params=["served", pytest.param("static", marks=pytest.mark.slow)])
def address(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def page(browser, address):
    with watched(browser, address) as page:
        yield page


def column(page, name: str) -> list[float]:
    texts = page.locator(f".rows .row .{name}").all_text_contents()
    return [float(text.strip("%").replace("e−", "e-").replace(",", "")) for text in texts]


def test_the_list_loads_with_the_overview(page, address):
    go(page, address)
    assert page.title() == "synthetic <b>topk</b> – Sememe"
    assert page.locator(".overview .facts dd").first.inner_text().startswith("300")
    assert page.locator(".report tbody tr").count() == 5
    assert page.locator(".report tbody tr:first-child td").all_inner_texts() == ["12%", "30%", "70%"]
    assert (
        page.locator(".density .bar").count() > 3 and "latents" in page.locator(".density svg").text_content()
    )
    assert page.locator(".found b").inner_text() == "288"
    assert column(page, "c-density span:last-child") == sorted(
        column(page, "c-density span:last-child"), reverse=True
    )


def test_only_what_is_seen_is_drawn_and_scrolling_reaches_the_end(page, address):
    go(page, address)
    assert page.locator(".rows .row").count() < 60
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_selector('.rows .row[aria-rowindex="288"]')
    assert page.locator(".rows .row").count() < 60


def test_sorting(page, address):
    go(page, address)
    for name, cell, first in (
        ("Density", "c-density span:last-child", "asc"),
        ("Max", "c-max", "desc"),
        ("Latent", "c-id", "asc"),
        ("Top share", "c-share", "desc"),
    ):
        header = page.get_by_role("columnheader", name=name)
        ends: list[float] = []
        for direction in (first, "asc" if first == "desc" else "desc"):
            header.get_by_role("button").click()
            settle(page)
            values = column(page, cell)
            assert values == sorted(values, reverse=direction == "desc"), name
            ends.append(values[0])
            assert header.get_attribute("aria-sort") == ("descending" if direction == "desc" else "ascending")
        assert "sort=" in page.url and ends[0] != ends[1]


def test_sorting_by_top_token_language_and_script(page, address):
    go(page, address, "#/?status=all")
    for by in ("token", "language", "script"):
        page.locator(".sorts select").select_option(by)
        settle(page)
        assert f"sort={by}" in page.url
        if by == "language":
            spoken = page.locator(".rows .row .c-lang").all_text_contents()
            assert spoken == sorted(spoken) and "–" not in spoken and len(spoken) > 5
            page.locator(".c-lang button").click()
            settle(page)
            assert "dir=desc" in page.url
            again = page.locator(".rows .row .c-lang").all_text_contents()
            assert again == sorted(again, reverse=True) and again[0] != spoken[0]
    tokens = page.evaluate(
        """async () => { const { source, text } = Sememe, tokens = new text.Tokens(await source.tokens());
        const model = new Sememe.Model(await source.index(), tokens);
        const { rows } = model.query({ ...Sememe.route.DEFAULTS, status: "all", sort: "token" });
        return rows.map((row) => Sememe.fields.WORDS.token.of(model, row).toLowerCase()); }"""
    )
    named = [token for token in tokens if token]
    in_order = sorted(named, key=lambda token: token.encode("utf-16-be"))  # as JavaScript compares
    assert named == in_order and len(set(named)) > 3 and tokens[: len(named)] == named


def test_more_examples_stay_after_a_reload(page, address):
    go(page, address, "#/latent/30")
    page.wait_for_selector(".latent[aria-busy=false]")
    before = page.locator("#top .example").count()
    page.locator("#top .more").click()
    settle(page)
    after = page.locator("#top .example").count()
    assert after > before and "open=top" in page.url
    page.reload()
    page.wait_for_selector(".latent[aria-busy=false]")
    assert page.locator("#top .example").count() == after


def test_sorting_by_label_is_alphabetical(page, address):
    go(page, address, "#/?sort=label&q=river&in=label")
    labels = [text.lower() for text in page.locator(".rows .row .names").all_inner_texts()]
    assert len(labels) > 1 and any("names of rivers" in label for label in labels)


def test_filters(page, address):
    go(page, address)
    page.locator('select[name="status"]').select_option("dead")
    settle(page)
    assert ids(page) == list(range(24, 300, 25)) and page.locator(".found b").inner_text() == "12"
    page.locator('select[name="status"]').select_option("all")
    settle(page)
    assert page.locator(".found b").inner_text() == "300"
    page.locator('select[name="lang"]').select_option("ja")
    settle(page)
    assert set(page.locator(".rows .row .c-lang").all_inner_texts()) == {"ja"}
    page.locator('input[name="min"]').fill("2")
    page.locator('input[name="max"]').fill("3")
    page.locator('input[name="max"]').press("Enter")
    settle(page)
    values = column(page, "c-density span:last-child")
    assert values and all(2 <= value <= 3 for value in values)
    assert "min=0.02" in page.url and "lang=ja" in page.url
    page.reload()
    page.wait_for_selector(".rows .row")
    assert column(page, "c-density span:last-child") == values
    go(page, address, "#/?lang=tlh")  # a language of nobody
    assert "No latent matches" in page.locator(".list .empty").inner_text()
    page.get_by_role("button", name="Clear").click()
    settle(page)
    assert page.locator(".found b").inner_text() == "288"


def test_a_bar_of_the_density_histogram_filters_the_list(page, address):
    go(page, address)
    bar = page.locator('.density .hit[role="button"]').nth(2)
    n = int(re.match(r"\d+", bar.get_attribute("aria-label"))[0])
    bar.click()
    settle(page)
    assert page.locator(".found b").inner_text() == str(n)
    bar.press("Enter")
    settle(page)
    assert page.locator(".found b").inner_text() == "288"


def test_search_by_token_label_and_number(page, address):
    go(page, address)
    page.keyboard.press("/")
    box = page.locator("#search")
    assert box.evaluate("(e) => e === document.activeElement")
    box.type("river")
    page.wait_for_selector(".where:has-text('promoted')")
    places = page.locator(".rows .row .where").all_inner_texts()
    assert all(places) and any("peak" in place for place in places)
    assert ids(page)[0] == 5 and "label" in places[0]  # its explanation says so
    own = ["top" in place or "label" in place for place in places]
    assert own == sorted(own, reverse=True) and sum(own) > 1
    n_any = int(page.locator(".found b").inner_text())
    page.locator('select[name="in"]').select_option("top")
    settle(page)
    token = VOCABULARY.index(b" river")
    assert all("river" in text for text in page.locator(".rows .row .names").all_inner_texts())
    assert int(page.locator(".found b").inner_text()) < n_any and token
    page.locator('select[name="in"]').select_option("any")
    box.fill("names of riv")
    settle(page)
    assert ids(page) == [5]
    box.fill("77")
    settle(page)
    assert ids(page)[0] == 77
    box.fill("no such thing anywhere")
    settle(page)
    assert "No latent matches" in page.locator(".list .empty").inner_text()


def test_the_list_opens_a_latent_and_remembers_where_it_was(page, address):
    go(page, address, "#/?sort=id")
    page.evaluate("window.scrollTo(0, 4000)")
    page.wait_for_selector('.rows .row[aria-rowindex="90"]')
    before = page.evaluate("window.scrollY")
    page.locator('.rows .row[aria-rowindex="90"]').click()
    page.wait_for_selector(".example")
    assert "#/latent/" in page.url and "sort=id" in page.url
    page.go_back()
    page.wait_for_selector('.rows .row[aria-rowindex="90"]')
    settle(page)
    assert abs(page.evaluate("window.scrollY") - before) < 50


def test_a_latent_s_page_shows_what_is_known(page, address):
    go(page, address, "#/latent/30")
    assert page.title().startswith("Latent 30")
    heading = page.locator("h1").inner_text()
    assert "Latent 30" in heading and r"\u202Etricks\u200B of letters" in heading
    assert page.locator(".charts section").first.locator(".bar").count() == 20
    assert page.locator(".logits").count() == 2 and page.locator(
        ".logits.negative .value"
    ).first.inner_text().startswith("−")
    assert page.locator("#top .example").count() == 10
    page.get_by_role("button", name=re.compile("Show 2 more")).click()
    assert page.locator("#top .example").count() == 12
    assert page.locator(".deciles .examples").count() == 10 and page.locator("#random .example").count() == 4
    acts = [float(text) for text in page.locator("#top .act").all_inner_texts()]
    assert acts == sorted(acts, reverse=True)
    assert page.locator("#random .tok.on").count() == 0
    kept = page.locator(".facts .history rect")
    assert kept.count() == 4 and page.locator(".facts .history rect.under").count() == 1
    heights = [float(kept.nth(i).get_attribute("height")) for i in range(1, 4)]
    assert heights == sorted(heights) and kept.nth(3).locator("title").inner_html().startswith("step 1,000: ")
    strongest = page.locator("#top .example").first.locator(".tok.peak")
    assert float(strongest.evaluate("(e) => e.style.getPropertyValue('--a')")) == pytest.approx(1)
    colour = strongest.evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert colour not in ("rgba(0, 0, 0, 0)", "transparent")


def test_arrow_keys_step_through_the_list_s_order(page, address):
    go(page, address, "#/?sort=max")
    order = ids(page)[:4]
    page.locator(".rows .row").first.click()
    for key, expected in (
        ("ArrowRight", order[1]),
        ("ArrowRight", order[2]),
        ("j", order[3]),
        ("k", order[2]),
        ("ArrowLeft", order[1]),
    ):
        page.wait_for_selector(".latent:not(.stale) .example")
        page.keyboard.press(key)
        page.wait_for_function(
            "(id) => document.querySelector('.latent:not(.stale) .number')?.textContent === 'Latent ' + id",
            arg=expected,
        )
    assert page.locator(".rail-row.current .c-id").inner_text() == str(order[1])
    page.keyboard.press("Escape")
    page.wait_for_selector(".list .rows .row")
    assert "sort=max" in page.url


def test_arrow_keys_in_a_search_box_stay_there(page, address):
    go(page, address, "#/latent/30")
    page.locator("#search").fill("riv")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert "#/latent/30" in page.url and "q=riv" in page.url


def test_hovering_a_token_tells_its_activation(page, address):
    go(page, address, "#/latent/30")
    example = page.locator("#top .example").first
    example.locator(".tok.peak").hover()
    tip = page.get_by_role("tooltip")
    text = tip.inner_text()
    assert "activation" in text and "100%" in text and re.search(r"position\s*\d+ of 48", text)
    example.locator(".tok:not(.on)").first.hover()
    assert re.search(r"activation\s*0\b", tip.inner_text())
    page.mouse.move(5, 5)
    page.wait_for_selector(".tip", state="detached")


def test_an_example_expands_to_its_whole_context(page, address):
    go(page, address, "#/latent/30")
    example = page.locator("#top .example").first
    few = example.locator(".tok").count()
    example.get_by_role("button").click()
    settle(page)
    assert example.locator(".tok").count() > 40 > few and example.locator(".tok.outside").count() > 0
    assert example.locator(".seam").count() == 1 and "open=0" in page.url
    example.locator(".tok.outside").first.hover()
    assert "not recorded" in page.get_by_role("tooltip").inner_text()
    page.reload()
    page.wait_for_selector(".example.open")
    page.locator("#top .example").first.get_by_role("button").click()
    settle(page)
    assert example.locator(".tok").count() == few and "open=" not in page.url


SHOWN_AS = {
    b"<script>alert(1)</script>": "<script>alert(1)</script>",
    "\u202eesrever".encode(): r"\u202Eesrever",
    "zero\u200bwidth".encode(): r"zero\u200Bwidth",
    b"nul\x00byte": r"nul\x00byte",
    b"\x07": r"\x07",
    b"\n\n": "↵↵",
    b"\t": "⇥",
    b"    ": "····",
    b"\xff": r"\xFF",
    "\ufe0f".encode(): r"\uFE0F",
    "\u0301".encode(): "◌\u0301",
    b"a" * 10_000: "a… (10,000 characters)",
}


def test_text_is_data(page, address):
    """Latent n fires on the n-th nasty token: its page shows the token and the page stays whole."""
    for latent, raw in enumerate(NASTY):
        go(page, address, f"#/latent/{latent}")
        page.wait_for_function(
            "(id) => document.querySelector('.latent:not(.stale) .number')?.textContent === 'Latent ' + id",
            arg=latent,
        )
        page.wait_for_selector(".latent:not(.stale) .facts")
        assert (
            page.evaluate(
                "document.querySelectorAll('article script, article img, article b, article td td').length"
            )
            == 0
        )
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        shown = page.locator("article").inner_text()
        for hidden in "\u202e\u200b\x00\x07\u2028\ufeff\u200d":
            assert hidden not in shown
        assert SHOWN_AS.get(raw, "") in shown


def test_letters_cut_into_several_tokens_are_joined(page, address):
    go(page, address, f"#/latent/{NASTY.index(bytes([0xE6, 0x97]))}")
    joined = page.locator(".tok:has-text('日') + .tok.continues")
    assert joined.count() > 0
    # Without fonts for the letter the gap is thinner than a pointer finds.
    joined.first.dispatch_event("pointerover", {"pointerType": "mouse", "bubbles": True})
    assert r"\xA5" in page.get_by_role("tooltip").inner_text()
    page.locator(".tok:has-text('日')").first.hover()
    assert r"\xE6\x97旀–旿" in re.sub(r"\s", "", page.get_by_role("tooltip").inner_text())


def test_a_dead_latent_and_one_that_is_not_there(page, address):
    go(page, address, "#/latent/24")
    assert (
        "never active" in page.locator("article").inner_text() and "dead" in page.locator("h1").inner_text()
    )
    go(page, address, "#/latent/5000")
    assert "no latent 5000" in page.locator(".problem").inner_text()


def test_promoted_tokens_lead_to_a_search(page, address):
    go(page, address, "#/latent/30")
    page.locator(".logits:not(.negative) li a").nth(1).click()
    page.wait_for_selector(".rows .row .where:has-text('promoted')")
    assert 30 in ids(page) or int(page.locator(".found b").inner_text()) > 20


def test_about_names_the_sources_and_links_only_to_the_web(page, address):
    go(page, address)
    page.get_by_role("link", name="Sources and licences").click()
    page.wait_for_selector(".about")
    text = page.locator(".sources").inner_text()
    assert "CC BY-SA 4.0" in text and "Text by its <authors>." in text
    assert page.locator(".sources a").evaluate_all("(links) => links.map((a) => a.href)") == [
        "https://example.org/wiki"
    ]


def test_dark_mode_follows_the_system(page, address):
    shades = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        go(page, address, "#/latent/30")
        shades[scheme] = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        )
    assert shades["light"] > 240 and shades["dark"] < 40


def test_a_phone_s_width_is_enough(page, address):
    page.set_viewport_size({"width": 360, "height": 740})
    for hash in ("#/", "#/latent/30", "#/latent/20?open=0,1,2", "#/about"):
        go(page, address, hash)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 360, hash


def test_the_keyboard_alone_is_enough(page, address):
    go(page, address, "#/?sort=id")
    page.locator(".rows .row a").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.wait_for_selector(".latent:not(.stale) .example")
    assert "#/latent/1?" in page.url
    page.locator("#top .example button").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".example.open")


def test_nothing_moves_after_the_first_paint(page, address):
    page.add_init_script(
        """window.moved = 0;
        const add = (list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.moved += e.value; });
        new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });"""
    )
    go(page, address, "#/latent/30")
    page.wait_for_timeout(300)
    assert page.evaluate("window.moved") < 0.02


def test_a_site_with_a_missing_shard_says_so(browser, inputs, tmp_path):
    site = export(ExportConfig(**inputs, out=tmp_path / "site"))
    (site.path / "data" / "latents" / "00000.js").unlink()
    page = browser.new_page()
    page.goto((site.path / "index.html").as_uri() + "#/latent/3")
    message = page.locator(".problem").inner_text()
    assert "data/latents/00000.js could not be loaded" in message and "export the site again" in message
    page.close()


def test_a_server_that_has_gone_says_so(browser, inputs):
    page = browser.new_page()
    with page_in_browser.served(inputs) as address:
        page.goto(address)
        page.wait_for_selector(".rows .row")
    page.locator(".rows .row").first.click()
    assert "server does not answer" in page.locator(".problem").inner_text()
    page.close()


def test_the_browser_refuses_scripts_that_are_not_the_page_s_own(browser, address):
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    go(page, address)
    page.evaluate(
        """() => { const s = document.createElement("script");
        s.textContent = "window.ran = 1"; document.body.append(s);
        const i = new Image(); i.src = "https://example.org/x.png"; document.body.append(i); }"""
    )
    settle(page)
    assert page.evaluate("window.ran") is None
    assert len(refused) >= 2 and all("Content Security Policy" in text for text in refused)
    page.close()


def test_the_static_site_needs_no_network(browser, static):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(static)
    page.wait_for_selector(".rows .row")
    page.locator(".rows .row").first.click()
    page.wait_for_selector(".example")
    context.close()
