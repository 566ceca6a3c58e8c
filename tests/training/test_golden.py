"""Golden runs: the first steps on the sample of real data, as recorded in tests/golden/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import runs


@pytest.mark.parametrize("name", [*runs.REWARD, *runs.POLICIES])
def test_the_first_steps_are_those_on_record(name: str, tmp_path: Path) -> None:
    """After a change that is meant: `python -m tests.golden.runs`, and say why."""
    steps = runs.reward_steps if name in runs.REWARD else runs.policy_steps
    found, expected = steps(name, tmp_path), runs.golden(name)
    assert len(found) == len(expected) == runs.STEPS
    for ours, recorded in zip(found, expected, strict=True):
        assert ours == pytest.approx(recorded, rel=1e-4)
