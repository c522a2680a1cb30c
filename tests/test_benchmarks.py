"""What the benchmarks compare and draw, on made-up records."""

import copy
import json
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    attention,
    compile_report,
    gpu,
    gpu_kin,
    kin,
    kin_rows,
    kin_scorers,
    plots,
    random_plans,
)
from benchmarks.compile_report import Report

VERSIONS = {"jax": "0.10.2", "ptxas": "13.0.88"}


def row(name="dim 128", **changes):
    return {
        **{"name": name, "pass": "gradients", "target": "sm_90a", "tile": "128x128", "stages": 2},
        **{"registers": [168, 240], "spill_bytes": 0, "shared_memory": 204800},
        **{"tensor_core": [40, 48], "bulk_copies": [9, 16], "temp_bytes": 1},
        **changes,
    }


def compare(*new, old=None, names=None):
    return compile_report.differences([row()] if old is None else old, new, names)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        ("product wait softmax product wait", 0),
        ("product product wait-1 softmax wait", 64),
        ("product wait product softmax wait softmax", 64),
    ],
)
def test_what_is_computed_while_products_go_on_is_counted(schedule, found):
    ptx = {
        "product": "wgmma.mma_async.sync.aligned.m64n8k16 {%f1};\nwgmma.commit_group.sync.aligned;",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "wait-1": "wgmma.wait_group.sync.aligned \t1;",
        "softmax": "ex2.approx.ftz.f32 \t%f2, %f3;\n" * 64,
    }
    text = "\n".join(ptx[step] for step in schedule.split())
    assert compile_report.exponentials_in_flight(text) == found


def test_the_order_in_which_kernels_were_compiled_does_not_count():
    # XLA compiles them in parallel; the figures of one kernel stay together
    first = compile_report.made_of([(40, 9), (48, 16), (40, 12)], [168, 240, 200])
    assert first == {
        **{"tensor_core": [40, 40, 48], "bulk_copies": [9, 12, 16]},
        "registers": [168, 200, 240],
    }
    assert compile_report.made_of([(40, 12), (48, 16), (40, 9)], [200, 240, 168]) == first


def test_equal_reports_have_no_differences():
    # where a buffer lies is not what kernels are made of; fewer registers are no loss
    assert compare(row(temp_bytes=2, registers=[168, 232])) == []
    # growth by one unit of what is handed out may be chance
    assert compare(row(registers=[176, 240])) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spill_bytes": 4}, "4 bytes spilled, before 0."),
        ({"shared_memory": 1}, "1 bytes of shared memory, before 204800."),
        ({"tensor_core": [40, 24]}, "40 24 matrix instructions, before 40 48."),
        ({"bulk_copies": [9]}, "9 asynchronous copies, before 9 16."),
        ({"registers": [168, 249]}, "168 249 registers, before 168 240."),
    ],
)
def test_each_difference_that_matters_is_a_sentence(change, says):
    assert compare(row(**change)) == [f"dim 128, gradients (sm_90a): {says}"]


def test_kernels_that_appear_and_vanish_are_named():
    found = compare(row("dim 64"), row(target="sm_80"))
    assert found == [
        "dim 128, gradients (sm_90a) is kept, but was not compiled.",
        "dim 64, gradients (sm_90a) is new.",
        "dim 128, gradients (sm_80) is new.",
    ]


def test_cases_that_were_not_asked_for_are_not_missed():
    both = [row(), row("dim 64")]
    assert compare(row(), old=both, names={"dim 128"}) == []
    assert len(compare(row(), old=both)) == 1


def test_other_compilers_are_not_compared():
    old = Report(VERSIONS, [row()])
    assert compile_report.comparable(old, Report(dict(VERSIONS), [])) is None
    said = compile_report.comparable(old, Report({**VERSIONS, "ptxas": "13.5.37"}, []))
    assert "ptxas 13.0.88" in said
    assert "ptxas 13.5.37" in said
    assert "only the gates count" in said


def test_a_run_compares_updates_and_heeds_the_gates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "versions", lambda: VERSIONS)
    path = tmp_path / "gpu_compile.json"
    good, wrong = row(failed=[]), row(failed=["no wgmma"])

    def run(*rows, update=False, names=None):
        return compile_report.conclude(rows, path, names, update=update)

    assert run(good) == 1
    assert "nothing to compare with" in capsys.readouterr().out
    assert run(wrong, update=True) == 1
    assert not path.exists()
    assert run(good, update=True) == 0
    assert run(good) == 0
    assert "failed" not in path.read_text()
    assert run(wrong) == 1
    capsys.readouterr()
    assert run(good | {"shared_memory": 1}) == 1
    assert "1 bytes of shared memory" in capsys.readouterr().out
    assert run(row("dim 64", failed=[])) == 1
    assert run(row("dim 64", failed=[]), names={"dim 64"}) == 1
    monkeypatch.setattr(compile_report, "versions", lambda: {"jax": "0.12"})
    capsys.readouterr()
    assert run(good | {"shared_memory": 1}) == 0
    assert "only the gates count" in capsys.readouterr().out
    assert run(wrong) == 1
    assert run(good, update=True, names={"dim 128"}) == 2


