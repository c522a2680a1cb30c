"""What methods and searches do unless told otherwise, against the specification of each.

One table for all: what is only a value is the specification's own. Where the default is another on
purpose, `Other` has the sentence of the docstring that says so; what the specification knows
nothing of is `Added`.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.core import pooling
from jsparse.masks.moa import span
from jsparse.masks.powerattention import powers_of_two
from jsparse.masks.s2_attention import sharded_blocks
from jsparse.planning import patterns, rules, scale_factors, search_scale_factors, search_thresholds
from jsparse.planning.pareto import Program, pareto_front


class Other(NamedTuple):
    """A default of our own in the place of the specification's `theirs`, and where it is said."""

    value: Any
    theirs: Any
    said: str


class Added(NamedTuple):
    """The default of an argument that the specification does not have."""

    value: Any


HANDED_ON = {"source": Added(""), "partial": Added(None)}

# the sections named are those of each specification
DEFAULTS = {
    # minference: "Parameters and defaults"
    js.minference: {
        "patterns": js.VerticalSlash(vertical_size=1000, slash_size=6096),  # "(fallback)"
        "minference_ratio": 1.0,
        "block_size": 64,
        "last_q": 64,
        "forced_vertical": 30,
        "forced_slash": 100,
        "width": Added(None),
    },
    js.AShape: {"n_init": 100, "n_local": 800},
    js.VerticalSlash: {"vertical_size": 1000, "slash_size": 6096},
    js.BlockSparse: {"top_k": 100},
    # minference: "Algorithm", plan
    patterns.search_patterns: {
        "candidates": Other(None, "one size of each", "tried at smaller sizes too"),
        "budget": Added(0.25),
        "start": 2500,
        "score": patterns.kept_mass,  # "Code v1"
        **HANDED_ON,
    },
    # pbs-attn: "Parameters and defaults"
    js.pbs_attn: {
        "block_size": 128,
        "segment_size": None,  # two blocks: see below
        "threshold": 0.9,
        "force_first_block": True,
        "query_pool": pooling.mean_blocks,
        "key_pool": pooling.mean_blocks,
        "share_in_group": Other(False, "per query head", "`share_in_group` is not in the paper"),
        "width": Added(None),
    },
    # blasst: "Parameters and defaults", prefill and decoding of the emulation
    js.blasst: {
        "threshold": 1e-3,
        "decode_threshold": 1e-4,
        "scale_factor": None,
        "decode_scale_factor": None,
        "calibration": Other(None, "one of the model", "may differ by head"),
        "target_sparsity": 0.5,
        "block_q": 128,
        "block_kv": 128,
    },
    # blasst: "Algorithm", plan
    search_scale_factors: {
        "target_sparsity": 0.5,
        "lengths": Other(None, "24 prompts, 4 lengths up to 32768", "Any captured text serves"),
        "thresholds": scale_factors.THRESHOLDS,
        "block_size": 128,
        **HANDED_ON,
    },
    # gna: "Parameters and defaults"; tiles: see below
    js.gna: {
        "grid": Other(None, "given", "Grid and window may be left out"),
        "window": Other(None, "given", "Grid and window may be left out"),
        "stride": 1,
        "dilation": 1,
        "is_causal": False,
        "q_tile": None,
        "kv_tile": None,
    },
    # fna: the same
    js.fna: {
        "grid": Other(None, "given", "Grid and window may be left out"),
        "window": Other(None, "given", "Grid and window may be left out"),
        "dilation": 1,
        "is_causal": False,
        "q_tile": None,
        "kv_tile": None,
    },
    js.masks.neighborhood: {"stride": 1, "dilation": 1, "is_causal": False},
    # s2-attention: "Parameters and defaults", where Phi-3-small's and the paper's are given
    js.s2_attention: {
        "block_size": 64,
        "local_blocks": Other(16, "1 or 8 in the paper", "The defaults are those of Phi-3-small"),
        "vert_stride": Other(8, "15 in the paper", "The defaults are those of Phi-3-small"),
        "head_sliding_step": None,  # max(1, vert_stride // heads): see below
        "head_sliding_offset": 0,
        "num_dense_heads": 0,
        "homo_head": False,
    },
    sharded_blocks: {
        "head_sliding_step": None,
        "head_sliding_offset": 0,
        "num_dense_heads": 0,
        "homo_head": False,
        "offset": Added(None),
    },
    # powerattention: "Parameters and defaults"
    js.powerattention: {"block_size": 256, "window_size": 5, "num_sink_blocks": 1},
    powers_of_two: {"num_sink_blocks": 1, "offset": Added(None)},
    # moa: "Parameters and defaults"
    js.moa: {
        "rules": Other(0.5, "one per head, found", "all heads see half of the length"),
        "num_sink": 64,
        "min_span": 128,
        "block_size": 64,
        "max_new_tokens": Other(0, 1024, "so `max_new_tokens` is 0 by default"),
    },
    js.ElasticRule: {"alpha": Added(0), "beta": Added(0.5)},
    span: {"num_sink": 64, "min_span": 128, "block_size": 64},
    rules.elastic_rules: {"interval": 1024, "num_betas": 9},
    rules.search_rules: {
        "density": 0.5,
        "extended": None,  # twice the longest profiled: 16384 of 8192
        "interval": 1024,
        "num_betas": 9,
        "ranges": 4,
        "least_spent": 0.9,
        "most_rules": 2,
        "share_in_group": False,
        "block_size": 64,
        "time_limit": Other(60.0, "none", "may be stopped by `time_limit`"),
        "loss": Other(None, "the model's", "by the first-order estimate on `held_out`"),
        **HANDED_ON,
    },
    Program: {"least_spent": 0.9, "most_rules": 2},
    pareto_front: {"ranges": 4, "solve": Added(None)},
    # xattention: "Parameters and defaults", estimate
    js.xattention: {
        "stride": 16,
        "block_size": 128,
        "threshold": 0.9,
        "norm": 1.0,
        "width": Added(None),
    },
    # xattention: "Algorithm", plan
    search_thresholds: {"coverage": 0.9, "stride": 16, "block_size": 128, **HANDED_ON},
}
NAMES = [each.__name__ for each in DEFAULTS]


