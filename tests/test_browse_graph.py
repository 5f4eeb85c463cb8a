"""The page of a graph in a real browser, served and from disk; and what the server says of graphs."""

from __future__ import annotations

import json
import time

import pytest
from page_in_browser import a_browser, exported, served, settle, violations, watched
from served_atlases import client_of
from synthetic_atlas import DICTIONARY, SyntheticConfig, build
from synthetic_graph import LABEL, synthetic_graph, write_synthetic_graph

from sememe.browse import BrowseConfig
from sememe.graph import from_json, to_json

SMALL = SyntheticConfig(n_latents=40, n_contexts=30)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("graphs")
    build(root / "atlas", SMALL)
    small = write_synthetic_graph(root / "small.json", fingerprint=DICTIONARY)
    large = write_synthetic_graph(
        root / "large.json", n_latents=2000, n_edges=20_000, n_layers=20, n_tokens=24, seed=1
    )
    return {"atlas": root / "atlas", "graph": (small, large)}


def test_the_server_says_what_graphs_there_are_and_gives_each(inputs):
    with client_of(BrowseConfig(**inputs)) as client:
        about = client.get("/api/overview").json()["graphs"]
        assert [(one["name"], one["n_edges"]) for one in about] == [("small", 240), ("large", 20_000)]
        found = client.get("/api/graphs/0").json()
        assert found["nodes"]["label"][8] == LABEL and len(found["edges"]["weight"]) == 240
        refused = client.get("/api/graphs/2")
        assert refused.status_code == 404 and "or name more with --graph" in refused.json()["error"]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "must hold a graph, got nothing there"), ("{}", "must be a graph")]
)
def test_what_is_no_graph_is_said_on_the_page(inputs, tmp_path, text, message):
    """As with everything else that is shown beside an atlas."""
    if text is not None:
        (tmp_path / "graph.json").write_text(text)
    with client_of(BrowseConfig(atlas=inputs["atlas"], graph=(tmp_path / "graph.json",))) as client:
        answer = client.get("/api/overview")
        assert answer.status_code == 500 and message in answer.json()["error"]


# ---- in a browser --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def over_http(inputs):
    with served(inputs) as address:
        yield address


@pytest.fixture(scope="module")
def from_disk(inputs, tmp_path_factory):
    return exported(inputs, tmp_path_factory.mktemp("a folder") / "site #1")


def opened(page, address: str, hash: str = "#/graph/0") -> None:
    page.goto(address + hash)
    page.wait_for_selector(".graph-box canvas, .problem")
    settle(page)


def query_of(page) -> str:
    return page.evaluate("decodeURIComponent(location.hash)")


@pytest.mark.browser
@pytest.mark.parametrize(("where", "scheme"), [("over_http", "light"), ("from_disk", "dark")])
def test_nodes_are_pinned_grouped_followed_and_linked(browser, where, scheme, request):
    address = request.getfixturevalue(where)
    with watched(browser, address, color_scheme=scheme, accept_downloads=True) as page:
        page.add_init_script(
            "window.shift = 0; new PerformanceObserver((l) => l.getEntries().forEach((e) => { if (!e.hadRecentInput)"
            " window.shift += e.value; })).observe({ type: 'layout-shift', buffered: true })"
        )
        opened(page, address)
        assert page.locator("nav.tools a[aria-current]").text_content() == "Graph"
        rows = page.locator(".graph-table tbody tr")
        assert rows.count() == 50 and "0.61" in page.locator(".graph-scores").text_content()
        assert page.evaluate("window.shift") < 0.02
        # The keyboard reaches a node, says what it is, and pins it.
        page.locator("canvas[tabindex]").focus()
        page.keyboard.press("ArrowUp")
        settle(page)
        said = page.locator("[role=status]").text_content()
        assert ", effect " in said
        page.keyboard.press("Enter")
        settle(page)
        assert "pin=" in query_of(page) and page.get_by_role("button", name="Unpin", exact=True).count()
        # Two latents from the table, ticked and named.
        for _ in range(2):
            page.locator(".graph-table [aria-label^='pin latent']").first.click()
            settle(page)
        for box in page.locator(".pins input").all()[-2:]:
            box.check()
        page.locator(".group-name").fill("<b>kings</b>")
        page.get_by_role("button", name="Group the 2 ticked").click()
        settle(page)
        assert page.locator(".pins .group b").text_content() == "<b>kings</b>"
        assert page.locator(".subgraph .box.grouped").count() == 1
        assert violations(page) == []
        # What leads to a node, and back.
        n_before = rows.count()
        page.get_by_role("button", name="What leads here").click()
        settle(page)
        assert "of=" in query_of(page)
        assert 0 < rows.count() <= n_before
        page.get_by_role("button", name="Show the whole graph again").click()
        settle(page)
        # The label is a text, and leads to the latent's page in the atlas of its dictionary.
        link = page.locator(".graph-table a", has_text="latent 0:")
        assert LABEL in link.text_content()
        assert link.get_attribute("href").endswith("#/latent/0")


