"""`AttentionSuite`: what any attention over a plan must keep, for testing one's own kernel too."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jsparse.masks import causal, segments
from jsparse.types import BlockMask, Frame, Mask

FEATURES = frozenset(
    "grouped_heads v_dim lengths ragged_tiles rectangular_tiles lists_per_head mask bias score_mod "
    "sinks softcap scale lse gradients second_order float16 batch empty_rows".split()
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, tiles, and what modifies the logits."""

    name: str
    needs: frozenset[str]
    q_len: int = 64
    kv_len: int = 64
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    batch: tuple[int, ...] = ()
    block_q: int = 16
    block_kv: int = 16
    list_heads: int = 1
    density: float = 0.5
    mask: str | None = None
    bias: tuple[int, ...] | None = None
    score_mod: bool = False
    sinks: bool = False
    softcap: float | None = None
    scale: str | None = None
    empty_rows: bool = False


def _case(name: str, *needs: str, **sizes: Any) -> Case:
    return Case(name, frozenset(needs), **sizes)


CASES = (
    _case("plain"),
    _case("grouped_heads", "grouped_heads", heads=4, kv_heads=2),
    _case("one_kv_head", "grouped_heads", heads=4, kv_heads=1, list_heads=4),
    _case("v_dim", "v_dim", v_dim=24),
    _case("fewer_queries", "lengths", q_len=32, kv_len=96),
    _case("more_queries", "lengths", q_len=96, kv_len=32),
    _case("ragged_tiles", "ragged_tiles", "lengths", q_len=41, kv_len=59),
    _case("rectangular_tiles", "rectangular_tiles", block_q=8, block_kv=32),
    _case("columns", "rectangular_tiles", block_q=32, block_kv=1, density=0.2),
    _case("lists_per_head", "lists_per_head", list_heads=2),
    _case(
        "lists_per_kv_head", "lists_per_head", "grouped_heads", heads=4, kv_heads=2, list_heads=2
    ),
    _case("causal", "mask", mask="causal"),
    _case("causal_ragged", "mask", "ragged_tiles", "lengths", q_len=41, kv_len=59, mask="causal"),
    _case("segments", "mask", mask="segments"),
    _case("bias_full", "bias", batch=(2,), bias=(2, 2, 64, 64)),
    _case("bias_keys", "bias", bias=(1, 64)),
    _case("bias_queries", "bias", bias=(2, 64, 1)),
    _case("bias_ragged", "bias", "ragged_tiles", q_len=41, kv_len=59, bias=(41, 59)),
    _case("score_mod", "score_mod", score_mod=True),
    _case("sinks", "sinks", sinks=True),
    _case("softcap", "softcap", softcap=2.0),
    _case("scale", "scale", scale="static"),
    _case("scale_array", "scale", scale="array"),
    _case("batch", "batch", batch=(2,), list_heads=2),
    _case("two_batch_axes", "batch", batch=(2, 3)),
    _case("empty_rows", "empty_rows", density=0.12, empty_rows=True),
    # rows inside computed tiles that the mask leaves without a key
    _case("hidden_rows", "empty_rows", "mask", "lengths", q_len=56, kv_len=32, mask="causal"),
    *(
        _case(
            name,
            *FEATURES - {"float16", "second_order"},
            q_len=41,
            kv_len=kv_len,
            heads=4,
            kv_heads=2,
            v_dim=24,
            batch=(2,),
            block_q=8,
            block_kv=block_kv,
            list_heads=4,
            mask="causal",
            bias=(2, 1, 1, kv_len),
            score_mod=True,
            sinks=True,
            softcap=3.0,
            scale="array",
        )
        for name, kv_len, block_kv in (("everything", 59, 16), ("everything_wide", 300, 128))
    ),
)


