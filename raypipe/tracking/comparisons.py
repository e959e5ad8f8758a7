"""A comparison in MLflow: a run of its own, with the table and each figure of each row as a metric."""

from __future__ import annotations

import re
from collections.abc import Sequence

from raypipe.errors import RunError
from raypipe.tracking.compare import Account, Comparison, as_table, columns_of, comparison_key
from raypipe.tracking.mlflow_sink import TROUBLE, Sink, one_line, points

EXPERIMENT = "comparisons"


def log_comparison(found: Comparison, accounts: Sequence[Account]) -> str:
    """Where it is; the same runs compared again are the same one. Raises RunError when MLflow is out of reach."""
    at, key = max(account.at for account in accounts), comparison_key(accounts)
    table, columns = as_table(found), columns_of(found)
    figures = {
        f"{_allowed(row[0])}/{name}": float(value)
        for row in table
        for name, value in zip(columns, row, strict=True)
        if isinstance(value, int | float)
    }
    try:
        sink = Sink()
        place = sink.run(sink.experiment(EXPERIMENT), f"compare-{key[:8]}", at, {"fed.compare": key})
        said = {"fed.runs": ", ".join(a.run for a in accounts), "fed.metric": found.metric}
        sink.tags(place.run_id, said | ({"fed.notes": "; ".join(found.notes)} if found.notes else {}))
        sink.table(place.run_id, "comparison.json", columns, table)
        sink.metrics(place.run_id, points(figures, at, 0))
        sink.end(place.run_id, "finished", at)
        return sink.where(place)
    except TROUBLE as error:
        raise RunError(f"the comparison is not in MLflow: {one_line(error)}") from None


def _allowed(text: str) -> str:
    """With what a metric's name may hold in MLflow."""
    return re.sub(r"[^\w\-. ]", "_", text)
