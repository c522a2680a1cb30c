"""The roofline against numbers worked by hand."""

import pytest

from benchmarks import roofline
from benchmarks.roofline import DEVICES, Problem

H200 = DEVICES["NVIDIA H200"]
# 64 x 64 tiles of 128 x 128 per head, all computed
DENSE = Problem(16, 4, 8192, 8192, 128, 128, tiles=16 * 64 * 64)


def test_forward_at_density_one():
    work = roofline.forward(DENSE)
    # 4 * 16 heads * 8192^2 pairs * 128
    assert work.flops == 4 * 16 * 8192 * 8192 * 128 == 549_755_813_888
    # q and out 32 MiB each, k and v 8 MiB each, a f32 per row
    assert work.bytes == 2**20 * (32 + 32 + 8 + 8) + 4 * 16 * 8192
    # 0.5498 TFLOP at 989 TFLOP/s
    assert work.expected_ms(H200) == pytest.approx(0.55587, rel=1e-4)
    assert work.bound(H200) == "products"


def test_skipped_tiles_cost_their_logits():
    # one head of 128 queries, two of whose four listed tiles of keys are kept
    kept = Problem(1, 1, 128, 1024, 128, 64, tiles=2)
    work = roofline.skipping(kept, listed=4)
    assert work.flops == 2 * 128 * 128 * (4 * 128 + 2 * 64)
    # q and out, keys of four tiles, values of two, a f32 per row
    assert work.bytes == 2 * 128 * (128 + 64 + 4 * 128 + 2 * 64) + 4 * 128
    assert roofline.skipping(kept, listed=2) == roofline.forward(kept)


def test_products_of_the_gradients():
    forward = roofline.forward(DENSE).flops
    by_name = {name: work.flops / forward for name, work in roofline.kernels(DENSE).items()}
    assert by_name == {"forward": 1.0, "d_q": 1.5, "d_k_d_v": 2.0}
    masked = DENSE._replace(masked=True)
    by_name = {name: work.flops / forward for name, work in roofline.kernels(masked).items()}
    assert by_name == {"forward": 1.0, "d_q": 1.5, "d_k": 1.5, "d_v": 1.0}


def test_widths_that_differ():
    # one tile of 64 x 64, dim 192, v_dim 128; in units of 2 * 64 * 64 operations
    problem = Problem(1, 1, 64, 64, 192, 128, 1, block_q=64, block_kv=64, masked=True)
    unit = 2 * 64 * 64
    found = {name: work.flops / unit for name, work in roofline.kernels(problem).items()}
    assert found == {"forward": 320, "d_q": 512, "d_k": 512, "d_v": 320}
    both = roofline.kernels(problem._replace(masked=False))["d_k_d_v"]
    assert both.flops / unit == 640
    # in bytes per row of 64: q and k 384 each, v, out and its gradient 256, two f32
    row = {name: work.bytes / 64 for name, work in roofline.kernels(problem).items()}
    assert row == {
        "forward": 384 + 384 + 256 + 256 + 4,
        "d_q": 384 + 384 + 256 + 256 + 384 + 8,
        "d_k": 384 + 384 + 256 + 256 + 384 + 8,
        "d_v": 384 + 384 + 256 + 256 + 4,
    }
    assert both.bytes / 64 == 384 + 384 + 256 + 256 + 384 + 256 + 8


def test_few_tiles_wait_for_memory():
    one_per_row = DENSE._replace(tiles=16 * 64)
    work = roofline.forward(one_per_row)
    assert work.bound(H200) == "memory"
    # 80 MiB and half a MiB of numbers per row at 4.8 TB/s
    assert work.expected_ms(H200) == pytest.approx((80.5 * 2**20) / 4.8e12 * 1e3)


def test_keys_that_no_tile_lists_are_not_read():
    # one head of four tiles of keys, of which one is listed
    few = Problem(1, 1, 128, 512, 64, 64, tiles=1)
    assert roofline.forward(few).bytes == 2 * (128 + 128 + 128 + 128) * 64 + 4 * 128


def test_scores_of_the_map_are_a_product_each():
    half = roofline.forward(DENSE).flops / 2
    lse, scores = roofline.row_lse(DENSE), roofline.tile_scores(DENSE)
    assert lse.flops == scores.flops == half
    # q 32 MiB, k 8 MiB, a f32 per row; besides, one of each of 16 * 64 * 64 tiles
    assert lse.bytes == 2**20 * (32 + 8) + 4 * 16 * 8192
    assert scores.bytes == lse.bytes + 4 * 16 * 64 * 64


def test_antidiagonals_are_a_part_of_a_product():
    half = roofline.forward(DENSE).flops / 2
    work = roofline.antidiagonals(DENSE, stride=16, group=8)
    assert work.flops == half / 16
    # 512 x 512 cells of each head, an eighth as many f32 twice, and one per row of cells
    assert work.bytes == 2**20 * (32 + 8) + 16 * (512 * 64 * 8 + 512 * 4)
    assert work.bound(H200) == "products"


def test_best_columns_read_every_part_of_the_keys():
    # 8192 queries of 16 heads, 64 blocks of 4: three parts of 16 bits; 8 chosen, 8 bytes each
    problem = Problem(16, 4, 8192, 64, 128, 0, tiles=16 * 64, block_q=128, block_kv=64)
    work = roofline.best_columns(problem, parts=3, top_k=8)
    assert work.flops == 3 * 2 * 16 * 8192 * 64 * 128
    assert work.bytes == 2**20 * 32 + 3 * 4 * 64 * 256 + 16 * 8192 * 64
    assert work.bound(H200) == "memory"


