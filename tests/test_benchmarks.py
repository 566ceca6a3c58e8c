"""The gateway's benchmark still runs, whatever it measures: a benchmark that nobody runs is the first code to rot."""

from __future__ import annotations

from benchmarks import gateway, run, scoring


def test_the_gateway_benchmark_runs_and_checks_its_answers() -> None:
    tables = gateway.run(rounds=1, share=0.01)
    assert len(tables) == 8
    for table in tables:
        names = [str(row[0]) for row in table.rows]
        assert any(name.startswith("floor") for name in names)
        assert any(name.startswith("winnow") for name in names)
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_texts_to_score_differ_and_come_again() -> None:
    texts = scoring.completions(16, seed=3)
    assert len({str(text) for text in texts}) == 16
    assert texts == scoring.completions(16, seed=3)
    assert texts != scoring.completions(16, seed=4)


def test_the_hardware_is_named() -> None:
    assert "Python 3" in run.hardware()
