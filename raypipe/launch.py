"""Start a run and watch it: on the cluster that is there, or on Ray on this machine alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType
from typing import Any

from raypipe.compose import compose
from raypipe.config.load import to_dict
from raypipe.config.schema import RunConfig
from raypipe.demo import make_demo_stores
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.placement.homes import raypipe_home
from raypipe.prelude import prepare
from raypipe.run import new_run_id
from raypipe.security.own import show_local_token
from raypipe.tracking.console import Screen

LOOK_S = 0.3  # between two looks at how it goes
HEAD_S = 60.0  # for a head that has just begun to know itself
REST_S = 1.5  # Ray kills a job three seconds after it was to end
GIVE_UP_S = 90.0  # after a second Ctrl-C, or when the coordinator does not answer


def federate(
    config: RunConfig,
    address: str | None,
    screen: Screen,
    ends: ExitStack,
    resume: str | None = None,
    *,
    insecure: bool = False,
) -> dict[str, Any]:
    """A whole run; its summary. Ctrl-C ends it cleanly: what was published is kept. SIGTERM (`ray job stop`) leaves it
    to be resumed, within the three seconds that Ray gives a job.

    Raises RaypipeError. `address`: a Ray address; None: RAY_ADDRESS if set, else this machine alone. `ends`: with it
    the cluster is left, which takes seconds. `resume`: the id of a run to be taken up. `insecure`: a cluster that lets
    strangers in will do.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        show_local_token(make=True)
    from raypipe.placement import actor as cluster
    from raypipe.security.actor import refuse_open

    run = resume or new_run_id(config.name, time.time())
    if address:
        cluster.connect(address)
        home = None
    else:
        home = str(raypipe_home())
        _start_here(config)
    ends.callback(cluster.shut_down)
    if address and not insecure:
        refuse_open(cluster.address())
    return _watch(config, run, home, screen, again=resume is not None)


def ask(run: str, address: str | None, method: str, *arguments: Any) -> Any:
    """Tell the coordinator of a run on a cluster something: `join`, `leave`, `stop`, `classes`; its answer.

    Raises RaypipeError.
    """
    if not (address or os.environ.get("RAY_ADDRESS")):
        show_local_token(make=False)
    import ray

    from raypipe.placement import actor as cluster

    cluster.connect(address or os.environ.get("RAY_ADDRESS") or "auto")
    try:
        coordinator: Any = ray.get_actor(f"coordinator/{run}", namespace=cluster.NAMESPACE)
        return ray.get(getattr(coordinator, method).remote(*arguments), timeout=GIVE_UP_S)
    except ValueError:
        raise ConfigError(f"no run named {run!r} is going on in this cluster") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaypipeError):
            raise error.cause from None
        raise
    finally:
        cluster.shut_down()


def _start_here(config: RunConfig) -> None:
    """Private data sets for each store and Ray, side by side."""
    from raypipe.placement import actor as cluster

    if config.local is None:
        raise ConfigError("local: missing; it says what data to make here. Or name a cluster: --address HOST:PORT")
    stores = raypipe_home() / "demo" / config.name
    os.environ["RAYPIPE_STORES"] = str(stores)
    ids = [store.id for store in config.stores]
    if config.evaluate.central:
        raise ConfigError("evaluate.central: there is no such store on this machine alone; name a cluster: --address")
    with ThreadPoolExecutor(1) as beside:
        data = beside.submit(make_demo_stores, config, stores)
        cluster.start_local(ids, sum(store.cpus for store in config.stores), 64 * 2**20)
        data.result()


def begin(config: RunConfig, run: str, home: str | None, mlflow: dict[str, str], *, again: bool = False) -> Any:
    """The run's coordinator as an actor of this cluster, on the head."""
    from raypipe.coordinator.actor import CoordinatorActor, on_head
    from raypipe.placement.actor import NAMESPACE
    from raypipe.placement.plan import KEEP_FREED_MEMORY

    options = {"name": f"coordinator/{run}", "namespace": NAMESPACE, **on_head()}
    options["runtime_env"] = {"env_vars": KEEP_FREED_MEMORY}
    make = partial(compose, must_exist=again)
    return CoordinatorActor.options(**options).remote(make, to_dict(config), run, home, mlflow, prepare)


def watch(actor: Any, see: Callable[[dict[str, Any]], None], check: Callable[[], None]) -> dict[str, Any]:
    """Have the coordinator work; its summary. `see` is told how it goes, `check` may end it by raising."""
    import ray

    work: Any = actor.work.remote()
    seen, asked = 0, actor.progress.remote(0, LOOK_S)
    while work not in (done := ray.wait([work, asked], timeout=LOOK_S)[0]):
        check()
        if asked not in done:
            continue  # a busy coordinator: patience
        state = ray.get(asked)
        see(state)
        seen = len(state["board"]["lines"]) if state["board"] else 0
        asked = actor.progress.remote(seen, LOOK_S)
    ray.wait([asked], timeout=2 * LOOK_S)  # Ray has a line of its own about a call whose actor is ended meanwhile
    summary: dict[str, Any] = ray.get(work)
    return summary


