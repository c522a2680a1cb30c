"""The table fits its terminal, the page is one file that says what the figures are."""

import base64
import io
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from jsparse.evaluation import compare, figures
from jsparse.evaluation.compare import Comparison, Result
from jsparse.evaluation.report import make_room, shown_settings, write_report, write_tiles
from jsparse.evaluation.table import columns, print_table, rows
from tests.evaluation.test_compare import WHICH, captured

LAYERS, HEADS, BLOCKS = 3, 4, 6
FULL = np.tril(np.ones((BLOCKS, BLOCKS), bool))


def result(method: str, setting: str, density: float, **figures) -> Result:
    """A setting with the same figures for every layer and head."""

    def everywhere(x):
        return np.full((LAYERS, HEADS), x).tolist()

    given = {
        "density": density,
        "token_density": density if density == 1 else density * 0.9,
        "recall": density**0.1,
        "error": 1 - density,
        "largest_error": 3.5,
        "cosine": density**0.2,
    } | figures
    lists = {name: everywhere(x) for name, x in given.items() if name in Result._fields[2:8]}
    numbers = {
        "plan_seconds": 0.001,
        "seconds": density,
        "dense_seconds": 1.0,
        "plan_flops": 1e6,
        "flops": density * 2e9,
        "dense_flops": 2e9,
        "backward_flops": density * 5e9,
        "dense_backward_flops": 5e9,
        "bytes": density * 3e6,
        "dense_bytes": 3e6,
        "overflowed": False,
        "score": 1.5,
    } | {name: x for name, x in figures.items() if name in Result._fields[8:]}
    return Result(label=f"{method} {setting}".strip(), method=method, **lists, **numbers)


def made(*results: Result, dense_score: float | None = 1.0) -> Comparison:
    tiles = {r.label: [np.stack([FULL] * HEADS)] * LAYERS for r in results}
    return Comparison(list(results), tiles, dense_score, BLOCKS * 128, HEADS, repeats=7)


@pytest.fixture
def comparison():
    return made(
        result("whole", "", 1.0),
        result("window", "64", 0.12),
        result("window", "256", 0.3),
        result("a_method_of_a_long_name", "0.95", 0.21),
    )


