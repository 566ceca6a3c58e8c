"""`winnow ask`: one question through the `openai` client, candidates and rewards as a table."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from winnow.console import FAILED, CommandError, out, print_json, progress_console, table

if TYPE_CHECKING:
    import httpx2
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"


def ask(
    text: str = typer.Argument(metavar="TEXT", help="The question."),
    base_url: str = typer.Option(DEFAULT_BASE_URL, help="A running proxy, with its /v1."),
    model: str | None = typer.Option(None, help="Model to ask; the first that the proxy lists, if not given."),
    best_of: int | None = typer.Option(None, help="Candidates to draw; the proxy's default, if not given."),
    max_tokens: int | None = typer.Option(None, help="Longest candidate."),
    as_json: bool = typer.Option(False, "--json", help="The whole answer as JSON."),
) -> None:
    """One question through a running proxy, every candidate with its reward.

    Example: winnow ask "Why is the sky blue?" --best-of 4
    """
    answer = question(base_url, text, model=model, best_of=best_of, max_tokens=max_tokens)
    if as_json:
        print_json(answer)
    else:
        show(answer)


def question(
    base_url: str, text: str, *, model: str | None = None, best_of: int | None = None, **sampling: float | None
) -> dict[str, Any]:
    """The answer as the client library gives it, with its `winnow` member. Raises `CommandError`.

    `sampling` are fields of the request, such as `max_tokens` and `temperature`; None leaves one out.
    """
    import openai

    # A proxy on embedded models asks for no key; the library insists on some.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    winnow: dict[str, Any] = {"return_candidates": True} | ({} if best_of is None else {"best_of": best_of})
    try:
        with openai.OpenAI(base_url=base_url, api_key=key, http_client=_http_client(base_url)) as client:
            chosen = model or _first_model(client)
            given = {name: value for name, value in sampling.items() if value is not None}
            with progress_console().status("Drawing candidates …"):
                answer: ChatCompletion = client.chat.completions.create(
                    model=chosen,
                    messages=[{"role": "user", "content": text}],
                    extra_body={"winnow": winnow} | given,
                )
    except openai.APIConnectionError as error:
        raise CommandError(f"no proxy answers at {base_url}; start one with `winnow serve`", FAILED) from error
    except openai.APIStatusError as error:
        raise CommandError(f"{base_url} answered {error.status_code}: {error.message}", FAILED) from error
    return answer.model_dump(mode="json")


def _http_client(base_url: str) -> httpx2.Client | None:
    """For a proxy on this machine, one that does not ask a corporate HTTP proxy for the way; else the library's own."""
    import openai

    host = urlsplit(base_url).hostname or ""
    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    return openai.DefaultHttpxClient(trust_env=False) if loopback else None


def show(answer: dict[str, Any]) -> None:
    """Candidates by reward, the winner marked."""
    winnow = answer.get("winnow")
    if not winnow:
        out().print(answer["choices"][0]["message"]["content"], markup=False, soft_wrap=True)
        raise CommandError("the answer came without candidates: is this base URL a winnow proxy?", FAILED)
    # Best first; those without a reward at the end.
    candidates = sorted(
        winnow["candidates"], key=lambda one: (not one["valid"], one["reward"] is None, -(one["reward"] or 0.0))
    )
    rows = [
        [
            "★" if one["index"] == winnow["winner"] else "",
            one["index"],
            one["reward"],
            None if one["percentile"] is None else round(one["percentile"]),
            one["finish_reason"] if one["valid"] else one["reason"],
            (one["usage"] or {}).get("completion_tokens"),
            one["content"] or _calls(one),
        ]
        for one in candidates
    ]
    console = out()
    console.print(table(["", "#", "reward", "percentile", "finish", "tokens", "text"], rows))
    usage = answer.get("usage") or {}
    model = winnow["reward_model"] if winnow["scored"] else "none: the first valid candidate is returned"
    accepted = "accepted" if winnow["accepted"] else "not accepted"
    console.print(
        f"reward model {model}; best of {winnow['best_of']}; {accepted}; {usage.get('total_tokens', 'unknown')} tokens",
        markup=False,
    )


def _first_model(client: OpenAI) -> str:
    models = client.models.list().data
    if not models:
        raise CommandError("the proxy lists no model: name one with --model", FAILED)
    return models[0].id


def _calls(candidate: dict[str, Any]) -> str | None:
    names = [call.get("function", {}).get("name", "") for call in candidate.get("tool_calls") or []]
    return ", ".join(f"{name}(…)" for name in names) or None
