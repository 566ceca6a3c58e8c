"""The parts of a PPO run, made from its options: models on their device, learner, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from feedback.jsonl import Skipped, replacing
from training.actors import Actors
from training.distributed import gathered, shard
from training.hydra import Hydra, split
from training.language_mix import LanguageMix, read_mix
from training.moving_average import WeightAverage
from training.options import OptionsError
from training.policies import Policy, load_policy
from training.policy_writer import PolicyWriter
from training.ppo_learner import LanguageLearner
from training.ppo_options import PpoOptions
from training.rollout_server import ServerSampler
from training.rollouts import EncodedPrompt, ModelSampler, Sampler, read_prompts
from training.sequences import TokenSequence
from training.value_models import RewardValues, StateValues, reward_values, state_values, without_dropout

KEPT = "kept.pt"
KEPT_AVERAGE = "kept-average.pt"
VALUE = "value.safetensors"


@dataclass(frozen=True, slots=True)
class PpoParts:
    """Models and what trains them."""

    accelerator: Accelerator
    actors: Actors
    learner: LanguageLearner
    writer: PolicyWriter
    mix: LanguageMix | None

    def keep_policy(self, run: Path, average: WeightAverage | None) -> None:
        """Remembers the policy's weights and their average as they are: the last that were within `max_kl`.

        All processes take part.
        """
        kept = {KEPT: self.writer.weights()}
        if average is not None:
            kept[KEPT_AVERAGE] = average.weights
        if self.accelerator.is_main_process:
            for name, weights in kept.items():
                with replacing(run / "checkpoints" / name) as partial:
                    torch.save(weights, partial)
        self.accelerator.wait_for_everyone()

    def take_kept_policy(self, run: Path, average: WeightAverage | None) -> None:
        """Puts them back, for the policy to be written. All processes take part."""
        if self.actors.is_sharded or self.accelerator.is_main_process:
            self.actors.policy.load_trainable_state(_kept(run, KEPT))
        if average is not None and self.accelerator.is_main_process:
            average.weights.update(_kept(run, KEPT_AVERAGE))

    def save_value(self, run: Path) -> None:
        """Writes the value model's weights, for whoever wants to go on from here. All processes take part."""
        from safetensors.torch import save_file

        state = {name: value.detach() for name, value in self.actors.value.state_dict().items()}
        weights = gathered(state, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            with replacing(run / VALUE) as partial:
                save_file({name: value.cpu().contiguous() for name, value in weights.items()}, partial)


@dataclass(frozen=True, slots=True)
class Prompts:
    """What is asked."""

    train: Sequence[EncodedPrompt]
    held_out: Sequence[EncodedPrompt]
    left_out: int
    """Prompts that are too long, of both."""


def build_parts(accelerator: Accelerator, options: PpoOptions) -> PpoParts:
    """Loads the models. Raises `OptionsError`, `reward.errors.ModelLoadError`."""
    policy, hydra, reference = _policies(options)
    value = _value(policy, options)
    for model in (policy.model, reference.model if reference else None, value):
        if model is not None:
            without_dropout(model)
            # Recomputing activations is done in training mode only; without dropout the modes are one function.
            model.train(options.gradient_checkpointing)
            if options.sharding == "none" or isinstance(model, StateValues):
                model.to(accelerator.device)
    if hydra is not None:
        hydra.reference_top.to(accelerator.device)
    if options.sharding == "fsdp2":
        _shard(accelerator, policy, reference, value)

    def precision() -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], accelerator.autocast())

    actors = Actors(policy, value, options.temperature, accelerator.device, hydra, reference, precision)
    if actors.is_sharded:
        # Shards are put in order by a first pass; without it they could not be put together to write.
        end = [min(policy.stop_ids)]
        actors.freeze([TokenSequence(end, end)])
    mix = _mix(policy, options)
    learner = LanguageLearner(
        accelerator,
        actors,
        policy_rate=options.learning_rate,
        value_rate=options.value_learning_rate,
        betas=options.adam_betas,
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        micro_batch_tokens=options.micro_batch_tokens,
        mix=mix,
    )
    writer = PolicyWriter(accelerator, policy, (lambda: _load_policy(options)) if actors.is_sharded else None)
    return PpoParts(accelerator, actors, learner, writer, mix)