@pytest.mark.parametrize("function", DEFAULTS, ids=NAMES)
def test_defaults_are_those_of_the_specification_or_said_to_be_others(function):
    given = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    # what reports on the way, and what solves, are functions that no value describes
    functions = {"progress", "solve"}
    listed = DEFAULTS[function]
    assert {*given} - functions == {*listed} - functions
    for name in {*listed} - functions:
        expected = listed[name]
        expected = expected.value if isinstance(expected, (Other, Added)) else expected
        assert (given[name], type(given[name])) == (expected, type(expected)), name


def differences(function):
    """What a docstring has under 'Differs from the paper', in one line."""
    text = inspect.getdoc(function) or ""
    _, found, rest = text.partition("Differs from the paper:\n")
    return " ".join(rest.split("\n\n")[0].split()) if found else ""


@pytest.mark.parametrize("function", DEFAULTS, ids=NAMES)
def test_other_defaults_are_said_where_they_differ(function):
    for name, default in DEFAULTS[function].items():
        if isinstance(default, Other):
            assert default.value != default.theirs
            assert default.said in differences(function), name


def test_tiles_of_grids_are_those_of_the_kernels():
    """Hopper's for gna, 64 x 64 for fna; by hand, for nothing else of a method tells them."""
    for method, tiles in (
        (js.gna, {(300,): 128, (20, 30): 16 * 8, (5, 9, 10): 4 * 4 * 8}),
        (js.fna, {(300,): 64, (20, 30): 8 * 8, (5, 9, 10): 4 * 4 * 4}),
    ):
        for grid, tokens in tiles.items():
            q = jax.ShapeDtypeStruct((int(np.prod(grid)), 1, 4), jnp.float32)
            # the whole of an axis would need no order, and no tile of a shape
            run = functools.partial(method(grid=grid, window=3).plan, ())
            plan, _ = jax.eval_shape(run, q, q)
            assert (plan.block_q, plan.block_kv) == (tokens, tokens)


def test_two_blocks_are_sorted_together():
    def sorts(length):
        q = jax.ShapeDtypeStruct((length, 1, 4), jnp.float32)
        return jax.eval_shape(functools.partial(js.pbs_attn().plan, ()), q, q)[1].kv_order

    assert sorts(256) is None
    assert sorts(257).shape == (1, 257)


def test_residues_grow_by_the_stride_over_the_query_heads():
    sizes = {"block_size": 64, "local_blocks": 16}
    few = sharded_blocks(heads=4, kv_heads=2, vert_stride=8, **sizes)
    assert few.residues == (0, 0, 2, 2)
    many = sharded_blocks(heads=32, kv_heads=8, vert_stride=8, **sizes)
    assert many.residues == tuple(h // 4 for h in range(32))


def test_the_grids_of_the_searches():
    assert len(scale_factors.THRESHOLDS) == 20
    assert scale_factors.THRESHOLDS[0] == 1e-6
    assert scale_factors.THRESHOLDS[-1] == 0.99
    assert {*patterns.CANDIDATES} == {
        js.AShape(100, 800),
        *map(js.VerticalSlash, (30, 100, 500, 3500), (800, 750, 700, 100)),  # "Code v1"
        *map(js.VerticalSlash, (100, 1000), (800, 4096)),  # "Code v2", as the next
        js.BlockSparse(100),
    }
