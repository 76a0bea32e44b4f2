"""Nothing is skipped that was to be run: with `DARTS_REQUIRE_ALL=1` a test that would be skipped fails.

Nothing fails for being slow: examples have no deadline. A test that leaves something behind fails: see `leaks`. What
several tests of a module share is looked for at its end.
"""

import contextlib
import importlib.util
import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

from tests.support.leaks import MARK, Belongings, belongings, left_since

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_BEFORE = pytest.StashKey[Belongings]()


def pytest_configure() -> None:
    """Refuse to start where vLLM has to be there and is not."""
    if _require_all() and importlib.util.find_spec("vllm") is None:
        raise pytest.UsageError(
            "DARTS_REQUIRE_ALL is 1, but vLLM is not installed, so its tests would be skipped; install it as the "
            "README says, or unset the variable"
        )


def _require_all() -> bool:
    return os.environ.get("DARTS_REQUIRE_ALL") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped fails where everything is to be run."""
    report = yield
    if report.skipped and _require_all() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"DARTS_REQUIRE_ALL is 1, but {item.nodeid} would be skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _own_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Temporary files go where nobody else's are; whatever is started says whose it is."""
    _put_temporary_files(tmp_path_factory.mktemp("temporary"))
    os.environ[MARK] = str(os.getpid())
    uvloop.new_event_loop().close()  # the first makes a pipe for signals, which stays


@pytest.fixture(autouse=True)
def _hears_the_end_of_its_terminal() -> None:
    """Under nohup, and after a run in this process that has ended, SIGHUP is ignored: a test is not to see that."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_a_module_is_left(request: pytest.FixtureRequest) -> Generator[None]:
    before = belongings()
    if not request.module.__name__.startswith("tests.generator.vllm"):
        yield
        _assert_nothing_is_left(before)
        return
    with _scratch():
        yield
    before.descriptors["pipe"] += (
        2  # vLLM keeps what it started its first engine core with, and the end of it, for ever
    )
    _assert_nothing_is_left(before)


@contextlib.contextmanager
def _scratch() -> Generator[None]:
    """vLLM leaves the files of its sockets behind, however it ends: in a run the supervisor removes them."""
    outside = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="darts-", dir="/tmp", ignore_cleanup_errors=True
    ) as scratch:  # a short path
        _put_temporary_files(Path(scratch))
        yield
        _put_temporary_files(Path(outside))


def _put_temporary_files(directory: Path) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Look what is there before a test."""
    if MARK in os.environ:
        item.stash[_BEFORE] = belongings()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """And after it, once its fixtures are gone."""
    result = yield
    if not _shares(item) and _BEFORE in item.stash:
        _assert_nothing_is_left(item.stash[_BEFORE])
    return result


def _shares(item: pytest.Item) -> bool:
    """Whether a test has something in common with others of its module."""
    assert isinstance(item, pytest.Function)
    own = Path(__file__).parent
    definitions = [fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    return any(
        fixture.scope != "function"
        and fixture.argname not in (_own_place.__name__, _nothing_of_a_module_is_left.__name__)
        for fixture in definitions
        if own in Path(fixture.func.__code__.co_filename).parents
    )


def _assert_nothing_is_left(before: Belongings) -> None:
    left = left_since(before)
    assert not left, "left behind: " + "; ".join(left)
