"""Rules about the source itself: what may import what, and what nobody may call."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted([*(ROOT / "mbc_core").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")])
PRODUCT = sorted([*CORE, *(ROOT / "pipelines").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
DISTRIBUTION_OF = {"faiss": "faiss-cpu", "apache_beam": "apache-beam"}
USED_BY_OTHERS = {"gguf"}  # transformers reads GGUF files with it
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


OF_EXTRAS = {"google"}
"""Comes with `mbc[gcp]`: Pub/Sub alone needs it."""


def test_the_runtime_imports_exactly_what_it_declares():
    declared = tomllib.loads(PYPROJECT)["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", one)[0] for one in declared} - USED_BY_OTHERS
    ours = {"mbc_core", "schemas", "pipelines"}
    used = set().union(*(roots(path.read_text("utf-8")) for path in PRODUCT)) - ours - set(sys.stdlib_module_names)
    assert {DISTRIBUTION_OF.get(name, name) for name in used - OF_EXTRAS} == names


def test_what_an_extra_brings_is_imported_where_it_is_asked_for_only():
    users = {path.name for path in PRODUCT if OF_EXTRAS & roots(path.read_text("utf-8"))}
    assert users == {"pubsub.py", "pubsub_local.py"}
    missing = "; ".join(f"sys.modules[{name!r}] = None" for name in ("google.pubsub_v1", "google.cloud.pubsub"))
    code = f"import sys; {missing}; import pipelines.main, pipelines.ingest, pipelines.streaming, pipelines.pubsub"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_every_dependency_has_its_reason_beside_it():
    listed = re.findall(r'^    "[^"]+",(.*)$', PYPROJECT.split("[project.scripts]")[0], re.MULTILINE)
    reasons = [rest for rest in listed if not rest.strip().startswith("#")]
    assert len(listed) > 20
    assert len(reasons) == 3, "only the three classifiers go without a reason"


def test_everything_but_torch_is_pinned():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if line and not line.startswith("#")}
    assert all("==" in line for line in lines if line and not line.startswith("#"))
    project = tomllib.loads(PYPROJECT)["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[<>=\[]", one)[0].replace("_", "-") for one in wanted} - {"mbc", "torch"}
    assert names <= pins
    assert not {"torch", "triton"} & pins
