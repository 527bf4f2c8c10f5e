# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every test body runs per device, on inputs that differ from run to run, and with memory that is
poisoned (NaN) before it is written."""

import os
import random

import pytest
import torch

SEED = int(os.environ.get("MLSTM_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header():
    return f"MLSTM_TEST_SEED={SEED} (set it to repeat this run), torch {torch.__version__}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)
    random.seed(SEED)


# The oracle is made of tiny operations; threads only slow it down.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills new tensors with NaN, and so also every output and workspace of the library."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
