"What several test modules share."

import signal

import pytest
import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so does every process that they
# start; some tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread():
    """Small tensors gain nothing from threads, and lose much on a busy machine.

    Not for every test by itself: a test that compares bits with a fixture of its module needs the threads of
    that one.
    A module asks for it with `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def notes_are_new():
    "A note is written once in a process; here once in a test, since folders of two tests may have one path."
    from clip475.core.files import _note_once

    _note_once.cache_clear()


@pytest.fixture(scope="session")
def save_random_run():
    "A function that writes a run folder of the preset tiny with random weights, single fields changed."
    from clip475.core.config import LabConfig
    from clip475.models.joint import build_model, save_model

    def save(folder, **changes):
        config = LabConfig.from_preset("tiny", **changes)
        torch.manual_seed(475)
        return save_model(build_model(config), config, folder)

    return save


_SLOWEST = (
    "distributed",
    "handin",
    "run",
    "experiments",
    "course",
    "kill",
    "ablation",
    "hostile",
    "export",
    "hub",
)


def pytest_collection_modifyitems(items):
    "The slowest files first, so that no process is left with one of them at the end."
    place = {f"test_{name}.py": number for number, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
