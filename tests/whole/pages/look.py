"""``make report-check``, second half: the pages of case.py in headless Chromium.

They have to open without an error or a request, show the manifest's figures, where they are hovered
over as well, sort and filter. Screenshots of each on light, dark and printed paper are left beside
them, to be looked at. Runs in an environment of its own, which knows nothing of loftq.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

WIDE, NARROW = {"width": 1100, "height": 900}, {"width": 420, "height": 900}
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
_MINUTES = 5 * 60 * 1000


def main(place: Path, names: list[str]) -> int:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium: apt-get install chromium, or install google-chrome")
    pages: dict[str, Any] = json.loads((place / "expected.json").read_text())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        for name in names or pages:
            expected = pages[name]
            said = opened(browser, place / f"{name}.html", expected)
            print(f"{name}: {said}", flush=True)
    return 0


def opened(browser: Browser, file: Path, expected: dict[str, Any]) -> str:
    page = browser.new_page(viewport=WIDE, color_scheme="light")
    page.set_default_timeout(_MINUTES)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
    page.on("request", lambda request: faults.append(request.url))
    page.goto(file.absolute().as_uri())
    page.wait_for_function("document.documentElement.dataset.drawn", timeout=_MINUTES)
    assert [fault for fault in faults if fault != file.absolute().as_uri()] == [], faults
    plots = page.locator(".plot")
    assert int(page.evaluate("document.documentElement.dataset.drawn")) == plots.count() > 2
    for number in range(plots.count()):
        plot = plots.nth(number)
        assert plot.locator("svg.marks").count() == 1
        assert len(plot.get_attribute("aria-label")) > 10
    sound(page)
    shots(page, file)
    if "matrices" not in expected:
        for label in expected["labels"]:
            expect(page.locator("main table").first).to_contain_text(label)
        return f"{plots.count()} plots"
    hovered = hover(page, expected)
    figures(page, expected)
    return f"{plots.count()} plots, {len(expected['matrices'])} rows, hovering shows {hovered}"


def sound(page: Page) -> None:
    """One title, headings in order, every table with a caption, nothing wider than the paper."""
    assert page.locator("h1").count() == 1
    assert page.locator("h2").count() > 3
    assert page.locator("table").count() == page.locator("table > caption").count()
    for viewport in (WIDE, NARROW):
        page.set_viewport_size(viewport)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) <= 0, viewport
    page.set_viewport_size(WIDE)


def figures(page: Page, expected: dict[str, Any]) -> None:
    """Every matrix is in the table with its residuals; it sorts, and filters."""
    expect(page.locator(".tiles")).to_contain_text(expected["residual"])
    matrices = expected["matrices"]
    while page.locator("#more").is_visible():
        page.locator("#more").click()
    rows = page.locator("#matrices tbody tr")
    heads = page.locator("#matrices thead th").all_inner_texts()
    columns = [heads.index(title) for title in heads if title.split()[0] in ("without", "residual")]
    shown = page.evaluate(
        "[...document.querySelectorAll('#matrices tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert {row[0] for row in shown} == set(matrices)
    for row in shown:
        for column, wanted in zip(columns, matrices[row[0]], strict=True):
            assert abs(float(row[column]) - float(wanted)) < 1.01e-4, row  # rounded once more
    finals = [float(row[columns[1]]) for row in shown]
    assert finals == sorted(finals, reverse=True)
    head = page.locator("#matrices th[data-field=final]")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    first = page.locator("#matrices tbody th").first.inner_text()
    assert float(matrices[first][1]) == min(float(each[1]) for each in matrices.values())
    page.locator("#filter").fill("layers.3. down_proj")
    kept = [name for name in matrices if "layers.3." in name and "down_proj" in name]
    assert sorted(rows.locator("th").all_inner_texts()) == sorted(kept)
    expect(page.locator("#found")).to_contain_text(f"{len(kept)} of {len(kept)}")
    page.locator("#filter").fill("")


def hover(page: Page, expected: dict[str, Any]) -> int:
    """Cells of the heat map say what the manifest says; how many were asked."""
    cells = page.locator("#plot-heat .mark-rect.role-mark path")
    assert cells.count() >= len(expected["cells"])
    asked = 0
    for number in range(0, len(expected["cells"]), max(1, len(expected["cells"]) // 5)):
        cells.nth(number).scroll_into_view_if_needed()
        box = cells.nth(number).bounding_box()
        page.mouse.move(0, 0)
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=8)
        tip = page.locator("#vg-tooltip-element")
        expect(tip).to_be_visible(timeout=60000)
        told = dict(
            zip(
                tip.locator("td.key").all_inner_texts(),
                tip.locator("td.value").all_inner_texts(),
                strict=True,
            )
        )
        told = {re.sub(r":$", "", key): value for key, value in told.items()}
        wanted = expected["cells"][f"{told['kind']}/{told['block']}"]
        assert abs(float(told["with the adapter"]) - wanted) <= 1.01e-4, told
        asked += 1
    choice = page.locator("#plot-heat select")
    choice.select_option(label="without the adapter")
    page.mouse.move(0, 0)
    return asked


def shots(page: Page, file: Path) -> None:
    for paper in ("light", "dark"):
        page.emulate_media(color_scheme=paper)
        page.wait_for_timeout(500)
        page.screenshot(path=file.with_name(f"{file.stem}-{paper}.png"), full_page=True)
    page.emulate_media(media="print", color_scheme="light")
    page.pdf(path=file.with_suffix(".pdf"), format="A4", print_background=True)
    page.emulate_media(media="screen", color_scheme="light")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("names", nargs="*", help="of pages; all by default")
    sys.exit(main(**vars(parser.parse_args())))