class AttentionSuite:
    """Checks an attention function against float64, feature by feature.

    Subclass it in a test module, set `attention` and what it supports:

        class TestMine(js.testing.AttentionSuite):
            attention = staticmethod(my_attention)
            supports = js.testing.FEATURES - {"bias"}

    `attention` has the signature of `js.attend`. A case that needs what is not supported must raise
    NotImplementedError: a feature may be missing, it may not be dropped.
    """

    attention: Callable[..., Any]
    supports: frozenset[str] = FEATURES

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Gives the tests their cases."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", CASES, ids=lambda case: case.name)

    def test_output_and_gradients(self, case: Case) -> None:
        """Output, lse and every gradient equal those of dense attention in float64."""
        problem = Problem(case)
        if not case.needs - {"gradients"} <= self.supports:
            _raises_not_implemented(lambda: problem.run(type(self).attention))
            return
        if "gradients" not in self.supports:
            _close(problem.run(type(self).attention), problem.exact()[:2], problem.tolerance())
            return
        got = problem.value_and_gradients(type(self).attention)(problem.operands)
        _close(got, problem.exact(), problem.tolerance())

    def test_output_without_gradients(self) -> None:
        """What is computed where no gradient is asked for is the same."""
        case = next(case for case in CASES if case.name == "everything")
        if case.needs - {"gradients"} <= self.supports:
            problem = Problem(case)
            got = jax.jit(lambda o: problem.run(type(self).attention, o))(problem.operands)
            _close(got, problem.exact()[:2], problem.tolerance())

    def test_jit_with_a_traced_plan(self) -> None:
        """Lists that depend on data, built under jit, give what the same lists give outside."""
        problem = Problem(CASES[0])
        dense = problem.plan.to_dense()

        def build_and_run(tiles, operands):
            plan = BlockMask.from_dense(tiles, **problem.plan.grid._asdict())
            return problem.run(type(self).attention, operands, plan)

        got = jax.jit(build_and_run)(dense, problem.operands)
        _close(got, problem.run(type(self).attention), problem.tolerance())

    def test_vmap_equals_batch(self) -> None:
        """Mapping over a batch axis of operands and lists equals passing it."""
        if "batch" not in self.supports:
            return
        problem = Problem(next(case for case in CASES if case.name == "batch"))
        mapped = jax.vmap(lambda o, p: problem.run(type(self).attention, o, p))
        got = mapped(problem.operands, problem.plan)
        _close(got, problem.run(type(self).attention), problem.tolerance())

    def test_second_derivatives(self) -> None:
        """The gradient's gradient equals that of the reference."""
        if not {"gradients", "second_order"} <= self.supports:
            return
        from jsparse.attention.attend import attend

        case = next(case for case in CASES if case.name == "everything")
        if not case.needs <= self.supports:
            return
        problem = Problem(case)

        def curvature(attention):
            def slope(operands):
                gradients = jax.grad(lambda o: problem.loss(*problem.run(attention, o)))(operands)
                return sum(jnp.sin(g).sum() for g in jax.tree.leaves(gradients))

            return jax.jit(jax.grad(slope))(problem.operands)

        def reference(*args, **kwargs):
            return attend(*args, **kwargs, implementation="reference")

        got, expected = curvature(type(self).attention), curvature(reference)
        for name in expected:
            size = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(got[name], expected[name], atol=2e-4 * size, err_msg=name)

    def test_low_precision_is_as_good_as_plain_low_precision(self) -> None:
        """The error in 16 bits is at most twice that of dense attention in 16 bits.

        That of the lse is that of f32: sums and the softmax's state are kept there.
        """
        for dtype in (jnp.bfloat16, jnp.float16):
            if dtype == jnp.float16 and "float16" not in self.supports:
                continue
            problem = Problem(CASES[0], dtype)
            exact = problem.exact()
            low = problem.plain_low_precision()
            got = problem.run(type(self).attention)
            for name, mine, plain, true in zip(("out", "lse"), got, low, exact, strict=False):
                allowed = 2 * np.abs(np.asarray(plain, np.float64) - true).max()
                if name == "lse":
                    allowed = problem.tolerance() * max(1.0, np.abs(true).max())
                error = np.abs(np.asarray(mine, np.float64) - true).max()
                assert error <= allowed, f"{name} in {dtype.__name__}: {error} > {allowed}"

    def test_a_nan_stays_in_its_row(self) -> None:
        """A NaN in one query reaches that query's output and no other."""
        problem = Problem(CASES[0])
        operands = dict(problem.operands)
        operands["q"] = operands["q"].at[5].set(jnp.nan)
        out, lse = problem.run(type(self).attention, operands)
        clean, _ = problem.run(type(self).attention)
        assert np.isnan(out[5]).all()
        # an lse of -inf would let `merge` drop the broken part
        assert np.isnan(lse[:, 5]).all()
        others = np.arange(64) != 5
        np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(clean)[others])

    def test_rows_without_keys_give_finite_gradients(self) -> None:
        """Whatever the loss makes of an lse of -inf, operands get finite gradients."""
        if not {"gradients", "empty_rows", "mask", "lengths"} <= self.supports:
            return
        problem = Problem(next(case for case in CASES if case.name == "hidden_rows"))

        def loss(operands):
            out, lse = problem.run(type(self).attention, operands)
            return out.sum() + jnp.square(lse).sum()

        gradients = jax.jit(jax.grad(loss))(problem.operands)
        for name, gradient in gradients.items():
            assert np.isfinite(gradient).all(), name

    def test_runs_are_equal_to_the_bit(self) -> None:
        """Output and gradients do not change from run to run."""
        if "gradients" not in self.supports:
            return
        problem = Problem(next(case for case in CASES if case.name == "grouped_heads"))
        run = problem.value_and_gradients(type(self).attention)
        jax.tree.map(np.testing.assert_array_equal, run(problem.operands), run(problem.operands))

    def test_dropping_a_feature_is_noticed(self) -> None:
        """The comparison of `test_output_and_gradients` fails for every argument left out."""
        dropped = {
            "causal": "mask",
            "segments": "mask",
            "bias_keys": "bias",
            "score_mod": "score_mod",
            "sinks": "sinks",
            "softcap": "softcap",
            "scale": "scale",
            "plain": "plan",
        }
        for name, argument in dropped.items():
            case = next(case for case in CASES if case.name == name)
            if not case.needs <= self.supports:
                continue
            problem = Problem(case)

            def without(q, k, v, plan, *, argument=argument, **kwargs):
                plan = None if argument == "plan" else plan
                return type(self).attention(
                    q, k, v, plan, **{**kwargs, argument: None} if (argument != "plan") else kwargs
                )

            got = jax.jit(lambda o, p=problem, f=without: p.run(f, o))(problem.operands)
            try:
                _close(got, problem.exact()[:2], problem.tolerance())
            except AssertionError:
                continue
            raise AssertionError(f"dropping {argument} changed nothing in case {name}")


