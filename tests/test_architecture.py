"""The house: registry = files = exports = oracles = tests = README, and imports run downwards."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jsparse as js
from jsparse.registry import METHODS, readme_table
from jsparse.types import Method

ROOT = Path(__file__).parents[1]
FAMILIES = ("masks", "estimators", "hierarchical", "learned", "routing")
SOURCES = sorted([*ROOT.glob("jsparse/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
# what a module loads, wherever in it the statement stands
IMPORT = re.compile(r"^\s*(?:from|import)\s+(\S+)", re.MULTILINE)
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
    # that of attention over pages is no method's
    oracles = {p.stem for p in (ROOT / "tests" / "oracles").glob("[a-z]*.py")}
    assert oracles == names | {"paged"}
    # one is about the defaults of many
    tests = {p.stem for p in (ROOT / "tests" / "methods").glob("test_*.py")}
    assert tests == {f"test_{name}" for name in names} | {"test_defaults"}


def test_every_method_file_has_a_row():
    """A factory is a public function that returns a Method; each is registered, under its name."""
    for family in FAMILIES:
        for path in (ROOT / "jsparse" / family).glob("[a-z]*.py"):
            found = {
                node.name
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and isinstance(node.returns, ast.Name)
                and node.returns.id == Method.__name__
            }
            rows = {row.name for row in METHODS if (row.family, row.name) == (family, path.stem)}
            assert found == rows, path
            # among the masks stand also those that methods are made of
            assert rows or family == "masks", path
    assert {row.family for row in METHODS} <= {*FAMILIES}


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
        roots = {name.split(".")[0] for name in IMPORT.findall(path.read_text())}
        assert roots <= {"math", "numpy"}, path


def test_method_files_import_no_other_method():
    names = {row.name for row in METHODS}
    for row in METHODS:
        tree = ast.parse((ROOT / "jsparse" / row.family / f"{row.name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                loaded = [*(getattr(node, "module", None) or "").split(".")]
                loaded += [part for alias in node.names for part in alias.name.split(".")]
                others = {*loaded} & (names - {row.name})
                assert not others, f"{row.name} imports {others}"


def test_unstable_names_of_jax_live_in_compat_modules():
    unstable = re.compile(r"jax\.(_src|experimental|extend|core|interpreters)\b")
    for path in SOURCES:
        if path.name != "_compat.py" and path.is_relative_to(ROOT / "jsparse"):
            assert not unstable.search(path.read_text()), path
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
