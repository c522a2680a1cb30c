"""What each attention kernel has to do, and how fast a device could do it at the very best.

The expected time is the longer of two: all products at the rate of the tensor cores, and every
array moved once at the rate of the memory. Nothing here is measured; softmax, launches and what is
read again are not counted, so no kernel is faster.
"""

from typing import NamedTuple

_ROWS = 64  # of a product of a warpgroup


class Device(NamedTuple):
    """Rates of a device: dense 16-bit products, and its memory.

    The data sheets give products with sparsity two to one; half of those are dense.
    """

    flops_per_second: float
    bytes_per_second: float
    source: str


_A100 = "NVIDIA A100 data sheet, https://www.nvidia.com/en-us/data-center/a100/"
# by the name that JAX gives the device
DEVICES = {
    "NVIDIA H200": Device(
        989e12,
        4.8e12,
        "NVIDIA H200 data sheet, https://www.nvidia.com/en-us/data-center/h200/",
    ),
    "NVIDIA H100 80GB HBM3": Device(
        989e12,
        3.35e12,
        "NVIDIA H100 data sheet, SXM, https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "NVIDIA A100-SXM4-80GB": Device(312e12, 2.039e12, _A100),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 1.555e12, _A100),
    "NVIDIA B200": Device(
        2250e12,
        8e12,
        "NVIDIA HGX B200 data sheet, an eighth, https://www.nvidia.com/en-us/data-center/hgx/",
    ),
}


class Problem(NamedTuple):
    """An attention problem.

    Attributes:
      heads: Query heads of all sequences.
      kv_heads: Heads of k and v, of all sequences.
      q_len: Queries.
      kv_len: Keys.
      dim: Width of q and k.
      v_dim: Width of v.
      tiles: Computed tiles, of all query heads.
      block_q: Queries per tile.
      block_kv: Keys per tile.
      masked: Whether something changes logits, so that d_k and d_v take a pass each.
      itemsize: Bytes per number of q, k, v and their gradients.
    """

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    v_dim: int
    tiles: float
    block_q: int = 128
    block_kv: int = 128
    masked: bool = False
    itemsize: int = 2


class Work(NamedTuple):
    """Operations, and bytes moved at least."""

    flops: float
    bytes: float

    def expected_ms(self, device: Device) -> float:
        """Milliseconds that a device takes at the very best."""
        seconds = max(self.flops / device.flops_per_second, self.bytes / device.bytes_per_second)
        return 1e3 * seconds

    def bound(self, device: Device) -> str:
        """What it waits for: "products" or "memory"."""
        computing = self.flops / device.flops_per_second
        return "products" if computing >= self.bytes / device.bytes_per_second else "memory"


def forward(problem: Problem) -> Work:
    """Two products per tile; q, k and v read, the output and a number per row written."""
    size = _sizes(problem)
    return Work(_products(problem, 1, 1), size.q + size.kv + size.out + size.row_numbers / 2)


def skipping(problem: Problem, listed: float) -> Work:
    """A forward pass that skips tiles on the way: of those the logits alone, not the values.

    Args:
      problem: Whose tiles are those that are kept.
      listed: Tiles whose logits are computed, of all query heads.
    """
    kept, every = forward(problem), problem._replace(tiles=listed)
    moved = kept.bytes + _sizes(every).k - _sizes(problem).k
    return Work(_products(every, 1, 0) + _products(problem, 0, 1), moved)


def d_q(problem: Problem) -> Work:
    """Three products: logits, gradients of the probabilities, and of q."""
    size = _sizes(problem)
    return Work(_products(problem, 2, 1), 2 * size.q + size.out + size.kv + size.row_numbers)


def d_k_d_v(problem: Problem) -> Work:
    """Four products: logits, gradients of v, of the probabilities, and of k."""
    size = _sizes(problem)
    return Work(_products(problem, 2, 2), size.q + size.out + 2 * size.kv + size.row_numbers)


def d_k(problem: Problem) -> Work:
    """Three products: logits, gradients of the probabilities, and of k."""
    size = _sizes(problem)
    moved = size.q + size.out + size.kv + size.k + size.row_numbers
    return Work(_products(problem, 2, 1), moved)


def d_v(problem: Problem) -> Work:
    """Two products: logits, and gradients of v; v itself is not needed."""
    size = _sizes(problem)
    moved = size.q + size.out + size.k + size.v + size.row_numbers / 2
    return Work(_products(problem, 1, 1), moved)


def row_lse(problem: Problem) -> Work:
    """One product; q and k read, a number per row written."""
    size = _sizes(problem)
    return Work(_products(problem, 1, 0), size.q + size.k + size.row_numbers / 2)


def tile_scores(problem: Problem) -> Work:
    """Sums or maxima of the map: one product; q, k and a number per row read, one per tile written.

    Their exponentials are not counted, as a softmax's are not: one per pair for sums, one per row
    and tile for maxima.
    """
    size = _sizes(problem)
    moved = size.q + size.k + size.row_numbers / 2 + 4.0 * problem.tiles
    return Work(_products(problem, 1, 0), moved)


def antidiagonals(problem: Problem, stride: int, group: int) -> Work:
    """Sums over antidiagonals of cells: a `stride`th of a product; a number per row and run.

    Args:
      problem: Of tokens, as are its tiles.
      stride: Tokens per cell.
      group: Key cells per run, whose number is written once and read once.
    """
    size = _sizes(problem)
    cells = problem.tiles * problem.block_q * problem.block_kv / stride**2
    # and the lse of each row of cells
    moved = size.q + size.k + 8.0 * cells / group + size.row_numbers / (2 * stride)
    return Work(_products(problem, 1, 0) / stride, moved)


def best_columns(problem: Problem, parts: int, top_k: int) -> Work:
    """The best keys of each query: a product with each part of them; two numbers per chosen one."""
    size = _sizes(problem)
    moved = size.q + parts * size.k + top_k * size.row_numbers
    return Work(parts * _products(problem, 1, 0), moved)


def best_blocks_of_windows(problem: Problem, top_k: int) -> Work:
    """The best blocks of each query by probabilities of windows, which heads of a group share.

    A product; q, k and a number per row read, two numbers per chosen block written, for a group.
    Exponentials are not counted, nor is what is computed again for windows in two blocks.

    Args:
      problem: Of windows, as are its tiles.
      top_k: Blocks of a query.
    """
    size = _sizes(problem)
    chosen = 8.0 * top_k * problem.kv_heads * problem.q_len
    return Work(_products(problem, 1, 0), size.q + size.k + size.row_numbers / 2 + chosen)


def merging(problem: Problem, parts: int) -> Work:
    """What parts with a softmax each cost beside one pass over all their keys.

    Each after the first reads q again; each writes an output and a number per row of its own, which
    merging reads, to write what one pass would have written.
    """
    size = _sizes(problem)
    return Work(0.0, (parts - 1) * size.q + 2 * parts * (size.out + size.row_numbers / 2))


def inverse_lists(lists: int, rows: int, width: int, columns: int) -> Work:
    """Lists turned round: each entry and each row's count read once, ids and offsets written once.

    Args:
      lists: Of all sequences and heads.
      rows: Of each.
      width: Entries of a row, padding included, for which there are places.
      columns: That entries name.
    """
    return Work(0.0, 4.0 * lists * (2 * rows * width + rows + columns + 1))


def kernels(problem: Problem) -> dict[str, Work]:
    """The work of each kernel of a forward pass and its gradient, by name."""
    made = (d_k, d_v) if problem.masked else (d_k_d_v,)
    return {kernel.__name__: kernel(problem) for kernel in (forward, d_q, *made)}


def kernels_of_short_tiles(problem: Problem) -> dict[str, Work]:
    """The work where tiles have fewer queries or keys than the 64 rows that tensor cores multiply.

    Heads, rows and tiles count as kernels get them: a group of query heads whose heads are rows of
    one tile is a head. Each program reads all that its list names: keys that several lists name may
    come from the cache, and then a kernel may be faster than this.
    """
    own_queries = problem._replace(block_q=max(problem.block_q, _ROWS))
    own_keys = problem._replace(block_kv=max(problem.block_kv, _ROWS))
    size, width = _sizes(problem), problem.itemsize * (problem.dim + problem.v_dim)
    listed_keys = problem.tiles * problem.block_kv * width
    # of each, both numbers per row too
    listed_rows = problem.tiles * problem.block_q * (width + 8.0)
    rows = size.q + size.out
    found = {
        "forward": Work(_products(own_queries, 1, 1), rows + size.row_numbers / 2 + listed_keys),
        "d_q": Work(_products(own_queries, 2, 1), rows + size.q + size.row_numbers + listed_keys),
    }
    if not problem.masked:
        both = Work(_products(own_keys, 2, 2), 2 * size.kv + listed_rows)
        return {**found, "d_k_d_v": both}
    return {
        **found,
        "d_k": Work(_products(own_keys, 2, 1), size.kv + size.k + listed_rows),
        "d_v": Work(_products(own_keys, 1, 1), size.k + size.v + listed_rows),
    }


def gathered_queries(problem: Problem) -> dict[str, Work]:
    """The same for tiles of few queries, where each entry's part is written and read again.

    A forward pass keeps of each query and entry a sum of values, its weight and the largest logit.
    """
    listed = problem.tiles * problem.block_q
    return {
        "forward": _kept(forward(problem), listed * (problem.v_dim + 2)),
        "d_q": _kept(d_q(problem), listed * problem.dim),
        "d_k_d_v": d_k_d_v(problem),
    }


def gathered_columns(problem: Problem) -> dict[str, Work]:
    """The same for tiles of few keys, whose lists no two heads share."""
    listed = problem.tiles * problem.block_kv
    return {
        "forward": forward(problem),
        "d_q": d_q(problem),
        "d_k_d_v": _kept(d_k_d_v(problem), listed * (problem.dim + problem.v_dim)),
    }


def _kept(work: Work, numbers: float) -> Work:
    """With so many f32 written and read besides."""
    return Work(work.flops, work.bytes + 8.0 * numbers)


class _Sizes(NamedTuple):
    """Bytes of each array; `row_numbers` of two f32 per row, `kv` of k and v."""

    q: float
    out: float
    k: float
    v: float
    row_numbers: float

    @property
    def kv(self) -> float:
        return self.k + self.v


def _sizes(problem: Problem) -> _Sizes:
    rows = problem.heads * problem.q_len
    # where tiles are few, some keys are never read
    columns = min(problem.kv_heads * problem.kv_len, problem.tiles * problem.block_kv)
    return _Sizes(
        float(problem.itemsize * rows * problem.dim),
        float(problem.itemsize * rows * problem.v_dim),
        float(problem.itemsize * columns * problem.dim),
        float(problem.itemsize * columns * problem.v_dim),
        8.0 * rows,
    )


def _products(problem: Problem, over_dim: int, over_v_dim: int) -> float:
    pairs = problem.tiles * problem.block_q * problem.block_kv
    return 2.0 * pairs * (over_dim * problem.dim + over_v_dim * problem.v_dim)
