# SPDX-License-Identifier: MIT OR Apache-2.0
"""These tests need a GPU and libmlstm.so alone: no Python binding of the library."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
