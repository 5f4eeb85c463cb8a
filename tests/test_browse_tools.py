"""The pages Notes, Rate, Compare and Try in a real browser, served and from disk, as a person would use them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from live_world import child_of, make_live_world
from page_in_browser import a_browser, answering, settle, violations, wait_until, watched
from synthetic_atlas import SyntheticConfig, build

from sememe.atlas import open_atlas
from sememe.browse import ExportConfig, export
from sememe.browse.guard import Door
from sememe.browse.notes import notes_path
from sememe.browse.server import application
from sememe.browse.serving import BrowseConfig, served

pytestmark = pytest.mark.browser

CONFIG = SyntheticConfig()
HOSTILE = "<img src=x onerror=alert(1)> \u202eevil\u200b ${1+1} </script>"


@contextlib.contextmanager
def serving(config: BrowseConfig, live=None):
    """The address of a server."""
    with served(config) as atlases, answering(application(atlases, live=live, door=Door())) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def atlases(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    build(root / "one" / "atlas", CONFIG)
    build(root / "two" / "atlas", SyntheticConfig(seed=5, n_latents=120))
    return root / "one" / "atlas", root / "two" / "atlas"


@pytest.fixture(scope="module")
def written(atlases):
    """Served with --write."""
    with serving(BrowseConfig(atlas=atlases[0], against=atlases[1:], write=True)) as address:
        yield address


@pytest.fixture(scope="module")
def static(atlases, tmp_path_factory):
    out = tmp_path_factory.mktemp("a folder") / "site #1"
    site = export(ExportConfig(atlas=atlases[0], against=atlases[1:], out=out))
    return (site.path / "index.html").as_uri()


@pytest.fixture(params=["written", pytest.param("static", marks=pytest.mark.slow)])
def address(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def page(browser, address):
    with watched(browser, address, accept_downloads=True) as page:
        yield page


def wait_for_file(path: Path, condition) -> dict:
    deadline = time.monotonic() + 20
    while True:
        found = json.loads(path.read_text()) if path.exists() else {}
        if found and condition(found):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


# ---- notes


def test_a_latent_is_starred_tagged_noted_and_renamed_and_it_lasts(page, address, atlases):
    page.goto(address + "#/latent/7")
    star = page.get_by_role("button", name="Star", exact=True)
    star.click()
    assert page.locator(".notes .star").inner_text() == "★ Starred"
    page.get_by_label("Add a tag", exact=True).fill(HOSTILE[:28])
    page.keyboard.press("Enter")
    page.get_by_label("Add a tag", exact=True).fill("rivers")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Write a note").click()
    page.get_by_label("What it stands for, in your words").fill("names of rivers " + HOSTILE)
    page.get_by_label("Note", exact=True).fill(HOSTILE + "\nsecond line")
    page.get_by_label("Note", exact=True).blur()
    wait_until(page, "document.querySelector('h1')?.innerText.includes('names of rivers')")
    heading = page.locator("h1").inner_text()
    assert "\\u202E" in heading and "<img" in heading, "hostile text is shown, not run"
    assert page.locator("h1 img").count() == 0
    place = page.locator(".notes .kept").inner_text()
    if address.startswith("http"):
        assert place == "kept beside the atlas"
        found = wait_for_file(notes_path(atlases[0]), lambda d: d["latents"].get("7", {}).get("note"))[
            "latents"
        ]["7"]
        assert found["star"] is True and found["tags"][1] == "rivers"
        assert found["note"] == HOSTILE + "\nsecond line"
    else:
        assert place == "kept in this browser"
    page.reload()
    page.wait_for_selector(".notes .star.on")
    assert page.locator(".notes .tag").count() == 2
    page.goto(address + "#/")
    page.wait_for_selector(".rows .row")
    page.get_by_role("searchbox", name="Search latents").fill("names of riv")
    wait_until(page, "document.querySelector('.found b')?.innerText === '1'")
    page.get_by_role("button", name="Clear").click()
    page.locator("select[name=note]").select_option("tag:rivers")
    wait_until(
        page,
        "location.hash.includes('note=tag') && Number(document.querySelector('.found b')?.innerText) < 3",
    )
    assert "7" in page.locator(".rows .c-id").all_inner_texts()
    page.goto(address + "#/notes")
    page.wait_for_selector(".noted li")
    assert (
        "7" in page.locator(".noted").inner_text()
        and "second line" in page.locator(".note-text").inner_text()
    )
    page.locator("select[name=show]").select_option("tag:rivers")
    assert page.locator(".noted li").count() == 1
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    kept = json.loads(Path(download.value.path()).read_text())
    assert kept["kind"] == "notes" and kept["latents"]["7"]["tags"][1] == "rivers"
    # take all of it away, and bring it back from the file
    page.goto(address + "#/latent/7")
    page.locator(".notes .star").click()
    for _ in range(2):
        page.locator(".tag button").first.click()
    if not page.get_by_label("Note", exact=True).is_visible():
        page.get_by_role("button", name="Show the note").click()
    page.get_by_label("Note", exact=True).fill("")
    page.get_by_label("What it stands for, in your words").fill("")
    page.get_by_label("What it stands for, in your words").blur()
    wait_until(page, "!document.querySelector('h1')?.innerText.includes('names of rivers')")
    page.goto(address + "#/notes")
    page.wait_for_selector(".empty")
    page.locator("input[type=file]").set_input_files(
        {"name": "notes.json", "mimeType": "application/json", "buffer": json.dumps(kept).encode()}
    )
    page.wait_for_selector(".noted li")
    assert "Imported" in page.locator(".files [role=status]").inner_text()
    page.locator("input[type=file]").set_input_files(
        {"name": "x.json", "mimeType": "application/json", "buffer": b"not json"}
    )
    page.wait_for_selector(".files .problem")
    assert "must be JSON" in page.locator(".files .problem").inner_text()


def test_s_stars_a_latent_but_not_while_one_types(page, address):
    page.goto(address + "#/latent/9")
    page.wait_for_selector(".notes .star")
    page.keyboard.press("s")
    page.wait_for_selector(".notes .star.on")
    page.get_by_label("Add a tag", exact=True).press("s")
    assert page.locator(".notes .star.on").count() == 1
    page.locator("h1").click()
    page.keyboard.press("s")
    page.wait_for_selector(".notes .star:not(.on)")


def test_a_server_that_only_reads_keeps_notes_in_the_browser(browser, atlases, tmp_path):
    build(tmp_path / "atlas", SyntheticConfig(n_latents=12, n_contexts=20))
    with serving(BrowseConfig(atlas=tmp_path / "atlas")) as address, watched(browser, address) as page:
        page.goto(address + "#/latent/3")
        page.get_by_role("button", name="Star", exact=True).click()
        assert page.locator(".notes .kept").inner_text() == "kept in this browser"
        page.reload()
        page.wait_for_selector(".notes .star.on")
        assert not notes_path(tmp_path / "atlas").exists()


def test_what_is_taken_away_of_a_server_s_notes_stays_away(browser, tmp_path):
    made = build(tmp_path / "atlas", SyntheticConfig(n_latents=12, n_contexts=20))
    rating = {"session": "s", "source": made.fingerprint, "latent": 5, "verdict": "unclear"}
    whose = {"atlas": made.fingerprint, "dictionary": made.meta["parents"].get("dictionary", "")}
    theirs = {
        "kind": "notes",
        "format_version": 1,
        **whose,
        "latents": {"3": {"star": True}, "4": {"star": True}},
    }
    notes_path(tmp_path / "atlas").write_text(json.dumps({**theirs, "ratings": [rating]}))
    held = "[[...Sememe.notes.latents.keys()], Sememe.notes.ratings.map((one) => one.verdict)]"
    with serving(BrowseConfig(atlas=tmp_path / "atlas")) as address, watched(browser, address) as page:
        page.goto(address + "#/latent/3")
        page.wait_for_selector(".notes .star.on")
        page.get_by_role("button", name="Starred").click()
        page.evaluate("one => Sememe.notes.rate({ ...one, verdict: null })", rating)
        page.reload()
        page.wait_for_selector(".notes .star:not(.on)")
        assert page.evaluate(held) == [[4], []]
        page.get_by_role("button", name="Star", exact=True).click()
        page.evaluate("one => Sememe.notes.rate({ ...one, verdict: 'unclear' })", rating)
        page.reload()
        page.wait_for_selector(".notes .star.on")
        assert [sorted(page.evaluate(held)[0]), page.evaluate(held)[1]] == [[3, 4], ["unclear"]]


def test_the_page_refuses_notes_of_another_dictionary(page, address):
    page.goto(address + "#/notes")
    page.wait_for_selector(".files")
    before = page.evaluate("Sememe.notes.latents.size")
    for said, message in (
        ({"atlas": "a" * 64, "dictionary": "b" * 64}, "must be of this atlas's dictionary"),
        ({"latents": {"99999": {"star": True}}}, "got latent 99999, which it does not have"),
    ):
        document = {"kind": "notes", "latents": {"2": {"explanation": "x"}}, "ratings": [], **said}
        page.locator("input[type=file]").set_input_files(
            {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(document).encode()}
        )
        wait_until(
            page, f"document.querySelector('.files .problem')?.innerText.includes({json.dumps(message)})"
        )
    assert page.evaluate("Sememe.notes.latents.size") == before


def test_the_strongest_of_a_text_may_be_below_zero(page, address):
    page.goto(address + "#/notes")
    tokens = [{"latents": [{"latent": 1, "act": act, "writes": 1}]} for act in (0.5, -3.0, 2.0)]
    found = page.evaluate("tokens => Sememe.firedOnText(tokens)", tokens)
    assert (found[0]["best"]["act"], found[0]["at"], found[0]["n"]) == (-3.0, 1, 3)


# ---- rating


def test_rating_by_keys_with_undo_tallies_and_the_same_queue_again(page, address):
    page.goto(address + "#/rate?n=4&seed=3")
    for i, key in enumerate("131"):
        wait_until(page, f"document.querySelector('.rate-place b')?.innerText === '{i + 1}'")
        page.wait_for_selector(".rate-examples .excerpt .tok.on")
        assert "Latent" not in page.locator(".tool section").first.inner_text(), (
            "the latent's number is not told"
        )
        page.keyboard.press(key)
    wait_until(page, "document.querySelector('.rate-place b')?.innerText === '4'")
    assert [
        cell.split()[0] for cell in page.locator(".tallies tbody tr").first.locator("td").all_inner_texts()
    ] == ["3", "2", "0", "1"]
    assert "67% (21% to 94%)" in page.locator(".tallies tbody tr").first.inner_text()
    page.keyboard.press("z")
    wait_until(page, "document.querySelector('.rate-place b')?.innerText === '3'")
    page.reload()
    wait_until(page, "document.querySelector('.rate-place b')?.innerText === '3'")
    page.wait_for_selector(".rate-examples .excerpt .tok.on")  # by then it listens to keys
    page.keyboard.press("u")  # two quick ones are two verdicts
    page.get_by_role("button", name="polysemantic").click()
    page.wait_for_selector(".rated li")
    assert (
        page.locator(".rated li").count() == 4
        and "All 4 are rated" in page.locator(".rate-place").inner_text()
    )
    first = page.locator(".rated").inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    ratings = json.loads(Path(download.value.path()).read_text())["ratings"]
    verdicts = [one["verdict"] for one in ratings if one["session"] == "seed 3, 4 by density"]
    assert sorted(verdicts) == ["monosemantic", "polysemantic", "polysemantic", "unclear"]
    page.get_by_label("seed").fill("4")
    page.get_by_label("seed").blur()
    wait_until(page, "document.querySelector('.rate-place b')?.innerText === '1'")
    page.get_by_label("seed").fill("3")
    page.get_by_label("seed").blur()
    page.wait_for_selector(".rated li")
    assert page.locator(".rated").inner_text() == first


def test_a_latent_is_rated_by_strong_and_by_weak_examples(browser, tmp_path):
    """As many top examples as `sememe interpret` keeps by default must not hide the others."""
    config = SyntheticConfig(n_latents=12, n_contexts=80, n_top=20, n_decile=3)
    path = build(tmp_path / "atlas", config).path
    with serving(BrowseConfig(atlas=path)) as address, watched(browser, address) as page:
        page.goto(address + "#/rate?n=1&seed=2&by=none")
        page.wait_for_selector(".rate-examples .excerpt")
        peaks = page.locator(".rate-examples .excerpt .peak")
        shades = [float(peak.get_attribute("style").split("--a:")[1].strip(" ;")) for peak in peaks.all()]
        page.keyboard.press("2")
        latent = int(page.locator(".rated li a").inner_text().split()[1])
    with contextlib.closing(open_atlas(path)) as atlas:
        most = atlas.query("SELECT max_act FROM latents WHERE id = ?", latent)[0]["max_act"]
        rows = atlas.query(
            "SELECT kind, act FROM examples WHERE latent = ? ORDER BY kind DESC, decile DESC, rank", latent
        )
    top = [row["act"] for row in rows if row["kind"] == "top"]
    spread = [row["act"] for row in rows if row["kind"] == "decile"]
    assert len(top) > 14 and len(spread) == 30
    wanted = [*top[:7], *(spread[round(i * 29 / 6 + 1e-9)] for i in range(7))]
    assert shades == pytest.approx([0.1 + 0.9 * act / most for act in wanted], abs=0.002)


def test_two_dictionaries_are_mixed_and_the_source_is_told_at_the_end(page, address):
    page.goto(address + "#/rate?n=6&seed=1")
    page.locator("select[name=by]").select_option(label="mixed with two/atlas, source hidden")
    for i in range(6):
        wait_until(page, f"document.querySelector('.rate-place b')?.innerText === '{i + 1}'")
        page.wait_for_selector(".rate-examples .excerpt")
        shown = page.locator(".tool > section").all_inner_texts()
        assert not any("two/atlas" in text or "one/atlas" in text for text in shown)
        page.keyboard.press("2")
    page.wait_for_selector(".rated li")
    rows = page.locator(".tallies tbody tr th").all_inner_texts()
    assert rows == ["all", "one/atlas", "two/atlas"]
    assert [page.locator(".tallies tbody tr").nth(i).locator("td").first.inner_text() for i in (1, 2)] == [
        "3",
        "3",
    ]


def test_wilson_intervals_and_queues(page, address):
    page.goto(address + "#/rate")
    page.wait_for_selector(".rate-place")
    low, high = page.evaluate("Sememe.wilson(8, 10)")
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Wilson 1927, by hand
    assert page.evaluate("Sememe.wilson(0, 0)") == [0, 1]
    pools = "[{stratum: 'a', items: [1,2,3,4,5,6,7,8].map((id) => ({id}))}, {stratum: 'b', items: [{id: 9}, {id: 10}]}]"
    drawn = page.evaluate(f"Sememe.rateQueue({{seed: 2, n: 6, pools: {pools}}})")
    assert sorted(one["stratum"] for one in drawn) == ["a"] * 4 + ["b"] * 2
    assert len({one["id"] for one in drawn}) == 6
    assert page.evaluate(f"Sememe.rateQueue({{seed: 2, n: 6, pools: {pools}}})") == drawn
    assert page.evaluate(f"Sememe.rateQueue({{seed: 3, n: 6, pools: {pools}}})") != drawn


# ---- comparing


def test_matched_latents_stand_side_by_side(page, address):
    page.goto(address + "#/compare")
    page.wait_for_selector(".pairs .pair")
    assert "cosine of the tokens they fire on" in page.locator(".lead").inner_text()
    like = [float(text.split()[0]) for text in page.locator(".pairs .like").all_inner_texts()]
    assert like == sorted(like, reverse=True) and like[0] > 0.9
    first = page.locator(".pair").first
    first.focus()
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelectorAll('.card[aria-busy=false] .excerpt').length > 2")
    assert page.locator(".card").count() == 2
    numbers = page.locator(".pairs .open .c-id").all_inner_texts()
    assert [title.split()[1] for title in page.locator(".card h2 a").all_inner_texts()] == numbers
    assert f"latent={numbers[0]}" in page.url, "what is open is in the address"
    page.locator("select[name=sort]").select_option("unlike")
    settle(page)
    assert page.locator(".pairs .open").count() == 1, "the open pair is seen wherever it ranks"
    rows = page.locator(".pairs li:not(.open) .like").all_inner_texts()
    like = [float(text.split()[0]) for text in rows]
    assert like == sorted(like) and len(like) > 5
    n_all = int(page.locator(".found b").inner_text())
    page.locator("select[name=only]").select_option("mutual")
    settle(page)
    assert 0 < int(page.locator(".found b").inner_text()) < n_all
    page.get_by_role("searchbox").fill("river")
    settle(page)
    assert int(page.locator(".found b").inner_text()) < n_all


def test_one_changes_between_atlases_and_each_is_itself(page, address):
    page.goto(address + "#/")
    page.wait_for_selector(".rows .row")
    assert page.locator(".facts dd").first.inner_text().startswith("300")
    page.locator("select[name=atlas]").select_option("1")
    wait_until(page, "document.querySelector('.facts dd')?.innerText.startsWith('120')")
    page.wait_for_selector(".rows .row")
    assert "?atlas=1" in page.url
    page.locator(".rows .row a").first.click()
    page.wait_for_selector(".example")


# ---- trying


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_live_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def live(world):
    child = child_of(world)
    child.start()
    deadline = time.monotonic() + 200
    while child.status()["state"] == "loading":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with serving(BrowseConfig(atlas=world.root / "atlas"), live=child) as address:
        yield address
    child.close()


@pytest.fixture
def tried(browser, live):
    with watched(browser, live) as page:
        yield page


def test_which_latents_fire_on_a_text(tried, live):
    page = tried
    page.goto(live + "#/")
    page.get_by_label("Which latents fire on this text?").fill(
        "the river runs past <b>the old</b> town ü\u202e"
    )
    page.keyboard.press("Enter")
    page.wait_for_selector(".fires li")
    assert "Ready" in page.locator(".live-state").inner_text()
    text = page.locator(".try-text").first.inner_text()
    assert "<b>" in text.replace(" ", "") and "\\u202E" in text.replace("\n", "")
    tokens = page.locator(".try-text button.tok")
    assert "not looked at" in tokens.first.get_attribute("aria-label")
    tokens.nth(3).focus()
    page.wait_for_selector(".fired-columns section:first-child .fires li")
    inside = page.locator(".fired-columns section").first
    assert inside.locator(".fires li").count() == 4, "the dictionary's k"
    assert "over" in inside.inner_text() and "fire" in inside.inner_text()
    tokens.nth(4).hover()
    page.get_by_role("button", name="Shade by latent").first.click()
    shaded = page.locator(".fired > p").inner_text()
    assert "Shaded by latent" in shaded and "at=3" in page.url and "lit=" in page.url
    page.reload()
    page.wait_for_selector(".fires li")
    assert page.locator(".fired > p").inner_text() == shaded
    assert page.locator(".try-text button.tok[aria-pressed=true]").count() == 1
    page.get_by_label("what each does to the loss").check()
    page.get_by_role("button", name="Show latents").click()
    wait_until(page, "!document.querySelector('.progress')")
    tokens.nth(3).focus()
    page.wait_for_selector(".fired .figures [title*=loss]")
    assert "loss=1" in page.url
    link = page.locator(".fires li a").first
    number = link.inner_text()
    link.click()
    wait_until(page, f"document.querySelector('h1')?.innerText.startsWith('Latent {number}')")


def test_steered_text_beside_the_unsteered(tried, live, world):
    page = tried
    page.goto(live + "#/try?text=the+river")
    page.wait_for_selector(".fires li")
    page.get_by_role("button", name="Steer with latent").first.click()
    assert page.get_by_placeholder("The model goes on from here").input_value() == "the river"
    with contextlib.closing(open_atlas(world.root / "atlas")) as atlas:
        strongest = atlas.query("SELECT id FROM latents ORDER BY max_act DESC LIMIT 2")
    for row in strongest:
        page.get_by_label("add latent").fill(str(row["id"]))
        page.keyboard.press("Enter")
    sliders = page.locator(".steering input[type=range]")
    for i in range(sliders.count()):
        sliders.nth(i).focus()
        page.keyboard.press("End")
    assert page.locator(".steering output").first.inner_text() == "+10×"
    page.get_by_label("tokens", exact=True).fill("8")
    page.get_by_label("temperature").fill("0.5")
    page.get_by_label("seed").fill("7")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".written .try-text")
    texts = page.locator(".written .try-text").all_inner_texts()
    assert len(texts) == 2 and texts[0] != texts[1]
    assert "+10×" in page.locator(".written h3").nth(1).inner_text()
    assert "steer=" in page.url and "seed=7" in page.url and "n=8" in page.url
    page.reload()
    page.wait_for_selector(".steering output")
    assert page.locator(".steering output").first.inner_text() == "+10×", "every state is in the address"
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".written .try-text")
    assert page.locator(".written .try-text").all_inner_texts() == texts
    page.get_by_label("add latent").fill("999999")
    assert page.get_by_role("button", name="Add", exact=True).is_disabled()


def test_what_the_model_refuses_is_said(browser, live):
    context = browser.new_context()  # not watched: a refusal is a line on the browser's console
    page = context.new_page()
    page.goto(live + "#/try?prompt=the+river&n=900")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".problem")
    assert "must fit the context" in page.locator(".problem").inner_text()
    context.close()


class _Slow:
    """A model that takes its time, and can be stopped."""

    def __init__(self):
        self.stop = threading.Event()
        self.job = None

    def status(self):
        busy = self.job and {"name": self.job, "verb": "generate", "done": 3, "of": 40}
        about = {"model": "m", "device": "cpu", "hookpoints": ["h"], "context_length": 9}
        return {"state": "busy" if busy else "ready", "about": about, "job": busy, "waiting": 0}

    def ask(self, verb, arguments, job=""):
        from sememe.browse.live import LiveError, Refusal

        self.job = job
        assert self.stop.wait(30)
        self.job = None
        raise LiveError(
            Refusal(409, "a job must run to its end to have an answer", "cancelled", "Ask again.")
        )

    def cancel(self, job):
        self.stop.set()
        return job == self.job

    def close(self):
        self.stop.set()


def test_progress_is_shown_and_a_job_is_cancelled(browser, atlases):
    with serving(BrowseConfig(atlas=atlases[0]), live=_Slow()) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address + "#/try")
        page.get_by_placeholder("The model goes on from here").fill("once")
        page.get_by_role("button", name="Generate").click()
        wait_until(page, "document.querySelector('.progress')?.innerText.includes('3 of 40 tokens')")
        assert page.locator("progress").get_attribute("max") == "40"
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_selector("#steer [role=alert]")
        assert page.locator("#steer [role=alert]").inner_text() == "Cancelled."
        context.close()


# ---- all of them


PAGES = {
    "#/notes": ".tool",
    "#/rate?n=3": ".rate-examples .excerpt",
    "#/compare?latent=1": ".card[aria-busy=false] .excerpt",
    "#/latent/11": ".notes .star",
}


def picture(page, name: str) -> None:
    """A picture for people, where SEMEME_PICTURES names a folder."""
    if folder := os.environ.get("SEMEME_PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A server of two small atlases with something written."""
    import httpx

    root = tmp_path_factory.mktemp("noted")
    build(root / "one" / "atlas", SyntheticConfig(n_latents=60, n_contexts=60))
    build(root / "two" / "atlas", SyntheticConfig(seed=5, n_latents=40, n_contexts=60))
    note = {"star": True, "tags": ["rivers", "to check"], "note": "Seen. " + HOSTILE, "explanation": "rivers"}
    config = BrowseConfig(atlas=root / "one" / "atlas", against=(root / "two" / "atlas",), write=True)
    with serving(config) as address:
        assert httpx.put(address + "api/notes/11", json=note).status_code == 200
        yield address


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_s_width_is_enough(browser, noted, scheme):
    for width in (1280, 360):
        with watched(browser, noted, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
            for hash, shown in PAGES.items():
                page.goto("about:blank")
                page.goto(noted + hash)
                page.wait_for_selector(shown)
                settle(page)
                assert violations(page, scheme) == [], hash
                assert page.evaluate("document.documentElement.scrollWidth") <= width, hash
                picture(page, f"{hash.strip('#/').split('?')[0].replace('/', '-')}-{width}-{scheme}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_page_that_tries(browser, live, scheme):
    for width in (1280, 360):
        with watched(browser, live, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
            page.goto(live + "#/try?text=the+river+runs&prompt=the+river&steer=3:2,5:-1.5&n=12")
            page.wait_for_selector(".fires li")
            page.get_by_role("button", name="Generate").click()
            page.wait_for_selector(".written .try-text")
            page.locator(".try-text button.tok").nth(1).focus()
            settle(page)
            assert violations(page, scheme) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            picture(page, f"try-{width}-{scheme}")


def test_without_a_model_the_page_says_how_to_have_one(page, address):
    page.goto(address + "#/try")
    page.wait_for_selector(".tool")
    assert "sememe browse ATLAS --live" in page.locator(".tool").inner_text()
    assert page.get_by_role("link", name="Try").count() == 0


def test_a_damaged_atlas_s_page_says_what_to_do(browser, tmp_path):
    build(tmp_path / "atlas", SyntheticConfig(n_latents=12, n_contexts=20))
    database = tmp_path / "atlas" / "atlas.duckdb"
    database.write_bytes(database.read_bytes()[:-100])
    with serving(BrowseConfig(atlas=tmp_path / "atlas")) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(".failed .problem")
        assert page.locator("h1").inner_text() == "This atlas cannot be shown"
        assert "truncated" in page.locator(".problem").inner_text()
        context.close()
