"""What every test shares. Builders of tiny models and inputs are in `tiny.py`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    """One thread (tests run side by side) and the same random numbers whatever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
