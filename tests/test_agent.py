"An agent in a loop of one's own: the lifetimes of a meta-test, and errors that say what to do."

import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from gla_nb.agent import ENVIRONMENT, GLA, Acting, find_place
from gla_nb.evaluate import meta_test
from gla_nb.projections import TokenLayout
from gla_nb.stages import seed_number
from gla_nb.tasks import Task, make_env
from gla_nb.transformer import GLAConfig

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
SHORT = Task("short", "Pendulum-v1", {"max_episode_steps": 15})  # actions from -2 to 2
LAYOUTS = {
    "plain": TokenLayout(3, 1, False, normalise=16),
    "projected": TokenLayout(64, 16, False, normalise=16, projection="orthonormal"),
    "conditioned": TokenLayout(3, 1, False, eta=("gap", "position")),
}


def new_agent(layout, spread=8.0):
    "Its actions depend on all it has read, strongly enough for small differences to show."
    matching = 1 if layout.projection else 0
    agent = GLA(GLAConfig(layout, layers=2, width=16, heads=2, window=24, matching=matching), 3)
    with torch.no_grad():
        agent.head.weight.mul_(spread)
    return agent.eval()


def start(seed):
    return seed_number("figure", seed, ENVIRONMENT)


def make_short():
    return gym.make(SHORT.id, **SHORT.kwargs)


def own_loop(agent, env, seed, interactions, eta=None):
    "Rewards of a plain loop, as in the README."
    agent.begin(env, seed=seed, eta=eta)
    observation, _ = env.reset(seed=start(seed))
    rewards = []
    for _ in range(interactions):
        action = agent.act(observation)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        agent.observe(reward, terminated, truncated, observation)
        rewards.append(reward)
        if terminated or truncated:
            observation, _ = env.reset()
    return rewards


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_loop_of_ones_own_is_the_lifetime_of_a_meta_test(kind):
    agent = new_agent(LAYOUTS[kind])
    eta = {"gap": 4, "position": 30} if kind == "conditioned" else None
    expected = meta_test(SHORT, agent, [7], 50, eta=eta).reward[0]
    np.testing.assert_allclose(own_loop(agent, make_short(), 7, 50, eta), expected, atol=1e-5)
    assert own_loop(agent, make_short(), 7, 50, eta) == own_loop(agent, make_short(), 7, 50, eta)
    other = own_loop(agent, make_short(), 8, 50, eta)
    assert not np.allclose(other, expected)


def test_discrete_actions_are_whole_numbers():
    agent = new_agent(TokenLayout(9, 4, True), spread=30.0)
    env = gym.make("gla_nb/GridWorld-v0")
    rewards = own_loop(agent, env, 3, 60)
    assert rewards == meta_test("grid", agent, [3], 60).reward[0].tolist()
    assert isinstance(agent.act(env.reset()[0]), int)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_vector_environments_of_both_kinds_give_the_same_lifetimes(kind, mode):
    agent, seeds, length = new_agent(LAYOUTS[kind]), [5, 6, 9], 50
    expected = meta_test(SHORT, agent, seeds, length).reward
    environments = SyncVectorEnv([make_short] * 3, autoreset_mode=mode)
    acting = agent.batch(environments, seeds)
    observation, _ = environments.reset(seed=[start(seed) for seed in seeds])
    rewards, resets, done = [], 0, np.zeros(3, bool)
    while len(rewards) < length:
        actions = acting.act(observation)
        observation, reward, terminated, truncated, infos = environments.step(actions)
        acting.observe(reward, terminated, truncated, observation, infos)
        if mode == AutoresetMode.NEXT_STEP and done.any():
            assert done.all() and not reward.any()  # episodes have one length: all reset together
            resets, done = resets + 1, np.zeros(3, bool)
            continue
        rewards.append(reward)
        done = terminated | truncated
    assert resets == (3 if mode == AutoresetMode.NEXT_STEP else 0)
    same = np.stack(rewards, axis=1)
    np.testing.assert_allclose(same, expected, atol=1e-4)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_environments_that_end_at_different_times(mode):
    "Rows that reset do not disturb the others, nor are they disturbed."
    agent, lengths = new_agent(LAYOUTS["plain"]), (7, 15)
    expected = [
        meta_test(Task("one", "Pendulum-v1", {"max_episode_steps": length}), agent, [seed], 40)
        for seed, length in enumerate(lengths)
    ]
    made = [
        lambda length=length: gym.make("Pendulum-v1", max_episode_steps=length)
        for length in lengths
    ]
    environments = SyncVectorEnv(made, autoreset_mode=mode)
    acting = agent.batch(environments)
    observation, _ = environments.reset(seed=[start(0), start(1)])
    rewards, resetting = [[], []], np.zeros(2, bool)
    while min(map(len, rewards)) < 40:
        actions = acting.act(observation)
        observation, reward, terminated, truncated, infos = environments.step(actions)
        acting.observe(reward, terminated, truncated, observation, infos)
        for row in np.flatnonzero(~resetting):
            rewards[row].append(reward[row])
        done = terminated | truncated
        resetting = done & ~resetting if mode == AutoresetMode.NEXT_STEP else np.zeros(2, bool)
        if mode == AutoresetMode.DISABLED and done.any():
            observation, _ = environments.reset(options={"reset_mask": done})
    for mine, lifetimes in zip(rewards, expected, strict=True):
        np.testing.assert_allclose(mine[:40], lifetimes.reward[0], atol=1e-4)


