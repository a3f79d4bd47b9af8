"""One thread unless told, no network, no progress bars: the same speed on every machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads of other workers need the processor

import gc
import logging
import math

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import HealthCheck, settings

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)
# a machine that is busy may stop for a second anywhere; new examples are looked for in `make test-slow`
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("patient", patient, derandomize=True, database=None)
settings.register_profile("searching", patient, max_examples=2000)
settings.load_profile("patient")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One worker more than there are processors, as tests wait for ranks and a browser; two more gained nothing."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    from fastdiff.threads import processor_quota, processors

    return math.ceil(min(processors(), processor_quota() or processors())) + 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="of torch, in every worker; see scripts/test_machines.py")


def pytest_collection_finish() -> None:
    """What was imported lives to the end: a collection by a test need not look at its half a million objects."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(autouse=True, scope="session")
def _clock_stands_still():
    """No test's outcome goes by the time that something took: of equal candidates the quantized layer is chosen."""
    from fastdiff.quant import timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed, "seconds", lambda run, device: 1.0)
        yield


@pytest.fixture(autouse=True)
def _no_leak_of_grad_mode():
    """A test that leaves gradients switched off would hide a missing no_grad in the next."""
    before = torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled() is before
