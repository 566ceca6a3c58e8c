"""Policies under training, whole or in shards, as folders on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from training.distributed import gathered
from training.policies import Policy, save_policy


class PolicyWriter:
    """Writes a policy as it is, or with other weights; one process writes, all take part."""

    def __init__(self, accelerator: Accelerator, policy: Policy, load_whole: Callable[[], Policy] | None) -> None:
        """`load_whole`: the policy as it was before training, for one in shards, which cannot be written as it is."""
        self._accelerator = accelerator
        self._policy = policy
        self._load_whole = load_whole
        self._whole: Policy | None = None

    def weights(self) -> dict[str, Tensor]:
        """What training changes, whole, for the process that writes; nothing for the others, which must call it too."""
        keep = self._accelerator.is_main_process
        found: dict[str, Tensor] = gathered(self._policy.trainable_state(), keep=keep)
        return found if keep else {}

    def write(self, target: Path, weights: Mapping[str, Tensor] | None = None, *, unless_there: bool = False) -> None:
        """The folder appears only when whole, and must not be there yet, but `unless_there` leaves it as it is.

        `weights`: as `weights` gave them; None: as they are now.
        """
        if self._load_whole is not None and weights is None:
            weights = self.weights()
        if self._accelerator.is_main_process and not (unless_there and target.exists()):
            self._write(target, weights)
        self._accelerator.wait_for_everyone()

    def _write(self, target: Path, weights: Mapping[str, Tensor] | None) -> None:
        if self._load_whole is None:
            save_policy(self._policy, target, trainable=weights)
            return
        assert weights is not None
        self._whole = self._whole or self._load_whole()
        self._whole.load_trainable_state(weights)
        save_policy(self._whole, target)