def test_best_blocks_of_windows_are_a_product_with_each_window():
    # 8192 queries of 16 heads, 512 windows of 4; 16 chosen for each of 4 heads, 8 bytes each
    problem = Problem(16, 4, 8192, 512, 128, 0, tiles=16 * 64 * 64, block_kv=8)
    work = roofline.best_blocks_of_windows(problem, top_k=16)
    assert work.flops == 2 * 16 * 8192 * 512 * 128
    assert work.bytes == 2**20 * 32 + 4 * 512 * 256 + 4 * 16 * 8192 + 4 * 8192 * 128
    assert work.bound(H200) == "products"


def test_merging_two_parts_costs_five_arrays_as_large_as_q():
    # q once more, two outputs written and read besides the merged one, 32 MiB each
    work = roofline.merging(DENSE, 2)
    assert work.bytes == 2**20 * 5 * 32 + 4 * 4 * 16 * 8192
    # against a tenth of the tiles: two thirds of their time at 8192 tokens, a sixth at 32768
    tenth = roofline.forward(DENSE._replace(tiles=DENSE.tiles / 10))
    assert work.expected_ms(H200) / tenth.expected_ms(H200) == pytest.approx(0.65, abs=0.02)
    longer = DENSE._replace(q_len=32768, kv_len=32768, tiles=16 * 256 * 256 / 10)
    share = roofline.merging(longer, 2).expected_ms(H200)
    assert share / roofline.forward(longer).expected_ms(H200) == pytest.approx(1 / 6, abs=0.01)


def test_few_queries_wait_for_the_keys_that_they_list():
    # 8 sequences of 8 kv heads, of 4 query heads and a query each, filled up to 8 rows; each lists
    # 128 pages of 16 keys
    decode = Problem(64, 64, 8, 32768, 128, 128, tiles=64 * 128, block_q=8, block_kv=16)
    work = roofline.kernels_of_short_tiles(decode)["forward"]
    keys, rows = 64 * 128 * 16, 64 * 8
    # 64 rows are multiplied for each
    assert work.flops == 4 * 64 * keys * 128
    assert work.bytes == 512 * keys + 512 * rows + 4 * rows
    assert work.bound(H200) == "memory"


def test_gradients_of_short_tiles():
    # 4096 queries of a group of 16 rows, each with 16 blocks of 64 keys
    nsa = Problem(1, 1, 16 * 4096, 4096, 128, 128, tiles=16 * 4096, block_q=16, block_kv=64)
    found = roofline.kernels_of_short_tiles(nsa)
    unit = 2 * 128 * 16 * 4096 * 64  # operations of a product with one row
    products = {name: work.flops / unit for name, work in found.items()}
    assert products == {"forward": 2 * 64, "d_q": 3 * 64, "d_k_d_v": 4 * 16}
    rows, keys, strips = 16 * 4096, 4096, 16 * 4096 * 16
    assert found["d_q"].bytes == 256 * 3 * rows + 8 * rows + 512 * 16 * 4096 * 64
    assert found["d_k_d_v"].bytes == 2 * 512 * keys + (512 + 8) * strips
    assert all(work.bound(H200) == "memory" for work in found.values())
    apart = roofline.kernels_of_short_tiles(nsa._replace(masked=True))
    assert apart["d_k"].flops + apart["d_v"].flops == 5 / 4 * found["d_k_d_v"].flops
    assert apart["d_k"].bytes == 256 * 3 * keys + (512 + 8) * strips


def test_what_entries_give_is_written_and_read_again():
    # a head of 64 queries, each listing 2 of 8 tiles of 16 keys
    few_queries = Problem(1, 1, 64, 128, 64, 32, tiles=128, block_q=1, block_kv=16)
    found, plain = roofline.gathered_queries(few_queries), roofline.kernels(few_queries)
    assert {name: work.flops for name, work in found.items()} == {
        name: work.flops for name, work in plain.items()
    }
    more = {name: work.bytes - plain[name].bytes for name, work in found.items()}
    assert more == {"forward": 8 * 128 * (32 + 2), "d_q": 8 * 128 * 64, "d_k_d_v": 0}
    # 2 tiles of 32 queries, each listing 10 keys
    few_keys = Problem(1, 1, 64, 128, 64, 32, tiles=20, block_q=32, block_kv=1)
    found, plain = roofline.gathered_columns(few_keys), roofline.kernels(few_keys)
    more = {name: work.bytes - plain[name].bytes for name, work in found.items()}
    assert more == {"forward": 0, "d_q": 0, "d_k_d_v": 8 * 20 * (64 + 32)}


def test_lists_turned_round_are_read_and_written_once():
    # 16 lists of 512 rows of 64 int32, padding included, and a count each; 512 columns
    work = roofline.inverse_lists(16, 512, 64, 512)
    assert work.bytes == 4 * 16 * (512 * 64 + 512 + 512 * 64 + 513)
    assert work.bound(H200) == "memory"
    # beside attention to as many tiles, nothing
    tiles = DENSE._replace(q_len=65536, kv_len=65536, tiles=16 * 512 * 64)
    assert work.expected_ms(H200) < 0.001 * roofline.forward(tiles).expected_ms(H200)


def test_every_device_names_its_source():
    assert all("https://" in device.source for device in DEVICES.values())
    assert (H200.flops_per_second, H200.bytes_per_second) == (989e12, 4.8e12)
