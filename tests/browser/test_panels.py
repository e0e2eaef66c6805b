"Each panel, driven as a person does it, in real JupyterLab in real Chromium."

import re

import pytest
from PIL import Image

playwright = pytest.importorskip(
    "playwright.sync_api", reason="there is no playwright; pip install 'clip475[browser]'"
)
expect = playwright.expect
expect.set_options(timeout=300_000)


NOTEBOOKS = {"search": "03_panels", "zeroshot": "03_panels"}  # the others are in 04_teaching_panels
NAMES = ("search", "zeroshot", "tokens", "temperature", "freezing", "augmentation", "map")


def panel_in(pages, name):
    found = pages[NOTEBOOKS.get(name, "04_teaching_panels")].locator(f".jp-OutputArea-output .clip475-{name}")
    expect(found).to_be_visible()
    found.scroll_into_view_if_needed()
    return found


@pytest.fixture
def panel(pages, shots, request):
    "The panel that the test is named after; its picture is kept at the end."
    name = request.node.name.split("_")[1]
    found = panel_in(pages, name)
    found.page.bring_to_front()
    yield found
    found.screenshot(path=shots / f"{request.node.name.removeprefix('test_')}.png")


def field(panel, label):
    return panel.get_by_label(label, exact=True)


def alert(panel):
    return panel.get_by_role("alert")


def choose_file(panel, path):
    with panel.page.expect_file_chooser() as chooser:
        panel.get_by_role("button", name=re.compile("own picture")).click()
    chooser.value.set_files(path)


def slide(panel, label, keys):
    "Press arrow keys on a slider."
    handle = (
        panel.locator(
            ".widget-inline-hbox, .jupyter-widgets", has=panel.page.locator(".noUi-handle, .ui-slider-handle")
        )
        .filter(has=panel.page.locator("label", has_text=re.compile(f"^{label}$")))
        .last.locator(".noUi-handle, .ui-slider-handle")
    )
    handle.focus()
    for key in keys:
        panel.page.keyboard.press(key)


def test_the_notebooks_run_without_an_error(pages, shots):
    for name, page in pages.items():
        page.bring_to_front()
        assert (
            page.locator(
                "[data-mime-type='application/vnd.jupyter.error'], "
                "[data-mime-type='application/vnd.jupyter.stderr']"
            ).all_inner_texts()
            == []
        )
        assert page.get_by_text("Error displaying widget").count() == 0
        page.screenshot(path=shots / f"{name}.png")


def test_search_by_words_by_click_and_by_upload(panel, tmp_path):
    query = field(panel, "look for")
    query.fill("a pink flower")
    query.press("Enter")
    expect(panel.get_by_text("nearest to “a pink flower”")).to_be_visible()
    pictures = panel.locator("img")
    expect(pictures).to_have_count(5)
    before = [p.get_attribute("src") for p in pictures.all()]
    button = panel.get_by_role("button", name=re.compile("more like this")).nth(1)
    button.focus()
    panel.page.keyboard.press("Enter")  # by keyboard alone
    expect(panel.get_by_alt_text("the picture searched by")).to_be_visible()
    expect(panel.get_by_text("nearest to “a pink flower”")).to_be_hidden()
    assert before[1] not in [p.get_attribute("src") for p in pictures.all()[1:]]
    expect(button).to_be_focused()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "own.png")
    choose_file(panel, tmp_path / "own.png")
    asked = panel.get_by_alt_text("the picture searched by")
    expect(asked).not_to_have_attribute("src", before[1])
    expect(alert(panel)).to_have_count(0)


def test_search_says_what_is_wrong(panel, tmp_path):
    query = field(panel, "look for")
    query.fill("")
    query.press("Enter")
    expect(alert(panel)).to_contain_text("the query is empty")
    expect(panel.locator("img")).to_have_count(0)
    (tmp_path / "letter.png").write_bytes(b"Dear reader, this is no picture")
    choose_file(panel, tmp_path / "letter.png")
    expect(alert(panel)).to_contain_text("upload a JPEG, PNG or the like")
    query.fill("a purple zorgon")
    panel.get_by_role("button", name="search", exact=True).click()
    expect(panel.get_by_text("never seen zorgon")).to_be_visible()
    expect(panel.locator("img")).to_have_count(5)


def test_zeroshot_with_edited_classes(panel, tmp_path):
    classes = field(panel, "classes")
    classes.fill("a red bus\na pink cat\na blue spaceship")
    expect(panel.locator("td", has_text="a pink cat")).to_be_visible()
    expect(panel.get_by_text("never saw 'spaceship'")).to_be_visible()
    shown = panel.locator("img").get_attribute("src")
    slide(panel, "picture", ["ArrowRight"] * 3)
    expect(panel.locator("img")).not_to_have_attribute("src", shown)
    classes.fill("a dog, a dog")
    expect(alert(panel)).to_contain_text("are the same to the text tower")
    classes.fill("a dog, a boat")
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "own.png")
    shown = panel.locator("img").get_attribute("src")
    choose_file(panel, tmp_path / "own.png")
    expect(panel.locator("img")).not_to_have_attribute("src", shown)
    shares = [float(text.strip(" %")) for text in panel.locator("td:last-child").all_inner_texts()]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_tokens_while_one_types(panel):
    text = field(panel, "text")
    text.fill("")
    text.press_sequentially("a snowmen")
    expect(panel.locator("[title='position 3: word']")).to_contain_text("men␣")
    expect(panel.get_by_text("5 tokens; padding fills up to 77")).to_be_visible()
    text.fill("boat " * 100)
    expect(panel.get_by_text("its end was cut off")).to_be_visible()
    text.fill("two cats 🙂")
    expect(panel.get_by_text("has never seen")).to_be_visible()


