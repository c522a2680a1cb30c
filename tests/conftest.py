"""Every test is also a shape test: jsparse is imported through jaxtyping's hook."""

import collections
import gc
import importlib.metadata
import os
from pathlib import Path

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


def compile_quickly():
    """Takes XLA's former code generator, with few optimizations: it needs half the time.

    It also leaves each program in one piece: cut into 32 for as many threads, it takes a third
    more processor time. Tests compile much and compute little. The flags are for this process
    alone: XLA reads them once, and they are gone for what tests start.
    """
    given = os.environ.get("XLA_FLAGS")
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{quick} {given or ''}"
    jax.jit(lambda: 0)()
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


# later versions do not have it
if importlib.metadata.version("jaxlib").startswith("0.10."):
    compile_quickly()
install_import_hook("jsparse", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "standard")
# where in Python each operation came from takes a tenth of the time of a suite that compiles
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_include_full_tracebacks_in_locations", False)
# these see what users of the newest JAX see; others are compiled with few optimizations
OPTIMIZED = Path(__file__).parent / "attention"
# these ask what is computed, by oracles and by hand; whether a JAX computes it is asked of every
# method by the contract suite, and of every executor
NUMBERS = "cache core evaluation masks methods planning types".split()
# of a test's cases that run on one JAX, so many there for each one on another
CASES_PER_CASE = 4


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow cases too")


def pytest_collection_finish():
    # what is imported stays, and looking for cycles in all that JAX traces takes its time
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(config, items):
    has_gpu = jax.default_backend() == "gpu"
    # jax 0.10 interprets GPU kernels several times slower than later versions; and what depends
    # on no version need not run on two
    old = jax.__version_info__ < (0, 11)
    cases = collections.Counter()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; pass --slow"))
        if "newest" in item.keywords and old and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="runs on later versions; pass --slow"))
        of_numbers = item.path.relative_to(Path(__file__).parent).parts[0] in NUMBERS
        of_numbers |= "numbers" in item.keywords
        if of_numbers and not old and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="runs on jax 0.10; pass --slow"))
        of_both = not {"newest", "slow"} & set(item.keywords)
        if of_both and not old and not config.getoption("--slow"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % CASES_PER_CASE:
                item.add_marker(pytest.mark.skip(reason="runs on jax 0.10; pass --slow"))
            cases[test] += 1
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def without_shape_checks():
    """Wrong types reach jsparse's own checks, as they do for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Says how a module is compiled, and drops what it had compiled.

    Each program maps some memory, and a process may have 65,530 mappings on Linux: XLA crashes when
    thousands of programs have used them up.
    """
    optimized = jax.__version_info__ >= (0, 11) and request.path.is_relative_to(OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.clear_caches()
