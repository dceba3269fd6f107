"""What a test may leave behind on a GPU, and what it may not."""

import contextlib
import os
import sys
import warnings

import pytest
import torch

# PyTorch's own, once in a process, when the mode is set. Warnings are errors in tests: raised there, it would leave the
# mode set, and every later test of the process that reads a value would fail.
PROTOTYPE = "Synchronization debug mode is a prototype feature"


@contextlib.contextmanager
def without_waiting():
    """Whatever makes the host wait for the GPU raises RuntimeError; without a GPU there is nothing to wait for."""
    if not torch.cuda.is_available():
        yield
        return
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode("default")


def allow_waiting():
    """Takes back what `without_waiting` forbids."""
    if torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode() != 0:
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", PROTOTYPE, UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def end_after_an_error(config, test):
    """Ends the process where a kernel has failed: from then on every call of CUDA in it would raise the same error.

    A worker of pytest-xdist exits; a new one takes its place, and the test counts as failed. Without workers the run
    ends, with the reports of the tests so far.

    Args:
        config: pytest's.
        test: the name of the test that ran last.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{test}: the GPU is not usable any more in this process: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(1)
