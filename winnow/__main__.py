"""The command tree. A command's code is imported when it is called: `winnow --help` loads no models, no server."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from winnow.console import exits, fail
from winnow.version import __version__

_ROOMS = ("proxy", "reward", "training", "feedback")

_COMMANDS: Mapping[str, tuple[str, str, str]] = {
    # name: (module, attribute: a function, or a typer app for a group; one line of help)
    "serve": ("winnow.commands.serve", "serve", "The proxy: best-of-N behind an OpenAI base URL."),
    "ask": ("winnow.commands.ask", "ask", "One question through a running proxy, every candidate with its reward."),
    "config": ("winnow.commands.config", "app", "The proxy's configuration: check it."),
    "demo": ("winnow.commands.demo", "demo", "Start the proxy on embedded models and put one question through it."),
    "sample": ("winnow.commands.sample", "sample", "Draw K completions a prompt from any model, ready to rank."),
    "score": ("winnow.commands.score", "score", "Score completions with a reward model."),
    "eval": ("winnow.commands.eval", "app", "Language models against each other."),
    "reward": ("winnow.commands.reward", "app", "Reward models: serve and evaluate them."),
    "train": ("winnow.commands.train", "app", "Train models from human data."),
    "hosted": ("winnow.commands.hosted", "app", "Fine-tune hosted models through their providers."),
}


def main() -> None:
    """The console script."""
    _require_own_rooms()
    run(sys.argv[1:] or ["--help"])


def run(arguments: Sequence[str]) -> None:
    """Runs one command and exits with its code."""
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        with exits():
            code = command_tree(chosen)(args=list(arguments), prog_name="winnow", standalone_mode=False)
    except Exception as error:
        # Usage errors of the parser know how to say themselves in one line; anything else is a bug.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        fail(f"{explain().rstrip('.')}. See `{_help_for(arguments)}`", getattr(error, "exit_code", 2))
    raise SystemExit(code if isinstance(code, int) else 0)


def command_tree(chosen: str | None) -> typer.Typer:
    """All commands by name and help; only the chosen one with its code."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Best-of-N with a reward model trained on human rankings, behind any OpenAI base URL.",
        epilog='Example: winnow serve --upstream-url https://host/v1 & winnow ask "Why is the sky blue?"',
    )
    app.callback()(_root)
    for name, (module, attribute, summary) in _COMMANDS.items():
        command = getattr(importlib.import_module(module), attribute) if name == chosen else _unloaded
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, help=summary)
        else:
            app.command(name, help=None if name == chosen else summary)(command)
    return app


def _unloaded() -> None:
    """Stands for a command that was not called: the parser never gets here."""
    raise AssertionError("this command's code was not loaded")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)  # noqa: T201
        raise typer.Exit()


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Holds the options that stand before a command."""


def _help_for(arguments: Sequence[str]) -> str:
    known = [argument for argument in arguments[:1] if argument in _COMMANDS]
    return " ".join(["winnow", *known, "--help"])


def _require_own_rooms() -> None:
    """Other packages use such names too: better one line here than a strange error later."""
    house = Path(__file__).resolve().parent.parent
    for room in _ROOMS:
        spec = importlib.util.find_spec(room)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if house / room not in places:
            found = places[0] if places else "nowhere"
            fail(f"the package {room!r} that Python finds is not winnow's ({found}): use an environment of its own")


if __name__ == "__main__":
    main()
