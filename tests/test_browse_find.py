"""Finding latents on the page: the map, filters and sorting by any figure, search, chosen texts; served and static."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pytest
from page_in_browser import a_browser, exported, go, ids, served, settle, violations, wait_until, watched
from synthetic_atlas import SyntheticConfig, build, build_all, build_prompts, build_report

from sememe.browse import ExportConfig, export
from sememe.browse.inputs import Inputs, opened
from sememe.errors import ArtifactError, CorruptError, MismatchError

pytestmark = pytest.mark.browser

EXPLANATIONS = {5: "names of </script><b>great rivers</b>", 30: "\u202etricks\u200b of letters"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("find")
    found = build_all(folder, SyntheticConfig(), EXPLANATIONS)
    build_report(folder / "sweep" / "k16", "another" * 8, fvu=0.3, l0=16.0)
    build_report(folder / "sweep" / "k32 <b>")
    return found | {"report": folder / "sweep"}


@pytest.fixture(scope="module")
def data(inputs):
    with opened(Inputs(**inputs)) as (data, _):
        yield data


@pytest.fixture(scope="module")
def open_at(inputs, tmp_path_factory):
    """A browser, and the page's address served and from disk."""
    with ExitStack() as stack:
        browser = stack.enter_context(a_browser())
        site = exported(inputs, tmp_path_factory.mktemp("sites") / "site")
        yield browser, {"served": stack.enter_context(served(inputs)), "static": site}


@pytest.fixture(params=["served", pytest.param("static", marks=pytest.mark.slow)])
def address(request, open_at):
    return open_at[1][request.param]


@pytest.fixture
def page(open_at, address):
    with watched(open_at[0], address) as page:
        yield page


def ready(page) -> None:
    """The map's figures have come and been drawn."""
    page.wait_for_selector(".map-legend")
    settle(page)


def n_found(page) -> int:
    return int(page.locator(".toolbar .found b").inner_text().replace(",", ""))


def on_screen(page, data, row: int) -> tuple[float, float]:
    """Where the whole map shows a latent."""
    box = page.locator(".map canvas").bounding_box()
    details = data.details()
    scale = min(box["width"], box["height"]) * 0.94 / 9999
    return (
        box["x"] + (details["x"][row] - 9999 / 2) * scale + box["width"] / 2,
        box["y"] + (details["y"][row] - 9999 / 2) * scale + box["height"] / 2,
    )


def test_the_landing_page_shows_report_frontier_scores_and_map(page, address):
    go(page, address)
    ready(page)
    own, other = page.locator(".frontier circle.own"), page.locator(".frontier circle.other")
    assert own.count() == other.count() == 1
    assert "k32 <b>" in own.inner_html() or "k32 &lt;b&gt;" in own.inner_html()
    scores = page.locator(".scores")
    assert scores.locator("thead th").all_inner_texts()[2:] == ["random directions", "<b>evil</b>", "lift"]
    assert scores.locator("tbody td").all_inner_texts() == ["0.5", "0.2", "0.1", "0.3"]
    painted = page.locator(".map canvas").evaluate(
        "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length"
    )
    assert painted > 500


def test_hovering_names_a_latent_and_a_click_opens_it(page, address, data):
    go(page, address)
    ready(page)
    x, y = on_screen(page, data, 5)
    page.mouse.move(x, y)
    tip = page.locator(".map-tip")
    assert tip.locator(".c-id").inner_text() == "5" and "great rivers</b>" in tip.inner_text()
    page.mouse.click(x, y)
    page.wait_for_selector(".latent:not(.stale) .example")
    assert "#/latent/5" in page.url


def test_zoom_and_pan_are_in_the_address(page, address):
    go(page, address)
    ready(page)
    page.get_by_role("button", name="Zoom in").click()
    # The page's own address: Playwright hears of changes a little later.
    wait_until(page, "location.hash.includes('view=')")
    zoomed = page.evaluate("location.hash")
    box = page.locator(".map canvas").bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 130, box["y"] + 60, steps=3)
    page.mouse.up()
    wait_until(page, f"location.hash !== '{zoomed}'")
    panned = page.evaluate("location.hash")
    assert "view=" in panned and "#/latent" not in panned
    page.locator(".map canvas").focus()
    page.mouse.wheel(0, -400)
    wait_until(page, r"Number(/view=\d+_\d+_([\d.]+)/.exec(location.hash)[1]) > 1.7")
    page.get_by_role("button", name="Whole map").click()
    wait_until(page, "!location.hash.includes('view=')")