def test_dictionaries_of_boxes_become_rows():
    class Rooms(gym.Env):
        observation_space = gym.spaces.Dict(
            place=gym.spaces.Box(-1, 1, (2, 1), np.float64),
            room=gym.spaces.Box(0, 9, (3,), np.int64),
        )
        action_space = gym.spaces.Box(np.float32([-3, 0]), np.float32([3, 10]))

    agent = new_agent(LAYOUTS["projected"])
    agent.begin(Rooms(), seed=1)
    action = agent.act({"place": np.ones((2, 1)), "room": np.array([1, 2, 3])})
    assert Rooms.action_space.contains(action)
    agent.observe(1.0, False, True)  # the last observation is not known
    again = agent.act({"place": np.zeros((2, 1)), "room": np.zeros(3, int)})
    assert not np.allclose(action, again)


MISUSES = {
    "observe tells what came of an action: call act first": lambda agent, env: agent.observe(
        0.0, False, False
    ),
    "act was called twice": lambda agent, env: [agent.act(np.zeros(3)) for _ in range(2)],
    r"observation has shape \(1, 4\), but 1 of Box.*need \(1, 3\)": lambda agent, env: agent.act(
        np.zeros(4)
    ),
    "gave observation .*nan.* in stream 0, interaction 0": lambda agent, env: agent.act(
        np.full(3, np.nan)
    ),
    "gave reward inf in stream 0, interaction 0": lambda agent, env: [
        agent.act(np.zeros(3)),
        agent.observe(np.inf, False, False),
    ],
    r"reward has shape \(2,\), for 1 actions": lambda agent, env: [
        agent.act(np.zeros(3)),
        agent.observe(np.zeros(2), False, False),
    ],
    r"seeds=\[-1\]": lambda agent, env: agent.begin(env, seed=-1),
    r"seeds=\[1, 2\]: give 1 whole numbers": lambda agent, env: Acting(agent, env, [1, 2]),
    "environments='Pendulum-v1': give a gymnasium environment": lambda agent, env: agent.begin(
        "Pendulum-v1"
    ),
    "environments=0": lambda agent, env: agent.batch(0),
    "has several environments: use batch": lambda agent, env: agent.begin(
        SyncVectorEnv([make_short] * 2)
    ),
    "the agent was made for TokenLayout.observation=3": lambda agent, env: agent.begin(
        gym.make("MountainCarContinuous-v0")
    ),
    r"eta \['age'\]": lambda agent, env: agent.begin(env, eta={"age": 3}),
}


@pytest.mark.parametrize("message", MISUSES)
def test_misuse_says_what_to_do(message):
    with pytest.raises(ValueError, match=message):
        MISUSES[message](new_agent(LAYOUTS["plain"]).begin(), make_short())


def test_agents_of_projections_want_to_see_the_environment():
    with pytest.raises(ValueError, match=r"begin\(environment\)"):
        new_agent(LAYOUTS["projected"]).act(np.zeros(3))
    with pytest.raises(ValueError, match="projected, continuous actions"):
        new_agent(LAYOUTS["projected"]).begin(gym.make("CartPole-v1"))
    assert find_place(LAYOUTS["projected"], make_env(SHORT)).num_envs == 1


def test_an_agent_that_has_not_begun_acts_as_it_was_trained():
    agent, again = new_agent(LAYOUTS["plain"]), new_agent(LAYOUTS["plain"]).begin(seed=0)
    assert agent.act(np.ones(3)) == again.act(np.ones(3))
    assert agent.begin(seed=1).act(np.ones(3)) != again.begin(seed=0).act(np.ones(3))


def run_offline(folder, code):
    "Python in a folder without the Hub, and with a cache of its own."
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


LOAD = "from gla_nb.agent import GLA; print(GLA.from_pretrained('somebody/agent').about)"


def test_a_name_of_the_hub_while_offline(tmp_path):
    done = run_offline(tmp_path, LOAD)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ValueError: no agent 'somebody/agent': there is no such folder in", last)
    assert "HF_HUB_OFFLINE" in last and "name their folder" in last


def test_an_agent_in_the_cache_of_the_hub(tmp_path):
    "As the Hub's client lays it down: a snapshot of a commit that the branch main points to."
    home = tmp_path / "cache" / "hub" / "models--somebody--agent"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("c0ffee")
    new_agent(LAYOUTS["plain"]).save_pretrained(home / "snapshots" / "c0ffee", {"gap": 4})
    done = run_offline(tmp_path, LOAD)
    assert done.stdout == "{'gap': 4}\n", done.stderr
