"What several test modules share."

import pytest
import torch


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
