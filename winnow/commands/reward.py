"""`winnow reward …`: serving and evaluating reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.commands.reward_eval import evaluate
from winnow.console import say

app = typer.Typer(no_args_is_help=True, help="Reward models: serve and evaluate them.")


@app.command()
def serve(
    reward_model: Annotated[str | None, typer.Option(help="Folder, hub id or `default`.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    host: str | None = typer.Option(None, help="Address to listen on.  [default: 127.0.0.1]"),
    port: int | None = typer.Option(None, help="Port to listen on.  [default: 8000]"),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps."),
    dtype: str | None = typer.Option(None, help="auto, float32, bfloat16, float16."),
) -> None:
    """The scoring service alone, for a GPU box: `/v1/score`, and what OpenRLHF, vLLM, SGLang and TEI clients ask.

    Settings are those of `winnow serve`; upstreams and routes mean nothing here.

    Example: winnow reward serve --reward-model runs/my-reward-model --port 8001
    """
    from winnow.commands.serve import given, run_server
    from winnow.reloading import Source

    flags = {
        "server": {"host": host, "port": port},
        "reward": {"model": reward_model},
        "device": device,
        "dtype": dtype,
    }
    source = Source(config, given(flags), scores_only=True)
    run_server(source, lambda _, address: say(f"winnow scores at {address}/v1/score"))


app.command("eval")(evaluate)
