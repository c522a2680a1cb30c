"""What the pages say runs, exists and is true."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "language_model"
TRAINED = ROOT / "examples" / "trained_sparse"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", MODEL / "README.md", TRAINED / "README.md"]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[0].read_text(), re.M | re.S)


@pytest.mark.parametrize("number", range(3))
def test_python_in_the_readme_runs_as_printed(number, without_shape_checks):
    assert len(blocks("python")) == 3
    exec(compile(blocks("python")[number], "README.md", "exec"), {})


def test_the_readme_opens_with_ten_lines_of_use():
    lines = [x for x in blocks("python")[0].splitlines() if x and not x.startswith("import")]
    assert len(lines) <= 10


@by_page
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@by_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M))
    assert named <= targets
    if page == PAGES[0]:
        assert {"demo", "test"} <= named


def test_make_help_names_every_command():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {"help"}
    assert set(re.findall(r"make ([a-z-]+)", text.split("help:")[1].split("\n\n")[0])) == phony


def test_the_models_page_has_the_figures_of_its_log():
    last = json.loads((MODEL / "checkpoint" / "log.jsonl").read_text().splitlines()[-1])
    row = " | ".join(
        f"{last[f'held_out_bits_per_byte_at_{context}']:.3f}" for context in (512, 2048, 8192)
    )
    assert f"| bits per byte | {row} |" in PAGES[2].read_text()


@by_page
def test_no_place_of_one_machine_is_named(page):
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|usr)/|localhost", page.read_text())