def test_an_update_of_some_keeps_the_others(tmp_path):
    path = tmp_path / "new" / "gpu_compile.json"
    assert compile_report.read(path) is None
    old = Report(VERSIONS, [row("a"), row("b")])
    compile_report.write(path, old)
    assert compile_report.read(path) == old
    some = Report(VERSIONS, [row("b", spill_bytes=8), row("c")])
    merged = compile_report.merged(old, some, complete=False)
    assert merged.rows == [row("a"), row("b", spill_bytes=8), row("c")]
    assert compile_report.merged(old, some, complete=True) == some
    with pytest.raises(ValueError, match="without --only"):
        compile_report.merged(old, some._replace(versions={"jax": "0.12"}), complete=False)


def test_the_page_has_a_line_per_row(tmp_path):
    path = tmp_path / "gpu_compile.json"
    compile_report.write(path, Report(VERSIONS, [row("a"), row("b", registers=[1, 2, 3])]))
    lines = path.with_suffix(".md").read_text().splitlines()
    assert "| a | gradients | sm_90a | 128x128 | 2 | 168 240 | 0 | 204800 | 40 48 | 9 16 |" in lines
    assert lines[-1].split(" | ")[5] == "1 2 3"


def test_the_kept_report_fits_its_page():
    report = compile_report.read(compile_report.RESULTS)
    assert compile_report.RESULTS.with_suffix(".md").read_text() == compile_report.page(report)
    assert not [r["name"] for r in report.rows if r["spill_bytes"]]
    assert all(min(r["tensor_core"]) > 0 for r in report.rows)


def test_instructions_of_every_generation_are_counted():
    ptx = """
      wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {
      wgmma.commit_group.sync.aligned;
      tcgen05.mma.cta_group::1.kind::f16 [%r1],
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {
      cp.async.bulk.tensor.4d.shared::cluster.global.tile [%r1],
      cp.async.bulk.commit_group;
    """
    assert compile_report.instructions(ptx) == (3, 1)


def gpu_record():
    def timing(length, density, **more):
        times = {
            "jsparse": {"ms": 1.0, "tflops": 100.0 * density},
            "torch flex": {"error": "not there"},
            "jsparse, forward and gradients": {"ms": 3.0},
        }
        sizes = {"length": length, "density": density, "dim": 128, "heads": 16, "kv_heads": 4}
        backward = {"ms": 2.0, "tflops": 50.0}
        return {**sizes, "causal": False, "times": times, "backward": backward, **more}

    return {
        "machine": {"device": "Made-up GPU", "jax": "1", "torch": "2", "date": "2026-01-01T00"},
        "timings": [
            *(timing(length, density) for length in (8192, 32768) for density in (1.0, 0.1)),
            timing(8192, 1.0, causal=True),
            {"length": 8192, "error": "out of memory"},
        ],
    }


def test_gpu_charts_are_over_density_and_over_length():
    found = {chart.title: chart for chart in plots.charts(gpu_record())}
    shape = "dim 128, 16 heads over 4"
    assert set(found) == {
        *(f"{length} tokens, {shape}" for length in (8192, 32768)),
        *(f"density {density}, {shape}" for density in ("1", "0.1")),
    }
    over_density = found[f"8192 tokens, {shape}"]
    assert over_density.lines == {
        "jsparse": [(0.1, 10.0), (1.0, 100.0)],
        "jsparse, gradients": [(0.1, 50.0), (1.0, 50.0)],
    }
    assert found[f"density 1, {shape}"].lines["jsparse"] == [(8192, 100.0), (32768, 100.0)]


def test_cpu_charts_have_one_of_each_dtype():
    record = json.loads(attention.RESULTS.read_text())
    record["against_torch"] = [
        {**row, "dtype": dtype}
        for dtype in ("float32", "bfloat16")
        for row in record["against_torch"]
    ]
    titles = [chart.title for chart in plots.charts(record)]
    assert sum("float32" in title for title in titles) == 1
    assert sum("bfloat16" in title for title in titles) == 1
    # as written before there was more than one
    old = copy.deepcopy(record)
    old["case"]["dtype"] = "float32"
    old["against_torch"] = [
        {k: v for k, v in row.items() if k != "dtype"} for row in record["against_torch"][:3]
    ]
    assert [c.title for c in plots.charts(old)] == [t for t in titles if "bfloat16" not in t]


