# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training with native sparse attention
#
# Most sparse attention prunes a model that was trained densely. **Native** sparse attention is
# there from the first step: what each query reads is a fixed budget, and the model learns to live
# within it. The difficulty is the choice. It is a top-k, and a top-k has no gradient:
#
# * **NSA** attends to compressed windows too; that attention has a gradient, and its probabilities
#   say which blocks are read in full.
# * **FlashMoBA** ranks blocks by their mean keys, and leaves it to the attention inside the chosen
#   blocks to shape those keys.
#
# This notebook puts NSA into a layer and looks at what it computes, trains a small model of such
# layers on a task that cannot be done without choosing well, and shows what it chooses. In the end
# it simulates why blocks that are ranked by their mean keys should be small. It takes about two
# minutes on a CPU.

# %% [markdown]
# ## Setting up
#
# jsparse is installed from a clone, which also has the model. In Colab, a clone is a file that you
# upload: run `git archive --prefix=jsparse/ --output=jsparse.zip HEAD` in yours. The cell below
# asks for `jsparse.zip` and installs it; a CPU runtime will do. Elsewhere it only looks for the
# clone that this notebook is in, installed by `pip install -e '.[report,train]'`.

# %%
import shutil
import subprocess
import sys
from pathlib import Path

place = Path.cwd()
if "google.colab" in sys.modules:
    place = place / "jsparse"
    if not place.is_dir():
        from google.colab import files

        files.upload()
        shutil.unpack_archive("jsparse.zip")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--editable", f"{place}[report,train]"], check=True)
clone = next(p for p in (place, *place.parents) if (p / "examples" / "language_model").is_dir())
sys.path.insert(0, str(clone))

# %%
import os
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.colors import ListedColormap

import jsparse as js
import jsparse.nn
from examples import associative_recall as recall
from examples import curves
from examples.language_model.model import LanguageModel
from jsparse.evaluation import density_of_layers
from jsparse.routing.flashmoba import failure_rate, signal_to_noise

device = jax.devices()[0]
print(f"JAX {jax.__version__} on {device.device_kind}, {os.cpu_count()} cores")

# %% [markdown]
# ## A layer with NSA
#
# A method is a value; a layer takes it, holds its parameters and trains them with its own. The
# sizes below are for a toy: the paper has windows of 32 keys, 16 blocks of 64, and 512 local keys,
# and a small perceptron makes one key of a window's, where this takes their mean. The mean has
# nothing to learn, so that the gates are NSA's only parameters here.

# %%
BLOCK, CONTEXT = 8, 128


def native(top_k):
    return js.nsa(
        compression=js.windows.mean(),
        compression_size=16,  # keys that one compressed key stands for
        stride=8,  # from a window to the next: they overlap
        block_kv=BLOCK,  # keys per selected block
        top_k=top_k,  # blocks per query, its own among them
        num_init=0,
        num_local=1,
        window=32,  # local keys
    )


method = native(top_k=4)
layer = js.nn.SparseAttention(64, num_heads=4, num_kv_heads=2, method=method, rngs=nnx.Rngs(0))
for path, x in jax.tree_util.tree_leaves_with_path(layer.params()):
    print(f"{jax.tree_util.keystr(path)} {x.shape}: features, heads, branches")

# %% [markdown]
# Three attentions, mixed by gates of the hidden states: compressed, selected, local. What each
# query computes in them, for one kv head of a layer that has learnt nothing yet:

# %%
causal = js.masks.causal()
x = jax.random.normal(jax.random.key(0), (CONTEXT, 64))
q, k = (
    jax.random.normal(key, (CONTEXT, heads, 16))
    for key, heads in zip(jax.random.split(jax.random.key(1)), (4, 2), strict=True)
)
_, info = method.plan(layer.params(), q, k, x=x, mask=causal)


def pairs_of(branch):
    """Which keys each query computes, [queries, keys of the branch]."""
    keys = branch.k.shape[-3]
    tiles = js.block_mask(branch.mask, CONTEXT, keys, block_q=1, block_kv=1, width=keys)
    seen = np.asarray(tiles.to_dense()[0])
    if branch.plan is None:
        return seen
    chosen = np.asarray(branch.plan.to_dense()[0])
    return seen & chosen.repeat(branch.plan.block_kv, axis=-1)[:, :keys]