def test_temperature_by_arrow_keys(panel):
    def largest():
        return max(float(text.strip(" %")) for text in panel.locator("td:last-child").all_inner_texts())

    slide(panel, "τ", ["End"])
    expect(panel.get_by_text("As uncertain as 8.0 equally likely captions")).to_be_visible()
    flat = largest()
    slide(panel, "τ", ["Home"])
    expect(panel.get_by_text("τ = 0.01;")).to_be_visible()
    assert flat < 15 < 90 < largest()
    slide(panel, "τ", ["ArrowRight"] * 20)
    expect(panel.get_by_text("τ = 0.1;")).to_be_visible()


def test_temperature_by_dragging(panel):
    handle = panel.locator(".noUi-handle, .ui-slider-handle").first
    box, before = handle.bounding_box(), panel.locator("td:last-child").first.inner_text()
    panel.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    panel.page.mouse.down()
    panel.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=5)
    panel.page.mouse.up()
    expect(panel.locator("td:last-child").first).not_to_have_text(before)


def test_freezing_changes_the_table(panel):
    policy = field(panel, "policy")
    policy.select_option("none")
    expect(panel.locator("tr", has_text="backbone")).to_contain_text("○ frozen")
    policy.select_option("all")
    expect(panel.locator("tr", has_text="text encoder")).to_contain_text("● trainable")
    expect(field(panel, "n blocks")).to_be_disabled()
    policy.select_option("last-n")
    field(panel, "n blocks").fill("99")
    field(panel, "n blocks").press("Enter")
    expect(alert(panel)).to_contain_text("whole number from 1 to")
    policy.select_option("head-only")
    expect(panel.locator("tr", has_text="projection head")).to_contain_text("● trainable")
    expect(alert(panel)).to_have_count(0)


def test_augmentation_by_ticks_and_seed(panel):
    picture = panel.locator("img")
    shown = picture.get_attribute("src")
    slide(panel, "seed", ["ArrowRight"])
    expect(picture).not_to_have_attribute("src", shown)
    for kind in ("crop", "jitter"):
        field(panel, kind).uncheck()
    expect(panel.get_by_text("augment = flip")).to_be_visible()
    field(panel, "flip").press(" ")  # the space bar ticks a box
    expect(panel.get_by_text("augment = none")).to_be_visible()


def test_map_by_mouse_and_by_keyboard(panel):
    points, tips = panel.locator(".clip475-point"), panel.locator(".clip475-tip")
    expect(points).to_have_count(120)
    assert panel.locator(".clip475-tip >> visible=true").count() == 0
    points.nth(3).focus()
    expect(tips.nth(3)).to_be_visible()
    panel.page.keyboard.press("Tab")
    expect(tips.nth(4)).to_be_visible()
    expect(tips.nth(3)).to_be_hidden()
    points.nth(100).hover(force=True)
    expect(tips.nth(100)).to_be_visible()
    expect(tips.nth(4)).to_be_hidden()  # one tip at a time
    field(panel, "find").fill("dog")
    field(panel, "find").press("Enter")
    expect(panel.get_by_text("points say “dog” and have a ring")).to_be_visible()
    slide(panel, "pictures", ["Home"])
    expect(points).to_have_count(6)
    slide(panel, "pictures", ["End"])
    expect(points).to_have_count(240)
    points.nth(10).focus()


def test_the_dark_theme_can_be_read(pages, shots):
    "Sheets and labels take the theme's own colours."
    for page in pages.values():
        page.bring_to_front()
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        expect(page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    for name in NAMES:
        panel = panel_in(pages, name)
        panel.page.bring_to_front()
        panel.screenshot(path=shots / f"{name}-dark.png")
        assert panel.evaluate(PALE) == [], name


# The texts of an element whose ink on the paper below has a contrast under WCAG's 4.5.
PALE = """panel => {
    const rgba = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number)
    const linear = v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4
    const weights = [.2126, .7152, .0722]
    const light = c => c.slice(0, 3).map(v => linear(v/255)).reduce((s, v, i) => s + v*weights[i], 0)
    const paper = n => rgba(getComputedStyle(n).backgroundColor)
    const below = n => n.parentElement && (paper(n)[3] ?? 1) === 0 ? below(n.parentElement) : n
    const contrast = e => {
        const pair = [rgba(getComputedStyle(e).color), paper(below(e))].map(light)
        const [a, b] = pair.sort((x, y) => y - x)
        return (a + .05)/(b + .05)
    }
    const text = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("")
    const words = e => /[\\p{L}\\d]/u.test(text(e)) && e.getClientRects().length && !e.disabled
    const pale = e => words(e) && contrast(e) < 4.5
    const elements = [...panel.querySelectorAll(":not(svg, svg *, style)")]
    return elements.filter(pale).map(e => `${text(e)}: ${contrast(e).toFixed(1)}`)
}"""
