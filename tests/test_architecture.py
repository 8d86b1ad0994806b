"""Imports run one way, heavy modules stay out of light processes, habits are kept. Each failure names the place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "node", "orthanc", "training")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module; `from a import b` counts as `a` and as `a.b`."""

    path: Path
    line: int
    module: str
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: imports {self.module}"


def sources(*packages: str) -> list[Path]:
    """Python files of the packages, relative to the repository."""
    found = [path.relative_to(ROOT) for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_in(path: Path, node: ast.AST, *, for_types_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        modules: list[str] = []
        if isinstance(child, ast.Import):
            modules = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: relative import; write the whole name"
            modules = [child.module or "", *(f"{child.module}.{alias.name}" for alias in child.names)]
        for module in modules:
            yield Import(path=path, line=child.lineno, module=module, for_types_only=for_types_only)
        yield from imports_in(path, child, for_types_only=for_types_only or is_type_checking(child))


def imports(*packages: str) -> Iterator[Import]:
    for path in sources(*packages):
        yield from imports_in(path, parse(path))


def all_of(path: Path) -> list[str]:
    """The names in a module's `__all__`."""
    (value,) = (
        n.value for n in parse(path).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
    )
    names: list[str] = ast.literal_eval(value)
    return names


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def assert_none(broken: list[str], rule: str) -> None:
    assert not broken, f"{rule}\n  " + "\n  ".join(broken)


# ---- who may import whom ----


def test_model_imports_neither_node_nor_training_nor_the_network() -> None:
    forbidden = ("node", "training", "pynetdicom", "highdicom", "sqlalchemy", "apscheduler", "orthanc", "tests")
    broken = [str(i) for i in imports("model") if is_within(i.module, *forbidden)]
    assert_none(broken, f"model/ never imports {', '.join(forbidden)}")


def test_pydicom_is_imported_in_three_modules_of_the_model_only() -> None:
    allowed = {Path("model/series.py"), Path("model/decode.py"), Path("model/phantom/dicom.py")}
    broken = [str(i) for i in imports("model") if is_within(i.module, "pydicom") and i.path not in allowed]
    assert_none(broken, f"in model/ only {', '.join(sorted(map(str, allowed)))} may import pydicom")


def test_training_never_imports_node() -> None:
    broken = [str(i) for i in imports("training") if is_within(i.module, "node", "tests")]
    assert_none(broken, "training/ never imports node")


def test_node_never_imports_training_or_torch() -> None:
    broken = [str(i) for i in imports("node") if is_within(i.module, "training", "torch", "safetensors", "tests")]
    assert_none(broken, "node/ never imports training, torch or safetensors")


def test_orthanc_knows_nothing_of_the_node() -> None:
    broken = [str(i) for i in imports("orthanc") if is_within(i.module, "node", "model", "training", "tests")]
    assert_none(broken, "orthanc/ never imports node, model or training")


def test_the_plugin_inside_orthanc_needs_nothing_installed() -> None:
    path = Path("orthanc/cspine_plugin.py")
    modules = {i.module.split(".")[0] for i in imports_in(path, parse(path))}
    assert "orthanc" in modules
    assert modules <= {*sys.stdlib_module_names, "orthanc"}


def test_node_enters_the_model_by_its_doors_only() -> None:
    """`model` and `model.phantom`; types of what the door hands out may be named from behind it."""
    doors = {"model": "model/__init__.py", "model.phantom": "model/phantom/__init__.py"}
    handed_out = {f"{door}.{name}" for door, path in doors.items() for name in all_of(Path(path))}
    # A function may be named like the module it comes from: `from model.phantom import render` is through the door.
    behind = {".".join(path.with_suffix("").parts) for path in sources("model")} - {*doors, *handed_out}
    broken = [str(i) for i in imports("node") if not i.for_types_only and is_within(i.module, *behind)]
    assert_none(broken, "node/ imports from `model` and `model.phantom`, nothing below them")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rules_see_every_import(package: str) -> None:
    """Guards the tests above: they would also pass if they found nothing."""
    assert list(imports(package))


def test_the_rules_see_an_import_wherever_it_stands() -> None:
    text = (
        "import torch.nn\n"
        "def f():\n"
        "    from model.pipeline import Pipeline\n"
        "if TYPE_CHECKING:\n"
        "    from model.bundle import Bundle\n"
    )
    found = list(imports_in(Path("x.py"), ast.parse(text)))
    assert [(i.line, i.module, i.for_types_only) for i in found] == [
        (1, "torch.nn", False),
        (3, "model.pipeline", False),
        (3, "model.pipeline.Pipeline", False),
        (5, "model.bundle", True),
        (5, "model.bundle.Bundle", True),
    ]
    assert str(found[1]) == "x.py:3: imports model.pipeline"


# ---- what an import costs ----


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("model", ("torch", "highdicom", "pynetdicom", "node", "training")),
        ("node.service", ("torch", "highdicom", "matplotlib", "training", "orthanc_api_client")),
        ("node.receive", ("torch", "highdicom", "scipy", "apscheduler", "training")),
        ("node.notify.clock", ("torch", "highdicom", "hl7apy", "training")),
        ("node.analyse", ("torch", "matplotlib", "training")),
        ("node.cli", ("torch", "numpy", "pydicom", "pynetdicom", "sqlalchemy", "highdicom", "scipy", "pydantic")),
        ("model.pipeline", ("lightning", "monai", "timm", "training")),
        ("training.cli", ("torch", "lightning", "monai", "node")),
    ],
)
def test_importing_a_module_does_not_import(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_modules_that_serve_peers_can_be_imported_first() -> None:
    """None needs another one to be there already."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [module for module in sys.modules if module.split(".")[0] == "node"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
"""
    packages = ("commitment", "receive", "retrieve", "web")
    modules = [path for path in sources("node") if path.parent.name in packages]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in modules]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(names) > 30
    assert_none(done.stdout.splitlines(), "a module can be imported before any other")


# ---- habits ----


def test_no_module_is_named_for_what_it_has_no_name_for() -> None:
    vague = ("util", "utils", "helper", "helpers", "manager", "common", "misc", "base")
    broken = [str(path) for path in sources(*PACKAGES) if path.stem in vague or path.parent.name in vague]
    assert_none(broken, f"no module is named {', '.join(vague)}")


def test_errors_are_caught_broadly_at_the_two_agreed_places_only() -> None:
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node.type) if node.type else 'bare except'}"
        for path in sources(*PACKAGES)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _ends_in_raise(node)
    ]
    places = [place.split(":")[0] for place in found]
    assert_none(
        [] if sorted(places) == ["node/receive/lane.py"] * 3 + ["node/workers.py"] else found,
        "`except Exception` stands in node/receive/lane.py (thread, PDU, C-STORE) and node/workers.py (a job) only",
    )


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = {"BaseException"} if handler.type is None else set(ast.unparse(handler.type).strip("()").split(", "))
    return bool(caught & {"Exception", "BaseException"})


def _ends_in_raise(handler: ast.ExceptHandler) -> bool:
    """Whether it only cleans up and lets the error go on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_files_stay_short_enough_to_be_read() -> None:
    paths = sources(*PACKAGES, "tests", "benchmarks")
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths}
    assert_none([f"{path}: {length} lines" for path, length in lengths.items() if length > 500], "500 lines at most")


def test_nothing_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "raise NotImplementedError")
    broken = [
        f"{path}:{number}: {line.strip()}"
        for path in sources(*PACKAGES)
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert_none(broken, f"none of {', '.join(marks)}")
