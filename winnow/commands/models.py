"""What the offline commands share: the options of scoring, loading a reward model, scoring under a progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from reward.errors import RewardError
from winnow.console import CommandError, progress_console

if TYPE_CHECKING:
    from reward.model import RewardModel
    from reward.rendering import Rendered
    from reward.scorer import RawScore


ModelSource = Annotated[str, typer.Option(help="Folder, hub id, or `default`.")]
SkipInvalid = Annotated[bool, typer.Option(help="Count bad records instead of stopping at the first.")]
MaxBatchTokens = Annotated[
    int | None, typer.Option(min=1, help="Padded tokens in one forward pass; as the device likes it, if not given.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run Python code that comes with the model.")]


def load_model(source: str, *, device: str, dtype: str, trust_remote_code: bool) -> RewardModel:
    """Raises `CommandError`."""
    try:
        from reward.model import load_reward_model
    except ModuleNotFoundError as error:
        raise CommandError(f"scoring needs {error.name}: install winnow[reward]") from error
    try:
        with progress_console().status("Loading the reward model …"):
            return load_reward_model(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    except (RewardError, ValueError) as error:
        raise CommandError(str(error)) from error


def score_with_progress(
    model: RewardModel, items: Sequence[Rendered], max_batch_tokens: int | None = None
) -> list[RawScore]:
    """Raw scores in order; a bar on a terminal. Raises ValueError on a reward that is not finite."""
    console = progress_console()
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=len(items))
        return model.raw_scores_of_all(items, max_batch_tokens, lambda count: progress.advance(task, count))
