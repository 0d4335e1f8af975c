"""The first notebook in JupyterLab as a person uses it: Run All, then a slider is moved and the picture changes."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from chapters import NOTEBOOKS
from playwright.sync_api import Page, expect, sync_playwright

MINUTE = 60_000  # milliseconds
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # opens a dialog otherwise
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, seen or not
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A JupyterLab of its own on this machine only, with fresh settings and a copy of the notebook."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    shutil.copy(NOTEBOOKS["corpus"], home / "notebooks")
    for name, values in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root"]
    command += ["--expose-app-in-browser", "--IdentityProvider.token=", f"--ServerApp.root_dir={home / 'notebooks'}"]
    environment = os.environ | places | {"FEDHUBERT_OUTPUTS": str(home / "outputs")}
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            # Jupyter takes the next port where one is in use, and says here which it has.
            facts = home / "runtime" / f"jpserver-{process.pid}.json"
            while not _answers(facts):
                assert process.poll() is None, (home / "server.log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{json.loads(facts.read_text())['port']}"
        finally:
            process.terminate()
            process.wait(300)


def _answers(facts: Path) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{json.loads(facts.read_text())['port']}/api"):
            return True
    except (OSError, ValueError):  # not written yet, half written, not listening yet
        return False


@pytest.fixture
def page(server: str) -> Iterator[Page]:
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--headless=new"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(10 * MINUTE)
        expect.set_options(timeout=10 * MINUTE)
        page.goto(f"{server}/lab/tree/{NOTEBOOKS['corpus'].name}")
        yield page
        browser.close()


def test_run_all_and_move_a_slider(page: Page, tmp_path: Path):
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    status = page.locator(".jp-StatusBar-Right, #jp-main-statusbar", has_text="Idle")
    status.first.wait_for()
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    # The last cell has run, and no other waits or has failed.
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(x => x.textContent);
            const failed = document.querySelector('.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"]');
            return failed !== null || prompts.every(text => /\\[\\d+\\]/.test(text));
        }"""
    )
    errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()

    picture = page.locator("img.widget-image")
    browser = page.locator(".jp-OutputArea-output").filter(has=picture)
    words = browser.locator(".widget-html-content").first
    picture.scroll_into_view_if_needed()
    before, said = picture.get_attribute("src"), words.inner_text()
    utterance = browser.locator(".noUi-handle").first
    utterance.focus()
    utterance.press("ArrowRight")
    expect(picture).not_to_have_attribute("src", before)
    expect(words).not_to_have_text(said)

    speaker = browser.locator(".widget-dropdown select")
    before, name = picture.get_attribute("src"), speaker.locator("option").nth(1).inner_text()
    speaker.select_option(index=1)
    expect(picture).not_to_have_attribute("src", before)
    expect(words).to_contain_text(f"speaker {name}")
    assert page.locator("audio").count() >= 2, "sound to play"
    page.screenshot(path=tmp_path / "jupyterlab.png")
    assert picture.evaluate("image => image.naturalWidth") > 600