class Problem:
    """The arrays of one case, and their exact answer."""

    def __init__(self, case: Case, dtype: Any = jnp.float32):
        self.case, self.dtype = case, dtype
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), dtype)

        lead = case.batch
        self.operands = {
            "q": normal(*lead, case.q_len, case.heads, case.dim),
            "k": normal(*lead, case.kv_len, case.kv_heads, case.dim),
            "v": normal(*lead, case.kv_len, case.kv_heads, case.v_dim),
        }
        if case.bias is not None:
            self.operands["bias"] = normal(*case.bias)
        if case.score_mod:
            self.operands["slopes"] = normal(case.heads)
            self.operands["table"] = normal(case.kv_len)
        if case.sinks:
            self.operands["sinks"] = normal(case.heads)
        if case.scale == "array":
            self.operands["scale"] = jnp.asarray(0.4, jnp.float32)
        q_blocks, kv_blocks = -(-case.q_len // case.block_q), -(-case.kv_len // case.block_kv)
        tiles = rng.random((*lead, case.list_heads, q_blocks, kv_blocks)) < case.density
        if not case.empty_rows:
            tiles[..., 0] = True
        else:
            tiles[..., 1, :] = False
        self.plan = BlockMask.from_dense(
            jnp.asarray(tiles),
            q_len=case.q_len,
            kv_len=case.kv_len,
            block_q=case.block_q,
            block_kv=case.block_kv,
        )
        ids = np.sort(rng.integers(0, 3, (*lead, case.q_len)), axis=-1).astype(np.int32)
        self.mask: Mask | None = None
        if case.mask == "causal":
            self.mask = causal()
        elif case.mask == "segments":
            self.mask = segments(jnp.asarray(ids))
        self.weights = rng.normal(size=(*lead, case.q_len, case.heads, case.v_dim))
        self.lse_weights = rng.normal(size=(*lead, case.heads, case.q_len))

    def run(
        self, attention: Callable[..., Any], operands: Any = None, plan: BlockMask | None = None
    ) -> Any:
        """`(out, lse)` of an attention function."""
        operands = self.operands if operands is None else operands
        plan = self.plan if plan is None else plan
        options: dict[str, Any] = {"return_lse": True}
        if self.mask is not None:
            options["mask"] = self.mask
        for name in ("bias", "sinks", "scale"):
            if name in operands:
                options[name] = operands[name]
        if self.case.softcap is not None:
            options["softcap"] = self.case.softcap
        if self.case.scale == "static":
            options["scale"] = 0.7
        if self.case.score_mod:
            slopes, table = operands["slopes"], operands["table"]

            def score_mod(logit, batch, head, q_index, kv_index):
                # the table is read twice on purpose: both uses have a gradient
                tilt = slopes[head] * (q_index - kv_index).astype(jnp.float32) * 0.05
                return logit + tilt + table[kv_index] * table[0] + 0.1 * batch

            options["score_mod"] = score_mod
        return attention(operands["q"], operands["k"], operands["v"], plan, **options)

    def loss(self, out: Any, lse: Any) -> Any:
        """A scalar that every output and every lse enters."""
        seen = ~jnp.isneginf(lse)
        lse_part = (jnp.where(seen, lse, 0.0) * self.lse_weights).sum()
        return (out.astype(jnp.float32) * self.weights).sum() + lse_part

    def value_and_gradients(self, attention: Callable[..., Any]) -> Callable[[Any], Any]:
        """A compiled function of the operands: out, lse, and the gradient of the loss by each."""

        def loss(operands):
            out, lse = self.run(attention, operands)
            return self.loss(out, lse), (out, lse)

        def value_and_gradients(operands):
            gradients, (out, lse) = jax.grad(loss, has_aux=True)(operands)
            return out, lse, gradients

        return jax.jit(value_and_gradients)

    def exact(self) -> Any:
        """The same in float64 NumPy, with derivatives written by hand."""
        return _dense_float64(self)

    def tolerance(self) -> float:
        """Error allowed relative to the largest entry: sums of a few hundred f32 roundings."""
        return 200 * float(jnp.finfo(jnp.float32).eps)

    def plain_low_precision(self) -> Any:
        """Dense attention with every product in the case's dtype, as one would write it."""
        q, k, v = (self.operands[name] for name in "qkv")
        logits = jnp.einsum("qhd,khd->hqk", q, k).astype(jnp.float32) * self.case.dim**-0.5
        logits = jnp.where(_pairs(self)[0], logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        probs = jnp.exp(logits - lse[..., None]).astype(self.dtype)
        return jnp.einsum("hqk,khd->qhd", probs, v), lse


def _pairs(problem: Problem) -> np.ndarray:
    """Who sees whom, [batch, heads, q_len, kv_len]."""
    case, plan = problem.case, problem.plan
    tiles = np.asarray(plan.to_dense())
    tiles = tiles.reshape(-1, *tiles.shape[-3:])
    pairs = np.repeat(np.repeat(tiles, case.block_q, -2), case.block_kv, -1)
    pairs = np.repeat(pairs[..., : case.q_len, : case.kv_len], case.heads // plan.list_heads, 1)
    if problem.mask is not None:
        flat = problem.mask.flatten_batch(case.batch)
        batches = pairs.shape[0]
        seen = flat.visible(
            jnp.arange(case.q_len)[:, None],
            jnp.arange(case.kv_len),
            Frame(case.q_len, case.kv_len, jnp.arange(batches)[:, None, None, None], 0),
        )
        pairs = pairs & np.asarray(seen)
    return pairs


def _dense_float64(problem: Problem) -> Any:
    case = problem.case
    x = {name: np.asarray(value, np.float64) for name, value in problem.operands.items()}
    q, k, v = (x[name].reshape(-1, *x[name].shape[-3:]) for name in "qkv")
    group = case.heads // case.kv_heads
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    weights = problem.weights.reshape(-1, *problem.weights.shape[-3:])
    lse_weights = problem.lse_weights.reshape(-1, *problem.lse_weights.shape[-2:])

    product = np.einsum("bqhd,bkhd->bhqk", q, k)
    scale = {"array": x.get("scale"), "static": 0.7, None: case.dim**-0.5}[case.scale]
    scaled = product * scale
    cap = case.softcap
    capped = scaled if cap is None else cap * np.tanh(scaled / cap)
    logits = capped
    distance = np.arange(case.q_len)[:, None] - np.arange(case.kv_len)
    if case.score_mod:
        tilt = x["slopes"][:, None, None] * distance * 0.05
        number = np.arange(len(q))[:, None, None, None]
        logits = logits + tilt + x["table"] * x["table"][0] + 0.1 * number
    if case.bias is not None:
        full = (*case.batch, case.heads, case.q_len, case.kv_len)
        logits = logits + np.broadcast_to(x["bias"], full).reshape(logits.shape)
    logits = np.where(_pairs(problem), logits, -np.inf)

    sink = np.full((case.heads, 1, 1), -np.inf)
    if case.sinks:
        sink = x["sinks"][:, None, None]
    peak = np.maximum(logits.max(-1, keepdims=True), sink)
    peak = np.where(np.isneginf(peak), 0.0, peak)
    mass = np.exp(logits - peak)
    total = mass.sum(-1, keepdims=True) + np.exp(sink - peak)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    probs = mass / np.where(total > 0, total, 1.0)
    out = np.einsum("bhqk,bkhd->bqhd", probs, v)

    # d loss / d logits = p * (dp - rowsum(dp p) + d lse)
    lse_weights = np.where(np.isneginf(lse), 0.0, lse_weights)
    d_probs = np.einsum("bqhd,bkhd->bhqk", weights, v)
    inner = (d_probs * probs).sum(-1, keepdims=True)
    d_logits = probs * (d_probs - inner + lse_weights[..., None])
    d_scaled = d_logits if cap is None else d_logits * (1 - np.tanh(scaled / cap) ** 2)
    d_product = d_scaled * scale

    def to_kv_heads(d):
        return d.reshape(*d.shape[:2], case.kv_heads, group, -1).sum(3)

    gradients = {
        "q": np.einsum("bhqk,bkhd->bqhd", d_product, k),
        "k": to_kv_heads(np.einsum("bhqk,bqhd->bkhd", d_product, q)),
        "v": to_kv_heads(np.einsum("bhqk,bqhd->bkhd", probs, weights)),
    }
    if case.bias is not None:
        full = (*case.batch, case.heads, case.q_len, case.kv_len)
        gradients["bias"] = _sum_to(d_logits.reshape(full), x["bias"].shape)
    if case.score_mod:
        gradients["slopes"] = (d_logits * distance * 0.05).sum((0, 2, 3))
        per_key = d_logits.sum((0, 1, 2))
        table = per_key * x["table"][0]
        table[0] += (per_key * x["table"]).sum()
        gradients["table"] = table
    if case.sinks:
        sink_probs = np.exp(sink - peak) / total
        gradients["sinks"] = (sink_probs * (lse_weights[..., None] - inner)).sum((0, 2, 3))
    if case.scale == "array":
        gradients["scale"] = (d_scaled * product).sum()
    gradients = {name: g.reshape(x[name].shape) for name, g in gradients.items()}
    shape = (*case.batch, case.q_len, case.heads, case.v_dim)
    return out.reshape(shape), lse.reshape(problem.lse_weights.shape), gradients


def _sum_to(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The transpose of broadcasting from `shape`."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return x.sum(axes, keepdims=True)


def _close(got: Any, expected: Any, tolerance: float) -> None:
    """Every array within `tolerance` of the largest entry of the expected one."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for mine, true in zip(got, expected, strict=True):
        mine, true = np.asarray(mine, np.float64), np.asarray(true, np.float64)
        assert mine.shape == true.shape
        finite = np.isfinite(true)
        np.testing.assert_array_equal(np.isfinite(mine), finite)
        size = max(1.0, np.abs(true[finite]).max(initial=0.0))
        np.testing.assert_allclose(mine[finite], true[finite], rtol=0, atol=tolerance * size)


def _raises_not_implemented(call: Callable[[], Any]) -> None:
    try:
        call()
    except NotImplementedError:
        return
    raise AssertionError("a feature that is not supported was accepted; it must raise")
