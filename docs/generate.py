"""Writes the reference pages that derive from the code: `settings.md` and `commands.md`. Run by `make docs`.

`python docs/generate.py --check` writes nothing and fails when a page is stale.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer.main
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from proxy.config import ENV_PREFIX, Settings
from training.hosted.options import HostedOptions
from training.distill import DistillOptions
from training.dpo import DpoOptions
from training.options import RewardOptions
from training.ppo_options import PpoOptions
from training.rlhf_options import RlhfOptions
from training.sft import SftOptions
from winnow.__main__ import command_tree

HERE = Path(__file__).parent
TRAINERS: Mapping[str, tuple[type[BaseModel], str]] = {
    "reward": (RewardOptions, "[Reward models](reward-models.md)"),
    "sft": (SftOptions, "[Training language models](training.md#demonstrations)"),
    "dpo": (DpoOptions, "[Training language models](training.md#preferences-without-a-reward-model)"),
    "ppo": (PpoOptions, "[PPO](training-ppo.md)"),
    "distill": (DistillOptions, "[Training language models](training.md#the-best-of-n-answers)"),
    "rlhf": (RlhfOptions, "[The whole loop](training-rlhf.md)"),
}
"""Settings of each `winnow train`, and the page that explains them."""
_NOTICE = (
    "<!-- Made by docs/generate.py from the code; edit the docstrings and options there, then run `make docs`. -->"
)


def pages() -> dict[str, str]:
    """Every generated page by its file name."""
    return {"settings.md": settings_page(), "commands.md": commands_page()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    check = parser.parse_args().check
    stale = [name for name, text in pages().items() if not _is(HERE / name, text)]
    for name in stale:
        if check:
            print(f"docs/{name} is stale: run `make docs`", file=sys.stderr)
        else:
            (HERE / name).write_text(pages()[name], encoding="utf-8")
    raise SystemExit(1 if check and stale else 0)


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


# --- settings -------------------------------------------------------------------------------------------------


def settings_page() -> str:
    lines = [
        "# Settings",
        _NOTICE,
        "",
        "## `winnow serve`",
        "",
        "Flags win over the environment, the environment over the file (`winnow serve --config FILE.yaml`). An unknown",
        "setting stops the start. `route.best_of` stands in the file as",
        "",
        "```yaml",
        "route:",
        "  best_of: 8",
        "```",
        "",
        "and in the environment as `WINNOW_ROUTE_BEST_OF=8`. In the environment `server.api_keys` is comma-separated;",
        "other lists are JSON.",
        "",
    ]
    top = {name: field for name, field in Settings.model_fields.items() if not _is_section(field)}
    for name, field in Settings.model_fields.items():
        if _is_section(field):
            section: type[BaseModel] = field.annotation  # type: ignore[assignment]  # _is_section says so
            doc = (section.__doc__ or "").strip()
            lines += [f"### `{name}`", "", doc, "", *_server_table(section.model_fields, f"{name}.")]
    lines += ["### Without a section", "", *_server_table(top, "")]
    lines += [
        "`WINNOW_CACHE_DIR` is no setting of the file: it names the folder for converted weights, by default",
        "`$XDG_CACHE_HOME/winnow` or `~/.cache/winnow`.",
        "",
        "## Trainers",
        "",
        "From `--config FILE.yaml`; `--set key=value` changes one setting (`--set lora.rank=16`; the value is YAML).",
        "`${NAME}` and `${NAME:-default}` in values are taken from the environment.",
        "",
    ]
    for name, (kind, page) in TRAINERS.items():
        lines += [f"## `winnow train {name}`", "", f"What they do to a model is told in {page}.", ""]
        lines += _trainer_tables(kind)
    lines += ["## `winnow hosted`", "", "What they do is told in [Hosted fine-tuning](hosted.md).", ""]
    lines += _trainer_tables(HostedOptions)
    return "\n".join(lines).rstrip() + "\n"


def _trainer_tables(kind: type[BaseModel]) -> list[str]:
    lines = _table(kind.model_fields, "")
    for name, field in kind.model_fields.items():
        if _is_section(field):
            nested: type[BaseModel] = field.annotation  # type: ignore[assignment]
            lines += [f"### `{name}`", "", (nested.__doc__ or "").strip(), "", *_table(nested.model_fields, f"{name}.")]
    return lines


def _server_table(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    rows = ["| setting | environment | takes | default | |", "| --- | --- | --- | --- | --- |"]
    for name, field in fields.items():
        variable = ENV_PREFIX + f"{prefix}{name}".replace(".", "_").upper()
        rows.append(f"| `{prefix}{name}` | `{variable}` | {_takes(field)} | {_default(field)} | {_meaning(field)} |")
    return [*rows, ""]


def _table(fields: dict[str, FieldInfo], prefix: str) -> list[str]:
    rows = ["| setting | takes | default | |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        if not _is_section(field):
            rows.append(f"| `{prefix}{name}` | {_takes(field)} | {_default(field)} | {_meaning(field)} |")
    return [*rows, ""]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _meaning(field: FieldInfo) -> str:
    return _cell((field.description or "").strip())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        raise ValueError(f"a default made by a function cannot be documented: {field}")
    if value is None or value in ((), {}):
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _takes(field: FieldInfo) -> str:
    """The type in a few words, with its limits."""
    limits = []
    for limit in field.metadata:
        for sign, name in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
            if getattr(limit, name, None) is not None:
                limits.append(f"{sign} {getattr(limit, name)}")
    return _cell(" ".join([_type(field.annotation), ", ".join(limits)]).strip())


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in arguments if one is not types.NoneType))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin in (dict, Mapping):
        if arguments[1] is Any:
            return "mapping"
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        pattern = [getattr(one, "metadata", ()) for one in annotation.__metadata__]
        return "percentile (`p20`)" if annotation.__origin__ is str and pattern else _type(annotation.__origin__)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{{{', '.join(annotation.model_fields)}}}`"
    names: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", SecretStr: "text"}
    return names[annotation]


# --- commands -------------------------------------------------------------------------------------------------


def commands_page() -> str:
    lines = [
        "# Commands",
        _NOTICE,
        "",
        "Every command exits 0 on success, 2 on bad usage or bad input, 1 when the work itself failed. Errors are one",
        "line on standard error. Results go to standard output, progress to standard error.",
        "",
    ]
    for path, command in commands():
        lines += _command_lines(path, command)
    return "\n".join(lines).rstrip() + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its full name."""
    names = _children(typer.main.get_command(command_tree(None)))
    for name in names:
        loaded = _children(typer.main.get_command(command_tree(name)))[name]
        yield from _leaves(f"winnow {name}", loaded)


