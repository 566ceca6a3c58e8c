"""Reward against KL of `winnow train ppo` beside the last PPOTrainer that TRL had: `benchmarks/run.py frontier`.

Both start from the same small model, on the same prompts and rule, with the same completions an iteration, epochs, β
and iterations; each side at as many rates, which are its own, and with each of the seeds. Policies on the way and at
the end are measured by one piece of code (`frontier.py`) on held-out prompts with the same draws. Winnow runs as it is
meant to (`lora`, rank 8 and 64) and doing TRL's work (`full`, on the same value model), as in `ppo.py`, whose ratios of
speed and memory mean little where the policy that comes out is worse.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bars, peers
from benchmarks.frontier import Point, frontier, mean, measure, reward_at
from benchmarks.policies import winnow_side
from benchmarks.tables import Table
from reward.bases import quiet_loading
from training.rule_rewards import capitalised_words

VOCABULARY, CAPITALISED_SHARE = 256, 0.25
PROMPT_TOKENS, NEW_TOKENS = 8, 16
BATCH_SIZE, ITERATIONS, EPOCHS, KEEP_EVERY = 64, 30, 4, 10
KL_COEF, SEEDS = 0.02, range(2, 8)
HELD_OUT = 1024
_HERE = Path(__file__).parent
_TRL, _OURS = _HERE / "trl_ppo_script.py", _HERE / "winnow_ppo_script.py"

TRL_RATES = (3e-5, 6e-5, 1.2e-4)
OURS: list[tuple[str, Sequence[float], dict[str, Any]]] = [
    ("winnow, lora", (2e-4, 3.5e-4, 6e-4), {"tuning": "lora", "value_learning_rate": 1e-3}),
    (
        "winnow, lora of rank 64",
        (1e-4, 1.7e-4, 3e-4),
        {"tuning": "lora", "value_learning_rate": 1e-3, "lora": {"rank": 64, "alpha": 64}},
    ),
    ("winnow, full", (3e-5, 6e-5, 1.2e-4), {"tuning": "full"}),
]
"""With rates about those that did best of the ones that were tried, as TRL's: see the results."""
AS_TRL: dict[str, Any] = {
    "final_rate_share": 0.0,
    "adam_betas": (0.9, 0.999),
    "adam_eps": 1e-8,
    "max_grad_norm": 1e9,
}
"""Where our defaults are others. TRL's rates fall to 0 in a line, ours in a cosine; TRL clips no gradients."""
TOLERANCE = 0.02
"""Two standard errors of the difference of two rewards on the held-out prompts."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Policies on the way, one a seed: their means."""

    side: str
    rate: float
    samples: int
    cpu_s: float
    point: Point


def run(iterations: int = ITERATIONS) -> list[Table]:
    """Some thirty minutes of CPU."""
    with tempfile.TemporaryDirectory() as scratch, peers.library(peers.TRL_WITH_PPO, _TRL) as trl:
        if trl is None:
            return []
        home = Path(scratch)
        model, value = start_model(home / "start"), home / "value"
        value_model(model, value)
        question: dict[str, Any] = {
            "model": model,
            "reward_model": str(value),
            "rule": "training.rule_rewards:capitalised_words",
            "prompts": prompts(iterations * BATCH_SIZE, seed=0),
            "batch_size": BATCH_SIZE,
            "iterations": iterations,
            "epochs": EPOCHS,
            "new_tokens": NEW_TOKENS,
            "keep_every": min(KEEP_EVERY, iterations),
        }
        of_policy = measurer(model)
        start = of_policy(model)
        found = _reached(trl, question, TRL_RATES, home / "trl", of_policy)
        for name, rates, more in OURS:
            value_base = str(value) if more["tuning"] == "full" else None
            asked = {**question, "tuning": None, "value_base": value_base, "more": {**AS_TRL, **more}}
            with winnow_side(_OURS) as winnow:
                winnow.name = name
                found += _reached(winnow, asked, rates, home / name, of_policy)
    return tables(trl.name, start, found)


def _reached(
    side: peers.Library,
    question: dict[str, Any],
    rates: Sequence[float],
    folder: Path,
    of_policy: Callable[[str], Point],
) -> list[Reached]:
    found = []
    for rate in rates:
        runs = []
        for seed in SEEDS:
            keep_in = folder / f"{rate:g}-{seed}"
            keep_in.mkdir(parents=True)
            more = {"kl_coef": KL_COEF, "seed": seed, **question.get("more", {})}
            runs.append(side.ask(**{**question, "learning_rate": rate, "more": more, "keep_in": str(keep_in)})["kept"])
        for kept in zip(*runs, strict=True):
            samples = kept[0]["iterations"] * question["batch_size"]
            cpu_s = statistics.fmean(one["cpu_s"] for one in kept)
            found.append(Reached(side.name, rate, samples, cpu_s, mean([of_policy(one["policy"]) for one in kept])))
    return found