def test_a_picture_says_what_was_measured_where(tmp_path):
    path = tmp_path / "x.svg"
    plots.draw(gpu_record(), path)
    text = path.read_text()
    ElementTree.fromstring(text)
    for said in ("Made-up GPU, jax 1, torch 2, 2026-01-01", "TFLOP/s on computed tiles", "jsparse"):
        assert said in text
    assert "torch flex" not in text


def test_the_kept_picture_is_of_the_kept_figures(tmp_path):
    path = tmp_path / "attention_cpu.svg"
    record = json.loads(attention.RESULTS.read_text())
    plots.draw(record, path)

    def words(text):
        found = [x.text for x in ElementTree.fromstring(text).iter() if x.tag.endswith("text")]
        return sorted(filter(None, found))

    kept = attention.RESULTS.with_suffix(".svg").read_text()
    assert words(kept) == words(path.read_text()), "run python -m benchmarks.plots"


@pytest.mark.parametrize("text", ["{}", "no json"])
def test_a_file_without_figures_is_named(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["plots", str(path)])
    with pytest.raises(SystemExit) as stop:
        plots.main()
    assert stop.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_results_that_differ_are_not_timed():
    q, k, _, _ = attention.inputs(64, "bfloat16")
    attention.same(q, q, "bfloat16")
    with pytest.raises(ArithmeticError, match="results in bfloat16 differ"):
        attention.same(q, k, "bfloat16")


def timing(density, ours, dense=None, **sizes):
    times = {"jsparse": {"ms": ours}}
    if dense is not None:
        times |= {"jax.nn cudnn": {"ms": dense}, "torch cudnn": {"ms": dense + 1}}
    row = {"length": 8192, "dim": 128, "heads": 16, "kv_heads": 16, "causal": False, **sizes}
    return {**row, "density": density, "plan_ms": 1.0, "times": times}


@pytest.mark.parametrize(
    ("full", "density"),
    [
        (9.0, 1.0),  # 10 ms at density 1 with the plan, as long as cuDNN takes
        (11.0, 0.9),  # 12 ms at 1 and 2 ms at 0.5: 10 ms at 0.9
        (17.0, 0.75),
    ],
)
def test_the_crossover_density_counts_the_plan(full, density):
    rows = [timing(1.0, full, dense=10.0), timing(0.5, 1.0)]
    (found,) = gpu.crossovers(rows)
    assert found["density"] == pytest.approx(density)
    assert found["dense_ms"] == 10.0


def test_the_crossover_density_is_zero_where_dense_always_wins():
    assert gpu.crossovers([timing(1.0, 20.0, dense=5.0), timing(0.5, 10.0)])[0]["density"] == 0.0


def test_crossovers_leave_out_what_was_not_measured():
    failed = {**timing(0.5, 1.0), "times": {"jsparse": {"error": "no"}}}
    rows = [timing(1.0, 9.0, dense=10.0), failed, {"error": "no"}, timing(0.5, 1.0, dim=64)]
    assert gpu.crossovers(rows) == []


def test_a_peer_whose_output_differs_is_not_timed():
    run = gpu.DRY._replace(milliseconds=0.0)
    ours = np.ones((2, 3), np.float32)
    assert gpu.dense_time(run, lambda: ours, ours)["ms"] > 0
    with pytest.raises(ArithmeticError, match="differ"):
        gpu.dense_time(run, lambda: ours + 1, ours)


def test_a_peer_that_is_not_installed_is_missing_and_not_an_error():
    def call():
        raise ModuleNotFoundError("No module named 'tokamax'")

    assert gpu.attempt(call) == {"missing": "No module named 'tokamax'"}


@pytest.mark.parametrize("share", [0.125, 0.5])
def test_as_many_tiles_are_kept_as_was_asked_for(share):
    length, dim = 1024, 32
    data = random_plans.skipped(2.0, dim)(length, share)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 1, dim)) for key in keys)
    kept = jax.jit(lambda *x: random_plans.skip(*x, "xla")[2])(q, k, v, data)
    rows = length // random_plans.BLOCK
    assert float(data.lists.kv_num_blocks.sum()) == 2 * share * rows**2
    assert float(kept.kv_num_blocks.sum()) == share * rows**2


def test_lists_at_random_have_the_asked_density_and_no_entry_twice():
    plan = random_plans.random_lists(1, 16, 2)(512, 0.25)
    lists = np.asarray(plan.kv_indices)
    assert lists.shape == (1, 2, 512, 8)
    assert (np.diff(lists) > 0).all()
    assert float(plan.density().mean()) == 0.25
    assert len(np.unique(lists[0, 0], axis=0)) > 8