class Page(HTMLParser):
    """Notes what a page opens, closes, refers to and says."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.cells, self.svgs, self.words = [], [], [], [], []
        self.ids, self.inner = [], set(re.findall(r"url\(#(\w+)\)", text))
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "hr", "link", "input"):
            self.open.append(tag)
        attrs = dict(attrs)
        if tag == "svg":
            self.svgs.append(attrs["class"].split()[0])
        if tag == "tr":
            self.cells.append([])
        self.note(attrs)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "use", "image", "rect", "g"), tag
        self.note(dict(attrs))

    def note(self, attrs):
        self.ids += [v for n, v in attrs.items() if n == "id"]
        targets = [v for n, v in attrs.items() if n in ("src", "href", "srcset", "action")]
        self.inner |= {x[1:] for x in targets if x.startswith("#")}
        self.references += [x for x in targets if not x.startswith(("#", "data:image/png;base64,"))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1].append(data)


def page_of(comparison, tmp_path, **options):
    path = tmp_path / "new" / "report.html"
    write_report(comparison, path, title="<Title> & more", source="A 'source' <b>.", **options)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_a_real_comparison_makes_a_page_of_one_file(tmp_path):
    real = compare(captured(), which=WHICH, score=lambda f: 1.0 if f is None else 1.25, repeats=1)
    page, text = page_of(real, tmp_path, score_name="bits/byte", text="def f(): <i>")
    assert page.references == []
    assert not re.search(r"https?://|@import|url\((?!#)|<script", text)
    assert "&lt;Title&gt; &amp; more" in text
    assert "def f(): &lt;i&gt;" in text
    assert "<b>." not in text
    assert "<i>" not in text
    # error, cost and speed; tiles of the two methods of these that leave something out
    assert page.svgs.count("chart") == 3
    assert page.svgs.count("tiles") == 2


def test_the_pages_table_holds_every_figure(comparison, tmp_path):
    page, text = page_of(comparison, tmp_path, score_name="bits/byte")
    shown = columns(comparison, "bits/byte")
    table = [[c.cell(r) for c in shown] for r in rows(comparison)]
    assert [row for row in page.cells if len(row) == len(shown)] == table
    assert [r.label for r in rows(comparison)] == ["dense", *(r.label for r in comparison.results)]
    for column in shown:
        assert column.meaning in text.replace("&#x27;", "'")


def test_the_page_tells_how_it_was_measured(comparison, tmp_path):
    words = " ".join(page_of(comparison, tmp_path)[0].words)
    assert "median of 7 runs" in words
    assert "cores" in words
    assert "jaxlib" in words


def test_a_page_needs_no_score(comparison, tmp_path):
    bare = comparison._replace(
        results=[r._replace(score=None) for r in comparison.results], dense_score=None
    )
    page, text = page_of(bare, tmp_path)
    assert "None" not in text
    assert page.svgs.count("chart") == 2
    assert "score" not in [c.name for c in columns(bare, "score")]


def test_a_place_that_cannot_hold_a_file_is_refused(comparison, tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(ValueError, match=said):
            make_room(path)
        with pytest.raises(ValueError, match=said):
            write_tiles(comparison, path)


def test_a_page_of_exact_settings_alone_says_so(tmp_path):
    page, text = page_of(made(result("whole", "", 1.0)), tmp_path)
    assert "No setting leaves anything out" in text
    assert page.svgs.count("chart") == 0
    assert page.svgs.count("tiles") == 1


def test_dense_attention_is_a_row_like_others(comparison):
    cells = {c.name: c.cell(rows(comparison)[0]) for c in columns(comparison, "score")}
    percents = ("density", "pairs", "recall")
    assert [cells[n].replace("\xa0", " ") for n in percents] == ["100.0 %"] * 3
    assert (cells["error"], cells["cosine"], cells["x dense"]) == ("0.000", "1.000", "1.00")
    assert (cells["ms"], cells["GFLOP"], cells["MB"]) == ("1000", "2.0", "3")
    assert cells["score"] == "1.0000"


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_no_cell_is_cut_in_a_terminal(comparison, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(comparison, "bits/byte")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "…" not in out
    assert max(map(len, lines)) <= width
    (header,) = [x for x in lines if x.strip().startswith("method ")]
    shown = columns(comparison, "bits/byte")
    names = [c.name for c in shown if c.brief or width == 200]
    assert re.split(r"  +", header.strip()) == ["method", *names]
    for r in rows(comparison):
        cells = [c.cell(r) for c in shown if c.name in names]
        wanted = [x for x in lines if x.strip().startswith(r.method)]
        assert any(re.split(r"  +", x.strip())[1:] == cells for x in wanted)


def test_the_setting_shown_is_the_one_nearest_to_a_common_density(comparison):
    assert [r.label for r in shown_settings(comparison)] == [
        "window 64", "a_method_of_a_long_name 0.95",
    ]  # fmt: skip


def findings(*results, **options):
    from jsparse.evaluation.report import _findings

    return " ".join(_findings(made(*results, **options), "bits/byte")).replace("\xa0", " ")


def test_findings_name_the_sparsest_and_the_fastest():
    slow = result("a", "1", 0.2, recall=0.95, error=0.3, seconds=0.5)
    fast = result("b", "2", 0.4, recall=0.93, error=0.05, seconds=0.25)
    poor = result("c", "3", 0.1, recall=0.5, error=0.9, seconds=0.01)
    text = findings(slow, fast, poor)
    assert "recall 90 % of dense attention, a 1 computes the fewest tiles, 20 %" in text
    assert "b 2 is the fastest, 4.0 times as fast" in text
    assert "output error below 0.1, b 2 computes the fewest, 40 %" in text
    assert "and it is the fastest" in findings(slow, poor)
    assert "recall 90 %" not in findings(poor)


def test_findings_say_when_sparse_beats_dense():
    """A score that falls with sparsity is a finding about the model, not a loss of minus some."""
    text = findings(result("a", "1", 0.5, score=0.75))
    assert "gains 0.2500 bits/byte" in text
    assert "does not rank the methods" in text
    text = findings(result("a", "1", 0.5, score=1.005))
    assert "loses 0.0050 bits/byte" in text
    assert "does not rank" not in text


def test_findings_say_what_an_exact_setting_is_there_for():
    text = findings(result("whole", "", 1.0, error=2e-7))
    assert "whole: at this setting nothing is left out" in text
    assert "error is 2e-07" in text


def test_leaving_out_pairs_within_tiles_is_not_exact():
    text = findings(result("window", "64", 1.0, token_density=0.4))
    assert "nothing is left out" not in text


def test_tensors_with_nan_still_make_a_page(comparison, tmp_path):
    broken = [r._replace(error=[[float("nan")] * HEADS] * LAYERS) for r in comparison.results]
    page, text = page_of(comparison._replace(results=broken), tmp_path)
    assert "hold NaN or infinity" in text
    assert page.svgs.count("chart") == 3


def test_findings_own_up_to_lists_that_were_too_short():
    assert "too short" not in findings(result("a", "1", 0.5))
    text = findings(result("a", "1", 0.5, overflowed=True))
    assert "too short for all that was chosen by a 1" in text


def shades(svg):
    """How dark the cells of a picture are, read back from its image."""
    (drawn,) = re.findall(r"data:image/png;base64,\s*([^\"]*)", svg)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(drawn)))
    assert not pixels[..., :3].any()
    return pixels[..., 3]


def picture(tiles):
    return figures.tile_grid("name", [("row", [figures.Panel(tiles, "caption", "tooltip")])])


def test_a_picture_draws_the_tiles_that_are_computed():
    tiles = FULL & (np.random.default_rng(0).random(FULL.shape) < 0.5)
    drawn = shades(picture(tiles))
    np.testing.assert_array_equal(drawn == 1, tiles)
    # what causal attention sees and leaves out is faint, the rest is clear
    np.testing.assert_array_equal(drawn > 0, FULL)
    assert max(drawn[~tiles]) < 0.1


def test_many_tiles_are_drawn_as_shades():
    tiles = np.zeros((382, 382), bool)
    tiles[:3, 3:6] = True
    # one of nine is still seen
    tiles[6, 0] = True
    tiles[381, 381] = True
    drawn = shades(picture(tiles))
    assert drawn.shape == (128, 128)
    # the last cell stands for one tile alone
    assert {(int(r), int(c)): drawn[r, c] for r, c in np.argwhere(drawn > 0.1)} == {
        (0, 1): 1, (2, 0): pytest.approx(0.25, abs=1 / 255), (127, 127): 1,
    }  # fmt: skip


def test_the_picture_of_tiles_is_a_file_of_its_own(comparison, tmp_path):
    path = tmp_path / "new" / "tiles.svg"
    write_tiles(comparison, path)
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [w for w in words if " head " not in w] == ["window 64", "a_method_of_a_long_name 0.95"]
    # a middle layer and the last
    assert sum(w.startswith("L1 head ") for w in words) == 2 * HEADS
    assert sum(w.startswith("L2 head ") for w in words) == 2 * HEADS


def chart(points, **options):
    points = [figures.Point(x, y, f"at {x}", f"tip <{x}> & {y}") for x, y in points]
    return ElementTree.fromstring(figures.chart("name", [points], ("across", "up"), **options))


def ticks(root, anchor):
    """The marks of an axis, by where their text is anchored."""
    found = [x.text for x in root.iter("text") if f"text-anchor: {anchor}" in x.get("style")]
    return [float(x.replace("−", "-")) for x in found if re.fullmatch(r"−?[\d.]+", x)]


def places(root):
    """Where points stand, left and top, in order of drawing."""
    return [(float(x.get("x")), float(x.get("y"))) for x in root.iter("use")]


def test_axes_hold_their_values_and_are_marked_at_round_numbers():
    for values in ([0.0, 0.29], [-0.004, 0.0], [3.0, 3.0], [0.013, 0.02]):
        marks = ticks(chart((10.0, y) for y in values), "end")
        assert len(marks) == len(set(marks)) >= 2, values
        assert min(marks) <= 0 <= max(marks)
    for values in ([5.0, 50.0], [18.0, 22.0], [0.7, 14.0], [20.0, 20.0]):
        root = chart([(x, x) for x in values], guide=lambda x: x)
        for anchor in ("middle", "end"):
            marks = ticks(root, anchor)
            assert len(marks) == len(set(marks)) >= 2, values
    assert ticks(chart([(1.0, 0.0), (2.0, 0.29)]), "end") == [0.0, 0.1, 0.2, 0.3]
    assert ticks(chart([(5.0, 0.0), (50.0, 1.0)]), "middle") == [5.0, 10.0, 20.0, 50.0]


def test_a_chart_puts_points_where_their_values_are():
    root = chart([(10.0, 0.1), (20.0, 0.2), (40.0, 0.4)])
    (first, up), (second, upper), (third, uppermost) = places(root)
    # doubling is a step to the right, and svg counts downwards
    assert first < second
    assert third - second == pytest.approx(second - first, abs=1e-3)
    assert upper - uppermost == pytest.approx(2 * (up - upper), abs=1e-3)
    assert up > upper
    tips = [x.find("title").text for x in root.iter("g") if x.find("title") is not None]
    assert tips == ["tip <10.0> & 0.1", "tip <20.0> & 0.2", "tip <40.0> & 0.4"]
    words = [x.text for x in root.iter("text")]
    assert {"at 10.0", "at 20.0", "across", "up"} <= set(words)


def test_the_guide_is_dashed_and_stands_where_its_values_are():
    root = chart([(5.0, 20.0), (50.0, 2.0), (10.0, 3.0)], guide=lambda x: 100 / x)
    (dashed,) = [x for x in root.iter("path") if "stroke-dasharray" in x.get("style", "")]
    left, top, right, bottom = map(float, re.findall(r"[\d.]+", dashed.get("d")))
    for (x, y), ahead in zip(places(root), (0, 0, 1), strict=True):
        on_line = top + (x - left) / (right - left) * (bottom - top)
        assert (y > on_line + 1) == ahead
        assert ahead or y == pytest.approx(on_line, abs=1e-2)
    assert left < min(places(root))[0]
    assert "dasharray" not in ElementTree.tostring(chart([(5.0, 20.0)]), encoding="unicode")


def test_shapes_and_frames_of_a_figure_are_found_in_it_and_on_the_page_once(comparison, tmp_path):
    page, _ = page_of(comparison, tmp_path)
    assert len(page.ids) == len(set(page.ids)) > 0
    assert set(page.ids) == page.inner


def test_figures_take_their_colours_from_the_page(comparison, tmp_path):
    page, text = page_of(comparison, tmp_path)
    svgs = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(svgs) == len(page.svgs) > 0
    for svg in svgs:
        assert not re.search(r"(fill|stroke)[:=] *[\"']?(#|rgb|black|white)", svg)
        assert 'fill="currentColor"' in svg.split(">")[0]
    for n in range(figures.COLORS):
        assert len(re.findall(rf"--c{n}: #", text)) == 2, "one for light, one for dark"
    assert "var(--c1)" in text


def test_drawing_leaves_matplotlib_as_it_was_and_does_not_heed_it():
    plain = picture(FULL)
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.grid": True}):
        before = dict(matplotlib.rcParams)
        assert picture(FULL) == plain
        assert dict(matplotlib.rcParams) == before


def test_a_dollar_sign_is_text():
    text = figures.tile_grid("n", [("$a$", [figures.Panel(FULL, "$_$", "$")])])
    assert {x.text for x in ElementTree.fromstring(text).iter("text")} == {"$a$", "$_$"}


def test_without_matplotlib_a_report_says_how_to_get_it(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for write in (lambda: page_of(comparison, tmp_path), lambda: write_tiles(comparison, tmp_path)):
        with pytest.raises(NotImplementedError, match=r"pip install 'jsparse\[report\]'"):
            write()
