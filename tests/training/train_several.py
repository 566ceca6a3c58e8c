"""Trains the reward model of each configuration that is named, one after another: starting processes costs more."""

from __future__ import annotations

import sys
from pathlib import Path

from training.options import RewardOptions, load_options
from training.reward_model import train_reward_model

if __name__ == "__main__":
    for config in sys.argv[1:]:
        train_reward_model(load_options(RewardOptions, Path(config)))
