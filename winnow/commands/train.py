"""`winnow train …`: the trainers. `torchrun -m winnow train …` starts the same thing on many devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from feedback.jsonl import DataError
from reward.errors import RewardError
from winnow.console import CommandError, progress_console

app = typer.Typer(no_args_is_help=True, help="Train models from human data.")


@app.callback()
def _group() -> None:
    """Keeps `train` a group while it has a single trainer."""


@app.command("reward")
def train_reward(
    config: Annotated[Path, typer.Option(help="YAML file; see training/configs/ for examples.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting; may be repeated.")
    ] = None,
) -> None:
    """Train a reward model on preferences and rankings.

    A killed run goes on where its last checkpoint was when the same command is given again.

    Example: winnow train reward --config training/configs/reward-lora.yaml --set output=runs/first
    """
    try:
        from training.options import OptionsError, RewardOptions, load_options
        from training.reward_model import train_reward_model
    except ModuleNotFoundError as error:
        raise CommandError(f"training needs {error.name}: install winnow[training]") from error
    try:
        folder = train_reward_model(load_options(RewardOptions, config, override or []))
    except (OptionsError, DataError, RewardError) as error:
        raise CommandError(str(error)) from error
    progress_console().print(f"reward model in {folder}; its README.md says how good it is", markup=False)