def read_all(policy: Policy, options: PpoOptions, skipped: Skipped) -> Prompts:
    """Training and held-out prompts. Raises `OptionsError`, `feedback.jsonl.DataError`."""

    def read(files: Sequence[str]) -> tuple[list[EncodedPrompt], int]:
        return read_prompts(
            files,
            policy,
            form=options.prompt_format,
            max_tokens=options.max_prompt_tokens,
            skipped=skipped if options.skip_invalid else None,
        )

    train, left_out = read(options.prompts)
    held_out, also_left_out = read(options.eval_prompts) if options.eval_prompts else ([], 0)
    held_out = held_out[: options.num_eval_prompts]
    longest = max(len(prompt.ids) for prompt in (*train, *held_out))
    if longest + options.max_new_tokens > policy.max_length:
        raise OptionsError(
            f"max_new_tokens: prompts of up to {longest} tokens and completions of {options.max_new_tokens} are more "
            f"than the {policy.max_length} that {options.base} was made for; lower it, or max_prompt_tokens"
        )
    return Prompts(train, held_out, left_out + also_left_out)


def build_sampler(parts: PpoParts, options: PpoOptions) -> Sampler:
    """What writes completions. Raises `OptionsError`."""
    if options.rollout_server.url is None:
        return ModelSampler(parts.actors, options.generation_batch_size)
    return ServerSampler(
        options.rollout_server,
        parts.actors.policy,
        options.temperature,
        Path(options.output) / "served",
        parts.writer.write,
        leads=parts.accelerator.is_main_process,
    )


def weight_files(options: PpoOptions) -> list[str]:
    """What the models are loaded from, where those are folders: a run must not go on with others of the same name."""
    folders = [Path(name).expanduser() for name in (options.base, options.reward.model, options.value_base) if name]
    return sorted({str(file) for folder in folders for file in folder.glob("*.safetensors")})


def _kept(run: Path, name: str) -> dict[str, Tensor]:
    return cast("dict[str, Tensor]", torch.load(run / "checkpoints" / name, map_location="cpu", weights_only=True))


def _policies(options: PpoOptions) -> tuple[Policy, Hydra | None, Policy | None]:
    """The policy, and what stands for its reference beside adapters that can be switched off."""
    policy = _load_policy(options)
    if options.tuning == "top_layers":
        return policy, split(policy.model, options.top_layers), None
    if options.tuning == "full":
        frozen = load_policy(options.base, tuning="frozen", trust_remote_code=options.trust_remote_code)
        return policy, None, frozen
    return policy, None, None


def _load_policy(options: PpoOptions) -> Policy:
    """Whole, as it is before training."""
    return load_policy(
        options.base,
        tuning="lora" if options.tuning == "lora" else "full",
        lora=options.lora,
        max_length=options.max_prompt_tokens + options.max_new_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
        trust_remote_code=options.trust_remote_code,
    )


def _shard(
    accelerator: Accelerator, policy: Policy, reference: Policy | None, value: StateValues | RewardValues
) -> None:
    """Every model of a language model's size; the value model on hidden states is two layers."""
    shard(policy.model, accelerator)
    if reference is not None:
        shard(reference.model, accelerator)
    if isinstance(value, RewardValues):
        shard(value, accelerator)


def _value(policy: Policy, options: PpoOptions) -> StateValues | RewardValues:
    if options.value_base is None:
        return state_values(policy.model, options.value_width)
    return reward_values(
        options.value_base,
        policy.tokenizer,
        score_shift=options.score_shift,
        score_scale=options.score_scale,
        trust_remote_code=options.trust_remote_code,
    )


def _mix(policy: Policy, options: PpoOptions) -> LanguageMix | None:
    if not options.ptx:
        return None
    examples = read_mix(
        options.ptx, policy, max_length=options.ptx_max_length, skipped=Skipped() if options.skip_invalid else None
    )
    completions = options.global_batch_size // options.num_minibatches
    return LanguageMix(
        examples,
        coefficient=options.ptx_coef,
        examples_per_step=max(1, round(options.ptx_ratio * completions)),
        micro_batch_tokens=options.micro_batch_tokens,
        seed=options.seed,
    )
