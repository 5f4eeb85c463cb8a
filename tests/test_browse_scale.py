"""The browser at 100,000 latents: served and exported, in a real browser. Slow; `make bench-browse` measures it."""

from __future__ import annotations

import pytest
from page_in_browser import a_browser, go, ids, served, watched
from synthetic_atlas import SyntheticConfig, build, scale

from sememe.browse import ExportConfig, export

pytestmark = [pytest.mark.slow, pytest.mark.browser]

BASE, TIMES = 500, 200
LAST = BASE * TIMES - 1


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    path = build(tmp_path_factory.mktemp("scale") / "atlas", SyntheticConfig(n_latents=BASE)).path
    scale(path, TIMES)
    return path


@pytest.mark.parametrize("how", ["served", "exported"])
def test_list_search_and_latent_of_a_hundred_thousand(atlas, tmp_path, how):
    def look(address: str) -> None:
        with a_browser() as browser, watched(browser, address) as page:
            go(page, address)
            assert page.evaluate("document.body.scrollHeight") > 1_000_000, "all of them"
            assert len(ids(page)) < 200, "only those in view are drawn"
            go(page, address, "#/?status=all&sort=id&dir=desc")
            assert ids(page)[0] == LAST
            go(page, address, f"#/?status=all&q={LAST}")
            assert LAST in ids(page)
            go(page, address, f"#/latent/{LAST}")
            page.wait_for_selector("h1")
            assert str(LAST) in page.locator("main").inner_text()

    if how == "served":
        with served({"atlas": atlas}) as address:
            look(address)
    else:
        site = export(ExportConfig(atlas=atlas, out=tmp_path / "site"))
        shards = len(list((site.path / "data" / "latents").glob("*.js")))
        assert shards == -(-BASE * TIMES // ExportConfig().latents_per_shard)
        look((site.path / "index.html").as_uri())
