"A student's lesson, untouched, in real JupyterLab in real Chromium."

import pytest

playwright = pytest.importorskip(
    "playwright.sync_api", reason="there is no playwright; pip install 'clip475[browser]'"
)


def test_an_untouched_lesson_runs_to_its_end(lesson, shots):
    page = lesson("05_loss")
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    assert errors.all_inner_texts() == []
    checks = page.locator(".jp-OutputArea-output", has_text="not written yet")
    assert checks.count() >= 1
    checks.first.scroll_into_view_if_needed()
    page.screenshot(path=shots / "lesson_check.png")
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 4
    figures.nth(1).scroll_into_view_if_needed()
    page.screenshot(path=shots / "lesson_figure.png")
    assert page.evaluate(CORNERS) == [0]  # charts have no ground, so that they suit a dark page


# How opaque the first pixel of each figure is: the different values.
CORNERS = """async () => {
    const found = new Set()
    for (const img of document.querySelectorAll(".jp-RenderedImage img")) {
        await img.decode()
        const context = new OffscreenCanvas(1, 1).getContext("2d")
        context.drawImage(img, 0, 0)
        found.add(context.getImageData(0, 0, 1, 1).data[3])
    }
    return [...found]
}"""