def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    children = _children(command)
    if not children:
        yield path, command
    for name, child in children.items():
        yield from _leaves(f"{path} {name}", child)


def _children(command: Any) -> dict[str, Any]:
    """Sub-commands. Typer brings a copy of click, so its groups are known by what they have."""
    return dict(getattr(command, "commands", {}))


def options(command: Any) -> Iterator[Any]:
    """A command's flags, `--help` aside."""
    return (one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts)


def _command_lines(path: str, command: Any) -> list[str]:
    summary, _, example = (command.help or "").partition("Example: ")
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join([path, *(_argument_name(one) for one in arguments), "[options]"])
    lines = [f"## `{path}`", "", *_paragraphs(summary), "```bash", f"{usage}", example.strip(), "```", ""]
    if example == "":
        raise ValueError(f"{path} has no example in its docstring")
    rows = ["| | default | |", "| --- | --- | --- |"]
    for one in arguments:
        rows.append(f"| `{_argument_name(one)}` | {'required' if one.required else ''} | {_cell(one.help or '')} |")
    for one in options(command):
        names = ", ".join(f"`{name}`" for name in sorted(one.opts, key=len, reverse=True))
        rows.append(f"| {names} | {_option_default(one)} | {_cell(_without_default(one.help or ''))} |")
    return [*lines, *rows, ""]


def _argument_name(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    stated = (option.help or "").partition("[default: ")[2].partition("]")[0]
    if stated:
        return f"`{stated}`"
    return "" if option.default is None or option.default is False else f"`{option.default}`"


def _without_default(text: str) -> str:
    return text.partition("[default: ")[0].strip()


def _paragraphs(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()] + [""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def documented_flags() -> Sequence[str]:
    """All flags of all commands, for tests."""
    return sorted({name for _, command in commands() for one in options(command) for name in one.opts})


if __name__ == "__main__":
    main()
