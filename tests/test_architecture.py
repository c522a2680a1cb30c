"""The house: registry = files = exports = oracles = tests = README, and imports run downwards."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jsparse as js
from jsparse.registry import METHODS, readme_table

ROOT = Path(__file__).parents[1]
FAMILIES = ("masks", "estimators")
SOURCES = sorted([*ROOT.glob("jsparse/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
by_name = pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)


@by_name
def test_a_method_has_its_file_export_oracle_and_test(row):
    assert (ROOT / "jsparse" / row.family / f"{row.name}.py").is_file()
    assert (ROOT / "tests" / "oracles" / f"{row.name}.py").is_file()
    assert (ROOT / "tests" / "methods" / f"test_{row.name}.py").is_file()
    assert getattr(js, row.name) is row.factory
    assert row.factory.__name__ == row.name
    assert f"test_{row.name}" in {p.stem for p in (ROOT / "tests" / "methods").glob("test_*.py")}


def test_every_oracle_and_method_test_has_a_row():
    names = {row.name for row in METHODS}
    assert len(names) == len(METHODS)
    assert {p.stem for p in (ROOT / "tests" / "oracles").glob("[a-z]*.py")} == names
    assert {p.stem for p in (ROOT / "tests" / "methods").glob("test_*.py")} == {
        f"test_{name}" for name in names
    }


@by_name
def test_factories_take_keywords_only_and_have_defaults(row):
    for parameter in inspect.signature(row.factory).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
        assert parameter.default is not inspect.Parameter.empty, parameter
    assert row.control is None or row.control in inspect.signature(row.factory).parameters


@by_name
def test_the_file_cites_its_source(row):
    text = (ROOT / "jsparse" / row.family / f"{row.name}.py").read_text()
    assert row.paper.removeprefix("arXiv:") in text.split('"""')[1]


def test_the_readme_lists_the_methods():
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip()
    assert table == readme_table(), "run `python -m jsparse.registry` and paste its output"


@pytest.mark.parametrize("name", ["utils", "helpers", "misc", "common"])
def test_no_dumping_grounds(name):
    assert not [p for p in SOURCES if p.stem == name]


def test_modules_are_small():
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_oracles_import_nothing_of_jsparse():
    for path in (ROOT / "tests" / "oracles").glob("*.py"):
        lines = [x for x in path.read_text().splitlines() if x.startswith(("import", "from"))]
        assert not [x for x in lines if "jsparse" in x or "jax" in x], path


def test_method_files_import_no_other_method():
    names = {row.name for row in METHODS}
    for row in METHODS:
        text = (ROOT / "jsparse" / row.family / f"{row.name}.py").read_text()
        for other in names - {row.name}:
            assert f".{other} import" not in text, f"{row.name} imports {other}"


def test_unstable_names_of_jax_live_in_compat_modules():
    for path in SOURCES:
        if path.name != "_compat.py":
            assert "jax._src" not in path.read_text(), path


def test_flax_is_imported_by_nn_alone():
    for path in SOURCES:
        text = path.read_text()
        if "import flax" in text or "from flax" in text:
            assert path.parent.name in ("nn", "evaluation"), path


def test_importing_jsparse_does_not_import_flax_or_matplotlib():
    modules = ("flax", "matplotlib", "torch")
    code = f"import sys, jsparse; print([m for m in {modules} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_import_contracts_hold():
    program = Path(sys.executable).parent / "lint-imports"
    if not program.exists():
        pytest.skip("import-linter is not installed here; `make check` runs it")
    out = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-2000:]
