"""What the kernels over listed tiles share: programs that walk lists.

A program owns a tile of tokens, as many for each of its consumer warpgroups as the chip's tensor
cores have rows, and meets the tiles of the other side that its list names. A producer warpgroup
reads the list and copies those tiles by TMA into rings of shared memory. Every consumer waits for a
tile to come and says when it is done with it; the producer waits for all of them before it
overwrites a slot.

Blocks shorter than a warpgroup's 64 rows are walked by the same programs. An owned block of fewer
rows lies at the top of its tile: they alone are loaded and stored, and what products make of the
others stays with those. Blocks that are met are strips, of which as many as fill 64 rows are copied
into one tile, each from where it is; lists and positions then come in the order of `strips`. That
rows are multiplied in vain costs little, for such programs wait for keys: 64 keys and values of
width 128 are 32 KiB, of which a Hopper's memory (4.8 TB/s, 132 multiprocessors) brings one in 900
ns to each, while its tensor cores (989 TFLOP/s) multiply them with 64 rows in 280 ns, however few
of those count.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ring
from pallas_kernels.ring import Ring
from pallas_kernels.warpgroup import Hopper, Operations

ROWS = Hopper.height  # of one warpgroup
SHARED_MEMORY = 232_448  # bytes a program may have on Hopper
RESERVED = 4096  # of which barriers and the compiler's scratch for reductions take a part
CACHED = 32 << 20  # bytes of one side that may count on staying in the 50 MB of Hopper's L2 cache

Carry = TypeVar("Carry")


class Lists(NamedTuple):
    """Which tiles of the other side each tile meets, as parts of one flat list per head.

    Where tiles are several blocks each, all numbers but `ids` count tiles.

    Attributes:
      ids: int32 [batch | 1, heads | kv_heads | 1, entries], tiles of the other side.
      first: int32 [batch | 1, heads | kv_heads | 1, blocks], where a tile's part begins.
      last: int32, as `first`: one past the part's end.
      whole: int32, as `first`: entries before this one are tiles in which the mask hides nothing.
        None where there is no mask.
    """

    ids: jax.Array
    first: jax.Array
    last: jax.Array
    whole: jax.Array | None = None


class Layout(Protocol):
    """What a kernel's configuration says of warpgroups and their memory."""

    @property
    def stages(self) -> int:
        """Tiles in flight."""
        ...

    @property
    def consumer_registers(self) -> int:
        """Registers per thread of a consumer."""
        ...

    @property
    def producer_registers(self) -> int:
        """Registers per thread of the producer."""
        ...


class Side(NamedTuple):
    """Arrays [batch, tokens, heads, width] of one side, q's or k's, and its tokens per block."""

    arrays: tuple[jax.Array, ...]
    block: int

    @property
    def heads(self) -> int:
        """Its heads."""
        return self.arrays[0].shape[2]

    @property
    def blocks(self) -> int:
        """Its blocks."""
        return self.arrays[0].shape[1] // self.block

    @property
    def tile(self) -> int:
        """Tokens of a tile in shared memory."""
        return max(self.block, ROWS)

    @property
    def strips(self) -> int:
        """Blocks that are met together, as one tile."""
        return self.tile // self.block