def test_a_kind_is_checked_before_it_is_timed(monkeypatch):
    (case,) = (case for case in kin.CASES if case.name == "gathered columns")
    right = case.attend

    def wrong(q, k, v, data, implementation):
        out = right(q, k, v, data, "reference")
        return out if implementation == "reference" else out * (1 + 2**-10)

    monkeypatch.setattr(kin, "CHECKED", 256)
    with pytest.raises(ArithmeticError, match="gathered columns: results differ"):
        kin.check(case._replace(attend=wrong))


def test_every_kind_is_timed_over_densities_and_lengths():
    for case in kin.CASES:
        over_density, over_length = case.sizes().values()
        assert [density for _, density in over_density] == [0.02, 0.05, 0.1, 0.25, 0.5]
        assert len({length for length, _ in over_density}) == 1
        lengths = [length for length, _ in over_length]
        # what goes along all tiles there are takes minutes where there are many
        assert lengths == [n for n in (2048, 8192, 32768, 65536) if n <= case.longest]
        assert case.longest == 65536 or case.name == "skipped of all"
        assert len({length * density for length, density in over_length}) == 1


def test_a_row_of_a_kind_has_its_work_and_its_memory():
    (case,) = (case for case in kin.CASES if case.name == "gathered columns")
    row = kin.measure(case, 512, 0.25, repeats=1)
    assert row["computed"] == 0.25
    # 4 bytes for each pair of either head
    assert 0 < row["forward_mib"] < 4 * 2 * 512**2 / 2**20
    assert row["forward_backward_ms"] > 0
    # 4 operations for each feature of a pair, at 989 TFLOP/s, or what is moved
    products = 4 * kin.DIM * 2 * 512**2 / 4 / 989e9
    assert row["h200_forward_bound_ms"] >= products


def test_lists_turned_round_are_compared_with_a_sort():
    case = kin_rows.Case(256, 64, 2)
    ranks, sort = kin_rows.inverse([case], 1)
    assert (ranks["way"], sort["way"]) == ("ranks", "sort")
    assert ranks["listed"] == sort["listed"] == 2 * 256 * 2


def test_long_scorers_are_timed_less_often():
    assert [kin_scorers.fewer(3, length) for length in (2048, 16384, 32768)] == [3, 3, 1]


def dry_run(monkeypatch, tmp_path, only):
    path = tmp_path / "kin.json"
    arguments = ["gpu_kin", "--dry-run", "--only", only, "--output", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_kin.main() == 0
    return json.loads(path.read_text())["kin"]


def test_kinds_on_a_gpu_can_be_tried_without_one(monkeypatch, tmp_path):
    (row,) = dry_run(monkeypatch, tmp_path, "decoding")
    found = row["times"]["xla"]
    assert 0 < found["difference"] < gpu.TOLERANCE["bfloat16"]
    # an eighth of 4 pages, so one of 64 keys for each of 2 sequences and 8 heads, of width 32
    assert row["selected_mbyte"] == 2 * 8 * 64 * (32 + 32) * 2 / 1e6
    assert found["of_copy"] == pytest.approx(
        row["selected_mbyte"] / found["ms"] / row["copy_gbyte_per_second"]
    )


@pytest.mark.slow
def test_all_kinds_on_a_gpu_can_be_tried_without_one(monkeypatch, tmp_path):
    rows = dry_run(monkeypatch, tmp_path, "")
    assert [row["kind"] for row in rows] == [case.name for case in gpu_kin.CASES]
    shares = {key for row in rows for key in row["times"]["xla"]}
    assert {"of_tiles", "over_dense", "of_all", "of_copy"} < shares
    assert all(row["times"]["xla"]["tflops"] > 0 for row in rows)
    (skipping,) = (row for row in rows if "kept" in row)
    assert skipping["kept"] == 0.5  # of the two tiles of a row the first


def kernel_of(compute):
    arrays = (jnp.ones((1, 8, 1, 16), jnp.bfloat16),)
    return gpu_kin.Kernel(arrays, compute, {}, 1.0, lambda run, row: None, differentiable=1)


def test_a_kind_that_is_wrong_is_not_timed_and_one_that_is_refused_is_no_error():
    def compute(name, x):
        if name == "triton":
            raise NotImplementedError("not here")
        return x * (2 if name == "mosaic" else 1)

    case = gpu_kin.Case("x", lambda run, length: kernel_of(compute))
    run = gpu_kin.DRY._replace(implementations=("mosaic", "triton", "xla"))
    row = gpu_kin.timings(run, case)
    assert "differs" in row["times"]["mosaic"]["error"]
    assert row["times"]["triton"] == {"refused": "not here"}
    assert row["times"]["xla"]["ms"] > 0
    assert gpu_kin.failed(row)
    assert not gpu_kin.failed({"times": {name: row["times"][name] for name in ("triton", "xla")}})
    assert gpu_kin.failed({"times": {"triton": row["times"]["triton"]}})
