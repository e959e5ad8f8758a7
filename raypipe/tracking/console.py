"""What the screen shows: a live table on a terminal, a few plain lines elsewhere, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raypipe.tracking.compare import Comparison
from raypipe.tracking.lineage import VersionRow
from raypipe.tracking.ratio import Ratio

# Where nobody watches live, at most 30 lines in all: 12 of the way (a title, 4 phases, 4 of progress, 2 of what
# happened and that there is more), and at the end the names of the columns, PLAIN_ROWS, and 9 lines below the table.
PLAIN_LINES = 4  # of progress: the first version, then each quarter of the way but the last, which the table follows
PLAIN_PHASES = 4
PLAIN_ROWS = 8  # in the table at the end, the one with the rest of the stores among them
PLAIN_EVENTS = 2
PLAIN_WIDTH = 160  # a file has no edge
SHARES = ("accuracy", "map50", "map")  # metrics shown in percent
SHOWN_EVENTS = 4  # on a terminal: of stores that left, failed, ...; the rest is in the record


class Screen:
    """Follows a run's progress. `total` is how long or how many versions the run may take, for the plain lines."""

    def __init__(self, console: Console, title: str, max_seconds: float | None, max_versions: int | None) -> None:
        self._console, self._title = console, title
        self._max_seconds, self._max_versions = max_seconds, max_versions
        self._live: Live | None = None
        self._told = self._shown = self._phases = 0
        self._phase = ""
        self._since = time.monotonic()

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(_one_line(line), highlight=False, soft_wrap=True, markup=False)

    def update(self, phase: str, board: Mapping[str, Any] | None) -> None:
        """Show the newest state."""
        if self._live is not None:
            self._live.update(self._table(phase, board))
        if phase != self._phase:
            self._phase = phase
            if self._live is None and phase not in ("training", "over", "starting") and self._phases < PLAIN_PHASES:
                self._phases += 1
                self.say(f"{time.monotonic() - self._since:5.0f} s  {phase} ...")
        if board is None:
            return
        most = PLAIN_EVENTS if self._live is None else SHOWN_EVENTS
        for line in board["lines"][self._shown : most]:
            self.say(f"{time.monotonic() - self._since:5.0f} s  {line}")
        if self._shown <= most < len(board["lines"]):
            self.say("         ... more of this is in the run's record")
        self._shown = len(board["lines"])
        due = self._told < PLAIN_LINES and board["version"] and self._progress(board) >= self._told / PLAIN_LINES
        if self._live is None and phase == "training" and due:
            self._told = int(self._progress(board) * PLAIN_LINES) + 1
            self.say(f"{time.monotonic() - self._since:5.0f} s  {_headline(board)}")

    def _progress(self, board: Mapping[str, Any]) -> float:
        by_time = board["elapsed_s"] / self._max_seconds if self._max_seconds else 0.0
        by_version = board["version"] / self._max_versions if self._max_versions else 0.0
        return max(by_time, by_version)

    def _table(self, phase: str, board: Mapping[str, Any] | None) -> Table:
        title = f"{self._title}   {phase}, {time.monotonic() - self._since:.0f} s"
        table = Table(title=title, title_justify="left", caption=_headline(board) if board else "", box=None)
        for name in (
            "store",
            "state",
            "images",
            "base",
            "steps",
            "steps/s",
            "updates",
            "share",
            "staleness",
            board["metric"] if board else "accuracy",
        ):
            table.add_column(name, justify="left" if name in ("store", "state") else "right")
        for row in (board or {"rows": []})["rows"]:
            table.add_row(
                row["store"],
                _state(row),
                f"{row['images']:,}",
                f"v{row['base']}",
                str(row["steps"]),
                f"{row['speed']:.1f}",
                str(row["updates"]),
                _percent(row["share"]),
                f"{row['mean_staleness']:.1f}",
                figure(board["metric"], row["accuracy"]) if board else "",
            )
        return table


