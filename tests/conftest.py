"""One thread, no network, no progress bars: the same numbers and the same speed on every machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads of other workers need the processor

import logging

import pytest
import torch
from diffusers.utils import logging as diffusers_logging

torch.set_num_threads(1)
diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _no_leak_of_grad_mode():
    """A test that leaves gradients switched off would hide a missing no_grad in the next."""
    before = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() is before
