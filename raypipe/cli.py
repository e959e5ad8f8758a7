"""The console command `raypipe`: thin verbs over the rooms. Errors are one line each; exit code 2 for bad input."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Before anything imports Ray. Of a process that ended Ray prints a paragraph; the run's own line says it, and what
# there is to do. What Ray says of memory that ran out stays.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^A worker died or was killed|There are infinite retries remaining")

from rich.console import Console

from raypipe import class_verbs, data_verbs, record_verbs, run_verbs, version_verbs
from raypipe.errors import RaypipeError, did_you_mean
from raypipe.ledger import commands as ledger


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    _warn_in_one_line()
    return exit_code(lambda: options.run(options, console))


def exit_code(run: Callable[[], int | None]) -> int:
    """Of a command; what is expected to go wrong is said in a line each."""
    try:
        return run() or 0
    except RaypipeError as error:
        for line in error.message.splitlines():
            print(f"raypipe: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("raypipe: stopped", file=sys.stderr)
        return 130


def _warn_in_one_line() -> None:
    """What raypipe warns of goes where its errors go, and looks like them; other libraries' warnings do not."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("raypipe: %(message)s"))
    log = logging.getLogger("raypipe")
    log.handlers, log.propagate = [handler], False


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with what would be right; its verbs' parsers too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """What a verb does not know is told here, where it is known what it could be."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            given = unknown[0].partition("=")[0]
            options = [name for name in self._option_string_actions if name.startswith("--")]
            hint = f".{did_you_mean(given, options)}" if given.startswith("-") else ""
            self.error(f"{self.prog.removeprefix('raypipe ')} knows no {given!r}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if wrong := re.fullmatch(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message):
            what, given, listed = wrong.groups()
            hint = did_you_mean(given, re.findall("[^', ]+", listed))
            message = f"{what.lower()} {given!r}: there is none such.{hint}"
        if not message.endswith((".", "?")):
            message += "; " + " ".join(self.format_usage().replace("[-h] ", "").split())
        self.exit(2, f"raypipe: {message}\n")


def _parser() -> argparse.ArgumentParser:
    from raypipe.doctor import commands as doctored
    from raypipe.placement import commands as placed
    from raypipe.security import commands as secured
    from raypipe.vault import commands as vaulted

    what = "Federated training of vision models on your own Ray cluster. Begin with: raypipe train"
    parser: argparse.ArgumentParser = _Parser(prog="raypipe", description=what, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace, Console], int], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    run_verbs.add(verb, _configured)
    data_verbs.add(verb, _configured)
    version_verbs.add(verb)
    vaulted.add_parsers(verbs)
    placed.add_parsers(verbs)
    doctored.add_parsers(verbs)
    secured.add_parsers(verbs)
    record_verbs.add(verb)
    class_verbs.add(verb)
    run_verbs.add_asking(verb)
    ledger.add_parsers(verbs)
    return parser


def _configured(sub: argparse.ArgumentParser) -> None:
    """A verb that takes a configuration, and changes to it."""
    sub.add_argument("config", nargs="?", type=Path, help="default: raypipe's own configs/quickstart.yaml")
    sub.add_argument("--config", dest="config_option", type=Path, help=argparse.SUPPRESS)
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="train.lr=0.1 ...")
