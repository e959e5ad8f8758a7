"""What a run's screen says where nobody watches live: little, whatever happens."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from raypipe.tracking.console import PLAIN_ROWS, Screen, show_summary

COLUMNS = ["store", "images", "steps/s", "updates", "steps", "share", "stale", "alone", "shared"]
PHASES = [
    "starting",
    "waiting for stores",
    "asking the stores",
    "training",
    "testing the best version",
    "handing",
    "over",
]


def row(number: int, **other: Any) -> dict[str, Any]:
    said = {
        "store": f"store-with-a-long-name-{number:03}",
        "state": "gone",
        "reason": "lost",
        "images": 1000,
        "base": 3,
    }
    said |= {"speed": 2.5, "updates": 4, "steps": 40, "share": 0.01, "mean_staleness": 0.5, "accuracy": 0.5}
    return {**said, "alone": 0.5, "shared": 0.7, "data_bytes": 500_000, **other}


def board(version: int, elapsed_s: float, lines: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    said = {"version": version, "metric": "accuracy", "score": 0.61, "best": (version, 0.61), "elapsed_s": elapsed_s}
    return {**said, "bytes_total": 4_000_000, "bytes_up": 1, "updates": 9, "rows": rows, "lines": lines}


def a_run(console: Console, stores: int, faults: int, mlflow: Any) -> None:
    """As `raypipe train` shows it: looked at three times a second, with a fault now and then."""
    rows = [row(number) for number in range(stores)]
    rows[-1] |= {"images": 3000, "updates": 2, "steps": 5, "mean_staleness": 3.5, "alone": None, "shared": None}
    lines = [f"store-{number} failed: it was\nkilled" for number in range(faults)]
    with Screen(console, "quickstart: stores", 36.0, None) as screen:
        screen.say("quickstart: stores")
        for phase in PHASES:
            for look in range(100 if phase == "training" else 2):
                told = lines[: look if phase == "training" else 0 if phase in PHASES[:3] else None]
                screen.update(phase, None if phase == "starting" else board(look, 0.4 * look, told, rows))
    said = {"run": "quickstart-1", "table": rows, "board": board(90, 36, lines, rows), "test": {"accuracy": 0.7}}
    said |= {"average": {"accuracy": 0.71}, "best_version": 88, "versions": 90, "folder": "/runs/quickstart-1"}
    said |= {"reason": "36 s are over", "mlflow": mlflow}
    show_summary(console, said, "raypipe promote quickstart-1 88 --as champion")


def shown(stores: int, faults: int = 0, mlflow: Any = None) -> list[str]:
    a_run(Console(file=(out := StringIO())), stores, faults, mlflow)
    return out.getvalue().splitlines()


def test_without_a_terminal_there_are_at_most_30_lines_whatever_happens() -> None:
    behind = {"done": False, "where": "", "trouble": "no answer\nfrom the server"}
    found = shown(100, faults=60, mlflow=behind)
    assert len(found) == 30, "all kinds of lines at once, and no more"
    assert sum("failed: it was killed" in line for line in found) == 2
    assert sum("more of this is in the run's record" in line for line in found) == 1
    told = [line.split()[3].rstrip(",") for line in found if " s  version " in line]
    assert told == ["1", "23", "45", "68"], "the first version at once: somebody waits; of 90 a quarter, a half, most"
    assert COLUMNS in [line.split() for line in found]
    (rest,) = [line for line in found if line.startswith("and ")]
    assert rest.split()[:5] == ["and", "93", "more", "95,000", "232.5"]
    assert rest.split()[5:] == ["370", "3685", "93.0%", "0.52", "50.0%", "70.0%"]
    assert any("; all stores: raypipe versions quickstart-1)" in line for line in found)
    (mlflow,) = [line for line in found if line.startswith("MLflow")]
    assert mlflow == (
        "MLflow is behind (no answer from the server): nothing is lost; later run: raypipe track quickstart-1"
    )
    assert found[-1] == "next: raypipe promote quickstart-1 88 --as champion"


def test_a_few_stores_have_a_row_each() -> None:
    found = shown(PLAIN_ROWS, mlflow={"done": True, "where": "sqlite:////home/mlflow.db"})
    assert [line.split()[0] for line in found if line.startswith("store-")] == [row(n)["store"] for n in range(8)]
    assert not [line for line in found if line.startswith("and ") or "all stores:" in line or "failed" in line]
    (mlflow,) = [line for line in found if line.startswith("MLflow")]
    assert mlflow.endswith("to see it: mlflow ui --backend-store-uri sqlite:////home/mlflow.db")


def test_a_terminal_shows_every_store() -> None:
    console = Console(file=(out := StringIO()), force_terminal=True, width=200, color_system=None)
    a_run(console, 30, 60, None)
    end = out.getvalue().rpartition("shared\n")[2]
    assert sum(line.startswith("store-with") for line in end.splitlines()) == 30
    assert sum("failed: it was killed" in line for line in out.getvalue().splitlines()) == 4
