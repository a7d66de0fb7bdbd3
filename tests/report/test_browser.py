"""The report in a real browser: what a reader can do with it, and that nothing in it is alive."""

from __future__ import annotations

import csv
import json
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import fastpie
from analyses import analysis_of
from fastpie.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"
)

SCRIPT = "<script>document.title='hacked'</script>"
IMAGE = '"><img src=x onerror="document.title=\'hacked\'">'
HOSTILE = [SCRIPT, IMAGE, "=1+1", '@cmd, "quoted"\nline']
NAMES = ["healthy", SCRIPT, "=caries"]
SAMPLES = 60


class Images(Dataset):
    """Labelled noise under hostile names."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(SAMPLES, 1, 40, 32, generator=generator)
        self.labels = torch.randint(0, 3, (SAMPLES,), generator=generator)
        self.sample_ids = [*HOSTILE, *(f"image-{i:03d}" for i in range(len(HOSTILE), SAMPLES))]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run, its analysis, a page with ids and heat maps, and one without ids."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    with torch.no_grad():
        model[4].weight.mul_(20)
    dual = fastpie.DualModel(model, fastpie.prune(model, [0.3, 0.6]))
    folder = tmp_path_factory.mktemp("browser")
    data = Images()
    result = fastpie.mine(dual, data, folder / "run", batch_size=20, keep_logits=True)
    attributes = {
        "sample_id": data.sample_ids,
        "label": data.labels.tolist(),
        "sex": ["F" if i % 2 else "M" for i in range(SAMPLES)],
        "age": [float(i) for i in range(SAMPLES)],
        "doctor": [SCRIPT] * SAMPLES,
    }
    pq.write_table(pa.table(attributes), folder / "run" / "manifest.parquet")
    result = fastpie.MiningResult(folder / "run")
    analysis = analysis_of(result, NAMES)
    options = {"analysis": analysis, "dataset": data, "class_names": NAMES}
    shown = write_report(
        result, folder / "shown.html", dual=dual, heat_maps=3, show_ids=True, **options
    )
    hidden = write_report(result, folder / "hidden.html", **options)
    return {"result": result, "analysis": analysis, "shown": shown, "hidden": hidden}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "disable-dev-shm-usage", "window-size=1200,900", "force-prefers-reduced-motion",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


class Page:
    """A loaded report and what a reader does with it."""

    def __init__(self, driver, path, address=""):
        self.driver = driver
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(f"file://{path}{address}")
        self.data = self.run("return JSON.parse(document.getElementById('data').textContent)")

    def run(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition, *arguments):
        """Until a condition holds; what it gives."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            found = self.run(f"return {condition}", *arguments)
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(condition)

    def key(self, key, selector="#grid"):
        self.run(
            "const to = document.querySelector(arguments[0]); to.focus();"
            "to.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[1], bubbles: true,"
            " cancelable: true}))",
            selector,
            key,
        )

    def click(self, selector):
        self.run("document.querySelector(arguments[0]).click()", selector)

    def choose(self, selector, value):
        self.run(
            "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('change'))",
            selector,
            str(value),
        )

    def cards(self):
        """Names of the cards in sight, in their order."""
        return self.run(
            "return [...document.querySelectorAll('.card .id')].map(e => e.textContent)"
        )

    def count(self):
        return int(self.run("return document.querySelector('#count b').textContent"))

    def of(self, rows):
        return [self.data["ids"][row] for row in rows]

    def score(self, key):
        values = next(s["values"] for s in self.data["scores"] if s["key"] == key)
        return np.array([np.nan if v is None else v for v in values])

    def check_console(self):
        entries = self.driver.get_log("browser")
        assert [e for e in entries if e["level"] in ("SEVERE", "WARNING")] == []
        assert self.driver.title.endswith("fastpie report")


@pytest.fixture
def page(made, browser):
    page = Page(browser, made["shown"])
    yield page
    page.check_console()