def tables(trl: str, start: Point, found: Sequence[Reached]) -> list[Table]:
    """All points, what each of ours comes to at the KL of each point of TRL's frontier, and the other way round.

    A curve that is read between two points is at a loss beside a policy that was trained to that KL: look at both ways.
    """
    sides = list(dict.fromkeys(one.side for one in found))
    hulls = {side: frontier([start, *(one.point for one in found if one.side == side)]) for side in sides}
    rows: list[list[str | float | None]] = [
        [one.side, f"{one.rate:g}", one.samples, one.cpu_s, one.point.reward, one.point.error, one.point.kl]
        for one in found
    ]
    rows.insert(0, ["the start", None, 0, None, start.reward, start.error, start.kl])
    told = f"PPO on capitalised words: {BATCH_SIZE} completions of {NEW_TOKENS} tokens, {EPOCHS} epochs; held out"
    columns = ["trainer", "rate", "samples", "CPU-s", "reward", "±", "exact KL"]
    ours = [side for side in sides if side != trl]
    theirs = hulls[trl][1:]
    compared: list[list[str | float | None]] = [
        [point.kl, point.reward, *(reward_at(hulls[side], point.kl) for side in ours)] for point in theirs
    ]
    frontiers = Table(f"At the KL of {trl}'s frontier", ["exact KL", "TRL's reward", *ours], compared)
    turned: list[list[str | float | None]] = [
        [side, point.kl, point.reward, reward_at(hulls[trl], point.kl)] for side in ours for point in hulls[side][1:]
    ]
    others = Table("The other way round: at the KL of ours", ["frontier of", "exact KL", "its reward", "TRL's"], turned)
    held = [
        bars.Bar(f"{side}: reward less TRL's at equal KL, at worst", -TOLERANCE, min(leads), "", True)
        for side in ours
        if (leads := _leads(hulls[side], hulls[trl]))
    ]
    return [Table(told, columns, rows), frontiers, others, bars.table(held)]


def _leads(ours: Sequence[Point], theirs: Sequence[Point]) -> list[float]:
    """At each point of either, as far as both reached."""
    rewards = [(reward_at(ours, kl), reward_at(theirs, kl)) for kl in (point.kl for point in (*ours[1:], *theirs[1:]))]
    return [our - their for our, their in rewards if our is not None and their is not None]


def measurer(start: str) -> Callable[[str], Point]:
    """Measures the policy in a folder by its KL from the one in `start`, and the rule."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    reference = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).eval()
    held_out = torch.tensor([tokenizer(text)["input_ids"] for text in prompts(HELD_OUT, seed=1)])

    def score(completions: Sequence[Sequence[int]]) -> list[float]:
        return capitalised_words([], tokenizer.batch_decode(completions, skip_special_tokens=True))

    def of_policy(folder: str) -> Point:
        with quiet_loading():
            policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return measure(policy, reference, held_out, NEW_TOKENS, score)

    return of_policy


def prompts(count: int, seed: int) -> list[str]:
    """All of one length."""
    choice = random.Random(seed)
    return [" ".join(choice.choices(words(), k=PROMPT_TOKENS)) for _ in range(count)]


def words() -> list[str]:
    """A token each."""
    return [f"{'W' if place < num_capitalised() else 'w'}{place}" for place in range(VOCABULARY)]


def num_capitalised() -> int:
    return round(VOCABULARY * CAPITALISED_SHARE)


def start_model(folder: Path) -> str:
    """A Llama of a million random weights. At each token some forty words are likely, others than at the next one.

    Its end token lies outside its vocabulary: every completion has all its tokens, on both sides.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ids = {word: place for place, word in enumerate(words())}
    plain = Tokenizer(models.WordLevel(ids, unk_token=words()[-1]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1.6 / config.hidden_size**0.5)
        direction = torch.nn.functional.normalize(torch.randn(config.hidden_size), dim=0)
        model.lm_head.weight[: num_capitalised()] += direction
    with quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def value_model(model: str, folder: Path) -> None:
    """The same model with a head for values, all 0 to begin with. It knows the end token, which winnow tries it on."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with quiet_loading():
        classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        torch.nn.init.zeros_(classifier.score.weight)
        tokenizer = AutoTokenizer.from_pretrained(model)
        classifier.resize_token_embeddings(len(tokenizer))
        classifier.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
