"""The pooled opponent: one model from the images of all stores in one place, by Ray Train, to its plateau.

python jobs/centralize.py [configs/quickstart.yaml] [--set key=value ...] [--steps N] [--every N] [--lrs LR ...]

Same task, model, batches and examples as `jobs/federate.py` with the same configuration and seed; the stores' data are
those that it makes, and are only read. Its run is one like any other: raypipe versions, raypipe compare. With --lrs it
is trained once with each, a run each, and the best on the validation split is named last.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone or a job's working directory
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # before anything imports Ray
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

from rich.console import Console

from raypipe.cli import exit_code
from raypipe.config.load import to_dict
from raypipe.config.schema import RunConfig
from raypipe.demo import make_demo_stores
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.placement.homes import raypipe_home, stores_home
from raypipe.run import load_run, new_run_id
from raypipe.tasks.metrics import lower_is_better
from raypipe.tracking.book import run_folder
from raypipe.tracking.compare import Account, account_of
from raypipe.tracking.console import figure, megabytes
from raypipe.tracking.lineage import read_history
from raypipe.tracking.plateau import plateau_line

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    """One pooled run for each learning rate; the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: _pooled(options, Console()))


def _pooled(options: argparse.Namespace, console: Console) -> int:
    config = load_run(options.config or DEFAULT, options.set)
    _check(config, options.steps)
    stores = _stores(config)
    done = [_one(config, lr, options, stores, console) for lr in options.lrs or [config.train.lr]]
    if len(done) > 1:
        pick = min if lower_is_better(config.evaluate.metric) else max
        best = pick(done, key=lambda account: _validated(account.run))
        line = f"best of {len(done)} on validation: {best.run} (lr {best.settings['train.lr']})"
        console.print(line, highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, help="default: configs/quickstart.yaml")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=_count, help="so many; default: to the plateau, by the validation split")
    parser.add_argument("--every", type=_count, help="steps between two judgements; default: an epoch")
    parser.add_argument("--lrs", type=_rate, nargs="+", default=[], metavar="LR", help="trials; default: train.lr")
    parser.add_argument("--cpus", type=_count, default=1, help="of the one worker")
    parser.add_argument("--gpu", action="store_true", help="train on one")
    return parser


def _check(config: RunConfig, steps: int | None) -> None:
    if steps is None and config.train.schedule["name"] != "constant":
        raise ConfigError(f"train.schedule {config.train.schedule['name']}: it needs an end to go towards: set --steps")


def _stores(config: RunConfig) -> Path:
    """Where the stores' data are: made as the main job makes them, else those that lie here."""
    if config.local is None:
        return stores_home()
    stores = raypipe_home() / "demo" / config.name
    make_demo_stores(config, stores)
    return stores


def _one(config: RunConfig, lr: float, options: argparse.Namespace, stores: Path, console: Console) -> Account:
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
    run = new_run_id(f"{config.name}-pooled", time.time())
    console.print(f"{run}: {config.model['name']}, lr {lr:g}", highlight=False, soft_wrap=True)
    _fit(to_dict(config), run, stores, options)
    account = account_of(read_history(run_folder(run)))
    where = _tracked(run) if config.track.mlflow else None
    _show(account, config.evaluate.metric, where, console)
    return account


def _fit(config: dict[str, Any], run: str, stores: Path, options: argparse.Namespace) -> None:
    """In a worker of Ray Train. Raises RaypipeError as the worker did."""
    from raypipe.security.own import show_local_token

    show_local_token(make=True)  # before Ray is imported
    from raypipe.placement import actor as cluster

    cluster.start_local([], options.cpus, 64 * 2**20)
    try:
        _train(config, run, stores, options)
    finally:
        cluster.shut_down()


def _train(config: dict[str, Any], run: str, stores: Path, options: argparse.Namespace) -> None:
    import ray.train
    import ray.train.torch

    rt: Any = ray.train  # typed only in part
    home = raypipe_home()
    asked = {"config": config, "run": run, "home": str(home), "stores": str(stores)}
    asked |= {"steps": options.steps, "every": options.every, "cpus": options.cpus}
    trainer = rt.torch.TorchTrainer(
        work,
        train_loop_config=asked,
        scaling_config=rt.ScalingConfig(
            num_workers=1, use_gpu=options.gpu, resources_per_worker={"CPU": options.cpus, "GPU": int(options.gpu)}
        ),
        run_config=rt.RunConfig(name=run, storage_path=str(home / "train")),
    )
    try:
        result = trainer.fit()
    except rt.TrainingFailedError as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise RunError(f"the worker of Ray Train ended: {last}") from None
    if result.return_value is not None:
        code, message = result.return_value
        raise (ConfigError if code == ConfigError.exit_code else RunError)(message)


def work(asked: dict[str, Any]) -> tuple[int, str] | None:
    """What the worker does. An error of ours comes back as exit code and message, since Ray would wrap it."""
    import torch
    from ray import train

    from raypipe.pooled import Until, centralize

    torch.set_num_threads(asked["cpus"])
    until = Until(asked["steps"], asked["every"])
    try:
        centralize(asked["config"], asked["run"], Path(asked["home"]), Path(asked["stores"]), until, train.report)
    except RaypipeError as error:
        return error.exit_code, error.message
    return None


def _tracked(run: str) -> str:
    from raypipe.tracking.follow import follow

    return follow(run_folder(run), patience_s=30)


def _validated(run: str) -> float:
    history = read_history(run_folder(run))
    assert history.best is not None
    metric = history.run()["config"]["evaluate"]["metric"]
    return float(history.evaluations[history.best]["validation"][1]["metrics"][metric])


def _show(account: Account, metric: str, where: str | None, console: Console) -> None:
    history = read_history(run_folder(account.run))
    final = history.final
    assert history.finished is not None
    assert final is not None
    lines = [
        f"{metric} on the {account.split} split: {figure(metric, account.quality)}, "
        f"worst store {figure(metric, account.worst)}; on validation {figure(metric, _validated(account.run))}",
        f"ended: {history.finished['reason']}; {account.seconds:.1f} s, {account.steps:,} steps, "
        f"{account.examples:,} examples seen",
        plateau_line(final["gained"], final["judged"]),
        f"pooling moved {megabytes(account.bytes_up)}: the stores' training examples, once",
        *([f"MLflow: {where}"] if where else []),
        f"next: raypipe compare {account.run} RUN ...",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _count(said: str) -> int:
    if not said.isdecimal() or int(said) < 1:
        raise argparse.ArgumentTypeError(f"{said!r} is no number of at least 1")
    return int(said)


def _rate(said: str) -> float:
    try:
        value = float(said)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{said!r} is no learning rate above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
