"""`winnow train …`: the trainers. `torchrun -m winnow train …` starts the same thing on many devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feedback.jsonl import DataError
from reward.errors import RewardError
from winnow.console import FAILED, CommandError, say

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from training.reward_sources import RewardSourceOptions

app = typer.Typer(no_args_is_help=True, help="Train models from human data.")

ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file; see training/configs/ for examples.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one setting; may be repeated.")
]


@contextmanager
def trainer() -> Iterator[None]:
    """Around a trainer's import and run: what a person can mend becomes one line."""
    try:
        from training.options import OptionsError
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    except (OptionsError, DataError, RewardError) as error:
        raise CommandError(str(error)) from error


def _missing(error: ModuleNotFoundError) -> CommandError:
    return CommandError(f"training needs {error.name}: install winnow[training]")


def _tell(text: str) -> None:
    """Once, not by each of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        say(text)


@app.command("reward")
def train_reward(config: ConfigFile, override: Overrides = None) -> None:
    """Train a reward model on preferences and rankings.

    A killed run goes on where its last checkpoint was when the same command is given again.

    Example: winnow train reward --config training/configs/reward-lora.yaml --set output=runs/first
    """
    with trainer():
        from training.options import RewardOptions, load_options
        from training.reward_model import train_reward_model

        folder = train_reward_model(load_options(RewardOptions, config, override or []))
    _tell(f"reward model in {folder}; its README.md says how good it is")


@app.command("sft")
def train_sft(config: ConfigFile, override: Overrides = None) -> None:
    """Fine-tune a language model on demonstrations.

    A killed run goes on where its last checkpoint was when the same command is given again.

    Example: winnow train sft --config training/configs/sft.yaml --set output=runs/sft
    """
    with trainer():
        from training.options import load_options
        from training.sft import SftOptions, train_sft

        folder = train_sft(load_options(SftOptions, config, override or []))
    _tell(f"policy in {folder}; winnow serve --local-model {folder} serves it")


@app.command("dpo")
def train_dpo(config: ConfigFile, override: Overrides = None) -> None:
    """Train a language model on preferences and rankings directly, without a reward model.

    A killed run goes on where its last checkpoint was when the same command is given again.

    Example: winnow train dpo --config training/configs/dpo.yaml --set base=runs/sft/policy
    """
    with trainer():
        from training.dpo import DpoOptions, train_dpo
        from training.options import load_options

        folder = train_dpo(load_options(DpoOptions, config, override or []))
    _tell(f"policy in {folder}; winnow serve --local-model {folder} serves it")


@app.command("ppo")
def train_ppo(config: ConfigFile, override: Overrides = None) -> None:
    """Train a language model on a reward, kept near where it started.

    A killed run goes on where its last checkpoint was when the same command is given again.

    Example: winnow train ppo --config training/configs/ppo-tiny.yaml --set reward.model=runs/reward/model
    """
    with trainer():
        from training.options import load_options
        from training.ppo import train_ppo
        from training.ppo_options import PpoOptions

        folder = train_ppo(load_options(PpoOptions, config, override or []), open_remote=_remote)
    _tell(f"policy in {folder}; winnow serve --local-model {folder} serves it")


@app.command("rlhf")
def train_rlhf(config: ConfigFile, override: Overrides = None) -> None:
    """Fine-tune on demonstrations, then in rounds: sample, rank, train a reward model, improve the policy by PPO.

    A killed run goes on where it was when the same command is given again. Ends with 1 when the run did not show what
    its `expect` says.

    Example: winnow train rlhf --config training/configs/rlhf-tiny.yaml --set output=runs/first
    """
    with trainer():
        from training.options import load_options
        from training.rlhf import Tools
        from training.rlhf import train_rlhf as run
        from training.rlhf_options import RlhfOptions
        from winnow.commands.rlhf_drawing import drawer

        options = load_options(RlhfOptions, config, override or [])
        finished = run(options, Tools(drawer(options.device), _remote, say))
    _tell(f"policy and reward model in {options.output}; {finished.report} tells how they came about")
    if finished.unmet:
        raise CommandError("; ".join(f"not shown: {one.what} ({one.found})" for one in finished.unmet), FAILED)


def _remote(options: RewardSourceOptions) -> Scorer:
    """A reward that a service gives, over the proxy's own transport."""
    from proxy.config_reward import RewardSettings
    from winnow.parts import remote_scorer

    settings = RewardSettings(url=options.url, protocol=options.protocol, key=options.key, timeout_s=options.timeout_s)
    return remote_scorer("default", settings)


@app.command("distill")
def train_distill(config: ConfigFile, override: Overrides = None) -> None:
    """Teach a language model to say at once what the best of its N answers was (rejection sampling).

    Samples answers, scores them, and fine-tunes on the best. A killed run goes on where it was when the same command is
    given again.

    Example: winnow train distill --config training/configs/distill.yaml --set base=runs/sft/policy
    """
    with trainer():
        from training.distill import DistillOptions, distill
        from training.options import load_options
        from winnow.commands.distilling import draw_with, score_with

        options = load_options(DistillOptions, config, override or [])
        folder = distill(options, draw_with(options), score_with(options))
    if options.fit:
        _tell(f"policy in {folder}; winnow serve --local-model {folder} serves it")
    else:
        _tell(f"winners in {folder}")
