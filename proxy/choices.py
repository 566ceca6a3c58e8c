"""The shape of a choice, as far as it is relied on behind this: what an upstream sends must not break a request."""

from __future__ import annotations

from proxy.candidates import CallFailure


def misshapen(upstream: str) -> CallFailure:
    return CallFailure("malformed", f"The upstream {upstream} answered with a choice in no form we know")


def are_well_formed(choices: object) -> bool:
    """Of a whole answer, or of a stream's chunk."""
    return isinstance(choices, list) and all(map(is_well_formed, choices))


def is_well_formed(choice: object) -> bool:
    # Once a chunk of every stream: plain steps, which cost a third of what is said in fewer words.
    if not isinstance(choice, dict):
        return False
    text = choice.get("text")
    if text is not None and not isinstance(text, str):
        return False
    return _is_message(choice.get("message")) and _is_message(choice.get("delta"))


def _is_message(said: object) -> bool:
    if said is None:
        return True
    if not isinstance(said, dict):
        return False
    calls = said.get("tool_calls")
    return not calls or (isinstance(calls, list) and all(map(_is_call, calls)))


def _is_call(call: object) -> bool:
    if not isinstance(call, dict):
        return False
    function = call.get("function")
    if function is None:
        return True
    return isinstance(function, dict) and isinstance(function.get("name"), str | None)
