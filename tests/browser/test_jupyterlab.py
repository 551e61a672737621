"""Notebooks in JupyterLab, opened, run and saved in a browser as a person does it.

`make test-browser` runs this; an ordinary run of pytest leaves it out, since it needs a Chromium.
"""

import json
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 60_000  # milliseconds
ERRORS = ", ".join(
    f'.jp-RenderedText[data-mime-type="application/vnd.jupyter.{kind}"]'
    for kind in ("stderr", "error")
)
# Notes each text that an output has while the cells run.
WATCH = """() => {
    window.texts = []
    const note = () => {
        for (const output of document.querySelectorAll('.jp-OutputArea-output')) {
            const text = output.innerText.trim()
            if (!window.texts.includes(text)) window.texts.push(text)
        }
    }
    const options = {subtree: true, childList: true, characterData: true}
    new MutationObserver(note).observe(document.querySelector('.jp-Notebook'), options)
}"""
# Notes each width that the bar of the widgets has while a lifetime runs.
WATCH_BAR = """() => {
    window.widths = []
    const bar = document.querySelector('.widget-hprogress .progress-bar')
    const note = () => window.widths.push(bar.style.width)
    new MutationObserver(note).observe(bar, {attributes: true, attributeFilter: ['style']})
}"""
# Every code cell has a number, none waits or runs; or an error has ended the run.
FINISHED = """([errors, count]) => {
    if (document.querySelector(errors)) return true
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
    const done = prompts.filter(prompt => /^\\[\\d+\\]:$/.test(prompt.innerText.trim()))
    return done.length == count
}"""


def code_cells(name):
    document = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return sum(cell["cell_type"] == "code" for cell in document["cells"])


def open_notebook(page, lab, name):
    "Open a notebook, and wait for all of its cells and for a kernel that is connected."
    page.goto(f"{lab.url}/lab/tree/nbs/{name}.ipynb?reset&token={lab.token}")
    expect(page.locator(".jp-CodeCell .jp-InputPrompt")).to_have_count(code_cells(name))
    wait_for_kernel(page)


def wait_for_kernel(page):
    "Until the status bar says that the kernel does nothing; the toolbar says so before it starts."
    page.locator("#jp-main-statusbar").get_by_text("(ipykernel) | Idle").wait_for()


def run_all(page, name):
    "Run > Run All Cells, and wait for the last; returns the texts that outputs had meanwhile."
    page.evaluate(WATCH)
    page.get_by_role("menubar").get_by_text("Run", exact=True).click()
    page.get_by_role("menuitem").filter(has_text="Run All Cells").first.click()
    page.wait_for_function(FINISHED, arg=[ERRORS, code_cells(name)], timeout=4 * MINUTES)
    wait_for_kernel(page)
    assert page.locator(ERRORS).all_inner_texts() == []
    return page.evaluate("window.texts")


def save(page):
    "Save with the keyboard, and wait for the server's word that it has the file."
    stored = "/api/contents/nbs/"
    with page.expect_response(lambda r: stored in r.url and r.request.method == "PUT") as saved:
        page.keyboard.press("Control+s")
    assert saved.value.ok


def picture_widths(pictures):
    return [picture.evaluate("image => image.naturalWidth") for picture in pictures.all()]


def without_outputs(path):
    document = json.loads(path.read_text(encoding="utf-8"))
    for cell in document["cells"]:
        cell.pop("outputs", None)
    return document


def output_kinds(path):
    "What each cell shows: `stream`, or the kinds of data. Displays of progress are left out."
    kinds = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        shown = [o.get("data", {o["output_type"]: None}) for o in cell.get("outputs", [])]
        kinds.append([sorted(data) for data in shown if set(data) != {"text/plain"}])
    return kinds


def check_saved(lab, name):
    """The saved notebook is the committed one, but for its outputs.

    Those have times in their lines of progress, and numbers that depend on the processor.
    """
    saved, committed = (folder / "nbs" / f"{name}.ipynb" for folder in (lab.checkout, ROOT))
    assert without_outputs(saved) == without_outputs(committed)
    before = saved.read_bytes()
    clean = Path(sys.executable).with_name("nbdev_clean")
    subprocess.run([clean], cwd=lab.checkout, check=True, timeout=120)
    assert saved.read_bytes() == before, "the hook left something for nbdev_clean to do"


def test_the_quickstart_runs_and_is_saved_clean(page, lab):
    open_notebook(page, lab, "30_quickstart")
    texts = run_all(page, "30_quickstart")
    progress = [text for text in texts if "of 400 interactions in 16 lifetimes" in text]
    assert len(progress) >= 3, f"the display of progress did not move: {texts}"
    picture = page.locator(".jp-OutputArea-output img")
    (width,) = picture_widths(picture)
    assert width > 300
    picture.scroll_into_view_if_needed()
    save(page)
    check_saved(lab, "30_quickstart")
    kinds = [output_kinds(folder / "nbs/30_quickstart.ipynb") for folder in (lab.checkout, ROOT)]
    assert kinds[0] == kinds[1]


def test_the_button_shows_a_lifetime_its_attention_and_a_film(page, lab):
    "Nobody presses it when the notebook is committed: its outputs there are of another kind."
    open_notebook(page, lab, "32_watch")
    run_all(page, "32_watch")
    page.evaluate(WATCH_BAR)
    button = page.get_by_role("button", name="Run", exact=True).and_(page.locator(".widget-button"))
    button.click()
    pictures = page.locator(".widget-output img")
    expect(pictures).to_have_count(3)  # the curve, the attention, the film
    expect(button).to_be_enabled()
    wait_for_kernel(page)
    assert all(width > 300 for width in picture_widths(pictures))
    assert pictures.last.get_attribute("src").startswith("data:image/webp")
    widths = page.evaluate("window.widths")
    assert len(widths) >= 3 and widths[-1] == "100%", f"the bar did not move: {widths}"
    assert page.locator(ERRORS).all_inner_texts() == []
    pictures.first.scroll_into_view_if_needed()
    save(page)
    check_saved(lab, "32_watch")