class Sides(NamedTuple):
    """Who owns tiles, who is met: which programs there are, and which lists each walks.

    Head by head of a group if q's tiles are owned; if k's are, a program meets the tiles of all
    heads of its group.
    """

    own: Side
    met: Side

    @property
    def kv_heads(self) -> int:
        """Heads of k and v."""
        return min(self.own.heads, self.met.heads)

    @property
    def members(self) -> int:
        """Heads of a group that own tiles."""
        return max(self.own.heads // self.met.heads, 1)

    @property
    def visits(self) -> int:
        """Lists that a program walks."""
        return max(self.met.heads // self.own.heads, 1)

    def order(self, lists: "Lists") -> jax.Array:
        """The number of each program, int32, in the order in which they start."""
        batches, heads = self.own.arrays[0].shape[0], max(self.own.heads, self.met.heads)
        work = _work(lists, batches, heads, self.kv_heads, self.members)
        return order(work, _together(work, self.met))

    def owner(self, program: jax.Array) -> "Owner":
        """What a program owns, from its number."""
        rest, member = divmod_i32(program, self.members)
        rest, block = divmod_i32(rest, self.own.blocks)
        batch, kv_head = divmod_i32(rest, self.kv_heads)
        return Owner(batch, kv_head, kv_head * self.members + member, block)

    def visit(self, lists: "Lists", owner: "Owner", which: jax.Array, before: jax.Array) -> "Visit":
        """A list that a program walks.

        Args:
          lists: References to all lists.
          owner: What the program owns.
          which: The number of the list, below `visits`.
          before: How many tiles were met before.
        """
        met_head = owner.kv_head * self.visits + which
        q_head = owner.head if self.members > 1 else met_head
        heads = max(self.own.heads, self.met.heads)
        row = (
            owner.batch if lists.ids.shape[0] > 1 else jnp.int32(0),
            lax.div(q_head, jnp.int32(heads // lists.ids.shape[1])),
        )
        first, last = (x[*row, owner.block] for x in (lists.first, lists.last))
        whole = None if lists.whole is None else lists.whole[*row, owner.block]
        return Visit(owner.batch, met_head, row, first, whole, last, before)


class Owner(NamedTuple):
    """What a program owns: a tile of a head."""

    batch: jax.Array
    kv_head: jax.Array
    head: jax.Array
    block: jax.Array


class Visit(NamedTuple):
    """A part of a list, on the way of a program.

    Attributes:
      batch: The sequence.
      head: The head of the other side.
      row: Where in `Lists.ids` the list is.
      first: Its first entry.
      whole: The first entry of which the mask hides something; None where there is no mask.
      last: One past its last entry.
      before: How many tiles the program met before.
    """

    batch: jax.Array
    head: jax.Array
    row: tuple[jax.Array, jax.Array]
    first: jax.Array
    whole: jax.Array | None
    last: jax.Array
    before: jax.Array

    def step(self, entry: jax.Array) -> jax.Array:
        """The number of a tile among all that the program meets."""
        return self.before + entry - self.first

    @property
    def after(self) -> jax.Array:
        """How many tiles the program has met when this is done."""
        return self.before + self.last - self.first

    def masked(self, entry: jax.Array) -> bool | jax.Array:
        """Whether the mask hides something in a tile."""
        return False if self.whole is None else entry >= self.whole

    def without_first(self) -> "Visit":
        """The rest of the part, when its first entry has been met."""
        first = self.first + 1
        whole = None if self.whole is None else jnp.maximum(self.whole, first)
        return self._replace(first=first, whole=whole, before=self.before + 1)

    def in_pieces(self, parts: int) -> "Visit":
        """The same where each entry is so many pieces, and all numbers count those."""
        whole = None if self.whole is None else self.whole * parts
        first, last, before = (x * parts for x in (self.first, self.last, self.before))
        return self._replace(first=first, whole=whole, last=last, before=before)

    def tiles(self, tile: Callable[[jax.Array, Carry, bool], Carry], carry: Carry) -> Carry:
        """Runs `tile(entry, carry, masked)` for each entry."""
        if self.whole is None:
            return lax.fori_loop(self.first, self.last, lambda n, x: tile(n, x, False), carry)
        carry = lax.fori_loop(self.first, self.whole, lambda n, x: tile(n, x, False), carry)
        return lax.fori_loop(self.whole, self.last, lambda n, x: tile(n, x, True), carry)


class Program(NamedTuple):
    """A program as one of its consumer warpgroups sees it.

    Attributes:
      batch: The sequence.
      head: The head of the tile it owns.
      start: The first of its tokens.
      rows: How many they are.
      member: Which of the consumers it is; those that own the same tokens are neighbours.
      stripe: Which of the program's stripes of tokens it owns.
      tiles: The tiles of each array of its side in shared memory, one for each stripe.
      rings: The tiles it meets, of each array of the other side.
      inputs: References to the further inputs.
      results: References to the results.
      scratch: References to the further shared memory.
      positions: A reference to the numbers from 0 on, or to the positions in the order of lists.
      other: The side whose tiles it meets.
      visits: How many lists the program walks.
      visit: Gives each of them from its number and how many tiles were met before.
      ids: `Lists.ids`.
      ops: The functions of the chip on arrays in registers.
    """

    batch: jax.Array
    head: jax.Array
    start: jax.Array
    rows: int
    member: jax.Array
    stripe: jax.Array
    tiles: tuple[Any, ...]
    rings: tuple[Ring, ...]
    inputs: tuple[Any, ...]
    results: tuple[Any, ...]
    scratch: tuple[Any, ...]
    positions: Any
    other: Side
    visits: int
    visit: Callable[[jax.Array, jax.Array], Visit]
    ids: Any
    ops: Operations

    def own(self, which: int) -> Any:
        """Its tokens' rows of an array of its side, in shared memory."""
        return self.tiles[which].at[ring.anew(self.stripe)]

    def met(self, visit: Visit, entry: jax.Array) -> jax.Array:
        """Which tile an entry is."""
        return self.ids[*visit.row, entry]

    def first(self, visit: Visit, entry: jax.Array) -> jax.Array:
        """Where what is known of a tile's tokens begins in arrays of such numbers."""
        if self.other.strips == 1:
            return self.met(visit, entry) * self.other.block
        return entry * self.other.tile

    def listed(self, visit: Visit) -> tuple[jax.Array, ...]:
        """Which row of `positions` that is about; none where they are the numbers from 0 on."""
        return visit.row if self.other.strips > 1 else ()

    def stored(self, ref: Any) -> Any:
        """Of a warpgroup's rows in shared memory those that are its tokens'."""
        return ref if self.rows == self.ops.height else ref.at[pl.ds(0, self.rows)]

    def write(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Copies from shared to device memory, and waits for that."""
        plgpu.commit_smem()
        for source, target in pairs:
            plgpu.copy_smem_to_gmem(source, target)
        plgpu.wait_smem_to_gmem(0)

    @property
    def tokens(self) -> tuple[Any, ...]:
        """Where its rows are in arrays [batch, tokens, heads, width]."""
        return self.batch, pl.ds(self.start, self.rows), self.head

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Where its rows are in arrays [batch, heads, tokens]."""
        return self.batch, self.head, pl.ds(self.start, self.rows)


def launch(
    consumer: Callable[[Program], None],
    own: Side,
    met: Side,
    lists: Lists,
    *,
    inputs: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    config: Layout,
    ops: Operations,
    sharing: int = 1,
    positions: jax.Array | None = None,
) -> Sequence[jax.Array]:
    """Runs a program for each tile of `own`, those with the longest way first.

    Args:
      consumer: What each warpgroup of a program does.
      own: The side whose tiles are owned.
      met: The other side.
      lists: Which tiles of it are met.
      inputs: Further arrays for the consumers.
      results: Shapes of what is computed.
      scratch: Further shared memory and barriers.
      config: How a program is laid out.
      ops: The functions of the chip on arrays in registers.
      sharing: How many consumers own the same tokens.
      positions: int32 [batch | 1, heads | kv_heads | 1, tokens], those of the tokens of `lists` in
        their order, where tiles are several blocks each.
    """
    sides = Sides(own, met)
    rows = min(own.block, ops.height)
    visits, stripes = sides.visits, own.block // rows
    consumers = stripes * sharing
    given = [x for x in lists if x is not None]
    counts = own.arrays, met.arrays, given, inputs, results, own.arrays, met.arrays

    def kernel(order_ref, positions_ref, *refs):
        left = iter(refs)
        taken = [tuple(itertools.islice(left, len(group))) for group in counts]
        own_refs, met_refs, lists_refs, input_refs, result_refs, own_smem, slots = taken
        own_full = tuple(itertools.islice(left, len(own_refs)))
        rings = tuple(Ring(x, *itertools.islice(left, 2)) for x in slots)
        bound = Lists(*lists_refs)
        owner = sides.owner(order_ref[lax.axis_index("program")])
        batch, _, head, block = owner
        member = lax.axis_index("warpgroup")
        visit = functools.partial(sides.visit, bound, owner)

        @pl.when(member == consumers)
        def producer():
            plgpu.set_max_registers(config.producer_registers, action="decrease")

            def walk(which, steps):
                way = visit(which, steps)

                # the step is carried, where it might be derived: registers are few here
                def copy(entry, step):
                    strips = [
                        bound.ids[*way.row, entry * met.strips + n if met.strips > 1 else entry]
                        * met.block
                        for n in range(met.strips)
                    ]
                    for ref, tiles in zip(met_refs, rings, strict=True):
                        sources = [(batch, pl.ds(start, met.block), way.head) for start in strips]
                        tiles.fill([ref.at[source] for source in sources], step)
                    return step + 1

                return lax.fori_loop(way.first, way.last, copy, steps)

            steps = lax.fori_loop(0, visits, walk, jnp.int32(0))
            for tiles in rings:
                tiles.drain(steps)

        @pl.when(member < consumers)
        def consume():
            plgpu.set_max_registers(config.consumer_registers, action="increase")
            stripe, other = divmod_i32(member, sharing)
            start = block * own.block + stripe * rows

            @pl.when(other == 0)
            def load():
                for ref, smem, full in zip(own_refs, own_smem, own_full, strict=True):
                    source = ref.at[batch, pl.ds(start, rows), head]
                    whole = rows == ops.height
                    tile = smem.at[stripe] if whole else smem.at[stripe, pl.ds(0, rows)]
                    plgpu.copy_gmem_to_smem(source, tile, full.at[stripe])

            for full in own_full:
                plgpu.barrier_wait(full.at[stripe])

            def visit_anew(which, before):
                # registers are few: what gives the start is not kept beside it
                block = lax.div(ring.anew(start), jnp.int32(own.block))
                return sides.visit(bound, owner._replace(block=block), which, before)

            consumer(
                Program(
                    batch,
                    head,
                    start,
                    rows,
                    member,
                    stripe,
                    tiles=own_smem,
                    rings=rings,
                    inputs=input_refs,
                    results=result_refs,
                    scratch=tuple(left),
                    positions=positions_ref,
                    other=met,
                    visits=visits,
                    visit=visit_anew,
                    ids=bound.ids,
                    ops=ops,
                )
            )

    if positions is None:
        longest = max(side.arrays[0].shape[1] for side in (own, met))
        positions = jnp.arange(longest, dtype=jnp.int32)
    programs = sides.order(lists)
    return plgpu.kernel(
        kernel,
        out_type=tuple(results),
        scratch_types=(
            *(ring.tiles(x.dtype, stripes, ops.height, x.shape[3]) for x in own.arrays),
            *(ring.tiles(x.dtype, config.stages, met.tile, x.shape[3]) for x in met.arrays),
            *(plgpu.Barrier(num_barriers=stripes) for _ in own.arrays),
            *itertools.chain(
                *(ring.barriers(config.stages, consumers, met.strips) for _ in met.arrays)
            ),
            *scratch,
        ),
        grid=programs.shape,
        grid_names=("program",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=ops.compiler_params,
    )(programs, positions, *own.arrays, *met.arrays, *given, *inputs)


def readable(values: jax.Array, own: Side) -> jax.Array:
    """Numbers per token [.., tokens | 1], of which a warpgroup may read its rows from any block."""
    missing = own.tile - own.block
    if not missing or values.shape[-1] == 1:
        return values
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def divmod_i32(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder of numbers that are not negative."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def _work(lists: Lists, batches: int, heads: int, kv_heads: int, members: int) -> jax.Array:
    """How many tiles each program meets: [batches, kv_heads, blocks, members]."""
    counts = lists.last - lists.first
    counts = jnp.repeat(counts, heads // counts.shape[1], axis=1)
    shape = batches, kv_heads, heads // kv_heads, counts.shape[2]
    per_head = jnp.broadcast_to(counts.reshape(-1, *shape[1:]), shape)
    if members > 1:
        return jnp.swapaxes(per_head, 2, 3)
    return per_head.sum(2)[..., None]


def _together(work: jax.Array, met: Side) -> int:
    """How many kv heads may take their turn together without crowding each other out of L2."""
    kv_heads = work.shape[0] * work.shape[1]
    size = sum(x.size * x.dtype.itemsize for x in met.arrays) // kv_heads
    fitting = max(1, min(kv_heads, CACHED // size))
    return next(n for n in range(fitting, 0, -1) if kv_heads % n == 0)


def order(work: jax.Array, together: int) -> jax.Array:
    """The order of programs: as many kv heads as fit in the cache, and of those the longest first.

    Programs start in this order as others end, so that none of the long ones is left for the end.
    Of equal ones, those that share a kv head and a tile stand side by side.

    Args:
      work: int32 [batches, kv_heads, blocks, members], the tiles that each program meets.
      together: How many kv heads fit, a divisor of `batches * kv_heads`.

    Returns:
      int32 [programs], positions in the flattened `work`.
    """
    sections = work.reshape(-1, together * work.shape[2] * work.shape[3])
    longest_first = jnp.argsort(sections, axis=1, stable=True, descending=True)
    starts = jnp.arange(sections.shape[0], dtype=jnp.int32)[:, None] * sections.shape[1]
    return (longest_first.astype(jnp.int32) + starts).reshape(-1)
