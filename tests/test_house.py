"""The house keeps its order: who may import what."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from raypipe.importing import without_collecting

PACKAGE = ROOT / "raypipe"
RAY_HERE = {"launch.py", "placement/provider.py", "store/client.py"}  # beside the files named actor.py
ROOMS = [p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()]


def imports(file: Path) -> set[str]:
    """Modules named in import statements anywhere in a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(room: str = "") -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_ray_is_imported_in_shells_only() -> None:
    users = [f for f in files() if any(m.split(".")[0] == "ray" for m in imports(f))]
    outside = {str(f.relative_to(PACKAGE)) for f in users if f.name != "actor.py"}
    assert outside == RAY_HERE


def test_mlflow_is_imported_in_one_file() -> None:
    users = [f.name for f in files() if any(m.split(".")[0] == "mlflow" for m in imports(f))]
    assert users == ["mlflow_sink.py"]


def test_rooms_never_import_the_files_that_know_all_rooms() -> None:
    names = ("run", "cli", "launch", "demo", "compose", "past", "plans", "replay", "pooled", "use")
    top = {f"raypipe.{name}" for name in names}
    assert [f for room in ROOMS for f in files(room) if imports(f) & top] == []


def test_decisions_load_neither_torch_nor_ray_nor_mlflow() -> None:
    code = (
        "import sys, raypipe.coordinator.machine, raypipe.coordinator.shell, raypipe.coordinator.closing,"
        " raypipe.coordinator.explain, raypipe.coordinator.loop, raypipe.config.load;"
        "print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_configuration_is_checked_without_torch_which_takes_a_second_to_import() -> None:
    code = (
        "import sys; from pathlib import Path; from raypipe.run import load_run\n"
        "for file in sorted(Path('configs').glob('*.yaml')): load_run(file)\n"
        "print(sorted({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_collect_no_garbage_and_are_no_garbage_later() -> None:
    before = gc.get_freeze_count()
    with without_collecting():
        assert not gc.isenabled()
        made = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(made)
    gc.unfreeze()


def test_no_message_or_file_of_ours_is_pickled() -> None:
    users = [f.name for f in files() if any(m.split(".")[0] in {"pickle", "cloudpickle", "dill"} for m in imports(f))]
    assert users == []
