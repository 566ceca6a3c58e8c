"""Rollouts by an OpenAI-compatible server, such as vLLM: prompts as token ids go out, completions come back.

The server's weights are the policy's of the moment: before each round they are written to a folder, and a command of
the user's tells the engine to take them; how differs from engine to engine. Its kernels and number formats are not
those of training, so what it says of probabilities is only compared: PPO's own come from the pass that training makes.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr
from torch import Tensor

from reward.errors import UnreachableError
from training.options import Options, OptionsError
from training.policies import Policy
from training.rollouts import Written

_UNCHANGED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""What vLLM and SGLang would take from the checkpoint's generation settings: draws would not be the policy's own."""


class RolloutServerOptions(Options):
    """An OpenAI-compatible server that writes completions in place of this process."""

    url: str | None = None
    """Its base URL, such as `http://gpu-1:8000/v1`; unset, the policy itself writes, in this process."""
    model: str = "policy"
    """The policy's name there."""
    key: SecretStr | None = None
    """Sent as a bearer token; `${NAME}` takes it from the environment."""
    reload_command: list[str] = Field(default=[])
    """Command that makes the server take new weights, as a list of arguments, run without a shell before each round:
    `{folder}` stands for the folder with the policy, `{iteration}` for the round. It has to end when the weights are
    in place, with status 0."""
    reload_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds for it."""
    calls_at_once: int = Field(default=64, ge=1)
    """Completions asked for at once."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds for one call."""
    max_retries: int = Field(default=3, ge=0)
    """Of a failed call."""


class ServerSampler:
    """A `Sampler` over such a server."""

    def __init__(
        self,
        options: RolloutServerOptions,
        policy: Policy,
        temperature: float,
        folder: Path,
        write: Callable[[Path], None],
        *,
        leads: bool,
    ) -> None:
        """`folder`: where `write`, in which all processes take part, puts weights; one of them `leads` the server.

        Raises `OptionsError` without a way to reload them.
        """
        if not options.reload_command:
            raise OptionsError(
                "rollout_server.reload_command: without it the server would go on with the weights it has"
            )
        self._options = options
        self._policy = policy
        self._temperature = temperature
        self._folder = folder
        self._write = write
        self._leads = leads

    def weights_changed(self, iteration: int) -> None:
        """Writes the policy and has the server take it. Raises `UnreachableError` when it does not."""
        target = self._folder / f"policy-{iteration:06d}"
        if self._leads:
            shutil.rmtree(target, ignore_errors=True)  # of a run that was killed meanwhile
        self._write(target)
        if self._leads:
            self._reload(target, iteration)

    def _reload(self, target: Path, iteration: int) -> None:
        names = {"{folder}": str(target.resolve()), "{iteration}": str(iteration)}
        command = [_filled(argument, names) for argument in self._options.reload_command]
        try:
            done = subprocess.run(  # noqa: S603  # the user's own command
                command, capture_output=True, text=True, timeout=self._options.reload_timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnreachableError(f"rollout_server.reload_command failed: {error}") from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-500:]
            raise UnreachableError(f"rollout_server.reload_command ended with status {done.returncode}: {said}")
        for old in self._folder.glob("policy-*"):
            if old != target:
                shutil.rmtree(old)

    def __call__(self, prompts: Sequence[Sequence[int]], chance: Tensor) -> list[Written]:
        """Raises `UnreachableError` when the server cannot be reached or answers in another shape."""
        from openai import OpenAI, OpenAIError

        options = self._options
        key = options.key.get_secret_value() if options.key is not None else "none"
        seeds = [int(first * 2**31) for first in chance[:, 0].tolist()]
        with (
            OpenAI(
                base_url=options.url, api_key=key, timeout=options.timeout_s, max_retries=options.max_retries
            ) as client,
            ThreadPoolExecutor(options.calls_at_once, thread_name_prefix="rollouts") as pool,
        ):

            def ask(prompt: Sequence[int], seed: int) -> Written:
                answer = client.completions.create(
                    model=options.model,
                    prompt=list(prompt),
                    max_tokens=chance.shape[1],
                    temperature=self._temperature,
                    top_p=1.0,
                    seed=seed,
                    logprobs=0,
                    extra_body=_UNCHANGED | {"return_token_ids": True},
                )
                return self._written(answer.choices[0], chance.shape[1])

            try:
                return list(pool.map(ask, prompts, seeds))
            except (OpenAIError, IndexError, AttributeError) as error:
                raise UnreachableError(f"rollout_server: {options.url} failed: {error}") from error

    def _written(self, choice: Any, longest: int) -> Written:
        given = getattr(choice, "token_ids", None)
        if given is None:
            raise UnreachableError(
                "rollout_server: the answer has no token_ids; a server is needed that knows return_token_ids, as vLLM "
                "does: words alone do not say which tokens were drawn"
            )
        ids = [int(token) for token in given][:longest]
        logprobs = getattr(getattr(choice, "logprobs", None), "token_logprobs", None)
        if choice.finish_reason == "stop" and ids[-1:] and ids[-1] not in self._policy.stop_ids:
            # Some leave the token out that ended the completion; which one it was they do not say.
            ids = [*ids, self._end]
            logprobs = None
        if not ids:
            ids, logprobs = [self._end], None
        told = [float(value) for value in logprobs] if logprobs is not None and len(logprobs) == len(ids) else None
        return Written(ids, told)

    @property
    def _end(self) -> int:
        end = self._policy.tokenizer.eos_token_id
        return int(end) if end is not None else min(self._policy.stop_ids)


def _filled(argument: str, names: dict[str, str]) -> str:
    for name, value in names.items():
        argument = argument.replace(name, value)
    return argument