def test_it_loads_and_shows_the_hardest_first(made, page):
    cards = page.cards()
    assert len(cards) >= 5
    assert cards == page.of(range(len(cards)))
    assert page.count() == SAMPLES
    # Only what is in sight exists.
    assert page.run("return document.querySelectorAll('.card').length") <= SAMPLES
    assert page.run("return document.querySelectorAll('#strip button').length") >= 4
    figures = page.run(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getAttribute('aria-label'))"
    )
    assert len(figures) >= 12
    assert all(figures)
    images = page.run(
        "return [...document.querySelectorAll('.card img')].map(e => [e.alt, e.src.slice(0, 11)])"
    )
    assert all(alt.startswith("Sample ") and source == "data:image/" for alt, source in images)


def test_hostile_fields_stay_text(made, page):
    assert page.run("return document.querySelectorAll('img[src=x]').length") == 0
    assert page.run("return document.scripts.length") == 3
    for sample_id in (SCRIPT, IMAGE):
        row = page.data["ids"].index(sample_id)
        Page(page.driver, made["shown"], f"#sort=hardness&sample={_quoted(sample_id)}")
        assert page.wait("document.querySelector('#detail-title')?.textContent") == sample_id
        assert page.run("return document.querySelector('#detail').textContent").count(SCRIPT) >= 2
        assert (
            page.run(
                "return document.querySelectorAll('#detail script, #detail img[src=x]').length"
            )
            == 0
        )
        assert page.data["classes"]["1"] == SCRIPT
        assert row >= 0
    names = page.run(
        "return [...document.querySelectorAll('#class-table tbody th')].map(e => e.textContent)"
    )
    assert SCRIPT in names


def test_every_score_sorts(page):
    for key in ("label_in_doubt", "margin_dense", "js"):
        page.choose("select[aria-label='Sort by']", key)
        values = page.score(key)
        low = next(s["low"] for s in page.data["scores"] if s["key"] == key)
        order = np.argsort(values if low else -values, kind="stable")
        cards = page.cards()
        assert cards == page.of(order[: len(cards)])
        page.click("#reverse")
        order = np.argsort(-values if low else values, kind="stable")  # NaN last in both
        assert page.cards() == page.of(order[: len(cards)])
        page.click("#reverse")


def test_filters_by_class_quadrant_subgroup_and_flag(page):
    data = page.data
    expected = set(range(SAMPLES))

    def narrowed(rows):
        nonlocal expected
        expected &= set(rows)
        assert page.count() == len(expected) > 0
        assert set(page.cards()) <= set(page.of(expected))

    page.choose("[id='facet-class']", 0)
    narrowed(i for i, label in enumerate(data["label"]) if label == 0)
    sex = next(a for a in data["attributes"] if a["key"] == "sex")
    page.choose("[id='facet-a.sex']", sex["values"].index("F"))
    narrowed(i for i, v in enumerate(sex["index"]) if sex["values"][v] == "F")
    # The menu counts what the other filters leave.
    text = page.run(
        "return [...document.getElementById('facet-quadrant').options].map(o => o.textContent)"
    )
    typical = data["quadrants"].index("typical")
    rows = [i for i in expected if data["quadrant"][i] == typical]
    assert f"typical ({len(rows)})" in text
    page.choose("#facet-quadrant", typical)
    narrowed(rows)
    page.click("#reset")
    assert page.count() == SAMPLES
    flag = next(f for f in data["flags"] if f["key"] == "wrong")
    page.click("#flag-wrong")
    assert page.count() == len(flag["rows"])
    page.click("#reset")
    page.choose("select[aria-label='Class of']", "dense")
    page.choose("[id='facet-class']", data["dense"][0])
    assert page.count() == data["dense"].count(data["dense"][0])
    age = next(a for a in data["attributes"] if a["key"] == "age")
    assert age["values"] == ["0-9", "10-19", "20-29", "30-39", "40-49", "50-59"]


