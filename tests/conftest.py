"""What every test shares: seeds to repeat a failure from, no tuned configurations, FlashInfer."""

# SPDX-License-Identifier: Apache-2.0
import random

import hypothesis
import pytest

hypothesis.settings.register_profile("nvfp4", deadline=None, print_blob=True)
hypothesis.settings.load_profile("nvfp4")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads the option
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = random.SystemRandom().randrange(2**32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"hypothesis: repeat with --hypothesis-seed={config.option.hypothesis_seed}"


@pytest.fixture(scope="session", autouse=True)
def no_tuned_configurations(tmp_path_factory):
    """Nothing here depends on what was measured on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVFP4_MOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def flashinfer():
    """The installed FlashInfer, for its helpers that run on the CPU."""
    reason = "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')"
    return pytest.importorskip("flashinfer", reason=reason)
