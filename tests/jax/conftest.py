# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every test body runs per device, on inputs that differ from run to run. The CPU counts as eight
devices."""

import os
import random

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# torch wants its share of the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)

SEED = int(os.environ.get("MLSTM_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header():
    return f"MLSTM_TEST_SEED={SEED} (set it to repeat this run), jax {jax.__version__}"


def devices(platform):
    """Those of a platform, or none."""
    try:
        return jax.devices(platform)
    except RuntimeError:
        return []


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the test runs: its name, as torch has it."""
    if not devices(request.param):
        pytest.skip("no CUDA device")
    with jax.default_device(devices(request.param)[0]):
        yield request.param
