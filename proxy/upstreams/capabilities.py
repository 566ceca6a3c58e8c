"""What is known of each upstream, model and endpoint: whether `n` is honoured, and up to which size.

Learnt from answers only, and a refusal only from a controlled comparison; never inferred from one error.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from proxy.candidates import Endpoint
from proxy.config import NMode

Key = tuple[str, str | None, Endpoint]
_MAX_KEYS = 1024
"""Model names come from clients: the memory of them must be bounded. The longest unused goes first."""


@dataclass(frozen=True, slots=True)
class _Knowledge:
    honoured: int = 1
    """The largest `n` that brought as many choices."""
    refused: int | None = None
    """The smallest `n` that was refused, or brought fewer choices."""


class Capabilities:
    """Lives as long as the server."""

    def __init__(self, n_mode: NMode) -> None:
        self._n_mode = n_mode
        self._known: OrderedDict[Key, _Knowledge] = OrderedDict()

    def worth_asking(self, key: Key, n: int) -> bool:
        """Whether one call with `n` is the way to get that many candidates, as far as is known."""
        if self._n_mode != "auto":
            return self._n_mode == "n"
        refused = self._known.get(key, _Knowledge()).refused
        return refused is None or n < refused

    def proven(self, key: Key, n: int) -> bool:
        """That many choices, or more, were brought by one call before: a refusal now is not about `n`."""
        return self._n_mode == "n" or self._known.get(key, _Knowledge()).honoured >= n

    def learn(self, key: Key, asked: int, received: int) -> None:
        """An answer to `n=asked` held `received` choices. 0: it was refused, while calls without `n` succeeded."""
        known = self._known.pop(key, _Knowledge())
        if received >= asked:
            known = replace(known, honoured=max(known.honoured, asked))
            if known.refused is not None and known.refused <= asked:
                known = replace(known, refused=None)
        else:
            # One choice is what ignoring `n` looks like; more than one is a cap.
            refused = received + 1 if received > 1 else 2 if received == 1 else asked
            refused = refused if known.refused is None else min(refused, known.refused)
            known = _Knowledge(min(known.honoured, refused - 1), refused)
        self._known[key] = known
        while len(self._known) > _MAX_KEYS:
            self._known.popitem(last=False)
