"""Every test is also a shape test: jsparse is imported through jaxtyping's hook."""

import contextlib
import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX's interpreter of GPU kernels has a thread for each warpgroup, and these wait for each other:
# for ever, where XLA's pool has as few as there are cores
os.environ.setdefault("NPROC", "8")
# nor what somebody tuned on this machine
os.environ["JSPARSE_TUNED"] = ""

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# tests compile much and compute little: XLA's former code generator, with few optimizations, takes
# half the time. Later versions have it no more; with them the tests see what users see
COMPILE_QUICKLY = importlib.metadata.version("jaxlib").startswith("0.10.")


@contextlib.contextmanager
def xla_flags(flags: str):
    """Flags for this process alone: XLA reads them once, and they are gone for what it starts."""
    given = os.environ.get("XLA_FLAGS")
    os.environ["XLA_FLAGS"] = f"{given or ''} {flags}"
    yield
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


with xla_flags("--xla_cpu_use_fusion_emitters=false" if COMPILE_QUICKLY else ""):
    jax.jit(lambda: 0)()
jax.config.update("jax_disable_most_optimizations", COMPILE_QUICKLY)

install_import_hook("jsparse", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "standard")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow cases too")


def pytest_collection_modifyitems(config, items):
    has_gpu = jax.default_backend() == "gpu"
    # jax 0.10 interprets GPU kernels several times slower than later versions
    old_interpreter = jax.__version_info__ < (0, 11)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; pass --slow"))
        if "slow_interpreter" in item.keywords and old_interpreter:
            if not config.getoption("--slow"):
                item.add_marker(pytest.mark.skip(reason="slow on this jax; pass --slow"))
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def without_shape_checks():
    """Wrong types reach jsparse's own checks, as they do for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
