"""Every sort of training, end to end on tiny models: it learns, and its folder says and does what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward.model import RewardModel, load_reward_model
from reward.network import PooledRewardModel
from reward.normalisation import NUM_QUANTILES
from tests.fakes.models import build_tiny_causal_lm
from tests.training import tasks
from tests.training.conftest import KINDS, Task, Trained
from training.models import load_trainable
from training.options import OptionsError, RewardOptions
from training.reward_model import train_reward_model

STOCK = ["lora", "lora-encoder", "full", "full-encoder"]
"""Kinds whose folder transformers (or PEFT) loads without us."""


def validation_files(kind: str, task: Task) -> list[Path]:
    return [task.validation, task.opposite_validation] if kind == "gated" else [task.validation]


def raw_rewards(model: RewardModel, files: list[Path]) -> list[float]:
    """Of all completions, each by itself."""
    rewards = []
    for file in files:
        for prompt, better, worse in tasks.completion_pairs(file):
            for completion in (better, worse):
                rewards += model.raw_rewards([model.renderer.render(prompt, completion)])
    return rewards


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_can_be_learnt(kind: str, trained: Trained, task: Task) -> None:
    model = load_reward_model(str(trained(kind)), device="cpu")
    rewards = raw_rewards(model, validation_files(kind, task))
    correct = [better > worse for better, worse in zip(rewards[::2], rewards[1::2], strict=True)]
    assert sum(correct) / len(correct) > 0.9
    stated = model.manifest.accuracy["all" if kind == "gated" else "zig"]
    assert stated.pairs == len(correct)
    assert stated.accuracy == pytest.approx(sum(correct) / len(correct), abs=0.02)
    assert stated.low < stated.accuracy <= stated.high


@pytest.mark.parametrize("kind", KINDS)
def test_served_rewards_have_mean_0_and_deviation_1_on_the_references(kind: str, trained: Trained, task: Task) -> None:
    """R8, after loading from disk."""
    model = load_reward_model(str(trained(kind)), device="cpu")
    scale = model.manifest.normalisation
    rewards = [scale.reward(raw) for raw in raw_rewards(model, validation_files(kind, task))]
    mean = math.fsum(rewards) / len(rewards)
    deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    assert mean == pytest.approx(0.0, abs=1e-5)
    assert deviation == pytest.approx(1.0, abs=1e-5)
    assert model.manifest.num_references == len(rewards)
    assert len(scale.quantiles) == NUM_QUANTILES
    assert scale.quantiles[-1] == pytest.approx(max(rewards), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_says_what_it_is(kind: str, trained: Trained, task: Task) -> None:
    """R7: held-out accuracy with its interval in it, after one pass unless more are asked for."""
    assert RewardOptions.model_fields["epochs"].default == 1.0
    folder = trained(kind)
    record = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
    assert record["name"] == kind
    assert len(record["probes"]) == 3
    facts = record["training"]
    assert {entry["file"] for entry in facts["data"]} >= {task.train.name}
    assert all(len(entry["sha256"]) == 64 for entry in facts["data"] + facts["validation_data"])
    assert facts["pairs"]["zig"] == 96
    assert facts["seed"] == 3
    assert facts["config"]["tuning"] == kind.split("-")[0].replace("gated", "head")
    assert "output" not in facts["config"], "a path of this machine"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: winnow\n")
    assert f"# {kind}" in card
    for accuracy in record["accuracy"].values():
        assert f"{accuracy['accuracy']:.1%} | {accuracy['low']:.1%} – {accuracy['high']:.1%}" in card
    assert not [entry for entry in folder.parent.iterdir() if entry.name.startswith(".")], "half-written leavings"


@pytest.mark.parametrize("kind", STOCK)
def test_stock_folders_score_alike_in_transformers(kind: str, trained: Trained, task: Task) -> None:
    folder = trained(kind)
    ours = load_reward_model(str(folder), device="cpu")
    kind_of = AutoPeftModelForSequenceClassification if "lora" in kind else AutoModelForSequenceClassification
    theirs = load_theirs(kind_of, folder)
    for prompt, better, _ in tasks.completion_pairs(task.validation)[:8]:
        item = ours.renderer.render(prompt, better)
        inputs = {"input_ids": torch.tensor([item.ids])}
        if item.token_type_ids is not None:
            inputs["token_type_ids"] = torch.tensor([item.token_type_ids])
        with torch.no_grad():
            raw = theirs(**inputs).logits[0, 0].item()
        scale = ours.manifest.normalisation
        (reward,) = ours.raw_rewards([item])
        assert scale.reward(reward) == pytest.approx(scale.reward(raw), abs=1e-4)


def load_theirs(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, num_labels=1).eval()


def test_a_gate_does_what_a_single_head_cannot(trained: Trained, task: Task, tmp_path: Path) -> None:
    gated = load_reward_model(str(trained("gated")), device="cpu").manifest
    assert gated.head.domains == ("zag", "zig")
    assert min(gated.accuracy[source].accuracy for source in ("zig", "zag")) > 0.9
    folder = train_reward_model(
        tasks.options(
            task.decoder,
            tmp_path / "single",
            [task.train, task.opposite_train],
            [task.validation, task.opposite_validation],
            **KINDS["head"],
        )
    )
    single = load_reward_model(str(folder), device="cpu").manifest
    assert single.accuracy["all"].accuracy < 0.65


def test_rankings_and_preferences_train_together(task: Task, tmp_path: Path) -> None:
    chosen = tasks.options(
        task.decoder, tmp_path / "run", [task.rankings, task.train], [task.validation], **KINDS["full"]
    )
    model = load_reward_model(str(train_reward_model(chosen)), device="cpu")
    # Five decided pairs of each four-way ranking with one tie, and the preferences.
    assert model.manifest.training["pairs"] == {"zig": 24 * 5 + 96}
    assert model.manifest.accuracy["zig"].accuracy > 0.9


def test_without_validation_the_scale_comes_from_the_training_data(task: Task, tmp_path: Path) -> None:
    model = load_reward_model(
        str(train_reward_model(tasks.options(task.decoder, tmp_path / "run", [task.train], **KINDS["head"]))),
        device="cpu",
    )
    assert model.manifest.accuracy == {}
    assert model.manifest.num_references == 2 * 96


def test_fewer_layers_are_kept_and_remembered(task: Task, tmp_path: Path) -> None:
    for tuning in ("head", "lora", "full"):
        chosen = tasks.options(
            task.decoder, tmp_path / tuning, [task.train], [task.validation], tuning=tuning, num_layers=1, epochs=0.2
        )
        model = load_reward_model(str(train_reward_model(chosen)), device="cpu")
        assert isinstance(model.network, PooledRewardModel)
        assert len(model.network.backbone.layers) == 1  # type: ignore[arg-type]  # a ModuleList


def test_a_single_layer_is_the_same_as_cutting_there(task: Task, tmp_path: Path) -> None:
    heads = []
    for name, settings in {"layers": {"layers": [1]}, "num_layers": {"num_layers": 1}}.items():
        chosen = tasks.options(task.decoder, tmp_path / name, [task.train], **KINDS["head"], **settings)
        folder = train_reward_model(chosen)
        manifest = load_reward_model(str(folder), device="cpu").manifest
        assert (manifest.head.num_layers, manifest.head.layers) == (1, ())
        heads.append(load_file(folder / "head.safetensors"))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_pad_equal_to_end_trains_and_serves_alike(tuning: str, task: Task, tmp_path: Path) -> None:
    """R2: with pad = EOS, transformers' own head reads one token early; neither training nor serving may."""
    base = build_tiny_causal_lm(tmp_path / "base", chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": config["eos_token_id"]}), encoding="utf-8")
    settings = {**KINDS[tuning], "eval_every": 1, "epochs": 0.5}
    run = tmp_path / "run"
    model = load_reward_model(
        str(train_reward_model(tasks.options(base, run, [task.train], [task.validation], **settings))), device="cpu"
    )
    assert model.renderer.template == "plain"
    seen = max(line["validation_accuracy"] for line in tasks.read_log(run) if "validation_accuracy" in line)
    assert model.manifest.accuracy["zig"].accuracy == seen


def test_a_new_head_is_small_and_without_offset(task: Task, tmp_path: Path) -> None:
    """R6: N(0, 1/(d+1))."""
    network = load_trainable(tasks.options(task.decoder, tmp_path, [task.train], tuning="full")).network
    assert isinstance(network, PooledRewardModel)
    assert isinstance(network.head, torch.nn.Linear)
    assert network.head.weight.std().item() == pytest.approx(33**-0.5, rel=0.5)
    assert network.head.bias is None or network.head.bias.abs().max() == 0
    assert network.head.out_features == 1


def test_a_frozen_base_stays_frozen(task: Task, tmp_path: Path) -> None:
    head = load_trainable(tasks.options(task.decoder, tmp_path, [task.train], tuning="head"))
    assert set(head.trainable_state()) == {"head.weight", "head.bias"}
    lora = load_trainable(tasks.options(task.decoder, tmp_path, [task.train], tuning="lora"))
    assert all("lora_" in name or name.startswith("head.") for name in lora.trainable_state())


@pytest.mark.parametrize("kind", ["lora", "full-encoder"])
def test_recomputing_activations_changes_nothing(kind: str, task: Task, tmp_path: Path) -> None:
    base = task.encoder if kind.endswith("encoder") else task.decoder
    losses = []
    for recompute in (False, True):
        run = tmp_path / str(recompute)
        settings = {**KINDS[kind], "epochs": 0.5, "gradient_checkpointing": recompute}
        train_reward_model(tasks.options(base, run, [task.train], **settings))
        losses.append(list(tasks.step_losses(run).values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_centring_keeps_rewards_near_nought(task: Task, tmp_path: Path) -> None:
    means = []
    for weight in (0.0, 1.0):
        settings = {**KINDS["full"], "centering": weight, "epochs": 2}
        folder = train_reward_model(tasks.options(task.decoder, tmp_path / str(weight), [task.train], **settings))
        means.append(abs(load_reward_model(str(folder), device="cpu").manifest.normalisation.mean))
    assert means[1] < min(0.1, means[0])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"gated": True, "tuning": "lora"}, "gated: needs tuning: head"),
        ({"tuning": "full", "pooling": ["mean"]}, r"it needs pooling: \[last\]"),
        ({"tuning": "full", "layers": [1, 2]}, "a single layer"),
        ({"tuning": "full", "heads": 2}, "heads: 1"),
        ({"gated": True, "heads": 2}, "choose heads or gated"),
        ({"label_smoothing": 0.1}, "label_smoothing: needs tuning: lora or full"),
        ({"centering": 0.01}, "centering: needs tuning: lora or full"),
        ({"layers": [2], "num_layers": 2}, "leave num_layers out"),
        ({"layers": [2, 1]}, r"layers: \[2, 1\] must rise"),
    ],
)
def test_what_cannot_be_combined_is_refused(settings: dict[str, Any], problem: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=problem):
        train_reward_model(tasks.options(task.decoder, tmp_path / "run", [task.train], **settings))
    assert not (tmp_path / "run").exists()


