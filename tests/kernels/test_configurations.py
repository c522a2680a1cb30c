"""Which configuration a kernel gets: tuned if it is there, whole, legal and compiles."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _compat, configurations
from pallas_kernels.block_sparse_attention import mosaic, mosaic_backward
from pallas_kernels.block_sparse_attention.chip import Problem
from pallas_kernels.block_sparse_attention.logits import Tiles
from pallas_kernels.block_sparse_attention.mosaic import Config
from pallas_kernels.block_sparse_attention.walk import Lists
from pallas_kernels.configurations import Entry, Key

SIZES = 64, 64, 64, 64  # block_q, block_kv, dim, v_dim
KEY = Key("forward", False, "Some GPU", "bfloat16", 64, 64, 64, 64)
DEFAULT = mosaic.default_config(Tiles(64, 64), 64, 64)
TUNED = dataclasses.replace(DEFAULT, stages=2)


def entry(key=KEY, tuned=TUNED, **changes):
    rows = [
        {"config": dataclasses.asdict(DEFAULT), "ms": 2.0},
        {"config": dataclasses.asdict(tuned), "ms": 1.0},
    ]
    return Entry(key, changes.pop("jax", jax.__version__), {"heads": 1}, rows, **changes)


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(configurations.VARIABLE, str(path))
    monkeypatch.setattr(configurations, "device_kind", lambda: KEY.device)
    configurations.forget()
    yield path
    configurations.forget()


def choose(trial=lambda config: None, key=KEY, default=DEFAULT):
    return configurations.chosen(
        key, default, lambda config: mosaic.layout_refusal(config, *SIZES), trial
    )


def test_a_tuned_configuration_is_read_once_and_compiled_once(file):
    configurations.write(file, [entry()])
    tried = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(tried.append) == TUNED
        file.unlink()
        assert choose(tried.append) == TUNED
    assert tried == [TUNED]


def test_another_key_keeps_its_default(file):
    configurations.write(file, [entry()])
    for field, value in (
        *(("operation", "d_q"), ("masked", True), ("dtype", "float16"), ("dim", 128)),
        *(("v_dim", 128), ("block_q", 128), ("block_kv", 128)),
    ):
        assert choose(key=KEY._replace(**{field: value})) == DEFAULT, field


def test_too_little_gained_is_the_default(file):
    slow = entry()
    slow.candidates[1]["ms"] = 2.0 * (1 - configurations.MARGIN)
    configurations.write(file, [slow])
    assert choose() == DEFAULT


def fails(config):
    raise RuntimeError("ptxas said no")


@pytest.mark.parametrize(
    ("written", "trial", "says"),
    [
        ("not json", None, "cannot be used .*Delete the file and run `jsparse tune`"),
        ('{"format": 0}', None, "its format is 1"),
        ("[]", None, "its format is 1"),
        ('{"format": 1, "entries": [{"key": {"what": 1}}]}', None, "not whole"),
        ([entry(key=KEY._replace(device="Another GPU"))], None, "for Another GPU, not for Some"),
        ([entry(jax="0.0.1")], None, "1 of the tuned .* another jax than"),
        ([entry()], fails, "does not compile: RuntimeError: ptxas said no"),
        ([entry(tuned=dataclasses.replace(TUNED, stages=99))], None, "bytes of shared memory"),
        ([entry(tuned=dataclasses.replace(TUNED, consumer_registers=236))], None, "multiples of 8"),
        ([entry(tuned=dataclasses.replace(TUNED, columns=96))], None, "columns must be 64 or 128"),
        ([entry(tuned=dataclasses.replace(TUNED, stages="2"))], None, "of other types"),
        ([entry(tuned=mosaic_backward.Config(0, 64, 240, 24))], None, "at least 1"),
    ],
)
def test_what_cannot_be_used_is_the_default_with_one_warning(file, written, trial, says):
    if isinstance(written, str):
        file.write_text(written)
    else:
        configurations.write(file, written)
    with pytest.warns(UserWarning, match=says) as caught:
        found = [choose(trial or (lambda config: None)) for _ in range(3)]
    assert found == [DEFAULT] * 3
    assert len(caught) == 1
    assert str(file) in str(caught[0].message)


def test_fields_of_another_version_are_the_default(file):
    configurations.write(file, [entry()])
    whole = json.loads(file.read_text())
    whole["entries"][0]["timed"][1]["config"]["warps"] = 4
    file.write_text(json.dumps(whole))
    with pytest.warns(UserWarning, match="other fields"):
        assert choose() == DEFAULT


def test_registers_are_shared_by_all_warpgroups():
    # two consumers and a producer are launched with 168 registers each, 504 of a lane in all
    sizes = 128, 128, 64, 64
    assert mosaic.layout_refusal(Config(2, 128, 240, 24), *sizes) is None
    assert "512 registers" in mosaic.layout_refusal(Config(2, 128, 240, 32), *sizes)
    # one consumer and a producer share twice as many each
    assert mosaic.layout_refusal(Config(2, 64, 240, 240), *SIZES) is None


@pytest.mark.parametrize("sizes", [(64, 64, 64, 64), (128, 128, 128, 128), (128, 64, 256, 256)])
def test_candidates_are_legal_differ_and_begin_with_the_default(sizes):
    for default, found, refusal in (
        (
            mosaic.default_config(Tiles(*sizes[:2]), *sizes[2:]),
            mosaic.FORWARD.candidates(*sizes),
            mosaic.layout_refusal,
        ),
        (
            mosaic_backward.default_config(*sizes),
            mosaic_backward.candidates(*sizes),
            mosaic_backward.layout_refusal,
        ),
    ):
        if default is None:
            assert found == ()
            continue
        assert found[0] == default
        assert len(set(found)) == len(found)
        assert not [c for c in found if refusal(c, *sizes)]


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv(configurations.VARIABLE, "")
    assert configurations.place() is None
    monkeypatch.delenv(configurations.VARIABLE)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configurations.place() == tmp_path / "jsparse" / "tuned.json"
    # there is none, and nobody named it: no warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == DEFAULT


def arrays():
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    zero = jnp.zeros((1, 1, 1), jnp.int32)
    return q, Lists(zero, zero, zero + 1)


def test_the_kernels_take_what_was_tuned_under_jit_and_grad(file, monkeypatch):
    taken = []
    monkeypatch.setattr(configurations, "compiles", lambda *arrays, **named: None)
    original = configurations.chosen

    def chosen(key, *rest, **callables):
        taken.append((key, original(key, *rest, **callables)))
        return taken[-1][1]

    monkeypatch.setattr(configurations, "chosen", chosen)
    backward = mosaic_backward.Config(1)
    keys = [KEY, KEY._replace(operation="d_q"), KEY._replace(operation="d_k_d_v")]
    found = [entry(), *(entry(key=key, tuned=backward) for key in keys[1:])]
    configurations.write(file, found)
    q, lists = arrays()
    tiles = Tiles(64, 64)
    with _compat.interpreter(detect_races=False):
        jax.eval_shape(lambda q: mosaic.FORWARD(q, q, q, lists, tiles), q)
        rows = jnp.zeros((1, 1, 64))
        problem = Problem(q, q, q, q, rows, rows)
        jax.eval_shape(lambda p: mosaic_backward.gradients(p, lists, lists, tiles), problem)
    assert taken == list(zip(keys, [TUNED, backward, backward], strict=True))


def test_one_that_really_does_not_compile_is_the_default_with_one_warning(file):
    if jax.default_backend() == "gpu":
        pytest.skip("here it compiles")
    configurations.write(file, [entry()])
    k, lists = arrays()

    def attention(q):
        return mosaic.FORWARD(q, k, k, lists, Tiles(64, 64))[0].sum()

    # the caller is inside two transformations, and its own kernel is for the interpreter
    with (
        _compat.interpreter(detect_races=False),
        pytest.warns(UserWarning, match="does not compile.*jsparse tune --again") as caught,
    ):
        jax.eval_shape(jax.jit(jax.vmap(attention)), k[None])
    assert len(caught) == 1


def test_a_trial_compiles_while_its_caller_is_traced():
    compiled = []

    def function(x):
        compiled.append(True)
        return jnp.sin(x)

    def traced(x):
        configurations.compiles(function, x)
        return x * x

    assert jax.jit(jax.grad(traced))(3.0) == 6.0
    assert compiled == [True]
