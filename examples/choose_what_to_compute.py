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
# # Choosing what to compute
#
# Attention over $n$ tokens has $n^2$ pairs, and most of them carry next to nothing. jsparse says in
# two ways which tiles of the attention map are worth computing:
#
# * a **mask** knows positions alone: who may see whom;
# * an **estimator** looks at q and k, and guesses where the probability will be.
#
# Both end in the same thing, a **plan**: a list of tiles that `js.attend` computes, leaving out the
# rest. This notebook composes masks, lets three published estimators choose tiles for the heads of
# a small trained language model, compares what they chose, and puts a choice into the model. It
# takes a minute or two on a CPU.

# %% [markdown]
# ## Setting up
#
# jsparse is installed from a clone, which also has the language model. In Colab, a clone is a file
# that you upload: run `git archive --prefix=jsparse/ --output=jsparse.zip HEAD` in yours. The cell
# below asks for `jsparse.zip` and installs it; a CPU runtime will do. Elsewhere it only looks for
# the clone that this notebook is in, installed by `pip install -e '.[report]'`.

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
    subprocess.run([*pip, "--editable", f"{place}[report]"], check=True)
clone = next(p for p in (place, *place.parents) if (p / "examples" / "language_model").is_dir())
sys.path.insert(0, str(clone))

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.colors import ListedColormap

import jsparse as js
import jsparse.nn
from examples.language_model import data
from examples.language_model.model import bits_per_byte, load
from jsparse import evaluation, planning

device = jax.devices()[0]
print(f"JAX {jax.__version__} on {device.device_kind}, {os.cpu_count()} cores")

# %% [markdown]
# ## Masks: who may see whom
#
# Masks compose with `&`, `|` and `~`. Nothing is computed yet: a mask is a rule, a few numbers.

# %%
causal = js.masks.causal()
window = js.masks.sliding_window(left=47)  # a query's own key and the 47 before it
sinks = js.masks.sinks(16)  # the first keys, which everyone sees
documents = js.masks.segments(jnp.repeat(jnp.arange(3), jnp.array([96, 40, 120])))

masks = {
    "causal": causal,
    "causal & window": causal & window,
    "causal & (window | sinks)": causal & (window | sinks),
    "causal & documents": causal & documents,
    "causal & ~window": causal & ~window,
}

# %% [markdown]
# `js.block_mask` turns a mask into a plan: the tiles in which some query sees some key. Tiles of
# one token are the pairs themselves, so the same call draws the rule too. A tile in which the
# negated mask leaves nothing is full: it is computed without looking at the mask again.

# %%
LENGTH, TILE = 256, 32