def _state(row: Mapping[str, Any]) -> str:
    """With its reason where it is not for the store to be at work."""
    told = row["state"] in ("closed", "paused", "gone", "set aside") and row["reason"]
    return f"{row['state']}: {row['reason'][:60]}" if told else str(row["state"])


def show_summary(console: Console, summary: Mapping[str, Any], next_command: str) -> None:
    """The table at the end, and where to go from here."""
    table: Sequence[Mapping[str, Any]] = summary["table"]
    board = summary["board"]
    metric = board["metric"]
    lines = list[str]()
    if table:
        whole = console.is_terminal or len(table) <= PLAIN_ROWS
        show_stores(console, table, metric, whole=whole)
        more = "" if whole else f"; all stores: raypipe versions {summary['run']}"
        lines.append(f"(alone, shared: {metric} on the test set; stale: mean versions behind when folded{more})")
    alone = [row["alone"] for row in table if row["alone"] is not None]
    test = next(iter(summary["test"].values()), None)
    if test is not None:
        exported = next(iter(summary.get("exported", {}).values()), None)
        how = "" if exported is None else f"; with the version's own statistics: {figure(metric, exported)}"
        lines.append(f"shared model on the test set: {figure(metric, test)}{_against(metric, test, alone)}{how}")
    if (average := next(iter(summary.get("average", {}).values()), None)) is not None:
        lines.append(f"running average of all versions on the test set: {figure(metric, average)}")
    if summary["best_version"] is not None and board["best"]:
        best = f"{figure(metric, board['best'][1])} on validation"
        lines.append(f"best version: v{summary['best_version']} of {summary['versions']} ({best})")
    pooled = sum(row["data_bytes"] for row in table)
    if pooled:
        lines.append(
            f"moved: {megabytes(board['bytes_total'])} both ways; pooling the images moves {megabytes(pooled)} once"
        )
    lines += [f"record: {summary['folder']}", *_tracked(summary["mlflow"], summary["run"])]
    lines += [f"ended: {summary['reason']}", *([f"next: {next_command}"] if summary["versions"] else [])]
    for line in lines:
        console.print(_one_line(line), highlight=False, soft_wrap=True, markup=False)


def show_stores(console: Console, rows: Sequence[Mapping[str, Any]], metric: str, *, whole: bool = True) -> None:
    """A row a store, as at a run's end; not `whole`: PLAIN_ROWS of them, the last one with all the others together."""
    if not console.is_terminal:
        console.width = max(console.width, PLAIN_WIDTH)
    if not whole:
        rest = rows[PLAIN_ROWS - 1 :]
        rows = [*rows[: PLAIN_ROWS - 1], _together(rest)]
    console.print(_final_table(rows, metric))


