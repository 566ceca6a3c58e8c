"""Golden runs: the first steps on the sample of real data, as recorded in tests/golden/."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import runs


@pytest.mark.parametrize("name", runs.RUNS)
def test_the_first_steps_are_those_on_record(name: str, tmp_path: Path) -> None:
    """After a change that is meant: `python -m tests.golden.runs`, and say why."""
    found, expected = runs.RUNS[name](name, tmp_path), runs.golden(name)
    assert len(found) == len(expected) == runs.STEPS
    for ours, recorded in zip(found, expected, strict=True):
        if name in runs.PPO:
            # Sampled tokens feed back: what machines round differently grows from step to step. KL begins at 0.
            kl, recorded_kl = ours.pop("kl"), recorded.pop("kl")
            assert kl == pytest.approx(recorded_kl, rel=1e-3, abs=2e-4)
            assert ours == pytest.approx(recorded, rel=1e-3, abs=1e-5)
        else:
            assert ours == pytest.approx(recorded, rel=1e-4)