def test_a_lasso_filters_the_list(page, address, data):
    details = data.details()
    go(page, address)
    ready(page)
    page.get_by_role("button", name="Lasso").click()
    box = page.locator(".map canvas").bounding_box()
    left, top, right, bottom = (
        box["x"] + 4,
        box["y"] + 4,
        box["x"] + box["width"] / 2,
        box["y"] + box["height"] - 4,
    )
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=4)
    page.mouse.up()
    settle(page)
    middle = 9999 / 2
    expected = {row for row, x in enumerate(details["x"]) if x is not None and x < middle - 60}
    maybe = {row for row, x in enumerate(details["x"]) if x is not None and abs(x - middle) <= 60}
    assert len(expected) <= n_found(page) <= len(expected | maybe)
    assert "lasso=" in page.url and set(ids(page)) <= expected | maybe
    again = page.url
    page.reload()
    ready(page)
    assert page.url == again and len(expected) <= n_found(page) < 288
    page.get_by_role("button", name="inside the lasso").click()
    settle(page)
    assert n_found(page) == 288 and "lasso" not in page.url


def test_the_map_by_keyboard(page, address):
    go(page, address)
    ready(page)
    canvas = page.locator(".map canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = page.locator(".map-tip .c-id").inner_text()
    page.keyboard.press("ArrowRight")
    second = page.locator(".map-tip .c-id").inner_text()
    page.keyboard.press("ArrowLeft")
    assert first != second
    page.keyboard.press("+")
    wait_until(page, "location.hash.includes('view=')")
    page.keyboard.press("0")
    wait_until(page, "!location.hash.includes('view=')")
    page.keyboard.press("ArrowDown")
    shown = page.locator(".map-tip .c-id").inner_text()
    assert f"Latent {shown}," in page.locator(".map [role=status]").last.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_selector(".latent .example")
    assert f"#/latent/{shown}" in page.url


def test_the_map_is_coloured_by_score_and_cluster(page, address):
    go(page, address)
    ready(page)
    read = "(c) => c.toDataURL()"
    seen = {page.locator(".map canvas").evaluate(read)}
    for name in ("score", "cluster"):
        page.locator('select[name="color"]').select_option(name)
        settle(page)
        assert f"color={name}" in page.url
        seen.add(page.locator(".map canvas").evaluate(read))
    assert len(seen) == 3
    assert "hues repeat" in page.locator(".map-legend").inner_text()


def test_any_figure_sorts_the_list(page, address, data):
    details, rows = data.details(), data.index()
    alive = [row for row, n in enumerate(rows["n_active"]) if n]
    go(page, address)
    for name, values in (
        ("mcs", details["mcs"]),
        ("kurtosis", details["kurtosis"]),
        ("l0", rows["density"]),
        ("neuron", details["top_neuron_share"]),
    ):
        page.locator('select[name="sort"]').select_option(name)
        page.wait_for_function(
            "(id) => document.querySelector('.rows .row .c-id')?.textContent === id",
            arg=str(max(alive, key=lambda row: (values[row], -row))),
        )
        assert f"sort={name}" in page.url
        assert page.locator(".rows .row .c-max").first.inner_text() not in ("", "–")
    page.get_by_role("button", name="high to low").click()
    settle(page)
    assert ids(page)[0] == min(alive, key=lambda row: (details["top_neuron_share"][row], row))


def test_latents_without_the_figure_come_last(page, address):
    go(page, address, "#/?sort=score")
    page.wait_for_function("() => document.querySelector('.rows .row .c-id')?.textContent === '30'")
    assert ids(page)[:2] == [30, 5]
    go(page, address, "#/?sort=score&dir=asc")
    page.wait_for_function("() => document.querySelector('.rows .row .c-id')?.textContent === '5'")
    assert ids(page)[:2] == [5, 30]


def test_filters_by_group_script_figure_and_kind(page, address, data):
    details = data.details()
    go(page, address)
    page.get_by_role("button", name="More filters").click()
    page.locator('select[name="cluster"]').select_option("2")
    settle(page)
    wanted = [row for row, c in enumerate(details["cluster"]) if c == 2]
    assert sorted(ids(page)) == wanted[: len(ids(page))] or set(ids(page)) <= set(wanted)
    assert n_found(page) == len(wanted) and "cluster=2" in page.url
    page.locator('select[name="cluster"]').select_option("")
    page.locator('select[name="figure"]').select_option("max_cos")
    page.locator('input[name="low"]').fill("0.5")
    page.get_by_role("button", name="Add").click()
    settle(page)
    alive = [row for row, n in enumerate(data.index()["n_active"]) if n]
    near = [row for row in alive if details["max_cos"][row] >= 0.5]
    assert n_found(page) == len(near) and "f=max_cos" in page.url
    page.reload()
    ready(page)
    assert n_found(page) == len(near)
    page.get_by_role("button", name=re.compile("nearest cosine ≥ 0.5")).click()
    settle(page)
    assert n_found(page) == len(alive)
    page.locator('select[name="status"]').select_option("neuron")
    settle(page)
    assert n_found(page) == sum(1 for row in alive if details["top_neuron_share"][row] > 0.5)
    page.locator('select[name="status"]').select_option("rare")
    settle(page)
    assert n_found(page) == 0
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="More filters").click()
    page.locator('select[name="script"]').select_option("Hebrew")
    settle(page)
    assert n_found(page) >= 1 and all(
        "ש" in text for text in page.locator(".rows .row .names").all_inner_texts()
    )


