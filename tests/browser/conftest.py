"""One JupyterLab on loopback and one Chromium for all tests of this folder.

Nothing of the user's own Jupyter is read or written, and both end with the tests. Pictures of what the
browser showed lie in pytest's temporary folder, or in the folder that `BROWSER_SHOTS` names."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def missing():
    "What is not here, and how to get it; None if all is."
    if CHROMIUM is None:
        return (
            "there is no Chromium; install it (on Debian and Ubuntu: apt install chromium fonts-dejavu-core)"
        )
    for name in ("playwright", "jupyterlab", "ipywidgets"):
        if importlib.util.find_spec(name) is None:
            return f"there is no {name}; pip install 'clip475[browser]'"


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not missing():
        return
    for item in here:
        item.add_marker(pytest.mark.skip(reason=missing()))


def stop(process):
    "End the server, which ends its kernels; one that does not listen is killed, and the kernels notice."
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def own_environment(home):
    "Folders of their own for all that Jupyter and the lab keep."
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
        "CLIP475_CACHE": "cache",
        "HF_HOME": "hub",
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IN_TEST"))}
    return (
        env
        | {name: str(home / place) for name, place in places.items()}
        | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
    )


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory):
    "Address and folder of a JupyterLab that serves that folder."
    home, work = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work")
    log = open(home / "log.txt", "w")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",  # any that is free
        f"--ServerApp.root_dir={work}",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True",
    ]
    setting(
        home, "notebook-extension/tracker", windowingMode="none", recordTiming=False
    )  # all cells stay in the page
    setting(home, "apputils-extension/notification", fetchNews="false", checkForUpdates=False)
    process = subprocess.Popen(
        command,
        env=own_environment(home),
        cwd=work,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield wait_for_address(home, process), work
    finally:
        stop(process)
        log.close()


def setting(home, plugin, **values):
    file = home / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def wait_for_address(home, process):
    "The address that JupyterLab writes down when it listens."
    while process.poll() is None:
        for file in (home / "runtime").glob(f"jpserver-{process.pid}.json"):
            with suppress(OSError, ValueError):  # it is just being written, or does not answer yet
                address = f"http://127.0.0.1:{json.loads(file.read_text())['port']}"
                urllib.request.urlopen(f"{address}/api", timeout=60).read()
                return address
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{(home / 'log.txt').read_text()[-2000:]}")


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("BROWSER_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


NOTEBOOKS = ("03_panels", "04_teaching_panels")


def open_notebook(context, address, name):
    page = context.new_page()
    page.set_default_timeout(600_000)
    page.add_locator_handler(
        page.get_by_text("Select Kernel", exact=True),
        lambda _: page.locator(".jp-Dialog .jp-mod-accept").click(),
    )
    page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb")
    page.get_by_text("| Idle").wait_for()
    return page


@pytest.fixture(scope="session")
def pages(jupyterlab, browser):
    "The notebooks' name → page: copied, open, and run from top to bottom in JupyterLab."
    address, work = jupyterlab
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    for name in NOTEBOOKS:
        shutil.copy(ROOT / "nbs/lib/app" / f"{name}.ipynb", work)
    pages = {name: open_notebook(context, address, name) for name in NOTEBOOKS}
    run_all(pages.values())
    return pages


def run_all(pages):
    "Run every cell of each notebook, all of them at once, and wait until they are done."
    for page in pages:
        page.evaluate(
            "{ window.ran = null;"
            " jupyterapp.commands.execute('notebook:run-all-cells').then(() => ran = true) }"
        )
    for page in pages:
        page.wait_for_function("ran", timeout=1_200_000)


@pytest.fixture(scope="session")
def lesson(jupyterlab, browser):
    "A function that copies a student's lesson, opens it in JupyterLab, and runs it from top to bottom."
    address, work = jupyterlab
    context = browser.new_context(viewport={"width": 1400, "height": 1000})

    def open_lesson(name):
        shutil.copy(ROOT / "nbs" / "course" / f"{name}.ipynb", work)
        page = open_notebook(context, address, name)
        run_all([page])
        return page

    return open_lesson