def _together(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Many stores' rows as one: what adds up is added, staleness is the mean over updates, scores over stores."""

    def mean(name: str) -> float | None:
        there = [row[name] for row in rows if row[name] is not None]
        return sum(there) / len(there) if there else None

    total = {name: sum(row[name] for row in rows) for name in ("images", "speed", "updates", "steps", "share")}
    late = sum(row["mean_staleness"] * row["updates"] for row in rows)
    stale = late / total["updates"] if total["updates"] else 0.0
    own = {"mean_staleness": stale, "alone": mean("alone"), "shared": mean("shared")}
    return {"store": f"and {len(rows)} more", **total, **own}


def _final_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("store", "images", "steps/s", "updates", "steps", "share", "stale", "alone", "shared")
    for name in names:
        table.add_column(name, justify="left" if name == "store" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["store"],
            f"{row['images']:,}",
            f"{row['speed']:.1f}",
            str(row["updates"]),
            str(row["steps"]),
            _percent(row["share"]),
            f"{row['mean_staleness']:.2f}",
            figure(metric, row["alone"]),
            figure(metric, row["shared"]),
        )
    return table


def _one_line(text: str) -> str:
    """As reasons and MLflow's troubles may hold more."""
    return " ".join(text.splitlines())


def _headline(board: Mapping[str, Any]) -> str:
    score = f", {board['metric']} {figure(board['metric'], board['score'])}" if board["score"] is not None else ""
    return f"version {board['version']}{score}, {board['updates']} updates, {megabytes(board['bytes_total'])} moved"


def _against(metric: str, test: float, alone: Sequence[float]) -> str:
    if not alone:
        return ""
    mean = sum(alone) / len(alone)
    better = f"{100 * (test - mean):+.1f} points" if metric in SHARES else f"{test - mean:+.3f}"
    return f"; a model trained alone, mean of {len(alone)} stores: {figure(metric, mean)} ({better})"


def _tracked(mlflow: Mapping[str, Any] | None, run: str) -> list[str]:
    if mlflow is None:
        return []
    if mlflow["done"]:
        where = str(mlflow["where"])
        how = f"; to see it: mlflow ui --backend-store-uri {where}" if where.startswith("sqlite:") else ""
        return [f"MLflow: {where}{how}"]
    return [f"MLflow is behind ({mlflow['trouble'] or 'busy'}): nothing is lost; later run: raypipe track {run}"]


def versions_table(rows: Sequence[VersionRow], metric: str = "accuracy") -> Table:
    """A row a version, newest last."""
    table = Table(box=None, pad_edge=False)
    for name in ("version", "hash", "stores", "steps", "stale", metric, "weights"):
        table.add_column(name, justify="left" if name in ("hash", "weights") else "right", no_wrap=True)
    for row in rows:
        stale = "-" if row.staleness_mean is None else f"{row.staleness_mean:.2f}"
        kept = "pruned" if not row.kept else "kept" if row.whole else "DAMAGED"
        marks = kept + (", promoted" if row.pinned else "") + (", best" if row.best else "")
        cells = (f"v{row.version}", row.hash[:12], str(row.contributors), str(row.steps), stale)
        table.add_row(*cells, figure(metric, row.score), marks)
    return table


def comparison_table(found: Comparison) -> Table:
    """A row an arm; means over its runs."""
    table, metric = Table(box=None, pad_edge=False), found.metric
    names = ("arm", "runs", metric, "worst store", "time", "up", "down", "pooling", "steps", "seen")
    for name in names:
        first = name == "arm"
        table.add_column(name, justify="left" if first else "right", no_wrap=not first, min_width=12 if first else None)
    for row in found.rows:
        quality = figure(metric, row.mean("quality"))
        if row.spread is not None:
            quality += f" ± {100 * row.spread:.1f}" if metric in SHARES else f" ± {row.spread:.3f}"
        moved = [megabytes(row.mean(name)) for name in ("bytes_up", "bytes_down", "pooling_bytes")]
        counts = [f"{row.mean(name):,.0f}" for name in ("steps", "examples")]
        own = (row.arm, str(len(row.accounts)), quality, figure(metric, row.worst))
        table.add_row(*own, f"{row.mean('seconds'):.0f} s", *moved, *counts)
    return table


def ratios_table(found: Comparison) -> Table | None:
    """A row an arm that is compared with pooled; None where there is none."""
    rows = [row for row in found.rows if row.against]
    names = list(dict.fromkeys(name for row in rows for name in row.against))
    table = Table(box=None, pad_edge=False)
    for name in ("arm", "pairs", *(f"{name} / pooled" for name in names)):
        first = name == "arm"
        table.add_column(name, justify="left" if first else "right", no_wrap=not first, min_width=12 if first else None)
    for row in rows:
        pairs = max(one.pairs for one in row.against.values())
        table.add_row(row.arm, str(pairs), *(_ratio(row.against.get(name), pairs) for name in names))
    return table if rows else None


def _ratio(found: Ratio | None, pairs: int) -> str:
    if found is None:
        return "-"
    bound = "" if found.bound is None else f" (> {found.bound:.3f})"
    return f"{found.mean:.3f}{bound}" + (f" of {found.pairs}" if found.pairs != pairs else "")


def megabytes(num_bytes: float) -> str:
    """Bytes for people: powers of ten."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def figure(metric: str, value: float | None) -> str:
    """A metric's value for people: shares in percent."""
    return _percent(value) if value is None or metric in SHARES else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