def gated(task: Task, base: Path, output: Path, **settings: Any) -> Path:
    files = [task.train, task.opposite_train], [task.validation, task.opposite_validation]
    return train_reward_model(tasks.options(base, output, *files, **(KINDS["gated"] | settings)))


def test_prompts_without_comparisons_reach_the_gate(task: Task, tmp_path: Path) -> None:
    prompts = tmp_path / "more.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"entirely other words {i}"}) + "\n" for i in range(12)))
    folder = gated(task, task.decoder, tmp_path / "run", gate_prompts={"zag": [str(prompts)]})
    facts = json.loads((folder / "reward.json").read_text(encoding="utf-8"))["training"]
    assert facts["gate_prompts"] == 12
    assert [entry["file"] for entry in facts["gate_data"]] == ["more.jsonl"]
    assert facts["pairs"] == {"zig": 96, "zag": 96}


def test_a_gate_for_an_unknown_source_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"gate_prompts\.zog: no such source; .*zag, zig"):
        gated(task, task.decoder, tmp_path / "run", gate_prompts={"zog": [str(task.train)]})


def test_a_gate_on_a_base_that_looks_ahead_is_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="need a causal decoder"):
        gated(task, task.encoder, tmp_path / "run")


def test_other_data_under_the_same_name_is_not_gone_on_with(task: Task, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "zig.train.jsonl"
    data.write_bytes(task.train.read_bytes())
    chosen = tasks.options(task.decoder, run, [data], [], **KINDS["head"])
    train_reward_model(chosen)
    (run / "model").rename(tmp_path / "finished")
    data.write_bytes(task.opposite_train.read_bytes())
    with pytest.raises(OptionsError, match="another data"):
        train_reward_model(chosen)


def test_rewards_that_are_all_equal_cannot_be_normalised(task: Task, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    # The same words in another shape.
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
    record = {"prompt": "a", "chosen": "b", "rejected": parts, "source": "same"}
    data.write_text(json.dumps(record) + "\n")
    with pytest.raises(OptionsError, match="cannot be normalised"):
        train_reward_model(tasks.options(task.decoder, tmp_path / "run", [data], [data], **KINDS["head"]))


def test_the_last_token_export_is_a_stock_classifier(task: Task, tmp_path: Path) -> None:
    folder = last_token_export(task, tmp_path / "run", KINDS["head"])
    ours = load_reward_model(str(folder), device="cpu")
    assert ours.manifest.head.kind == "sequence_classification"
    assert ours.manifest.accuracy["zig"].accuracy > 0.9
    theirs = load_theirs(AutoPeftModelForSequenceClassification, folder)
    for prompt, better, _ in tasks.completion_pairs(task.validation)[:4]:
        item = ours.renderer.render(prompt, better)
        with torch.no_grad():
            raw = theirs(input_ids=torch.tensor([item.ids])).logits[0, 0].item()
        assert ours.raw_rewards([item])[0] == pytest.approx(raw, abs=1e-4)


def test_the_last_token_export_reads_the_last_of_several_layers(task: Task, tmp_path: Path) -> None:
    folders = [last_token_export(task, tmp_path / kind, KINDS[kind]) for kind in ("head", "head-layers")]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_A" not in name)


def last_token_export(task: Task, run: Path, settings: dict[str, Any]) -> Path:
    chosen = settings | {"last_token_export": True}
    folder = train_reward_model(tasks.options(task.decoder, run, [task.train], [task.validation], **chosen))
    return folder.with_name("last_token")


def test_the_card_tells_what_the_configuration_says_of_the_data(trained: Trained, task: Task, tmp_path: Path) -> None:
    silent = (trained("head") / "README.md").read_text(encoding="utf-8")
    assert "licen" not in silent
    said = {
        "licence": "Apache-2.0",
        "sources": {"zig": "random words, CC0-1.0"},
        "base": "random weights, no licence needed",
        "notes": ["Nobody would rather have these.", "Honestly."],
    }
    chosen = tasks.options(task.decoder, tmp_path / "run", [task.train], **KINDS["head"], card=said)
    card = (train_reward_model(chosen) / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: apache-2.0\n---\n" in card
    assert "| zig | random words, CC0-1.0 |\n| the base | random weights, no licence needed |\n" in card
    assert "\n\nNobody would rather have these.\n\nHonestly.\n\n## Limits\n" in card