def test_the_address_keeps_the_state(made, page):
    page.choose("select[aria-label='Sort by']", "js")
    page.choose("[id='facet-class']", 2)
    page.run(
        "const s = document.getElementById('search'); s.value = 'image-0'; s.dispatchEvent(new Event('input'))"
    )
    rows = [
        i
        for i, label in enumerate(page.data["label"])
        if label == 2 and "image-0" in page.data["ids"][i]
    ]
    assert page.count() == len(rows)
    cards = page.cards()
    address = page.run("return location.hash")
    again = Page(page.driver, made["shown"], address)
    assert again.count() == len(rows)
    assert again.cards() == cards
    assert again.run("return document.getElementById('search').value") == "image-0"


def test_keys_move_open_and_tick(page):
    page.key("ArrowRight")
    page.key("ArrowRight")
    page.key("ArrowLeft")
    assert (
        page.run("return document.querySelector('.cursor .id').textContent") == page.data["ids"][1]
    )
    active = page.run(
        "return document.getElementById('grid').getAttribute('aria-activedescendant')"
    )
    assert active == "card-1"
    page.key(" ")
    assert (
        page.run("return document.getElementById('card-1').getAttribute('aria-selected')") == "true"
    )
    assert page.run("return document.getElementById('export').textContent") == "Export 1 ticked"
    page.key("Enter")
    assert page.run("return document.getElementById('detail').open")
    assert (
        page.run("return document.getElementById('detail-title').textContent")
        == page.data["ids"][1]
    )
    page.key("ArrowRight", "#detail")
    assert (
        page.run("return document.getElementById('detail-title').textContent")
        == page.data["ids"][2]
    )
    from selenium.webdriver.common.keys import Keys

    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait("!document.getElementById('detail').open")
    assert page.run("return document.activeElement.id") == "grid"
    page.key("End")
    assert (
        page.run("return document.querySelector('.cursor .id').textContent") == page.data["ids"][-1]
    )
    page.key("?")
    assert page.run("return document.getElementById('help').open")
    page.click("#help-close")
    page.key("/")
    assert page.run("return document.activeElement.id") == "search"


def test_a_sample_shows_both_models(made, page):
    page.click(".card")
    heads = page.run(
        "return [...document.querySelectorAll('.probabilities thead th')].map(e => e.textContent)"
    )
    assert heads == ["class", "dense", "0.3", "0.6"]
    ids = made["result"].table["sample_id"].to_pylist()
    dense, pruned = made["result"].logits()
    row = ids.index(page.data["ids"][0])
    logits = np.stack([dense[row], *pruned[:, row]]).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    cells = page.run(
        "return [...document.querySelectorAll('.probabilities tbody tr')]"
        ".map(r => [...r.cells].map(e => e.textContent))"
    )
    assert len(cells) == 3
    for name, *values in cells:
        known = next(i for i, n in enumerate(NAMES) if name.removesuffix("label") == n)
        found = [float(v.removesuffix(" %")) / 100 for v in values]
        np.testing.assert_allclose(found, expected[:, known], atol=6e-4)
    assert page.run("return document.querySelectorAll('.scores > *').length") >= 4 * 8
    # Grad-CAM: the picture, both models, and the difference.
    assert page.run("return document.querySelectorAll('.maps button').length") == 4
    assert page.run("return document.querySelectorAll('.stage canvas').length") == 0
    page.click(".maps button:last-child")
    size = page.run("const c = document.querySelector('.stage canvas'); return [c.height, c.width]")
    assert size == [32, 30]  # of 38 x 30 features, at most 32 a side
    drawn = page.run(
        "const c = document.querySelector('.stage canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].some(v => v > 0)"
    )
    assert drawn