def test_search_finds_words_of_an_explanation_in_any_order(page, address):
    go(page, address)
    page.locator("#search").fill("rivers names")
    settle(page)
    assert ids(page) == [5]


def test_labels_are_searched_by_meaning_where_a_model_answers(open_at, inputs):
    """The question's vector is the second label's: it comes first, and the other has nothing of it."""
    browser, addresses = open_at
    with watched(browser, addresses["served"]) as page:
        asked = []

        def answer(route):
            asked.append(route.request.post_data_json)
            route.fulfill(json={"vector": [0, 1, 0, 0], "encoder": "fake", "fingerprint": "0"})

        def lively(route):
            route.fulfill(json=route.fetch().json() | {"live": True})

        page.route("**/api/session", lively)
        page.route("**/api/live/embed", answer)
        go(page, addresses["served"])
        page.locator('select[name="in"]').select_option("meaning")
        page.locator("#search").type("letters with <b>tricks</b>")
        page.wait_for_function("() => document.querySelector('.toolbar .found b').textContent === '1'")
        assert ids(page) == [30] and asked[-1] == {"text": "letters with <b>tricks</b>"}
        assert len(asked) < 5  # not at every letter
        assert "in=meaning" in page.url
    with watched(browser, addresses["static"]) as page:
        go(page, addresses["static"], "#/?q=water&in=meaning")
        assert "sememe explain --scorers embedding" in page.locator(".list .problem").inner_text()


def test_nonsense_in_the_address_is_harmless(page, address):
    go(
        page,
        address,
        "#/?f=evil:1:2,score:x:y,mcs:0.1&lasso=1_2,a_b&view=__&color=%3Cb%3E&sort=evil&script=evil&cluster=x",
    )
    assert "No latent matches" in page.locator(".list .empty").inner_text()
    page.get_by_role("button", name="Show all latents").click()
    settle(page)
    assert n_found(page) == 300


def test_a_chosen_text_shows_which_latents_fire(page, address):
    go(page, address)
    assert page.locator(".texts li").count() == 2
    page.locator(".texts a").first.click()
    page.wait_for_selector(".chosen-text")
    tokens = page.locator(".chosen-text .tok")
    assert tokens.all_inner_texts() == [
        " river",
        "<script>alert(1)</script>",
        " bread",
        "\\u202Eesrever",
        "unseen </td>",
    ]
    # By the latent nearest to its own maximum: not alike where as many fire on every token.
    shades = [float(tokens.nth(i).evaluate("(e) => e.style.getPropertyValue('--a')")) for i in range(5)]
    assert len(set(shades)) >= 3 and max(shades) <= 1
    tokens.nth(2).click()
    page.wait_for_selector(".at-token h2:has-text('bread')")
    assert "16 fire" in page.locator(".at-token h2").inner_text() and "at=2" in page.url
    row = page.locator(".at-token tbody tr").first
    assert row.locator("td").all_inner_texts()[2:5] == ["8", "90%", "+0.125"]
    assert "<i>up</i>" in row.inner_text()
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".at-token h2:has-text('24 fire')")
    shade = page.get_by_role("button", name="Shade the text by latent 25")
    shade.first.click()
    page.wait_for_selector(".chosen > p:has-text('shaded by latent 25')")
    assert "mark=25" in page.url
    assert [tokens.nth(i).evaluate("(e) => e.classList.contains('on')") for i in range(5)] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert "unseen </td>" in tokens.last.inner_text()
    page.get_by_role("link", name="Next text").click()
    page.wait_for_selector("h1:has-text('Text 2')")
    page.locator(".in-text td a").first.click()
    page.wait_for_selector(".latent")
    go(page, address, "#/text/99")
    assert "There is no text 99" in page.locator(".problem").inner_text()