two = ListedColormap(["#eef1f5", "#17497c"])
figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
names = "compressed: windows of 16 keys", "selected: 4 blocks of 8 keys", "local: 32 keys"
for axis, name, branch in zip(axes, names, info.branches, strict=True):
    shown = pairs_of(branch)
    axis.imshow(shown, cmap=two, aspect="auto", interpolation="none")
    share = shown.sum() / (CONTEXT * (CONTEXT + 1) / 2)
    axis.set_title(f"{name}\n{share:.0%} as many pairs as dense", size=10)
    axis.set(xlabel="window" if "windows" in name else "key", ylabel="query")
    axis.label_outer()
plt.show()

# %% [markdown]
# `density_report` counts the same for any method, so that budgets can be compared. Tiles are those
# of the lists, pairs those of all three attentions. At 128 tokens these save next to nothing; but
# what is selected or local does not grow with the length.

# %%
report = density_of_layers(layer, x, mask=causal)[0]
print(report)

# %% [markdown]
# ## A task that needs a choice
#
# Pairs of a key and a value are planted early in a sequence, among tokens that mean nothing. Later
# some keys come again, and the model is to say their values. In 128 tokens a question is at least
# 16 tokens away from its pair, mostly much more; blocks are chosen before anything in them is read.

# %%
shown = recall.sequences(1, CONTEXT, seed=5)
kinds = np.zeros(CONTEXT)
row = np.asarray(shown.tokens[0])
kinds[row < recall.KEYS] = 1
kinds[(row >= recall.KEYS) & (row < recall.KEYS + recall.VALUES)] = 2
figure, axis = plt.subplots(figsize=(11, 1.8), layout="constrained")
colors = ListedColormap(["#eef1f5", "#17497c", "#b3541e"])
axis.imshow(kinds[None], cmap=colors, aspect="auto", interpolation="none")
for asked, planted in zip(np.asarray(shown.asked[0]), np.asarray(shown.planted[0]), strict=True):
    axis.annotate(
        "", (planted, -0.5), (asked, -0.5), arrowprops={"arrowstyle": "->", "color": "#7a8694",
        "connectionstyle": "arc3,rad=0.12"}, annotation_clip=False,
    )  # fmt: skip
axis.set(yticks=[], xlabel="token: keys blue, values orange; arrows lead to where the answer is")
axis.set_ylim(0.5, -1.6)
plt.show()

# %% [markdown]
# A language model of two layers, both with NSA. The training loop is the usual one. Short sequences
# first, of four blocks, in which each query has them all and the model learns what to do; then
# longer ones, for which it has to learn where to look. With `python -m examples.associative_recall`
# the sequences end at 512 tokens, for FlashMoBA as well.

# %%
STEPS = ((32, 64, 640), (CONTEXT, 16, 240))  # length, sequences per step, steps
SAVE_EVERY = 80

# %%
model = LanguageModel(recall.MODEL, method=method, rngs=nnx.Rngs(0))
for layer in js.nn.attention_layers(model):
    layer.implementation = "reference"  # products of everything: on a CPU the fastest, so short
schedule = [(length, count) for length, count, steps in STEPS for _ in range(steps)]
total = len(schedule)
rates = optax.warmup_cosine_decay_schedule(0.0, 3e-3, total // 16, total, end_value=1e-3)
transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rates, b2=0.98))
optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, batch):
    (_, bits), gradients = nnx.value_and_grad(recall.loss, has_aux=True)(model, batch)
    optimizer.update(model, gradients)
    return bits


# %% [markdown]
# Orbax keeps the state as it goes. A kernel that dies loses an interval at most: run the cells
# again, and the loop goes on from the last state. Once it has come to the end it leaves none.

# %%
STATES = clone / "build" / "recall_states"


def state():
    return {"trained": nnx.state((model, optimizer)), "bits": history}