def take_up(address: str, say: Callable[[str], None], *, insecure: bool = False) -> None:
    """Every run of this head that died, until each is over. Raises RunError when the cluster ends before they do,
    ConfigError when it lets strangers in, unless `insecure`.

    For the head's supervisor: a run that cannot be read is told and left, one that could not go on for now is told
    and counts as lost; SIGTERM ends this process and with it the coordinators, not the runs.
    """
    from raypipe.comeback import unfinished
    from raypipe.placement import actor as cluster
    from raypipe.security.actor import refuse_open

    died = unfinished()
    if not died:
        say(f"no run in {raypipe_home() / 'runs'} is to be taken up")
        return
    cluster.connect(address)
    try:
        if not insecure:
            refuse_open(cluster.address())
        cluster.wait_for_head(HEAD_S)
        working = dict(filter(None, (_again(run, config, say) for run, config in died.items())))
        lost = _see_out(working, say)
    finally:
        cluster.shut_down()
    if lost:
        raise RunError(f"lost before it was over: {', '.join(lost)}")


def _again(
    run: str, config: RunConfig | RaypipeError, say: Callable[[str], None]
) -> tuple[Any, tuple[str, Any]] | None:
    """Its work, its id and its actor; None where it cannot be taken up or needs not."""
    if isinstance(config, RaypipeError):
        say(f"{run}: {config.message}")
        return None
    try:
        actor = begin(config, run, None, _mlflow(), again=True)
    except ValueError:  # the name of its coordinator is taken
        say(f"{run}: is going on")
        return None
    say(f"{run}: is taken up")
    return actor.work.remote(), (run, actor)


def _mlflow() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}


def _see_out(working: dict[Any, tuple[str, Any]], say: Callable[[str], None]) -> list[str]:
    """Wait for the end of each; those whose coordinator was lost."""
    import ray

    lost: list[str] = []
    while working:
        done, _ = ray.wait(list(working))
        run, _ = working.pop(done[0])
        line, is_over = _ended(run, partial(ray.get, done[0]))
        say(f"{run}: {line}")
        lost += [] if is_over else [run]
    return lost


def _ended(run: str, summary: Callable[[], Any]) -> tuple[str, bool]:
    """How a run ended, in words, and whether for good: what failed on a full disk, say, is to be tried again."""
    import ray

    from raypipe.comeback import unfinished

    try:
        found = summary()
        return f"{found['versions']} versions, ended: {found['reason']}", True
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        line = cause.message if isinstance(cause, RaypipeError) else type(cause).__name__
        return line, isinstance(cause, ConfigError) or run not in unfinished()
    except ray.exceptions.RayError as error:
        return f"its coordinator was lost ({type(error).__name__})", False


def _watch(config: RunConfig, run: str, home: str | None, screen: Screen, *, again: bool) -> dict[str, Any]:
    import ray

    def end() -> None:
        screen.say("stopping; what was published is kept (Ctrl-C again: at once)")
        actor.stop.remote("stopped by hand")

    try:
        actor = begin(config, run, home, _mlflow(), again=again)
    except ValueError:  # the name of its coordinator is taken
        raise RunError(f"run {run} is going on; --new begins another beside it") from None
    stop = _StopKey(run, end, lambda: _rest(actor))
    try:
        with stop:
            return watch(actor, lambda state: screen.update(state["phase"], state["board"]), stop.check)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaypipeError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise RunError(
            f"the coordinator ended ({type(error).__name__}); the record so far: raypipe versions {run}"
        ) from None


def _rest(actor: Any) -> None:
    import ray

    with suppress(ray.exceptions.RayError, TimeoutError):
        ray.get(actor.rest.remote(), timeout=REST_S)


class _StopKey:
    """The first Ctrl-C asks for a clean end, a second one ends at once; SIGTERM lets the run rest."""

    def __init__(self, run: str, ask: Callable[[], Any], rest: Callable[[], Any]) -> None:
        self._run, self._ask, self._rest, self._asked_at = run, ask, rest, 0.0
        self._pressed, self._terminated = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopKey:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._terminated = True
        else:
            self._pressed += 1

    def check(self) -> None:
        """In the main loop. Raises RunError for a rest, or when the end takes too long or is asked for twice."""
        if self._terminated:
            self._rest()
            raise RunError(f"stopped for now; it goes on with: raypipe train --resume {self._run}")
        if self._pressed and not self._asked_at:
            self._asked_at = time.monotonic()
            self._ask()
        if self._pressed > 1 or (self._asked_at and time.monotonic() > self._asked_at + GIVE_UP_S):
            raise RunError("stopped at once; what was published is kept")
