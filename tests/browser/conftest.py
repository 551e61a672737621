"JupyterLab on a copy of the notebooks, and a Chromium to use it with."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic"),
]
LAB_FLAGS = [
    *("--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"),
    # Neither news, nor updates, nor lists of extensions are asked for.
    *("--LabApp.news_url=", "--LabApp.extension_manager=readonly"),
    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
]
MINUTE = 60_000  # milliseconds, the longest wait for anything but a run of cells
expect.set_options(timeout=MINUTE)
SCREENSHOTS = Path(tempfile.mkdtemp(prefix="gla_nb_screenshots_"))


def pytest_configure():
    "A test run that is ended by `kill` ends its server and its browser, as after Control-C."
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"Screenshots: {SCREENSHOTS}")


def find_chromium() -> str:
    "The browser that `CHROMIUM` names, or that of the system. Nothing is ever downloaded."
    named = os.environ.get("CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "/usr/bin/chromium"]
    for name in names:
        if shutil.which(name):
            return shutil.which(name)
    pytest.exit(
        f"No Chromium ({', '.join(names)}). Install one (Debian, Ubuntu: apt install chromium), "
        "or name it: make test-browser CHROMIUM=/path/to/chromium",
        returncode=1,
    )


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    "A repository of its own with our notebooks, in which nbdev's hooks are installed."
    folder = tmp_path_factory.mktemp("browser") / "checkout"
    skipped = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=skipped)
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "gla_nb").mkdir()  # nbdev wants it; imports find the package of the real checkout
    home = folder.parent / "home"  # the hooks are written to ~/.jupyter
    home.mkdir()
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    hooks = Path(sys.executable).with_name("nbdev_install_hooks")
    subprocess.run([hooks], cwd=folder, env=os.environ | {"HOME": str(home)}, check=True)
    return folder


@pytest.fixture(scope="session")
def lab(checkout):
    "A running JupyterLab: its `url`, its `token`, the `checkout` it works in, its `log`."
    home = checkout.parent / "home"
    disabled = {"@jupyterlab/apputils-extension:announcements": True}
    write(home / ".jupyter/labconfig/page_config.json", {"disabledExtensions": disabled})
    tracker = ".jupyter/lab/user-settings/@jupyterlab/notebook-extension/tracker"
    # All cells are in the page, not only those on the screen.
    write(home / f"{tracker}.jupyterlab-settings", {"windowingMode": "none"})
    token = os.urandom(16).hex()
    environment = {k: v for k, v in os.environ.items() if k != "GLA_NB_QUIET"} | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(home / ".jupyter"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": str(ROOT),
    }
    # Otherwise the first notebook says that a font cache is being built.
    fonts = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(fonts, env=environment, check=True, capture_output=True, timeout=120)
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *LAB_FLAGS],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group, which ends with its kernels
    )
    log, ready = [], threading.Event()

    def read():
        for line in process.stdout:
            log.append(line)
            if re.search(r"http://127\.0\.0\.1:\d+/lab", line):
                ready.set()
        ready.set()  # it ended

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait(timeout=90)
        found = re.search(r"http://127\.0\.0\.1:\d+", "".join(log))
        assert found and process.poll() is None, "JupyterLab did not start:\n" + "".join(log)
        yield SimpleNamespace(url=found[0], token=token, checkout=checkout, log=log)
    finally:
        end(process)


def end(process):
    "End a process group: politely, and after 20 seconds for certain."
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=20)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def browser():
    executable = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture
def page(browser, lab, request):
    "A page on JupyterLab. No request may leave this machine; a picture is kept of its end."
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    context.set_default_timeout(MINUTE)
    page, elsewhere = context.new_page(), []

    def watch(route):
        if route.request.url.startswith((lab.url, "data:", "blob:")):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    context.route("**/*", watch)
    try:
        yield page
        assert not elsewhere, "JupyterLab went to the network"
    finally:
        page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
        context.close()
