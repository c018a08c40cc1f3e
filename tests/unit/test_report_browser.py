"""The report in a real browser: nothing overflows, nothing is cut, pictures load, tables sort, light and dark, and on paper."""

import json
import pathlib

import numpy as np
import pytest

from jaxcl import report
from tests import browser
from tests.unit.test_report import _result

WIDTHS = (390, 1280, 1920)
# Elements that stick out of the window, but for those within a box that scrolls.
OUTSIDE = """
[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") || e.matches(".scroll"))
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 99))
"""
PICTURES = """
Promise.all([...document.images].map(i => i.decode().then(() => [i.alt, i.naturalWidth, i.currentSrc.length])))
"""
TABLES = """
[...document.querySelectorAll(".scroll:has(table)")].map(box => ({
  fits: box.scrollWidth <= box.clientWidth, scrolls: getComputedStyle(box).overflowX === "auto",
  reaches: (box.scrollLeft = 1e6, box.querySelector("th:last-child").getBoundingClientRect().right
            <= box.getBoundingClientRect().right + 1),
}))
"""


def column(index, table=0):
    return (
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].map(row => row.cells[{index}].textContent)"
    )


def click(index):
    return f"document.querySelectorAll('table')[0].tHead.rows[0].cells[{index}].click()"


@pytest.fixture(scope="module")
def page():
    if browser.executable() is None:
        pytest.skip("no browser is installed")
    with browser.page() as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A report of many long columns: three strategies of several seeds, one of them in two configurations."""
    folder = tmp_path_factory.mktemp("runs")
    rng, runs = np.random.default_rng(0), []
    matrices = {"from_scratch": 0.9, "incremental": 0.4, "er": 0.8, "a_strategy_of_my_own_with_a_long_name": 0.7}
    for strategy, level in matrices.items():
        for seed in range(3):
            matrix = np.clip(level + 0.1 * rng.normal(size=(5, 5)), 0, 1)
            confusion = rng.integers(1, 9, (10, 10)) + 50 * np.eye(10, dtype=int)
            found = _result("er", seed, matrix.tolist(), capacity=200 + 1000 * (seed == 2)) | {"strategy": strategy}
            found |= {"name": "digits, a title of my own", "average_top5": float(level + 0.05)}
            found |= {"class_names": [f"class number {i}" for i in range(10)], "confusion": confusion.tolist()}
            found["per_class_accuracy"] = (np.diag(confusion) / confusion.sum(1)).tolist()
            found["seconds"], found["images_per_second"] = 10.0 + seed, 10_000 * level + seed
            found |= {"command": "jaxcl train --config=digits --workdir=" + "x" * 200, "commit": "0123456789ab-dirty"}
            path = folder / strategy / str(seed)
            path.mkdir(parents=True)
            lines = [{"kind": "train", "step": i, "task": i // 20, "loss": 2.0 / (1 + i % 20)} for i in range(100)]
            (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            runs.append(report.Run(path, found))
    runs.append(report.Run(folder / "half", problem="unfinished: no result.json"))
    return report.write_report(runs, folder).as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_all_is_there(width, dark, url, page, tmp_path):
    page.open(url, width, dark)
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(OUTSIDE) == []
    tables = page.value(TABLES)
    assert len(tables) == 4 and all(table["fits"] or table["scrolls"] for table in tables)
    assert all(table["reaches"] for table in tables)  # the last column can be scrolled to
    assert width > 390 or not tables[0]["fits"]
    pictures = page.value(PICTURES)
    assert len(pictures) == 8 and all(size > 300 for _, size, _ in pictures)
    (ground, ink) = page.value("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    assert (ground, ink) == (
        ("rgb(20, 24, 28)", "rgb(223, 229, 234)") if dark else ("rgb(255, 255, 255)", "rgb(35, 41, 47)")
    )
    assert page.errors == []
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_dark_pages_have_dark_pictures(url, page):
    found = []
    for dark in (False, True):
        page.open(url, 1280, dark)
        found.append(page.value("document.images[0].decode().then(() => document.images[0].currentSrc.slice(0, 2000))"))
    assert found[0] != found[1]


def test_tables_sort(url, page):
    page.open(url, 1280)
    before = page.value(column(0))
    head = page.value("[...document.querySelectorAll('table')[0].tHead.rows[0].cells].map(cell => cell.textContent)")
    for index, name in enumerate(head):
        page.value(click(index))
        once = page.value(column(index))
        page.value(click(index))
        twice = page.value(column(index))
        if name == "strategy":
            assert once == sorted(once, key=str.casefold) and twice == once[::-1]
        else:
            numbers = [_number(cell) for cell in once]
            assert numbers == sorted(numbers, reverse=True), (name, once)
            assert [_number(cell) for cell in twice] == sorted(numbers), (name, twice)
    assert sorted(before) == sorted(page.value(column(0))) and len(before) == 8
    page.value(
        "(t => (t.focus(), t.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))))(document.querySelector('th'))"
    )
    assert page.value("document.querySelector('th').getAttribute('aria-sort')") == "ascending"
    assert page.errors == []


def _number(cell):
    """Of a mean with its deviation, or of bytes with their unit."""
    value, _, unit = cell.partition(" ± ")[0].replace(",", "").partition(" ")
    return float(value) * {"": 1, "B": 1, "KiB": 1024, "MiB": 2**20}[unit]


def test_without_a_script_the_tables_are_plain_ones(url, page):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(url, 1280)
        assert page.value("document.querySelectorAll('th[aria-sort]').length") == 0
        assert page.value("document.querySelectorAll('table.sorts tbody tr').length") == 8 + 8 + 12
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_no_table_is_cut(url, page):
    page.open(url, 1280)
    page.call("Emulation.setEmulatedMedia", media="print")
    page.call("Emulation.setDeviceMetricsOverride", width=1010, height=700, deviceScaleFactor=1, mobile=False)  # A4
    found = page.value("[...document.querySelectorAll('table, img')].map(x => x.getBoundingClientRect().right)")
    assert max(found) <= 1010, found
    assert page.pdf().startswith(b"%PDF")


def test_what_a_page_lacks_is_seen(tmp_path, page):
    """The guards themselves: a page that overflows, whose picture is broken and whose script fails."""
    path = pathlib.Path(tmp_path / "bad.html")
    path.write_text("<body><p style='width: 3000px'>x<img src='nowhere.png'><script>nothing.here</script>")
    page.open(path.as_uri(), 1280)
    assert page.value("document.documentElement.scrollWidth") > 1280 and page.value(OUTSIDE)
    assert any("nothing is not defined" in error for error in page.errors)
    assert any("ERR_FILE_NOT_FOUND" in error for error in page.errors)
