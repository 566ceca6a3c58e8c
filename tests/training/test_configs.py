"""The checked-in configurations are accepted as they stand, and the tiny ones find their data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from training.distill import DistillOptions
from training.dpo import DpoOptions
from training.options import PolicyOptions, load_options
from training.rlhf_options import RlhfOptions, require_whole
from training.sft import SftOptions

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
KINDS: dict[str, type[SftOptions] | type[DpoOptions]] = {
    "sft": SftOptions,
    "dpo": DpoOptions,
    "distill": DistillOptions,
}


@pytest.mark.parametrize("name", ["sft", "sft-tiny", "dpo", "dpo-tiny", "distill", "distill-tiny"])
def test_configurations_of_policies_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_DATA", "data")
    found: PolicyOptions = load_options(KINDS[name.partition("-")[0]], CONFIGS / f"{name}.yaml")
    if name.endswith("tiny"):
        named = found.model_dump()
        files: list[str] = [file for kind in ("train", "validation", "prompts") for file in named.get(kind, ())]
        assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("name", ["rlhf-tiny", "recipe"])
def test_configurations_of_the_loop_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_DATA", "data")
    found = load_options(RlhfOptions, CONFIGS / f"{name}.yaml")
    require_whole(found)
    if name.endswith("tiny"):
        assert all((ROOT / file).is_file() for file in [*found.sample.prompts, *found.evaluate.prompts])


def test_the_launch_configuration_asks_accelerate_for_what_it_does() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    launch = ClusterConfig.from_yaml_file(CONFIGS / "accelerate-ddp.yaml")
    assert str(launch.distributed_type).endswith("MULTI_GPU") and not launch.use_cpu
    assert "fsdp_config" not in yaml.safe_load((CONFIGS / "accelerate-ddp.yaml").read_text(encoding="utf-8"))
