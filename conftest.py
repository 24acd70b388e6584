"""Shared by every test and by nbval: what runs where no GPU is seen, and what fails.

Every test starts from the same random numbers, and what it allocates is poisoned.
"""

import atexit
import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.inputs import poison_empty

# A notebook's kernel inherits these: it would not draw inline, or print in colour or in the
# width of this terminal.
for name in ("MPLBACKEND", "FORCE_COLOR", "CLICOLOR_FORCE", "PYTHON_COLORS", "COLUMNS"):
    os.environ.pop(name, None)

# The same examples on every run and every machine: one that fails, fails again.
hypothesis.settings.register_profile("same", derandomize=True, database=None)
hypothesis.settings.load_profile("same")


def pytest_sessionstart(session):
    """`make gpu` must fail, rather than skip, where no GPU is seen."""
    if os.environ.get("RCM_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        pytest.exit("RCM_REQUIRE_GPU=1, but torch sees no CUDA device", returncode=3)


def pytest_collection_modifyitems(items):
    """Without a GPU, skip tests marked `gpu` and notebook cells tagged `gpu`."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        cell = getattr(item, "cell", None)  # an nbval item holds its notebook cell
        tags = cell.metadata.get("tags", []) if cell is not None else []
        if "gpu" in tags or item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_configure(config):
    """A notebook's kernel talks to its test through files. By TCP, a port that was free when
    it was chosen may be another kernel's when it is bound, if many start at the same time."""
    if not config.pluginmanager.has_plugin("nbval"):
        return
    import nbval.kernel
    from jupyter_client.manager import KernelManager

    def manager(**options):
        folder = tempfile.TemporaryDirectory(prefix="rcmlib-")
        atexit.register(folder.cleanup)
        return KernelManager(transport="ipc", ip=f"{folder.name}/kernel", **options)

    nbval.kernel.KernelManager = manager


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """--dist loadscope: a worker gets a whole notebook, or one test with all its parameters."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            notebook, cell, _ = nodeid.rpartition("::Cell ")
            return notebook if cell else nodeid.split("[")[0]

    return Scheduler(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test draws what it draws alone, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_outputs():
    """An element of its output that a kernel does not write is NaN, not what was there."""
    with pytest.MonkeyPatch.context() as patch:
        poison_empty(patch)
        yield


@pytest.fixture(scope="session")
def device() -> str:
    """Where a test puts its tensors: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu_memory():
    """For a test that wants gigabytes on the GPU: such tests take turns, of all workers too."""
    import fcntl

    with Path(tempfile.gettempdir(), "rcmlib-gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()  # a worker would keep what it has freed
