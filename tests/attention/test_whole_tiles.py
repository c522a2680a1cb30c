"""Lists for kernels name the tiles in which a mask hides nothing first, and all others after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsparse as js
from jsparse.attention import whole_tiles
from jsparse.attention.block_sparse import Lists, Sizes
from jsparse.attention.logits import LogitRule
from tests.inputs import on_device

Q_LEN, KV_LEN, BLOCK_Q, BLOCK_KV = 52, 91, 8, 16
BATCHES, HEADS, KV_HEADS = 2, 4, 2
RNG = np.random.default_rng(0)
IDS = on_device(np.repeat(RNG.integers(0, 3, (BATCHES, 6)), 16, axis=1)[:, :KV_LEN], jnp.int32)
ENDS = on_device(RNG.integers(20, Q_LEN, (HEADS, 1, 2)).repeat(KV_LEN, axis=1), jnp.int32)
MASKS = {
    "none, a last tile that is not full": lambda: None,
    "causal": js.masks.causal,
    "segments per sequence": lambda: js.masks.segments(IDS[:, -Q_LEN:], IDS) | js.masks.causal(),
    "intervals per head": lambda: js.masks.intervals(ENDS[None], causal=True, q_len=Q_LEN),
}


@pytest.mark.numbers
@pytest.mark.parametrize(
    ("name", "list_batches", "list_heads", "group"),
    [
        ("none, a last tile that is not full", 1, 1, 1),
        pytest.param("causal", BATCHES, KV_HEADS, 1, marks=pytest.mark.slow),
        ("causal", 1, 1, HEADS // KV_HEADS),
        pytest.param("segments per sequence", 1, HEADS, 1, marks=pytest.mark.slow),
        ("segments per sequence", BATCHES, 1, HEADS // KV_HEADS),
        pytest.param("intervals per head", 1, KV_HEADS, 1, marks=pytest.mark.slow),
        ("intervals per head", 1, KV_HEADS, HEADS // KV_HEADS),
        ("intervals per head", BATCHES, HEADS, 1),
    ],
)
def test_whole_tiles_come_first_and_are_those_that_all_who_share_a_list_see(
    name, list_batches, list_heads, group
):
    tiles = RNG.random((list_batches, list_heads, 7, 6)) < 0.7
    tiles[..., 2, :] = tiles[..., :, 3] = False
    plan = js.BlockMask.from_dense(
        on_device(tiles), q_len=Q_LEN, kv_len=KV_LEN, block_q=BLOCK_Q, block_kv=BLOCK_KV
    )
    # query heads may be packed as rows of their kv head
    rule = LogitRule(Q_LEN, KV_LEN, 1.0, None, None, group)
    heads, block_q = HEADS // group, BLOCK_Q * group
    sizes = Sizes(BATCHES, heads, KV_HEADS, block_q, BLOCK_KV, 7, 6, ragged=True)

    @jax.jit  # so that masks are traced
    def both(plan, mask):
        lists = Lists(plan.kv_indices, plan.kv_num_blocks, mask)
        by_key = whole_tiles.by_key(plan.inverse(), mask, rule, sizes)
        return whole_tiles.by_query(lists, rule, sizes), by_key

    mask = MASKS[name]()
    whole = whole_for_lists(mask, list_batches, list_heads)
    by_query, by_key = jax.tree.map(np.asarray, both(plan, mask))
    assert (tiles & whole).any()
    assert (tiles & ~whole).any()
    for lists, listed, seen in (
        (by_query, tiles, whole),
        (by_key, tiles.swapaxes(2, 3), whole.swapaxes(2, 3)),
    ):
        for at in np.ndindex(listed.shape[:3]):
            first, split, last = (x[at] for x in (lists.first, lists.whole, lists.last))
            ids = lists.ids[at[:2]]
            # each part in ascending order: neighbours read the same tiles at about the same time
            assert ids[first:split].tolist() == np.flatnonzero(listed[at] & seen[at]).tolist()
            assert ids[split:last].tolist() == np.flatnonzero(listed[at] & ~seen[at]).tolist()


def whole_for_lists(mask, list_batches, list_heads):
    """Brute force, on elements: [list_batches, list_heads, q_blocks, kv_blocks]."""
    q_index, kv_index = jnp.arange(Q_LEN)[:, None], jnp.arange(KV_LEN)[None]
    pairs = np.ones((BATCHES, HEADS, 7 * BLOCK_Q, 6 * BLOCK_KV), bool)
    pairs[..., KV_LEN:] = False
    for batch, head in np.ndindex(BATCHES, HEADS):
        if mask is not None:
            frame = js.types.Frame(Q_LEN, KV_LEN, batch, head)
            seen = np.asarray(mask.visible(q_index, kv_index, frame))
            pairs[batch, head, :Q_LEN, :KV_LEN] = seen
    tiles = pairs.reshape(BATCHES, HEADS, 7, BLOCK_Q, 6, BLOCK_KV).all((3, 5))
    tiles = tiles.reshape(list_batches, -1, list_heads, HEADS // list_heads, 7, 6)
    return tiles.all((1, 3))