def test_a_text_shows_how_strongly_a_latent_fires_below_zero(open_at, tmp_path):
    """PCA, AbsTopK: the largest is that of the largest size, with its sign."""
    path = build(tmp_path / "atlas", SyntheticConfig(n_latents=80, n_contexts=60)).path
    texts = build_prompts(tmp_path / "texts")
    for file in texts.glob("*.json"):
        view = json.loads(file.read_text())
        for row in view["rows"]:
            row["act"] *= -1 if row["latent"] % 2 else 1
        file.write_text(json.dumps(view))
    with served({"atlas": path, "prompts": (texts,)}) as address, watched(open_at[0], address) as page:
        go(page, address, "#/text/0")
        rows = page.locator(".in-text tbody tr").all()
        cells = [row.locator("td").all_inner_texts() for row in rows]
        largest = {int(cell[0]): cell[3].replace("−", "-") for cell in cells}
        assert largest[8] == "8" and largest[17] == "-7.8" and largest[25] == "-7.8"
        assert [int(cell[0]) for cell in cells[:4]] == [24, 32, 25, 33], (
            "the strongest first, whatever their sign"
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_s_width_is_enough(open_at, scheme):
    address = open_at[1]["static"]
    for width in (1280, 360):
        with watched(
            open_at[0], address, viewport={"width": width, "height": 800}, color_scheme=scheme
        ) as page:
            for hash in ("#/?f=max_cos:0.1:&color=cluster", "#/text/0?at=2&mark=20"):
                go(page, address, hash)
                page.wait_for_selector(".map-legend, .chosen-text")
                settle(page)
                assert violations(page, scheme) == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width, hash


def test_the_landing_page_does_not_shift(open_at, address):
    with watched(open_at[0], address) as page:
        page.add_init_script(
            """window.moved = 0;
            const add = (list) => list.getEntries().forEach((e) => { if (!e.hadRecentInput) window.moved += e.value; });
            new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });"""
        )
        go(page, address)
        ready(page)
        page.wait_for_timeout(200)
        assert page.evaluate("window.moved") < 0.02


# ---- the files behind it


def test_a_folder_of_reports_must_hold_the_dictionary_s(inputs, tmp_path):
    build_report(tmp_path / "reports" / "one", "stranger" * 8)
    with (
        pytest.raises(MismatchError, match="must be of the atlas's dictionary"),
        opened(Inputs(atlas=inputs["atlas"], report=tmp_path / "reports")),
    ):
        pass
    (tmp_path / "none").mkdir()
    with (
        pytest.raises(ArtifactError, match=r"must be a report, or hold reports, got .*holds none"),
        opened(Inputs(atlas=inputs["atlas"], report=tmp_path / "none")),
    ):
        pass


def test_prompts_that_are_not_views_of_prompts_are_refused(inputs, tmp_path):
    def read(*paths):
        with opened(Inputs(atlas=inputs["atlas"], prompts=paths)) as (data, _):
            return data.texts

    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"prompts must be \.json files .* a folder without any"):
        read(tmp_path / "empty")
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    with pytest.raises(CorruptError, match="must be a view of a prompt, got KeyError"):
        read(tmp_path / "a.json")
    small = build(tmp_path / "small", SyntheticConfig(n_latents=20))
    with (
        pytest.raises(CorruptError, match="must be of the atlas's dictionary, got latent 20"),
        opened(Inputs(atlas=small.path, prompts=inputs["prompts"])),
    ):
        pass
    assert len(read(inputs["prompts"][0] / "0.json")) == 1


def test_a_missing_map_says_so_and_the_list_is_there(open_at, inputs, tmp_path):
    address = exported(inputs, tmp_path / "site")
    (tmp_path / "site" / "data" / "details.js").unlink()
    page = open_at[0].new_page()
    page.goto(address + "#/?sort=score")
    assert "data/details.js could not be loaded" in page.locator(".map .problem").inner_text()
    assert len(ids(page)) > 8
    page.close()


def test_a_site_of_other_texts_is_another_site(inputs, tmp_path):
    site = export(ExportConfig(**inputs, out=tmp_path / "site"))
    assert (site.path / "data" / "texts" / "00001.js").is_file()
    with pytest.raises(MismatchError, match="site"):
        export(ExportConfig(**inputs | {"prompts": ()}, out=tmp_path / "site"))
