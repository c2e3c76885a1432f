"""Rules about the source itself: what may import what, and what nobody may call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted([*(ROOT / "mbc_core").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")])
PRODUCT = sorted([*CORE, *(ROOT / "pipelines").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADERS = {"torch.load", "torch.save", "numpy.load", "np.load", "pandas.read_pickle"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module name that is imported, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def called(tree: ast.AST) -> Iterator[str]:
    """Every plain dotted name that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func)


def roots(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported(ast.parse(source))}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_checks_see_what_they_should():
    assert roots("def f():\n    from apache_beam.io import x\n    import pipelines.main as y") == {
        "apache_beam",
        "pipelines",
    }
    assert roots("importlib.import_module('apache_beam')") == {"apache_beam"}
    assert set(called(ast.parse("x = torch.load(open('f'))"))) == {"torch.load", "open"}
    assert len(CORE) > 5
    assert len(PRODUCT) > len(CORE)


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_knows_neither_beam_nor_the_pipelines(path):
    assert not roots(path.read_text("utf-8")) & {"apache_beam", "pipelines"}


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_nothing_is_unpickled(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert not {name.split(".")[0] for name in imported(tree)} & UNPICKLERS
    assert not set(called(tree)) & LOADERS


@pytest.mark.parametrize("path", PRODUCT, ids=name_of)
def test_no_bare_asserts_in_product_code(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]
    assert lines == [], "raise one of mbc_core.errors instead: it survives python -O and tells the reader what to do"
