"One thread each, quiet, and never a file in the checkout's own outputs."

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GLA_NB_QUIET"] = "1"
os.environ.pop("IN_TEST", None)  # nbdev's commands would do nothing, silently
# Set before any test module is imported; single tests may choose a folder of their own.
OUTPUTS = tempfile.TemporaryDirectory(prefix="gla_nb_tests_")
os.environ["GLA_NB_OUTPUTS"] = OUTPUTS.name

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_unconfigure(config):
    OUTPUTS.cleanup()
