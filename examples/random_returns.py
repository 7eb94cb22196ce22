"""What random actions return in a Gymnasium environment, as a line of JSON: the baseline to learn more than.

python examples/random_returns.py --env HalfCheetah-v5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import gymnasium as gym

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--env", required=True)
parser.add_argument("--episodes", type=int, default=20)
parser.add_argument("--seed", type=int, default=1)


def main() -> None:
    args = parser.parse_args()
    sys.path.append(str(Path.cwd()))  # "module:Name-v0" may be a module there
    env = gym.make(args.env)
    env.action_space.seed(args.seed)
    returns = []
    for i in range(args.episodes):
        env.reset(seed=args.seed + i)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    print(json.dumps({"name": "random", "episodes": len(returns), "return_mean": statistics.fmean(returns)}))


if __name__ == "__main__":
    main()