def _downloaded(page, folder, name):
    path = folder / name
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_selection_and_the_data_of_plots_are_exported(made, page, tmp_path):
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.choose("[id='facet-class']", 2)
    page.click("#export")
    head, *rows = _downloaded(page, tmp_path, "fastpie-selection.csv")
    chosen = [i for i, label in enumerate(page.data["label"]) if label == 2]
    assert len(rows) == len(chosen) == page.count()
    records = [dict(zip(head, row, strict=True)) for row in rows]
    # What a spreadsheet would compute begins with an apostrophe.
    assert [r["sample"] for r in records] == [_guarded(i) for i in page.of(chosen)]
    assert {r["label"] for r in records} == {"'=caries"}
    np.testing.assert_allclose(
        [float(r["hardness"]) for r in records], page.score("hardness")[chosen]
    )
    (tmp_path / "fastpie-selection.csv").unlink()
    page.click("#reset")
    for sample_id in HOSTILE:
        row = page.data["ids"].index(sample_id)
        page.run("document.getElementById('grid').scrollIntoView()")
        page.key("Home")
        for _ in range(row):
            page.key("ArrowRight")
        page.key(" ")
    page.click("#export")
    head, *rows = _downloaded(page, tmp_path, "fastpie-selection.csv")
    assert {row[0] for row in rows} == {_guarded(i) for i in HOSTILE}
    page.click("#plot-subgroups .csv")
    head, *rows = _downloaded(page, tmp_path, "subgroups.csv")
    table = made["analysis"].tables["subgroups"]
    assert head == table.column_names
    assert [row[1] for row in rows] == table["value"].to_pylist()
    assert [float(row[4]) for row in rows] == table["odds_ratio"].to_pylist()


def test_tables_sort_and_lead_to_the_samples(page):
    def column(number):
        return page.run(
            "return [...document.querySelectorAll('#class-table tbody tr')]"
            ".map(r => Number(r.cells[arguments[0]].dataset.v))",
            number,
        )

    page.click("#class-table thead th:nth-child(2) button")
    assert column(1) == sorted(column(1), reverse=True)
    page.click("#class-table thead th:nth-child(2) button")
    assert column(1) == sorted(column(1))
    page.click("#class-table th[data-class='1'] button")
    assert page.count() == page.data["label"].count(1)


def test_without_ids_nothing_names_a_sample(made, browser):
    page = Page(browser, made["hidden"])
    text = made["hidden"].read_text("utf-8")
    for sample_id in made["result"].table["sample_id"].to_pylist():
        assert sample_id not in text
        assert json.dumps(sample_id) not in text
    assert "doctor" not in text
    assert "Dr. Who" not in text
    assert all(name.startswith("s-") for name in page.cards())
    with (made["result"].path / "report-ids.csv").open(encoding="utf-8", newline="") as file:
        known = {row["pseudonym"]: row["sample_id"] for row in csv.DictReader(file)}
    table = made["result"].table.sort_by([("hardness", "descending")])
    assert [known[name] for name in page.data["ids"]] == table["sample_id"].to_pylist()
    page.check_console()


@pytest.mark.parametrize("thumbnails", [0, 1000])
def test_a_page_without_analysis_data_set_or_samples(made, browser, tmp_path, thumbnails):
    page = Page(browser, write_report(made["result"], tmp_path / "x.html", thumbnails=thumbnails))
    assert page.run("return document.querySelectorAll('.card').length > 0") == (thumbnails > 0)
    assert page.run("return document.querySelectorAll('figure').length") == 4
    if thumbnails:
        page.click(".card")
        assert (
            page.run("return document.querySelector('#detail .none').textContent") == "no picture"
        )
    page.check_console()


def test_dark_and_narrow(made, browser):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page = Page(browser, made["shown"])
    ground = "return getComputedStyle(document.body).backgroundColor"
    dark = page.run(ground)
    page.click("#theme")  # light, whatever the system says
    assert page.run(ground) != dark
    page.run("localStorage.clear()")
    # Nothing is wider than the screen.
    assert page.run("return document.documentElement.scrollWidth") <= 390
    page.click("#toggle-filters")
    assert page.run("return document.getElementById('facet-class').offsetWidth") > 0
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.check_console()


def _guarded(text):
    return f"'{text}" if text[0] in "=+-@" else text


def _quoted(text):
    from urllib.parse import quote

    return quote(text, safe="")