history = np.full(total, np.nan, np.float32)
states = ocp.CheckpointManager(STATES, options=ocp.CheckpointManagerOptions(max_to_keep=1))
done = states.latest_step() or 0
if done:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state())
    found = states.restore(done, args=ocp.args.StandardRestore(target))
    nnx.update((model, optimizer), found["trained"])
    history = found["bits"]
    print(f"{done} of {total} steps were done before")

start = time.perf_counter()
for number, (length, count) in enumerate(schedule[done:], done + 1):
    batch = recall.sequences(count, length, number - 1)
    history[number - 1] = step(model, optimizer, batch)
    if number % SAVE_EVERY == 0:
        states.save(number, args=ocp.args.StandardSave(state()))
        bits = history[number - SAVE_EVERY // 4 : number].mean()
        elapsed = time.perf_counter() - start
        print(f"step {number}, {length:3} tokens: {bits:.2f} bits per answer, {elapsed:.0f} s")
states.wait_until_finished()
states.close()
shutil.rmtree(STATES)

# %%
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
smooth = np.convolve(history, np.ones(10) / 10, mode="valid")
axis.plot(np.arange(len(smooth)) + 10, smooth, color="#17497c")
ends = np.cumsum([steps for *_, steps in STEPS])
for (length, *_), end in zip(STEPS, ends, strict=True):
    axis.axvline(end, color="#7a8694", linestyle=":")
    axis.text(end, 7.5, f"{length} tokens ", ha="right", size=9)
axis.axhline(np.log2(recall.VALUES), color="#b3541e", linestyle="--")
axis.text(0, np.log2(recall.VALUES) + 0.15, "any value", color="#b3541e", size=9)
axis.set(xlabel="steps", ylabel="bits per answer", ylim=(0, 8.2))
plt.show()

# %% [markdown]
# From here on each layer computes by whatever is fastest here: the parameters are the same. Is the
# choice in use? The same parameters are asked once more with one block per query, its own.

# %%
for layer in js.nn.attention_layers(model):
    layer.implementation = None
held_out = recall.sequences(64, CONTEXT, seed=10**6)
reports = density_of_layers(model, held_out.tokens[:4])
tiles = np.mean([report.tiles for report in reports])
print(f"selected: {tiles:.0%} of the blocks that a query sees")
print(f"recall {recall.recalled(model, held_out):.1%}")
blind = recall.with_method(model, native(top_k=1))
print(f"without choosing any block besides its own {recall.recalled(blind, held_out):.1%}")

# %% [markdown]
# ## What it chooses
#
# A method is a tuple of functions. One that also writes down its lists takes its place in the
# trained layers.

# %%
lists = []


def attend(*given, **more):
    out, info = method.attend(*given, **more)
    lists.append(np.asarray(info.branches[1].plan.to_dense())[:, 0])
    return out, info


recall.with_method(model, method._replace(attend=attend))(held_out.tokens)
asked, planted = np.asarray(held_out.asked), np.asarray(held_out.planted)
rows, offsets = np.arange(len(asked))[:, None], np.arange(-3, 7)
# the pair of the question beside; out of reach where that asks for the same
others = np.roll(planted, 1, axis=1)
others = np.where(others == planted, -CONTEXT, others)


def chosen_at(chosen, pairs, offset):
    """How often questions choose the block so many after a pair's, where it is before their own."""
    block = pairs // BLOCK + offset
    before = (block >= 0) & (block < asked // BLOCK)
    return chosen[rows, asked, np.where(before, block, 0)][before].mean()


figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=(5, 3, 3))
order = asked[0].argsort()
axes[0].imshow(lists[1][0, asked[0, order]], cmap=two, aspect="auto", interpolation="none")
pairs = planted[0, order] // BLOCK
axes[0].plot(pairs, np.arange(len(order)), "s", color="#b3541e", fillstyle="none", markersize=11)
axes[0].set_title("second layer, blocks of one sequence", size=10)
axes[0].set(xlabel="block; orange: of the pair that is asked for", ylabel="question", yticks=[])
for axis, name, chosen in zip(axes[1:], ("first layer", "second layer"), lists, strict=True):
    for color, of, pairs in (("#b3541e", "its pair", planted), ("#7a8694", "another", others)):
        shares = [chosen_at(chosen, pairs, offset) for offset in offsets]
        axis.plot(offsets, shares, "o-", color=color, markersize=4, label=of)
        said = " ".join(f"{offset:+d}: {x:.0%}" for offset, x in zip(offsets, shares, strict=True))
        print(f"{name}, blocks after {of}: {said}")
    axis.set_title(f"{name}, all questions", size=10)
    axis.set(xlabel="blocks after that of a pair", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
axes[1].set_ylabel("chosen")
plt.show()

# %% [markdown]
# In the first layer it hardly matters which pair a question asks for. In the second the choice
# follows it: blocks soon after the pair's are chosen about twice as often as those after another
# pair's, blocks before it seldom. Most questions do not choose the pair's own block. A likely
# reason: in the first layer the pair is among the local keys of the 31 tokens after it, so that
# these can take it along, and a block in which many tokens know of a pair stands out more than one
# in which two do. By how much, the next section counts.
#
# ## Why blocks should be small
#
# FlashMoBA has no branch that looks first: a query's product with the mean key of a block is all
# that decides, as it is with the mean windows above. The mean hides the one key that matters among
# the others. Products with unrelated keys of $d$ features scatter by $1/\sqrt{d}$; a gap $\Delta$
# to the right key then stands
#
# $$\frac{\Delta}{\sqrt{2B/d}}$$
#
# deviations above the noise for blocks of $B$ keys: half the block, $\sqrt 2$ times the ratio.
# Keys of the block that belong together help, which is what FlashMoBA's convolution over keys is
# for. The simulation draws the products, takes the means and counts how often a block without the
# key wins.

# %%
DIM, TRIALS, BLOCKS = 64, 4000, np.array([16, 32, 64, 128, 256, 512])
rng = np.random.default_rng(0)


def simulated(block, *, gap, related, gain):
    products = rng.normal(scale=DIM**-0.5, size=(2, TRIALS, block))
    products[0, :, 0] += gap
    products[0, :, 1:related] += gain
    right, wrong = products.mean(-1)
    return (wrong > right).mean()


figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for color, name, related in (("#b3541e", "one key", 1), ("#17497c", "four related keys", 4)):
    setting = {"gap": 0.5, "related": related, "gain": 0.4}
    expected = [failure_rate(signal_to_noise(DIM, int(b), **setting)) for b in BLOCKS]
    counted = [simulated(b, **setting) for b in BLOCKS]
    axis.semilogx(BLOCKS, expected, color=color, label=f"{name}, by the formula")
    axis.semilogx(BLOCKS, counted, "o", color=color, label=f"{name}, simulated")
    worst = np.abs(np.subtract(expected, counted)).max()
    print(f"{name}: largest difference {worst:.3f}, one deviation is {0.5 / TRIALS**0.5:.3f}")
axis.set(xlabel="keys per block", ylabel="the wrong block wins", ylim=(0, 0.55))
axis.set_xticks(BLOCKS, BLOCKS)
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## A language model
#
# `python -m examples.train_sparse --method nsa` trains the example's language model from its first
# step with NSA in every layer, on the source of Python's standard library; other methods go by
# their names. The runs that are kept in the repository, at 4096 bytes:

# %%
print(curves.table(curves.runs(curves.FOLDER)))

# %% [markdown]
# ## Where to go from here
#
# * Your own model: `js.nn.SparseAttention(..., method=js.nsa())`. A method in some layers only is a
#   matter of which layers get it; `js.from_length(method, min_length=...)` is dense for short
#   inputs.
# * What learns by a loss of its own: indexers of `hisa` by `index_loss`, gates of `seerattention`
#   by `gate_loss`; `examples/train_sparse.py` has both.
# * `js.flashmoba(taps=3)` adds the convolution over keys.
# * On a GPU the same parameters are served by the kernels; `js.explain` says which.