def tiles_of(mask, size):
    plan = js.block_mask(mask, LENGTH, LENGTH, block_q=size, block_kv=size, width=LENGTH // size)
    return np.asarray(plan.to_dense()[0])


figure, axes = plt.subplots(2, len(masks), figsize=(13, 5.8), layout="constrained")
three = ListedColormap(["#eef1f5", "#8db7dd", "#17497c"])
for column, (name, mask) in enumerate(masks.items()):
    pairs, some, hidden = tiles_of(mask, 1), tiles_of(mask, TILE), tiles_of(~mask, TILE)
    full = some & ~hidden
    edges = dict(extent=(0, LENGTH, LENGTH, 0), interpolation="none")
    axes[0, column].imshow(2 * pairs, cmap=three, vmin=0, vmax=2, **edges)
    axes[0, column].set_title(f"{name}\n{pairs.mean():.0%} of the pairs", size=10)
    axes[1, column].imshow(0 + some + full, cmap=three, vmin=0, vmax=2, **edges)
    axes[1, column].set_title(f"{some.mean():.0%} of the tiles", size=10)
for axis in axes.flat:
    axis.set(xticks=range(0, LENGTH + 1, 64), yticks=range(0, LENGTH + 1, 64))
    axis.tick_params(labelsize=8)
    axis.label_outer()
axes[0, 0].set_ylabel("each pair\n\nquery")
axes[1, 0].set_ylabel(f"tiles of {TILE} x {TILE}\n\nquery")
for axis in axes[1]:
    axis.set_xlabel("key")
shades = [plt.Rectangle((0, 0), 1, 1, color=three(n)) for n in range(3)]
names = "skipped", "partly visible: computed and masked", "full: computed as it is"
figure.legend(shades, names, loc="outside lower center", ncols=3, frameon=False)
plt.show()

# %% [markdown]
# ### What it costs
#
# A mask says of a whole tile at once whether it is empty, partly visible or full, from the tile's
# corners: the time goes with the number of tiles, the memory with the number of those listed. For a
# quarter of a million tokens, an array of bools would take 64 GiB. Below: the best of five runs, on
# the machine named above.

# %%
sparse = causal & (js.masks.sinks(64) | js.masks.sliding_window(left=1023))
lengths, seconds, sizes = [2**n for n in (12, 14, 16, 18)], [], []
for length in lengths:
    jax.block_until_ready(js.block_mask(sparse, length, length))  # compiles
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        plan = jax.block_until_ready(js.block_mask(sparse, length, length))
        runs.append(time.perf_counter() - start)
    seconds.append(min(runs))
    sizes.append(sum(x.nbytes for x in jax.tree.leaves(plan)))
    tiles = plan.grid.q_blocks * plan.grid.kv_blocks
    print(f"{length:7} tokens: {tiles:8} tiles, {1e3 * seconds[-1]:6.1f} ms, {sizes[-1]:7} bytes")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
left.loglog(lengths, 1e3 * np.array(seconds), "o-", color="#17497c", label="js.block_mask")
as_tiles = 1e3 * seconds[-1] * (np.array(lengths) / lengths[-1]) ** 2
left.loglog(lengths, as_tiles, ":", color="#7a8694", label="in proportion to the tiles")
left.set(title="Time to classify all tiles and list those to compute", ylabel="milliseconds")
right.loglog(lengths, sizes, "o-", color="#17497c", label="the plan")
right.loglog(lengths, np.square(lengths), "--", color="#b3541e", label="a bool per pair")
right.set(title="Memory", ylabel="bytes")
for axis in (left, right):
    axis.legend(frameon=False)
    axis.set_xlabel("tokens")
    axis.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Heads of a trained model
#
# What is worth computing depends on the head, so the rest needs real q and k. The repository ships
# a byte-level language model; `capture` runs it on text that was kept from its training and
# collects what each attention layer was given. Any model of `js.nn.SparseAttention` layers will do.

# %%
CONTEXT, BLOCK = 4096, 64

model = load(clone / "examples" / "language_model" / "checkpoint" / "model.safetensors")
text = data.held_out_file(CONTEXT)
tokens = jnp.asarray(np.frombuffer(text.read_bytes()[:CONTEXT], np.uint8), jnp.int32)[None]
layers = evaluation.capture(model, tokens)

q, k, v = (jnp.stack(x) for x in zip(*layers, strict=True))  # the layers become the batch
heads = q.shape[-2]
print(f"{data.name_of(text)}: q {q.shape}, k and v {k.shape}: [layers, length, heads, dim]")

# %% [markdown]
# Dense attention is what all else is compared with: its output, and the log-sum-exp of each row.

# %%
dense, dense_lse = jax.jit(lambda *qkv: js.attend(*qkv, mask=causal, return_lse=True))(q, k, v)

# %% [markdown]
# ## Three estimators
#
# Each guesses from q and k where the probability is, without forming all pairs:
#
# * `mean_pooled` multiplies the mean query and the mean key of each tile, and keeps the best tiles
#   of each row: the plain baseline.
# * `xattention` sums antidiagonals of each tile, and keeps the fewest tiles that hold `threshold`
#   of the estimated probability: how many is up to the row.
# * `minference` lets the last queries attend to everything; the keys (stripes) and distances
#   (diagonals) that they attend to are what all queries compute.
#
# The settings are such that all three compute about as much, on average over the heads: else the
# one that computes more would look better.

# %%
methods = {
    "mean_pooled": js.mean_pooled(density=0.22, block_size=BLOCK),
    "xattention": js.xattention(threshold=0.97, block_size=BLOCK),
    "minference": js.minference(
        patterns=js.VerticalSlash(vertical_size=256, slash_size=50),
        forced_slash=30,
        block_size=BLOCK,
    ),
}

# %% [markdown]
# A method gives a plan; `js.attend` computes it. Three figures per head say how good the plan was:
#
# * **density**: the computed share of the tiles that a causal mask leaves visible;
# * **recalled mass**: the share of dense attention's probability that lies on computed pairs;
# * **output error**: the norm of the difference to the dense output, over the norm of that.


# %%
def measure(method):
    @jax.jit
    def run(q, k, v):
        plan, _ = method.plan((), q, k, mask=causal)
        return plan, js.attend(q, k, v, plan, mask=causal, return_lse=True)

    plan, (out, lse) = run(q, k, v)
    return plan, {
        "density": evaluation.visible_density(plan, causal, heads),
        "recalled mass": evaluation.recalled_mass(lse, dense_lse),
        "output error": evaluation.output_error(out, dense).relative,
    }


plans, figures = {}, {}
for name, method in methods.items():
    plans[name], figures[name] = measure(method)
    means = ", ".join(f"{what} {values.mean():.3f}" for what, values in figures[name].items())
    print(f"{name:11}  {means}")

# %% [markdown]
# ### The tiles that they chose
#
# One layer, a column per head. The first row is the truth that the others guess at: the share of
# each row of tiles that falls on each tile. An `xattention` of stride 1 computes it, for then its
# antidiagonals are the pairs themselves. Try other layers.

# %%
LAYER = 5

exact = js.xattention(stride=1, block_size=BLOCK)
_, info = exact.plan((), q[LAYER], k[LAYER], mask=causal)
truth = np.asarray(info.block_scores) / BLOCK

figure, axes = plt.subplots(1 + len(methods), heads, figsize=(11, 11.5), layout="constrained")
edges = dict(extent=(0, CONTEXT, CONTEXT, 0), interpolation="none")
for head in range(heads):
    shown = axes[0, head].imshow(truth[head] ** 0.25, cmap="Blues", vmin=0, vmax=1, **edges)
    axes[0, head].set_title(f"head {head}\nwhere the probability is", size=10)
for row, name in enumerate(methods, start=1):
    plan = jax.tree.map(lambda x: x[LAYER], plans[name])
    tiles = evaluation.tile_shares(plan, heads)
    density, recall, error = (x[LAYER] for x in figures[name].values())
    for head in range(heads):
        axes[row, head].imshow(tiles[head], cmap="Blues", vmin=0, vmax=1, **edges)
        said = f"{density[head]:.0%} of the tiles\nrecall {recall[head]:.0%}"
        axes[row, head].set_title(f"{said}, error {error[head]:.2f}", size=10)
for axis in axes.flat:
    axis.set(xticks=range(0, CONTEXT + 1, 1024), yticks=range(0, CONTEXT + 1, 1024))
    axis.tick_params(labelsize=8)
    axis.label_outer()
for axis, name in zip(axes[:, 0], ("dense", *methods), strict=True):
    axis.set_ylabel(f"{name}\n\nquery")
figure.supxlabel("key", size=10)
bar = figure.colorbar(shown, ax=axes[0], ticks=[0, 0.001**0.25, 0.01**0.25, 0.1**0.25, 1])
bar.ax.set_yticklabels(["0", "0.1 %", "1 %", "10 %", "100 %"], size=8)
bar.set_label("of a row of tiles", size=9)
figure.suptitle(f"Layer {LAYER}: tiles of {BLOCK} x {BLOCK}, dark where computed")
plt.show()

# %% [markdown]
# ### Every head of every layer
#
# Each column has one scale. What to look for: whether a method spends its tiles where heads need
# them, and whether heads that recall much also come out right. A head can recall nearly all and
# still miss a few rows by far, so look at both.

# %%
figure, axes = plt.subplots(len(methods), 3, figsize=(11, 9), layout="constrained")
for column, (what, colors) in enumerate(
    {"density": "Blues", "recalled mass": "Greens", "output error": "Oranges"}.items()
):
    top = 1.0 if what == "recalled mass" else max(float(f[what].max()) for f in figures.values())
    low = min(float(f[what].min()) for f in figures.values())
    for row, name in enumerate(methods):
        axis, values = axes[row, column], np.asarray(figures[name][what])
        shown = axis.imshow(values, cmap=colors, vmin=low, vmax=top, aspect="auto")
        axis.set_title(f"{name}: mean {what} {values.mean():.3f}", size=10)
        axis.set(xticks=range(heads), yticks=range(len(layers)), xlabel="head", ylabel="layer")
        for (layer, head), value in np.ndenumerate(values):
            color = "white" if value > (low + 2 * top) / 3 else "black"
            axis.text(head, layer, f"{value:.2f}", color=color, ha="center", va="center", size=9)
        axis.label_outer()
plt.show()

# %% [markdown]
# The same as points, one per head: what it computes and what it loses by leaving out the rest.
# Lower and farther left is better.

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
marks = dict(zip(methods, (("o", "#7a8694"), ("^", "#17497c"), ("s", "#b3541e")), strict=True))
for name, found in figures.items():
    mark, color = marks[name]
    lost = 1 - found["recalled mass"]
    for axis, values in zip(axes, (lost, found["output error"]), strict=True):
        axis.loglog(found["density"].ravel(), values.ravel(), mark, color=color, label=name)
for axis, title in zip(axes, ("probability not recalled", "output error"), strict=True):
    axis.set(xlabel="density: share of the visible tiles that is computed", ylabel=title)
    axis.set_xticks(shares := (0.05, 0.1, 0.2, 0.4, 0.8), [f"{share:.0%}" for share in shares])
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.set_title(f"{title[0].upper()}{title[1:]} over density, {q.shape[0] * heads} heads each")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Into a model
#
# `js.nn.with_methods` gives each attention layer a method; the parameters are shared and the model
# stays as it was. What counts in the end is what the whole model loses, in bits per byte.

# %%
cost = nnx.jit(bits_per_byte)
print(f"dense        {cost(model, tokens):.4f} bits per byte")
for name, method in methods.items():
    changed = js.nn.with_methods(model, [method] * len(layers))
    print(f"{name:11}  {cost(changed, tokens):.4f}")

# %% [markdown]
# ### Per head
#
# Heads differ, so give each what suits it. `search_patterns` tries candidates on the captured heads
# and keeps, within a budget of operations for each head, the one that recalls most;
# `search_thresholds` finds thresholds for `xattention`. A search is done once, offline. Where no
# candidate keeps to the budget, a head gets the cheapest.

# %%
budget = 0.3
candidates = [
    js.AShape(n_init=64, n_local=512),
    js.VerticalSlash(vertical_size=256, slash_size=50),
    js.BlockSparse(top_k=8),
]
table = planning.search_patterns(
    layers,
    candidates=candidates,
    budget=budget,
    start=CONTEXT // 4,  # queries that see enough keys for a choice to matter
    source="examples/language_model",
    block_size=BLOCK,
    forced_slash=30,
)

# %%
kinds = list(dict.fromkeys(choice.value for layer in table.layers for choice in layer))
chosen = np.array([[kinds.index(choice.value) for choice in layer] for layer in table.layers])
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
palette = ListedColormap(["#c9d8e8", "#f3d5b8", "#cfe3c8", "#e3cfe0"][: len(kinds)])
axis.imshow(chosen, cmap=palette, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto")
for (layer, head), _ in np.ndenumerate(chosen):
    score = table.layers[layer][head].score
    said = "above the budget" if score is None else f"{score:.0%}"
    axis.text(head, layer, said, ha="center", va="center", size=9)
axis.set(xticks=range(heads), yticks=range(len(layers)), xlabel="head", ylabel="layer")
axis.set_title(f"The best pattern within {budget:.0%} of the operations, and its recall", size=10)
swatches = [plt.Rectangle((0, 0), 1, 1, color=palette(n)) for n in range(len(kinds))]
axis.legend(swatches, kinds, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The table is JSON, for any model of that shape. Loaded again, it becomes a method per layer.
# Compare with the same pattern in all heads, above: the search maximises recall, not the model's
# own cost.

# %%
path = clone / "build" / "plan.json"
planning.save_table(table, path)
planned = js.nn.with_methods(model, planning.methods_of(planning.load_table(path)))
print(f"minference, searched: {cost(planned, tokens):.4f} bits per byte")

# %% [markdown]
# ## Where to go from here
#
# * Your own model: build it of `js.nn.SparseAttention(..., method=js.xattention())`, or hand
#   `attention_fn=js.nn.attention_fn(method)` to Flax's own attention. Without Flax,
#   `js.sparse_attention(q, k, v, method, mask=...)` is one call under `jit` and `grad`.
# * Your own q, k, v: `evaluation.save_captured(layers, path)`, then `jsparse compare` for a page
#   like this one with times, and `jsparse plan` for the search with a progress bar.
# * Other methods: `jsparse methods` lists them.
# * What runs it: `js.explain(q, k, v, plan, mask=...)` says which implementation, why and at what
#   cost. Nothing here measured speed; that depends on lengths and on the device.