@pytest.mark.browser
def test_what_is_kept_as_a_file_is_the_graph(browser, over_http):
    with watched(browser, over_http, accept_downloads=True) as page:
        opened(page, over_http)
        with page.expect_download() as kept:
            page.get_by_role("button", name="JSON", exact=True).click()
        data = json.loads(kept.value.path().read_text())
        found, whole = from_json(data), synthetic_graph(fingerprint=DICTIONARY)
        assert [node.id for node in found.nodes] == [node.id for node in whole.nodes]
        assert found.edges[5].weight == pytest.approx(whole.edges[5].weight, rel=1e-4)
        assert to_json(found) == data
        with page.expect_download() as kept:
            page.get_by_role("button", name="SVG", exact=True).click()
        drawn = kept.value.path().read_text()
        assert drawn.startswith("<svg") and "&lt;img src=x" in drawn and "<img" not in drawn
        assert drawn.count("<path") + drawn.count("<circle") + drawn.count("<rect") >= 240 + 60


@pytest.mark.browser
def test_the_pointer_finds_nodes_and_sliders_show_fewer(browser, over_http):
    with watched(browser, over_http) as page:
        opened(page, over_http)
        box = page.locator("canvas[tabindex]").bounding_box()
        places = [(x, y) for y in (75, 87, 99, 111) for x in range(66, int(box["width"]), 9)]
        for x, y in places:  # somewhere along the lowest row lies a token
            page.mouse.move(box["x"] + x, box["y"] + box["height"] - y)
            if page.locator(".graph-tip").count():
                break
        assert "token" in page.locator(".graph-tip").text_content()
        page.mouse.down()
        page.mouse.up()
        settle(page)
        assert "pin=-1:token@" in query_of(page)
        page.locator(".graph-slider input").first.fill("5")
        page.wait_for_timeout(350)
        assert "n=5" in query_of(page)
        assert page.locator(".graph-table tbody tr").count() == 5 + 8 + 2, (
            "latents and errors, tokens, logits"
        )


@pytest.mark.browser
def test_two_thousand_nodes_and_twenty_thousand_edges(browser, over_http):
    """All drawn at once; a frame that follows the pointer costs little. Bounds are loose: machines differ."""
    with watched(browser, over_http) as page:
        start = time.monotonic()
        opened(page, over_http, "#/graph/1?n=2100&e=20000")
        assert time.monotonic() - start < 15
        assert "20,000" in page.locator(".graph-slider output").nth(1).text_content()
        box = page.locator("canvas[tabindex]").bounding_box()
        page.mouse.move(box["x"] + 200, box["y"] + 200)
        start = time.monotonic()
        for step in range(20):
            page.mouse.move(box["x"] + 200 + step * 12, box["y"] + 200 + step * 5)
            settle(page)
        assert (time.monotonic() - start) / 20 < 0.5


@pytest.mark.browser
def test_a_graph_that_is_not_there_is_named(browser, over_http):
    with watched(browser, over_http) as page:
        opened(page, over_http, "#/graph/7")
        assert "There is no graph 7. Graphs are numbered 0 to 1." in page.locator(".problem").text_content()
