"""Environments of others: each id of `docs/environments.md` acts, or is refused by a clear error.

Run as a program, it writes that page anew: `.venv/bin/python tests/test_environments.py`.
"""

import functools
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from gla_nb.agent import GLA
from gla_nb.collect import CollectConfig, collect_run
from gla_nb.evaluate import meta_test
from gla_nb.histories import open_history, validate
from gla_nb.projections import TokenLayout
from gla_nb.stages import whole
from gla_nb.tasks import find_task, make_env
from gla_nb.transformer import GLAConfig

HOME = Path(__file__).parents[1]
PAGE = HOME / "docs" / "environments.md"
SUITES = {
    "Gymnasium, classic control": """CartPole-v1 MountainCar-v0 MountainCarContinuous-v0
        Pendulum-v1 Acrobot-v1""",
    "Gymnasium, toy text": "FrozenLake-v1 FrozenLake8x8-v1 CliffWalking-v1 Taxi-v4 Blackjack-v1",
    "Gymnasium, Box2D": "LunarLander-v3 LunarLanderContinuous-v3 BipedalWalker-v3",
    "Gymnasium, MuJoCo": """Ant-v4 Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5
        InvertedDoublePendulum-v5 InvertedPendulum-v5 Pusher-v5 Reacher-v5 Swimmer-v5
        Walker2d-v5""",
    "DeepMind Control": """acrobot-swingup ball_in_cup-catch cartpole-balance cartpole-swingup
        cartpole-three_poles cheetah-run dog-walk finger-spin fish-swim hopper-hop humanoid-walk
        lqr-lqr_2_1 manipulator-bring_ball pendulum-swingup point_mass-easy quadruped-walk
        reacher-easy stacker-stack_2 swimmer-swimmer6 walker-walk""",
}
NAMES = [name for names in SUITES.values() for name in names.split()]
INTRODUCTION = """\
# Environments

What happens to environments of others, as `tests/test_environments.py` finds it: that test runs
each of them and compares with this page, and `.venv/bin/python tests/test_environments.py` writes
the page anew.

*Acts*: an agent with an empty context acted for a few interactions, and PPO wrote a history of one
update. For Box actions that is the shipped agent `ant_projected`, which reads random projections
and takes part in any task of up to 64 observations and 16 action dimensions; for Discrete actions
it is a fresh agent that was made for these sizes. That an agent acts does not say that it learns.
*Refused* gives the error. An agent that you train on a task itself, without projections, may have
more than 64 observations. DeepMind Control tasks are found by the name here and as
`dm_control/NAME-v0`.
"""


@functools.cache
def projected() -> GLA:
    "The shipped agent for any Box task that is not too large."
    return GLA.from_pretrained(HOME / "outputs" / "agents" / "ant_projected")


def size(space) -> str:
    "A space in a few words."
    if isinstance(space, gym.spaces.Discrete):
        return f"Discrete {space.n}"
    if isinstance(space, gym.spaces.Dict) and all(hasattr(s, "low") for s in space.values()):
        return f"Dict of Box, {gym.spaces.flatdim(space)} numbers"
    return f"Box {space.shape}" if hasattr(space, "low") else type(space).__name__


def spaces_of(name: str) -> tuple[str, str]:
    "The spaces of an environment as gymnasium makes it."
    env = gym.make(find_task(name).id, disable_env_checker=True)
    env.close()
    return size(env.observation_space), size(env.action_space)


def agent_for(env) -> GLA:
    "The shipped agent for Box actions; a fresh one of the right layout for Discrete ones."
    if not isinstance(env.action_space, gym.spaces.Discrete):
        return projected()
    layout = TokenLayout(env.observation_space.shape[0], int(env.action_space.n), True)
    return GLA(GLAConfig(layout, layers=1, width=16, heads=2, window=16)).eval()


def what_happens(name: str) -> str:
    "`acts`, or `refused` with the error, after a few interactions and one update of PPO."
    try:
        env = make_env(name)
        env.close()
        lifetimes = meta_test(name, agent_for(env), [0], 6)
    except ValueError as error:
        return f"refused: {error}"
    assert lifetimes.reward.shape == (1, 6) and np.isfinite(lifetimes.reward).all()
    sizes = {"streams": 1, "steps_per_update": 8, "batch_size": 8, "width": 8, "epochs": 1}
    with tempfile.TemporaryDirectory() as folder:
        collect_run(CollectConfig(task=name, runs=1, updates=1, **sizes), 0, folder)
        assert validate(folder) == []
        assert open_history(folder).observation.shape[2:] == env.observation_space.shape
    return "acts"


def table_row(name: str) -> str:
    "The line of the page for one environment."
    return f"| `{name}` | {' | '.join(spaces_of(name))} | {what_happens(name)} |"


def page() -> str:
    "The whole page."
    parts = [INTRODUCTION]
    for suite, names in SUITES.items():
        parts.append(
            f"\n## {suite}\n\n| id | observation | action | what happens |\n|---|---|---|---|\n"
        )
        parts += [f"{table_row(name)}\n" for name in names.split()]
    return "".join(parts)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMES)
def test_an_environment_does_what_the_page_says(name):
    row = table_row(name)
    assert row in PAGE.read_text().splitlines(), f"now it is\n{row}\nwrite the page anew"


def test_the_page_has_these_environments_and_no_other():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == NAMES and len(NAMES) >= 25
    assert PAGE.read_text().startswith(INTRODUCTION)
    refused = [row.split("`")[1] for row in rows if "refused: " in row]
    assert {"Blackjack-v1", "Humanoid-v5", "humanoid-walk", "dog-walk"} <= set(refused)
    assert len(refused) < len(NAMES) / 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    with whole(PAGE) as temporary:
        temporary.write_text(page())
    print(f"wrote {PAGE}")
