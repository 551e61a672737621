"""Meta-testing and its statistics, against replays, brute force and numbers worked out by hand."""

import copy
import itertools
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

from gla_nb.agent import ACTION, ENVIRONMENT, GLA, NOISE, SHUFFLE
from gla_nb.evaluate import (
    CLAIMS,
    CONTEXT_FREE,
    Claim,
    LifetimeError,
    Lifetimes,
    MetaTest,
    bin_curve,
    bins_table,
    bootstrap_interval,
    change,
    claim_rows,
    claims_table,
    curve,
    differences,
    episodes_table,
    final_return,
    first_episode,
    gain,
    has_box_actions,
    holm,
    interactions_to,
    level,
    load_lifetimes,
    matched_scale,
    meta_test,
    meta_test_folder,
    paired_test,
    plot_bins,
    plot_returns,
    ppo_lifetimes,
    read_table,
    returns_at,
    run_meta_test,
    run_meta_tests,
    runs_right,
    save_lifetimes,
    saved_meta_test,
    summary,
    update_claims,
    write_figure,
    write_table,
    yoke_to,
)
from gla_nb.histories import HistoryWriter, episode_returns, export_histories
from gla_nb.projections import TokenLayout
from gla_nb.stages import plain, seed_number, seed_sequence, stage_folder
from gla_nb.transformer import GLAConfig

LENGTHS = (2, 9)  # of an episode of the environment below, drawn anew at each reset


class Restless(gym.Env):
    "Random observations, rewards and episode lengths; `broken` says what happens in step 6."

    def __init__(self, box=False, broken=""):
        self.broken, self.age = broken, 0
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = (
            gym.spaces.Box(-0.5, 0.5, (2,), np.float32) if box else gym.spaces.Discrete(4)
        )

    def see(self):
        return self.np_random.normal(size=3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(*LENGTHS)
        return self.see(), {}

    def step(self, action):
        self.left -= 1
        self.age += 1
        observation, reward = self.see(), self.np_random.normal() + float(np.sum(action))
        broken = self.broken if self.age == 6 else ""
        observation[0] = np.nan if broken == "observation" else observation[0]
        observation = observation[:2] if broken == "shape" else observation
        reward = {"reward": np.nan, "infinite": -np.inf}.get(broken, reward)
        if broken == "error":
            raise KeyError("joint 3")
        forward = {"reward_forward": float(reward) / 2}
        return observation, reward, self.left == 0, self.left == 0 and self.age % 2 == 0, forward


for name, kwargs in {
    "Restless": {},
    "RestlessBox": {"box": True},
    "BrokenObservation": {"broken": "observation"},
    "BrokenReward": {"broken": "reward"},
    "BrokenInfinite": {"broken": "infinite"},
    "BrokenShape": {"broken": "shape"},
    "BrokenError": {"broken": "error"},
}.items():
    gym.register(f"gla_nb_tests/{name}-v0", entry_point=Restless, kwargs=kwargs)

DISCRETE, BOX = TokenLayout(3, 4, True), TokenLayout(3, 2, False)
TASKS = {DISCRETE: "gla_nb_tests/Restless-v0", BOX: "gla_nb_tests/RestlessBox-v0"}
layouts = pytest.mark.parametrize("layout", [DISCRETE, BOX], ids=["discrete", "box"])


class Sum:
    "The memory of `Adder`: the sum of all tokens of each lifetime."

    def __init__(self, lifetimes, width):
        self.total, self.emptied = torch.zeros(lifetimes, width), []

    def empty(self, rows):
        self.emptied.append(rows.clone())
        self.total[rows] = 0


class Adder:
    "A deterministic agent that acts by the sum of its tokens, and keeps all that it was given."

    def __init__(self, layout):
        self.layout = layout
        outputs = layout.action if layout.discrete else 2 * layout.action
        self.weight = np.random.default_rng(0).normal(size=(layout.width, outputs)) / 4

    def new_cache(self, lifetimes):
        self.tokens, self.cache = [], Sum(lifetimes, self.layout.width)
        return self.cache

    def step(self, tokens, cache, active=None):
        active = torch.ones(len(tokens), dtype=torch.bool) if active is None else active
        self.tokens.append((tokens.clone(), active.clone()))
        cache.total[active] += tokens[active]
        return self.outputs(cache.total.numpy())

    def outputs(self, total):
        # Row by row, so that no result depends on how many rows there are.
        return torch.tensor(np.stack([row.astype(float) @ self.weight for row in total])).float()

    def read_by(self, lifetime):
        "(tokens, width): what this lifetime has read, in order."
        return np.stack([t[lifetime].numpy() for t, active in self.tokens if active[lifetime]])


def choose(layout, outputs, noise):
    "The action that `noise` picks, written without the library."
    if layout.discrete:
        probability = np.exp(outputs - outputs.max())
        edges = np.cumsum(probability / probability.sum())
        return np.int64(min((edges <= noise).sum(), layout.action - 1))
    mean, log_std = np.split(outputs, 2)
    return np.clip(mean + np.exp(log_std) * noise, -1, 1).astype(np.float32)


def replay(layout, seed, interactions, show, forget=False):
    "One lifetime of `Adder`, step by step in plain Python: its tokens and its true rewards."
    agent, env = Adder(layout), gym.make(TASKS[layout]).unwrapped
    generator = np.random.default_rng(seed_sequence("figure", seed, ACTION))
    encode = (lambda a: np.eye(4)[a]) if layout.discrete else (lambda a: a)
    observation, _ = env.reset(seed=seed_number("figure", seed, ENVIRONMENT))
    previous, total, tokens = np.zeros(layout.width - 3), np.zeros(layout.width), []
    rewards, ends = [], []

    def read(observation, previous):
        tokens.append(np.concatenate([observation, previous]).astype(np.float32))
        return total + tokens[-1]

    for step in range(interactions):
        total = read(observation, previous)
        outputs = agent.outputs(total[None].astype(np.float32))[0].numpy()
        draw = generator.random if layout.discrete else generator.standard_normal
        action = choose(layout, outputs, draw(None if layout.discrete else 2, dtype=np.float32))
        stretched = action if layout.discrete else action / 2  # the bounds of the task are +-0.5
        following, reward, terminated, truncated, _ = env.step(stretched)
        rewards.append(np.float32(reward))
        shown = show(step, rewards)
        previous = np.concatenate(
            [observation, encode(action), [shown, float(terminated), float(truncated)]]
        )
        ends.append(terminated or truncated)
        if ends[-1]:
            total = np.zeros(layout.width) if forget else read(following, previous)
            following, previous = env.reset()[0], np.zeros(layout.width - 3)
        observation = following
    return np.stack(tokens), np.array(rewards), np.array(ends)


@layouts
def test_agent_reads_exactly_the_tokens_of_a_replay(layout):
    agent, seeds, steps = Adder(layout), [3, 4, 5], 60
    lifetimes = meta_test(TASKS[layout], agent, seeds, steps)
    for row, seed in enumerate(seeds):
        tokens, rewards, ends = replay(layout, seed, steps, lambda step, rewards: rewards[step])
        assert len(tokens) == steps + ends.sum()  # one more for each end of an episode
        np.testing.assert_allclose(agent.read_by(row), tokens, atol=1e-5)
        np.testing.assert_allclose(lifetimes.reward[row], rewards, atol=1e-5)
        np.testing.assert_array_equal(lifetimes.done[row], ends)
    # The test means something only when episodes end at different times.
    assert 0 < (lifetimes.done.sum(0) % 3 > 0).sum()
    assert lifetimes.terminated.sum() > lifetimes.truncated.sum() > 0


def test_box_actions_are_executed_and_recorded_as_clipped():
    agent = Adder(BOX)
    lifetimes = meta_test(TASKS[BOX], agent, [0, 1], 40)
    actions = agent.read_by(0)[:, 6:8]
    assert np.abs(actions).max() == 1 and (np.abs(actions) == 1).mean() > 0.1
    first = agent.tokens[1][0][:, 6:8].numpy()  # an episode has at least two steps
    np.testing.assert_allclose(lifetimes.action_rms[:, 0], np.sqrt((first**2).mean(1)), rtol=1e-6)
    np.testing.assert_allclose(lifetimes.forward_reward, lifetimes.reward / 2, rtol=1e-6)


def true_rewards_of(layout, seeds, steps, show):
    return np.stack([replay(layout, s, steps, show[i])[1] for i, s in enumerate(seeds)])


def test_controls_change_only_the_reward_that_is_shown():
    seeds, steps, agent = [7, 8, 9], 50, Adder(DISCRETE)
    true = meta_test(TASKS[DISCRETE], agent, seeds, steps)
    yoke = yoke_to(true)
    np.testing.assert_array_equal(yoke, true.reward[[2, 0, 1]])
    draws = [
        np.random.default_rng(seed_sequence("figure", s, SHUFFLE)).random(steps, dtype=np.float32)
        for s in seeds
    ]

    def shuffled(row):
        return lambda step, rewards: rewards[int(draws[row][step] * step)] if step else 0.0

    expected = {
        "hidden": lambda row: lambda step, rewards: 0.0,
        "yoked": lambda row: lambda step, rewards: yoke[row, step],
        "shuffled": shuffled,
    }
    for feedback, show in expected.items():
        given = {"yoke": yoke} if feedback == "yoked" else {}
        lifetimes = meta_test(TASKS[DISCRETE], agent, seeds, steps, feedback=feedback, **given)
        assert lifetimes.agent == feedback
        for row, seed in enumerate(seeds):
            tokens, rewards, _ = replay(DISCRETE, seed, steps, show(row))
            np.testing.assert_allclose(agent.read_by(row), tokens, atol=1e-5)
            np.testing.assert_allclose(lifetimes.reward[row], rewards, atol=1e-5)
        assert (lifetimes.reward != 0).all()


@layouts
def test_episode_memory_is_emptied_exactly_at_resets(layout):
    agent, seeds, steps = Adder(layout), [3, 4, 5], 60
    lifetimes = meta_test(TASKS[layout], agent, seeds, steps, memory="episode")
    assert lifetimes.agent == "episode_memory"
    np.testing.assert_array_equal(
        torch.stack(agent.cache.emptied), lifetimes.done.T[lifetimes.done.any(0)]
    )
    for row, seed in enumerate(seeds):
        show = lambda step, rewards: rewards[step]  # noqa: E731
        tokens, rewards, _ = replay(layout, seed, steps, show, forget=True)
        np.testing.assert_allclose(agent.read_by(row), tokens, atol=1e-5)
        np.testing.assert_allclose(lifetimes.reward[row], rewards, atol=1e-5)


@layouts
def test_a_lifetime_depends_on_its_seed_alone(layout):
    task = TASKS[layout]
    eight = meta_test(task, Adder(layout), range(8), 300)
    for again in (meta_test(task, Adder(layout), range(8), 300),):
        np.testing.assert_array_equal(again.reward, eight.reward)
    four = meta_test(task, Adder(layout), range(4, 8), 300)  # 300 > one block of noise
    np.testing.assert_array_equal(four.reward, eight.reward[4:])
    np.testing.assert_array_equal(four.done, eight.done[4:])
    assert len(np.unique(eight.reward[:, 0])) == 8


def test_random_agent_is_uniform_in_both_spaces():
    lifetimes = meta_test(TASKS[BOX], "random", range(4), 500)
    assert lifetimes.agent == "random" and lifetimes.gap == ""
    # Two uniform actions in [-1, 1]: the mean square is 1/3.
    assert np.mean(lifetimes.action_rms**2) == pytest.approx(1 / 3, rel=0.05)
    grid = meta_test("grid", "random", range(64), 400)
    assert grid.reward.sum(1).mean() / 20 == pytest.approx(1.0, abs=0.5)
    with pytest.raises(ValueError, match="unknown agent 'ppo'"):
        meta_test("grid", "ppo", [0], 10)


def noise_replay(seed, steps, strength):
    "True rewards and actions of noise with `strength` (T,), in plain Python."
    env = gym.make(TASKS[BOX]).unwrapped
    generator = np.random.default_rng(seed_sequence("figure", seed, NOISE))
    env.reset(seed=seed_number("figure", seed, ENVIRONMENT))
    rewards, actions = [], []
    for step in range(steps):
        z = generator.standard_normal(2, dtype=np.float32)
        action = strength[step] * z / np.sqrt((z[0] ** 2 + z[1] ** 2) / 2)
        actions.append(np.clip(action, -1, 1))
        _, reward, terminated, truncated, _ = env.step(actions[-1] / 2)
        rewards.append(reward)
        if terminated or truncated:
            env.reset()
    return np.array(rewards), np.array(actions)


def test_zero_is_zero_in_each_step_and_has_the_environment_of_its_seed():
    lifetimes = meta_test(TASKS[BOX], "zero", [3, 4], 60)
    assert (lifetimes.agent, lifetimes.gap) == ("zero", "")
    assert not lifetimes.action_rms.any() and lifetimes.action_rms.shape == (2, 60)
    for row, seed in enumerate([3, 4]):
        expected, _ = noise_replay(seed, 60, np.zeros(60))
        np.testing.assert_allclose(lifetimes.reward[row], expected, atol=1e-6)


def test_matched_noise_has_the_strength_asked_for_at_every_step_of_every_lifetime():
    seeds, steps = [3, 5, 9], 300  # more than one block of noise
    wanted = np.random.default_rng(0).uniform(0, 0.7, (3, steps + 10)).astype(np.float32)
    wanted[1, 7] = 0.0
    # With two actions at most sqrt(2) * 0.7 < 1: nothing is clipped.
    noise = meta_test(TASKS[BOX], "magnitude_matched", seeds, steps, action_rms=wanted)
    assert (noise.agent, noise.gap) == ("magnitude_matched", "")
    np.testing.assert_allclose(noise.action_rms, wanted[:, :steps], rtol=1e-5)
    assert len(np.unique(noise.reward[:, 0])) == 3
    for row, seed in enumerate(seeds):
        expected, actions = noise_replay(seed, steps, wanted[row])
        np.testing.assert_allclose(noise.reward[row], expected, atol=1e-5)
        directions = np.arctan2(*actions[wanted[row, :steps] > 0].T)
        assert len(np.unique(directions)) > 290  # new noise in each step
    one = meta_test(TASKS[BOX], "magnitude_matched", [9], steps, action_rms=wanted[2:])
    np.testing.assert_array_equal(one.reward[0], noise.reward[2])


def test_matched_noise_is_paired_with_the_agent_and_as_strong_where_it_is_clipped():
    seeds = [0, 1]
    agent = meta_test(TASKS[BOX], Adder(BOX), seeds, 80)
    noise = meta_test(TASKS[BOX], "magnitude_matched", seeds, 80, action_rms=agent.action_rms)
    np.testing.assert_array_equal(noise.seeds, agent.seeds)
    np.testing.assert_array_equal(noise.done, agent.done)  # the same draws of the environment
    assert agent.action_rms.max() > np.sqrt(0.5)  # more than one component at the bound can have
    np.testing.assert_allclose(noise.action_rms, agent.action_rms, rtol=1e-4)


def test_the_strength_of_clipped_noise_is_exact_in_any_number_of_dimensions():
    rng = np.random.default_rng(0)
    for dimensions in (1, 2, 8):
        noise, rms = rng.standard_normal((500, dimensions)), rng.uniform(0, 1, 500)
        rms[:2] = 0, 1
        actions = np.clip(noise * matched_scale(noise, rms)[:, None], -1, 1)
        np.testing.assert_allclose(np.sqrt((actions**2).mean(1)), rms, rtol=1e-5)


@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        ("zero", {"task": TASKS[DISCRETE]}, r"'zero' needs Box actions.*Discrete\(4\)"),
        (
            "magnitude_matched",
            {"task": TASKS[DISCRETE], "action_rms": np.ones((2, 10))},
            r"'magnitude_matched' needs Box actions.*Discrete\(4\)",
        ),
        ("magnitude_matched", {}, "'magnitude_matched' and action_rms missing"),
        ("zero", {"action_rms": np.ones((2, 10))}, "'zero' and action_rms given"),
        ("magnitude_matched", {"action_rms": np.ones((2, 9))}, r"shape \(2, 9\)"),
        ("magnitude_matched", {"action_rms": np.ones((3, 10))}, r"shape \(3, 10\)"),
        ("magnitude_matched", {"action_rms": np.ones(10)}, r"shape \(10,\)"),
        ("magnitude_matched", {"action_rms": np.full((2, 10), np.nan)}, "finite"),
        ("magnitude_matched", {"action_rms": -np.ones((2, 10))}, "from 0"),
        ("noise", {}, "unknown agent 'noise'.*random, zero, magnitude_matched"),
    ],
)
def test_baselines_that_cannot_run_are_named(agent, arguments, message):
    base = {"task": TASKS[BOX], "seeds": [0, 1], "interactions": 10}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        meta_test(agent=agent, **(base | arguments))


def test_an_agent_refuses_a_strength_for_its_actions():
    with pytest.raises(ValueError, match="'Adder' and action_rms given"):
        meta_test(TASKS[BOX], Adder(BOX), [0], 10, action_rms=np.ones((1, 10)))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    "The folder of an agent for the box environment, with an eta, that claims gap 8."
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path / "outputs"))
    layout = TokenLayout(3, 2, False, eta=("gap", "position"))
    agent = GLA(GLAConfig(layout=layout, layers=1, width=16, heads=2, window=16))
    agent.save_pretrained(tmp_path / "agent", about={"gap": 8})
    return str(tmp_path / "agent")


def test_a_matched_curve_has_the_actions_gap_and_seeds_of_its_agent(trained):
    config = MetaTest(TASKS[BOX], trained, lifetimes=3, interactions=40, seed=2)
    noise = run_meta_test(replace(config, matched=True))
    agent = run_meta_test(config)
    assert (noise.agent, noise.gap, agent.gap) == ("magnitude_matched", 8, 8)
    assert noise.seeds.tolist() == agent.seeds.tolist() == [6, 7, 8]
    again = meta_test(TASKS[BOX], "magnitude_matched", [6, 7, 8], 40, action_rms=agent.action_rms)
    np.testing.assert_array_equal(noise.reward, again.reward)
    # Made from the curve that is kept, and kept itself, under a name that knows the weights.
    folders = {meta_test_folder(c) for c in (config, replace(config, matched=True))}
    assert len(folders) == 2 and all((f / "lifetimes.npz").exists() for f in folders)
    kept = load_lifetimes(meta_test_folder(replace(config, matched=True)) / "lifetimes.npz")
    np.testing.assert_array_equal(kept.action_rms, noise.action_rms)
    np.testing.assert_array_equal(kept.forward_reward, noise.forward_reward)
    GLA(GLAConfig(layout=BOX, layers=1, width=16, heads=2, window=16)).save_pretrained(trained)
    assert meta_test_folder(replace(config, matched=True)) not in folders


def test_fresh_weights_are_one_network_in_all_parts_of_a_curve(trained, monkeypatch):
    monkeypatch.setattr("gla_nb.evaluate.AT_ONCE", 2)
    config = MetaTest(TASKS[BOX], trained, lifetimes=4, interactions=20, untrained=True)
    (parts,) = run_meta_tests([config], jobs=1)
    np.testing.assert_allclose(parts.reward, run_meta_test(config).reward, atol=1e-5)


def test_a_matched_curve_keeps_the_switches_of_its_agent_and_a_name_of_its_own(trained):
    config = MetaTest(TASKS[BOX], trained, lifetimes=2, interactions=40, untrained=True)
    noise = run_meta_test(replace(config, matched=True))
    untrained = run_meta_test(config)
    assert (untrained.agent, noise.agent) == ("untrained", "magnitude_matched")
    again = meta_test(TASKS[BOX], "magnitude_matched", [0, 1], 40, action_rms=untrained.action_rms)
    np.testing.assert_array_equal(noise.reward, again.reward)
    named = replace(config, matched=True, name="trembling")
    assert (run_meta_test(named).agent, run_meta_test(named).gap) == ("trembling", 8)
    assert meta_test_folder(named) == meta_test_folder(replace(named, name=""))  # made once


def test_conditioning_of_a_curve_reaches_the_agent(trained):
    config = MetaTest(TASKS[BOX], trained, lifetimes=2, interactions=30)
    conditioned = replace(config, eta=(("position", 20), ("gap", 8)))
    assert meta_test_folder(conditioned) != meta_test_folder(config)
    expected = meta_test(
        TASKS[BOX], GLA.from_pretrained(trained), [0, 1], 30, eta={"gap": 8, "position": 20}
    )
    found = run_meta_test(conditioned)
    np.testing.assert_allclose(found.reward, expected.reward, atol=1e-5)
    assert not np.allclose(found.reward, run_meta_test(config).reward, atol=1e-5)
    assert (
        MetaTest(**plain(conditioned))
        == conditioned
        == replace(config, eta={"gap": 8, "position": 20})
    )
    with pytest.raises(ValueError, match="'age'.*not among"):
        run_meta_test(replace(config, eta=(("age", 1),)))


def test_curves_of_words_need_no_agent(trained, monkeypatch):
    config = MetaTest(TASKS[BOX], "zero", lifetimes=2, interactions=20)
    zero, random = run_meta_tests([config, replace(config, agent="random")], jobs=1)
    assert (zero.agent, random.agent) == ("zero", "random") and not zero.action_rms.any()
    for wrong, message in (
        ({"agent": "magnitude_matched"}, "matched=True"),
        ({"matched": True, "feedback": "yoked"}, "feedback='yoked'"),
        ({"eta": 3}, "eta=3"),
        ({"eta": ("gap", 4)}, r"eta=\('gap', 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **wrong)
    assert has_box_actions(TASKS[BOX]) and not has_box_actions(TASKS[DISCRETE])
    assert set(CONTEXT_FREE) == {"random", "zero", "magnitude_matched"}


def test_a_curve_of_many_lifetimes_is_made_in_parts_that_are_shared(trained, monkeypatch):
    monkeypatch.setattr("gla_nb.evaluate.AT_ONCE", 2)
    config = MetaTest(TASKS[BOX], "random", lifetimes=4, interactions=20, seed=1)
    (curve,) = run_meta_tests([config], jobs=1)
    expected = meta_test(TASKS[BOX], "random", [4, 5, 6, 7], 20)
    for name in ("seeds", "reward", "terminated", "truncated", "action_rms"):
        np.testing.assert_array_equal(getattr(curve, name), getattr(expected, name))
    assert (meta_test_folder(replace(config, lifetimes=2, seed=2)) / "lifetimes.npz").exists()
    assert not (meta_test_folder(config) / "lifetimes.npz").exists()


def test_the_transformer_acts_by_the_same_distributions_as_on_the_whole_sequence():
    agent = GLA(GLAConfig(layout=DISCRETE, layers=2, width=32, heads=2, window=16)).eval()
    read, step = [], agent.step

    def recorded(tokens, cache, active=None):
        outputs = step(tokens, cache, active)
        read.append((tokens, torch.ones(3, dtype=bool) if active is None else active, outputs))
        return outputs

    agent.step = recorded
    agent.about = {"gap": 8}
    assert meta_test(TASKS[DISCRETE], agent, range(3), 80).gap == 8
    for row in range(3):
        tokens = torch.stack([t[row] for t, active, _ in read if active[row]])
        cached = torch.stack([o[row] for _, active, o in read if active[row]])
        with torch.inference_mode():
            whole = agent(tokens[None])[0]
        torch.testing.assert_close(cached, whole, atol=1e-5, rtol=0)


BROKEN = {  # how an environment breaks in its sixth step, and what is said of it
    "Observation": "gave observation .*nan.* in stream 0",
    "Reward": "gave reward nan in stream 0",
    "Infinite": "gave reward -inf in stream 0",
    "Shape": r"an observation of shape \(2,\), but its space says \(3,\)",
    "Error": "raised KeyError: 'joint 3', in step",
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_environment_that_breaks_costs_nothing_that_was_complete(what):
    task = f"gla_nb_tests/Broken{what}-v0"
    said = f"(?s)'{task}' stopped at interaction 6 of 20: .*{BROKEN[what]}.*repair"
    with pytest.raises(LifetimeError, match=said) as caught:
        meta_test(task, "random", [0, 1], 20)
    kept, whole = caught.value.lifetimes, meta_test("gla_nb_tests/Restless-v0", "random", [0, 1], 5)
    assert kept.task == task and kept.interactions == 5
    for name in ("reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(whole, name))
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError if what == "Error" else ValueError)
    again = copy.deepcopy(caught.value)  # taken apart and made again, as to leave a worker process
    assert str(again) == str(caught.value) and again.lifetimes.interactions == 5


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_was_complete_is_kept_in_a_file_that_is_no_result(tmp_path, monkeypatch, jobs):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    config = MetaTest("gla_nb_tests/BrokenReward-v0", "random", lifetimes=2, interactions=20)
    both = [config, replace(config, seed=1)]  # two, so that they go to other processes
    for _ in range(2):  # a second try finds no result either
        with pytest.raises(LifetimeError, match=r"until_the_error\.npz") as caught:
            run_meta_tests(both, jobs)
    folder = caught.value.file.parent
    kept = load_lifetimes(folder / "until_the_error.npz")
    np.testing.assert_array_equal(kept.reward, caught.value.lifetimes.reward)
    assert kept.interactions == 5 and not (folder / "lifetimes.npz").exists()
    assert not list(folder.glob(".until*"))


def test_nan_from_an_agent_is_named_and_leaves_no_interaction():
    agent = Adder(DISCRETE)
    agent.weight[:] = np.nan
    with pytest.raises(LifetimeError, match="stopped at interaction 1 of 5: .*not fin") as caught:
        meta_test(TASKS[DISCRETE], agent, [0], 5)
    assert caught.value.lifetimes.interactions == len(episodes_table(caught.value.lifetimes)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feedback": "none"}, "unknown feedback 'none'"),
        ({"memory": "forever"}, "unknown memory 'forever'"),
        ({"feedback": "yoked"}, "yoke missing"),
        ({"yoke": np.zeros((2, 20))}, "yoke given"),
        ({"feedback": "yoked", "yoke": np.zeros((2, 5))}, r"\(2, 5\)"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"seeds": []}, "whole numbers"),
        ({"seeds": [0.5, 1]}, "whole numbers"),
        ({"seeds": [-1, 1]}, "whole numbers"),
        ({"interactions": 0}, "interactions=0"),
        ({"interactions": 2.5}, "interactions=2.5"),
        ({"task": "gridd"}, "gridd"),
        ({"task": "grid"}, "observation=9"),
        ({"task": TASKS[BOX]}, "discrete=False"),
        ({"eta": {"gap": 4}}, "eta .'gap'"),
    ],
)
def test_what_cannot_run_is_named_before_the_first_step(arguments, message):
    agent = Adder(DISCRETE)
    base = {"agent": agent, "task": TASKS[DISCRETE], "seeds": [0, 1], "interactions": 10}
    with pytest.raises(ValueError, match=message):
        meta_test(**(base | arguments))
    assert not hasattr(agent, "tokens")


def test_conditioning_enters_each_token():
    layout = TokenLayout(3, 4, True, eta=("gap", "return", "position"))
    agent = Adder(layout)
    meta_test(TASKS[DISCRETE], agent, [0], 40, eta={"gap": 7, "position": 20})
    acting = np.stack([t[0, -3:].numpy() for t, active in agent.tokens if active.all()])
    assert acting[:, 0] == pytest.approx(np.log(8)) and not acting[:, 1].any()
    assert acting[0, 2] == 0 and acting[-1, 2] == 1


def lifetimes_of(reward, ends, agent="gla", gap=4, seeds=None, **more):
    "Lifetimes on `grid` whose episodes end by truncation at `ends` (L, T)."
    ends = np.asarray(ends, bool)
    seeds = range(len(ends)) if seeds is None else seeds
    return Lifetimes("grid", agent, gap, list(seeds), reward, np.zeros_like(ends), ends, **more)


def by_hand():
    "Two lifetimes of 64 interactions: eight episodes of 8 steps, returns in the rows below."
    returns = np.array([[0, 2, 4, 6, 6, 6, 8, 8], [0, 0, 0, 0, 2, 0, 0, 8.0]])
    reward = np.repeat(returns / 8, 8, axis=1)
    return lifetimes_of(reward, np.tile(np.arange(8) == 7, (2, 8)), seeds=[5, 3]), returns


def test_tables_and_effects_by_hand():
    lifetimes, returns = by_hand()
    episodes, bins = episodes_table(lifetimes), bins_table(lifetimes)
    assert episodes["return"].tolist() == [*returns[0], *returns[1]]
    assert episodes["interactions"].tolist() == [8, 16, 24, 32, 40, 48, 56, 64] * 2
    assert episodes["episode"].tolist() == [*range(8)] * 2
    assert episodes["seed"].tolist() == [5] * 8 + [3] * 8
    assert set(episodes["length"]) == {8} and set(episodes["gap"]) == {"4"}
    # Bins are two steps wide: four to an episode; the end falls into each fourth.
    assert bins["reward"].tolist() == [*np.repeat(returns[0] / 8, 4), *np.repeat(returns[1] / 8, 4)]
    assert bins["truncations"].tolist() == [0, 0, 0, 1] * 16
    assert bins["interactions"].tolist() == [*range(2, 65, 2)] * 2
    # Quarters hold two episodes: (8 + 8 - 0 - 2) / 16 and (0 + 8 - 0 - 0) / 16.
    assert gain(bins).tolist() == [14 / 16, 8 / 16]
    assert first_episode(episodes).tolist() == [0, 0]
    assert final_return(episodes).tolist() == [8, 4]
    # Trailing means of five: 3.6, 4.8, 6, 6.4 and .4, .4, .4, 2.
    fast = interactions_to(episodes, 4.8)
    assert fast["interactions"].tolist() == [48, 64] and fast["reached"].tolist() == [True, False]
    assert interactions_to(episodes, 2.0)["interactions"].tolist() == [40, 64]
    assert interactions_to(episodes, 9, length=70)["interactions"].tolist() == [70, 70]
    row = summary(episodes, 4.8).iloc[0]
    assert (row["lifetimes"], row["first_episode"], row["final_return"]) == (2, 0, 6)
    assert (row["interactions_to"], row["never"]) == (56, 1)


def test_final_return_without_a_late_episode_is_not_dropped_in_silence():
    ends = np.zeros((2, 64), bool)
    ends[0, [7, 63]], ends[1, 7] = True, True
    final = final_return(episodes_table(lifetimes_of(np.ones((2, 64)), ends)))
    assert final.isna().tolist() == [False, True]
    with pytest.raises(ValueError, match="none may be dropped"):
        bootstrap_interval(final)


@pytest.mark.parametrize("streams", [1, 3])
def test_episodes_agree_with_a_walk_through_every_step(streams):
    rng = np.random.default_rng(streams)
    reward, ends = rng.normal(size=(4, 60)), rng.random((4, 60)) < 0.15
    lifetimes = lifetimes_of(reward, ends, streams=streams)
    table = episodes_table(lifetimes)
    at = np.full((4, 60), np.nan)
    for row, stream in itertools.product(range(4), range(streams)):
        open_steps = []
        for step in range(stream, 60, streams):
            open_steps.append(step)
            if ends[row, step]:
                value = lifetimes.reward[row, open_steps].astype(float).sum()
                at[row, open_steps] = value
                found = table[(table["seed"] == row) & (table["interactions"] == step + 1)]
                assert found["length"].tolist() == [len(open_steps)]
                assert found["return"].tolist() == pytest.approx([value])
                open_steps = []
    assert len(table) == ends.sum()
    np.testing.assert_allclose(returns_at(lifetimes, np.arange(1, 61)), at)
    assert all((group.diff().dropna() > 0).all() for _, group in table.groupby("seed").interactions)


def test_bins_of_a_lifetime_that_32_does_not_divide_miss_no_step():
    reward = np.random.default_rng(0).normal(size=(2, 75))
    bins = bins_table(lifetimes_of(reward, reward > 1))
    width = np.diff(bins["interactions"].to_numpy().reshape(2, 32), prepend=0, axis=1).ravel()
    assert set(width) == {2, 3} and width.sum() == 150
    assert (bins["reward"] * width).sum() == pytest.approx(reward.sum(), abs=1e-4)
    assert bins["truncations"].sum() == (reward > 1).sum()
    with pytest.raises(ValueError, match="31 interactions"):
        bins_table(lifetimes_of(np.zeros((1, 31)), np.zeros((1, 31))))


def test_curve_is_the_mean_over_lifetimes_with_its_interval():
    rng = np.random.default_rng(0)
    returns = rng.normal(5, 2, size=(64, 1)).repeat(4, 1)
    ends = np.tile(np.arange(10) == 9, (64, 4))
    ends[0, -1] = False  # the last episode of one lifetime is unfinished
    table = curve(lifetimes_of(np.repeat(returns / 10, 10, axis=1), ends), points=40)
    assert table["lifetimes"].tolist() == [64] * 30 + [63] * 10
    assert table["mean"][0] == pytest.approx(returns[:, 0].mean(), abs=1e-5)
    assert table["mean"][39] == pytest.approx(returns[1:, 0].mean(), abs=1e-5)
    error = returns[:, 0].std() / 8
    np.testing.assert_allclose(table["high"] - table["low"], 2 * 1.96 * error, rtol=0.1)
    ends[:32, -1] = False  # half of them: the interval lies around the mean of the others
    table = curve(lifetimes_of(np.repeat(returns / 10, 10, axis=1), ends), points=40)
    assert table["low"][39] < table["mean"][39] < table["high"][39]
    assert table["mean"][39] == pytest.approx(returns[32:, 0].mean(), abs=1e-5)
    ends[:, -1] = False  # nobody finished: no value, and no warning of numpy's
    with warnings.catch_warnings(action="error"):
        table = curve(lifetimes_of(np.repeat(returns / 10, 10, axis=1), ends), points=40)
    assert table[["mean", "low", "high"]].isna().all(axis=1).tolist() == [False] * 30 + [True] * 10


def test_sign_flips_agree_with_enumeration():
    for difference in ([0.3, -1.2, 2.0, 0.7, 0.1], [1.0, 1, 1, -1, 2, 2], [0.0, 0, 1, 3]):
        flips = np.array(list(itertools.product([-1, 1], repeat=len(difference))))
        means = (flips * difference).mean(1)
        extreme = np.abs(means) >= abs(np.mean(difference)) - 1e-12
        assert paired_test(difference) == pytest.approx(extreme.mean())
    assert paired_test([0.0, 0.0, 0.0]) == 1.0
    difference = np.random.default_rng(1).normal(0.4, 1, 40)
    assert paired_test(difference) == paired_test(difference)
    # Too many for enumeration: against a hundred thousand other random flips.
    flips = np.random.default_rng(7).choice([-1.0, 1.0], size=(100_000, 40))
    extreme = np.abs(flips @ difference) >= abs(difference.sum())
    assert paired_test(difference) == pytest.approx(extreme.mean(), rel=0.15)


def test_sign_flip_rejects_a_true_null_as_often_as_it_says():
    rng = np.random.default_rng(2)
    p = np.array([paired_test(rng.normal(size=12), resamples=999) for _ in range(200)])
    assert 0.01 <= (p < 0.05).mean() <= 0.1


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(3)
    samples = rng.exponential(size=(300, 64))  # skewed, mean 1
    ends = np.array([bootstrap_interval(s, resamples=500) for s in samples])
    assert 0.90 <= ((ends[:, 0] <= 1) & (1 <= ends[:, 1])).mean() <= 0.98
    assert bootstrap_interval(samples[0]) == bootstrap_interval(samples[0])
    assert bootstrap_interval([3, 3, 3]) == (3, 3)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval([1.0])


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 is .04 .06 .06 .04; the last is lifted to .06.
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.2]), [0.2])
    np.testing.assert_allclose(holm([0.9, 0.4, 0.001]), [0.9, 0.8, 0.003])


def figure_tables():
    "Two tasks, three curves: `gla` gap 8 learns on both, gap 4 and `yoked` do not on `other`."
    rng, tables = np.random.default_rng(0), []
    for task, (agent, gap, rise) in itertools.product(
        ("grid", "other"), [("gla", 8, 4.0), ("gla", "max", 0.0), ("yoked", "", 1.0)]
    ):
        start = rng.integers(0, 5, size=(12, 1))
        episode = start + np.linspace(0, rise, 16) + rng.integers(0, 3, size=(12, 16))
        ends = np.tile(np.arange(4) == 3, (12, 16))
        base = lifetimes_of(np.repeat(episode / 4, 4, axis=1), ends, agent, gap)
        lifetimes = Lifetimes(task, agent, gap, base.seeds, base.reward, ends & False, ends)
        tables.append((episodes_table(lifetimes), bins_table(lifetimes)))
    return [pd.concat(kind, ignore_index=True) for kind in zip(*tables, strict=True)]


FIGURE_CLAIMS = [
    Claim("learns", "gain", gap=8),
    Claim("learns more than yoked", "gain", gap=8, against="yoked"),
    Claim("begins below 9", "first_episode", gap="max", against=9.0, direction="less"),
    Claim(
        "gap 8 is slower", "interactions_to", gap=8, against="gla", against_gap="max", threshold=5.0
    ),
    Claim(
        "ends higher on grid",
        "final_return",
        gap=8,
        against="gla",
        against_gap="max",
        tasks=("grid",),
    ),
]


def test_claims_are_recomputed_from_the_csv_files(tmp_path):
    episodes, bins = figure_tables()
    claims = claims_table("figure", FIGURE_CLAIMS, episodes, bins)
    update_claims(tmp_path / "claims.csv", "figure", claims)
    write_table(tmp_path / "figure_episodes.csv", episodes)
    write_table(tmp_path / "figure_bins.csv", bins)
    tables = [read_table(tmp_path / f"figure_{kind}.csv") for kind in ("episodes", "bins")]
    again = claims_table("figure", FIGURE_CLAIMS, *tables)
    pd.testing.assert_frame_equal(again, read_table(tmp_path / "claims.csv"), check_dtype=False)
    assert list(again.columns) == CLAIMS and len(again) == 9
    assert again["seeds"].tolist() == [12] * 9
    # A table that was tampered with does not give the same claims.
    tables[1].loc[tables[1]["bin"] > 24, "reward"] += 1
    assert not claims_table("figure", FIGURE_CLAIMS, *tables).equals(again)


def test_claims_by_hand():
    episodes, bins = figure_tables()
    table = claims_table("figure", FIGURE_CLAIMS, episodes, bins)
    learns = table[table["claim"] == "learns"]
    for task, effect in zip(learns["task"], learns["effect"], strict=True):
        own = bins[(bins["task"] == task) & (bins["agent"] == "gla") & (bins["gap"] == "8")]
        rewards = own["reward"].to_numpy().reshape(12, 32)
        expected = (rewards[:, 24:].mean(1) - rewards[:, :8].mean(1)).mean()
        assert effect == pytest.approx(expected, rel=1e-5)
    # All twelve lifetimes gain: only all-plus and all-minus are as extreme; two tasks, times two.
    assert learns["p"].tolist() == pytest.approx([2 * 2 / 2**12] * 2, rel=1e-4)
    assert learns["holds"].all() and (learns["low"] > 0).all()
    assert (
        learns["against"].tolist() == ["0", "0"] and learns["agent"].tolist() == ["gla gap 8"] * 2
    )
    below = table[table["claim"] == "begins below 9"]
    assert (below["effect"] < 0).all() and below["holds"].all()
    assert below["against"].tolist() == ["9", "9"]
    assert table[table["claim"] == "ends higher on grid"]["task"].tolist() == ["grid"]
    opposite = claims_table(
        "figure", [Claim("unlearns", "gain", gap=8, direction="less")], episodes, bins
    )
    assert not opposite["holds"].any()


def test_a_claim_holds_only_at_its_level_and_in_its_direction():
    episodes, bins = figure_tables()
    p = 2 * 2 / 2**12  # the smallest that twelve lifetimes and two tasks can give
    for largest, direction, holds in (
        (1.1 * p, "greater", True),
        (0.9 * p, "greater", False),
        (1.1 * p, "less", False),
        (1.0, "greater", True),
    ):
        claim = Claim("learns", "gain", gap=8, level=largest, direction=direction)
        assert claims_table("figure", [claim], episodes, bins)["holds"].tolist() == [holds] * 2


def measured_bins(task, agent, forward, gap="", rms=None, seeds=range(4)):
    "The table of a curve whose forward reward in each of 32 bins of 2 steps is `forward` (L, 32)."
    forward = np.broadcast_to(forward, (len(seeds), 32)).repeat(2, axis=1)
    ends = np.zeros(forward.shape, bool)
    ends[:, -1] = True
    rms = None if rms is None else np.broadcast_to(rms, (len(seeds), 32)).repeat(2, axis=1)
    lifetimes = Lifetimes(
        *(task, agent, gap, list(seeds), forward + 1, ends & False, ends),
        forward_reward=forward,
        action_rms=rms,
    )
    return episodes_table(lifetimes), bins_table(lifetimes)


def tables_of(*curves):
    return [pd.concat(kind, ignore_index=True) for kind in zip(*curves, strict=True)]


RAMP = np.arange(32) + np.array([[0.0], [10], [20], [40]])  # forward reward by bin, four lifetimes


def test_level_and_change_by_hand():
    own, other = measured_bins("ant", "gla", RAMP, 8), measured_bins("ant", "ppo", 2 * RAMP[::-1])
    episodes, bins = tables_of(own, other)
    np.testing.assert_allclose(level(own[1], "forward_reward", 4, 7), [5, 15, 25, 45])
    np.testing.assert_allclose(level(own[1], "reward", 31, 32), [32, 42, 52, 72])
    np.testing.assert_allclose(change(own[1], "forward_reward", (0, 2, 10, 14)), [11] * 4)
    claims = [
        Claim("level", "level", gap=8, column="forward_reward", bins=(4, 7)),
        Claim("fell", "change", gap=8, column="forward_reward", bins=(10, 14, 0, 2)),
        Claim("gain", "gain", gap=8, column="forward_reward"),
        Claim("more", "level", gap=8, against="ppo", column="forward_reward", bins=(0, 1)),
    ]
    table = claims_table("figure4", claims, episodes, bins)
    # The level of ppo in bin 0 is 2 * (40, 20, 10, 0) against (0, 10, 20, 40).
    assert table["effect"].tolist() == [22.5, -11, 24, 17.5 - 35]
    assert (table["low"][1], table["high"][1], table["seeds"][1]) == (-11, -11, 4)


def test_the_share_that_runs_right_by_hand():
    late = np.tile(np.arange(32) >= 24, (4, 1)).astype(float)
    # Only the last quarter counts, and there the mean: 8 - 7 * 1.1, 8 * 0, and -1.
    forward = np.stack([late[0] * 0.1, -1 + 0 * late[1], 5 - 5 * late[2], 9 - 10 * late[3]])
    forward[0, 31] = -0.6
    own = measured_bins("ant_forward", "gla", forward, 8)
    assert runs_right(own[1]).tolist() == [1.0, 0.0, 0.0, 0.0]
    claim = Claim("runs right", "runs_right", gap=8, against=0.5)
    row = claims_table("figure4", [claim], *own).iloc[0]
    assert (row["effect"], row["against"], row["holds"]) == (-0.25, "0.5", False)


def test_a_pooled_claim_is_one_row_with_the_mean_over_tasks_of_each_seed():
    seeds = range(8)
    right = np.array([1, 1, 1, 1, 1, 1, 1, -1.0])[:, None]
    left = np.array([-1, 1, 1, 1, 1, 1, 1, 1.0])[:, None]
    curves = [
        measured_bins("ant_forward", "gla", right, 8, seeds=seeds),
        measured_bins("ant_backward", "gla", left[::-1], 8, seeds=seeds[::-1]),
        measured_bins("ant_forward", "random", 0, seeds=seeds),
        measured_bins("ant_backward", "random", -1, seeds=seeds),
        measured_bins("grid", "gla", -right, 8, seeds=seeds),
    ]
    tasks, tables = ("ant_forward", "ant_backward"), tables_of(*curves)
    common = {"gap": 8, "tasks": tasks, "pooled": True}
    claims = [
        Claim("runs right", "runs_right", against=0.5, **common),
        Claim("more than random", "level", against="random", bins=(0, 32), **common),
    ]
    table = claims_table("figure4", claims, *tables)
    assert table["task"].tolist() == ["ant_forward+ant_backward"] * 2
    # Shares 0.5 of seeds 0 and 7, 1 of the six others. Against random 1 and 0, 1 and 2, -1 and 2.
    assert table["effect"].tolist() == pytest.approx([6 * 0.5 / 8, (0.5 + 6 * 1.5 + 0.5) / 8])
    assert table["seeds"].tolist() == [8, 8] and table["holds"].all()
    assert table["p"].tolist() == pytest.approx([2 / 2**6, 2 / 2**8])
    apart = claims_table("figure4", [replace(claims[0], pooled=False)], *tables)
    assert apart["task"].tolist() == list(tasks) and apart["effect"].tolist() == [0.375, 0.375]
    everywhere = claims_table("figure4", [replace(claims[0], tasks=())], *tables)
    assert everywhere["task"].tolist() == ["ant_forward+ant_backward+grid"]
    fewer = tables[1][(tables[1]["task"] != "ant_backward") | (tables[1]["seed"] > 2)]
    with pytest.raises(ValueError, match=r"pooled by seed.*\[0, 1, 2\]"):
        claims_table("figure4", claims[:1], tables[0], fewer)


@pytest.mark.parametrize(
    ("forward", "direction", "holds"),
    [
        ([1.0, 1, 2, 2, 1, 2, 1, 2], "not_greater", False),  # the interval lies above 0
        ([1.0, -1, 2, -2, 1, -2, 1, 2], "not_greater", True),
        ([-1.0, -1, -2, -2, -1, -2, -1, -2], "not_greater", True),
        ([1.0, 1, 2, 2, 1, 2, 1, 2], "no_difference", False),
        ([-1.0, -1, -2, -2, -1, -2, -1, -2], "no_difference", False),
        ([1.0, -1, 2, -2, 1, -2, 1, 2], "no_difference", True),
    ],
)
def test_claims_that_expect_nothing(forward, direction, holds):
    own = measured_bins("ant", "gla", np.array(forward)[:, None], seeds=range(8))
    claim = Claim("x", "level", column="forward_reward", bins=(0, 32), direction=direction)
    row = claims_table("figure4", [claim], *own).iloc[0]
    assert row["holds"] == holds and (row["low"] > 0) == (min(forward) > 0)
    # The level is that of the test: at one above p, the test has found the difference.
    if direction == "no_difference" and holds:
        assert not claims_table("f", [replace(claim, level=row["p"] + 0.01)], *own)["holds"][0]


def test_a_column_that_nobody_measured_is_an_error_of_the_claim():
    ends = np.tile(np.arange(4) == 3, (4, 16))
    blind = lifetimes_of(np.ones((4, 64)), ends, "ppo", "")
    blind = episodes_table(blind), bins_table(blind).assign(task="ant")
    tables = tables_of(measured_bins("ant", "gla", RAMP, 8), blind)
    for effect, more in (
        ("gain", {"column": "forward_reward"}),
        ("level", {"column": "forward_reward", "bins": (0, 4)}),
        ("change", {"column": "forward_reward", "bins": (0, 4, 4, 8)}),
        ("runs_right", {}),
    ):
        with pytest.raises(ValueError, match=r"needs forward_reward of .'ant', 'ppo', ''"):
            claims_table("f", [Claim("x", effect, agent="ppo", **more)], *tables)
        with pytest.raises(ValueError, match=r"needs forward_reward of .'ant', 'ppo', ''"):
            claims_table("f", [Claim("x", effect, gap=8, against="ppo", **more)], *tables)
        assert len(claims_table("f", [Claim("x", effect, gap=8, **more)], *tables)) == 1
    # One bin of one lifetime is enough, if the claim looks at it.
    hole = tables[1].copy()
    hole.loc[(hole["seed"] == 2) & (hole["bin"] == 3), "forward_reward"] = np.nan
    claim = Claim("x", "level", gap=8, column="forward_reward", bins=(0, 4))
    with pytest.raises(ValueError, match=r"not measured in lifetimes \[2\]"):
        claims_table("f", [claim], tables[0], hole)
    assert len(claims_table("f", [replace(claim, bins=(4, 9))], tables[0], hole)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"column": "speed"}, "unknown column 'speed'.*action_rms"),
        ({"effect": "first_episode", "column": "action_rms"}, "'action_rms' with first_episode"),
        ({"effect": "level"}, r"bins=\(\) with level"),
        ({"effect": "level", "bins": (0, 8, 8, 9)}, r"\(0, 8, 8, 9\) with level"),
        ({"effect": "level", "bins": (8, 8)}, r"\(8, 8\)"),
        ({"effect": "level", "bins": (-1, 8)}, r"\(-1, 8\)"),
        ({"effect": "level", "bins": (0, 33)}, r"\(0, 33\)"),
        ({"effect": "level", "bins": (0.5, 3)}, r"\(0.5, 3\)"),
        ({"effect": "change", "bins": (0, 8)}, r"\(0, 8\) with change"),
        ({"effect": "change", "bins": (0, 8, 9)}, r"\(0, 8, 9\) with change"),
        ({"effect": "change", "bins": (0, 8, 9, 9)}, r"\(0, 8, 9, 9\)"),
        ({"bins": (0, 8)}, r"\(0, 8\) with gain"),
        ({"direction": "equal"}, "'equal'.*greater, less, not_greater, no_difference"),
    ],
)
def test_claims_name_a_column_range_or_direction_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Claim(**({"claim": "x", "effect": "gain"} | wrong))


def test_lifetimes_are_paired_by_seed_and_not_by_place():
    ours, theirs = pd.Series([1.0, 5.0], index=[7, 9]), pd.Series([4.0, 1.0], index=[9, 7])
    assert differences(ours, theirs).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("effect", ["first_episode", "final_return", "interactions_to"])
def test_a_lifetime_without_an_end_is_not_dropped_from_a_claim(effect):
    reward, ends = np.ones((3, 40)), np.tile(np.arange(40) % 10 == 9, (3, 1))
    ends[1] = False
    threshold = {"threshold": 5.0} if effect == "interactions_to" else {}
    lives = lifetimes_of(reward, ends)
    claim = Claim("earns something", effect, gap=4, against=0.0, **threshold)
    with pytest.raises(ValueError, match=r"no value in lifetimes \[1\]"):
        claim_rows(claim, "figure", episodes_table(lives), bins_table(lives))


def test_claims_refuse_what_is_not_there():
    episodes, bins = figure_tables()
    with pytest.raises(ValueError, match="no curve .'gla', '2'."):
        claims_table("figure", [Claim("x", "gain", gap=2)], episodes, bins)
    with pytest.raises(ValueError, match="no curve .*'ad'"):
        claims_table("figure", [Claim("x", "gain", gap=8, against="ad")], episodes, bins)
    fewer = bins[(bins["agent"] != "yoked") | (bins["seed"] > 0)]
    with pytest.raises(ValueError, match=r"paired by seed.*\[0\]"):
        claims_table("figure", [Claim("x", "gain", gap=8, against="yoked")], episodes, fewer)
    for wrong in ({"effect": "growth"}, {"direction": "up"}, {"threshold": 3.0}):
        with pytest.raises(ValueError, match=str(list(wrong.values())[0])):
            Claim(**({"claim": "x", "effect": "gain"} | wrong))
    with pytest.raises(ValueError, match="interactions_to alone needs one"):
        Claim("x", "interactions_to")


def test_update_claims_keeps_the_rows_of_other_figures(tmp_path):
    path, (episodes, bins) = tmp_path / "claims.csv", figure_tables()
    first = claims_table("figure3", FIGURE_CLAIMS, episodes, bins)
    second = claims_table("figure5", FIGURE_CLAIMS[:2], episodes, bins)
    update_claims(path, "figure3", first)
    update_claims(path, "figure5", second)
    update_claims(path, "figure3", first[:1])
    kept = read_table(path)
    assert kept["figure"].tolist() == ["figure5"] * 4 + ["figure3"]
    pd.testing.assert_frame_equal(kept[:4], second, check_dtype=False)
    with pytest.raises(ValueError, match="figure5"):
        update_claims(path, "figure3", second)
    assert read_table(path).equals(kept)


@pytest.mark.parametrize("gap", ["", 4, "max"])
def test_lifetimes_and_their_tables_survive_the_disk(tmp_path, gap):
    lifetimes, _ = by_hand()
    rms = np.random.default_rng(0).random((2, 64), dtype=np.float32)
    lifetimes = lifetimes_of(
        lifetimes.reward, lifetimes.done, gap=gap, seeds=[5, 3], action_rms=rms, streams=2
    )
    path = tmp_path / "lifetimes.npz"
    assert load_lifetimes(save_lifetimes(lifetimes, path)).forward_reward is None
    lifetimes = replace(lifetimes, forward_reward=(rms - 0.5).tolist())
    again = load_lifetimes(save_lifetimes(lifetimes, path))
    assert (again.gap, again.streams, again.forward_reward.dtype) == (gap, 2, np.float32)
    for name in ("seeds", "reward", "terminated", "truncated", "action_rms", "forward_reward"):
        np.testing.assert_array_equal(getattr(again, name), getattr(lifetimes, name))
    for make in (episodes_table, bins_table):
        table = make(lifetimes)
        read = read_table(write_table(tmp_path / "table.csv", table))
        pd.testing.assert_frame_equal(read, table, check_dtype=False, check_exact=True)
    np.testing.assert_allclose(table["forward_reward"], table["action_rms"] - 0.5, atol=1e-6)


def test_files_that_are_none_are_named(tmp_path):
    file = tmp_path / "lifetimes.npz"
    np.savez(file, gap="4", task="grid")
    with pytest.raises(ValueError, match="lifetimes.npz does not hold lifetimes"):
        load_lifetimes(file)
    np.savez(file, gap=np.array([{"a": 1}], dtype=object))  # a pickle: never opened
    with pytest.raises(ValueError, match="remove it to make it again"):
        load_lifetimes(file)
    (tmp_path / "claims.csv").write_text("")
    with pytest.raises(ValueError, match="claims.csv is not a table"):
        read_table(tmp_path / "claims.csv")


def test_a_saved_meta_test_is_made_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("GLA_NB_OUTPUTS", str(tmp_path))
    config, calls = {"task": TASKS[DISCRETE], "seeds": 3}, []

    def make():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return meta_test(TASKS[DISCRETE], Adder(DISCRETE), range(3), 40)

    folder = stage_folder("meta_tests", "restless", config)
    with pytest.raises(KeyboardInterrupt):
        saved_meta_test(folder, make)
    made, again = (saved_meta_test(folder, make) for _ in range(2))
    assert len(calls) == 2
    np.testing.assert_array_equal(made.reward, again.reward)
    saved_meta_test(stage_folder("meta_tests", "restless", config | {"seeds": 4}), make)
    assert len(calls) == 3 and len(list((tmp_path / "meta_tests").iterdir())) == 2


def test_ppo_runs_are_lifetimes_whose_streams_take_turns(tmp_path):
    rng, env, folders = np.random.default_rng(0), Restless(), []
    for run, updates in enumerate((3, 2)):
        folders.append(tmp_path / f"run_{run}")
        with HistoryWriter(
            folders[-1],
            task=TASKS[DISCRETE],
            observation_space=env.observation_space,
            action_space=env.action_space,
            streams=3,
            updates=updates,
            steps_per_update=8,
            seed=run,
        ) as writer:
            for _ in range(updates):
                ends = rng.random((3, 8)) < 0.3
                action = rng.integers(0, 4, (3, 8))
                writer.append(
                    {
                        "observation": rng.normal(size=(3, 8, 3)),
                        "action": action,
                        "executed_action": action,
                        "reward": rng.normal(size=(3, 8)),
                        "terminated": ends,
                        "truncated": ends & False,
                        "final_observation": ends[..., None] * np.ones(3),
                        "distribution": np.full((3, 8, 4), -np.log(4)),
                    }
                )
    lifetimes = ppo_lifetimes(folders)
    assert lifetimes.reward.shape == (2, 48) and lifetimes.agent == "ppo"  # cut to the shorter run
    from gla_nb.histories import open_history

    history = open_history(folders[1])
    np.testing.assert_array_equal(lifetimes.reward[1, :6], history.reward[:, :2].T.ravel())
    table = episodes_table(lifetimes)
    table, known = table[table["seed"] == 1], episode_returns(history)
    np.testing.assert_allclose(np.sort(table["return"]), np.sort(known.returns), atol=1e-6)
    np.testing.assert_array_equal(np.sort(table["length"]), np.sort(known.lengths))
    assert ppo_lifetimes(folders, interactions=30).interactions == 30
    small = export_histories(tmp_path, tmp_path / "export", every=2, steps=4)
    with pytest.raises(ValueError, match="exports have gaps .*run_0"):
        ppo_lifetimes(sorted(small.glob("run_*")))


@pytest.mark.parametrize("reported", [(True, True), (True, False), (False, False)])
def test_ppo_runs_bring_their_forward_reward_where_all_have_it(tmp_path, reported):
    rng, env = np.random.default_rng(0), Restless(box=True)
    for run, forward in enumerate(reported):
        plan = {"observation_space": env.observation_space, "action_space": env.action_space}
        plan |= {"streams": 2, "updates": 1, "steps_per_update": 20, "seed": run}
        with HistoryWriter(
            tmp_path / f"{run}", task=TASKS[BOX], forward_reward=forward, **plan
        ) as writer:
            action, reward = rng.uniform(-0.5, 0.5, (2, 20, 2)), rng.normal(size=(2, 20))
            rows = {"observation": rng.normal(size=(2, 20, 3)), "reward": reward}
            rows |= {"action": action, "executed_action": action}
            rows |= {"distribution": np.concatenate([action, action], -1)}
            rows |= {name: np.zeros((2, 20), bool) for name in ("terminated", "truncated")}
            rows |= {"final_observation": np.zeros((2, 20, 3))}
            writer.append(rows | ({"forward_reward": 3 * reward} if forward else {}))
    lifetimes = ppo_lifetimes([tmp_path / "0", tmp_path / "1"])
    if not all(reported):
        assert lifetimes.forward_reward is None
        return
    np.testing.assert_allclose(lifetimes.forward_reward, 3 * lifetimes.reward, rtol=1e-6)
    np.testing.assert_allclose(lifetimes.reward[1], reward.T.ravel(), rtol=1e-6)
    rms = np.sqrt((action**2).mean(-1)).T.ravel()
    np.testing.assert_allclose(lifetimes.action_rms[1], rms, rtol=1e-6)


def test_bins_are_drawn_at_their_middle_with_the_interval_of_their_mean():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, (50, 1)) * np.arange(96)
    ends = np.tile(np.arange(96) == 95, (50, 1))
    lifetimes = lifetimes_of(values / 9, ends, action_rms=values)
    table = bin_curve(lifetimes, "action_rms")
    assert table["interactions"].tolist() == (np.arange(32) * 3 + 1.5).tolist()
    np.testing.assert_allclose(table["mean"], values.mean(0)[1::3], rtol=1e-5)
    width = 2 * 1.96 * values.std(0)[1::3] / np.sqrt(50)
    np.testing.assert_allclose(table["high"] - table["low"], width, rtol=0.1)
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    figure, ax = plt.subplots()
    assert plot_bins(ax, {"gap 4": lifetimes, "half": lifetimes}, "action_rms") is ax
    np.testing.assert_allclose(ax.lines[0].get_ydata(), table["mean"])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), table["interactions"])
    assert ax.get_legend_handles_labels()[1] == ["gap 4 (50)", "half (50)"]
    colors = [line.get_color() for line in ax.lines]
    returns = plot_returns(plt.figure().gca(), {"gap 4": lifetimes, "half": lifetimes})
    assert colors == [line.get_color() for line in returns.lines]
    plt.close("all")
    with pytest.raises(ValueError, match="forward_reward of gla in grid was not measured"):
        bin_curve(lifetimes, "forward_reward")
    with pytest.raises(ValueError, match="unknown column 'speed'"):
        plot_bins(ax, {"gap 4": lifetimes}, "speed")


def test_a_picture_says_how_many_lifetimes():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    lifetimes, returns = by_hand()
    figure, ax = plt.subplots()
    plot_returns(ax, {"gap 4": lifetimes}, points=64, optimum=8)
    assert ax.get_legend_handles_labels()[1] == ["gap 4 (2)"]
    drawn = ax.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, np.repeat(returns.mean(0), 8))
    plt.close(figure)


def test_a_figure_is_three_files_and_its_curves_have_different_names(tmp_path):
    ends = np.tile(np.arange(4) == 3, (6, 16))
    rng = np.random.default_rng(0)
    curves = [lifetimes_of(rng.random((6, 64)), ends, gap=gap) for gap in (1, "max")]
    claim = Claim("begins above 0", "first_episode", gap="max")
    claims = write_figure(tmp_path, "figure3_grid", curves, [claim])
    assert claims["effect"][0] == pytest.approx(curves[1].reward[:, :4].sum(1).mean(), rel=1e-5)
    assert read_table(tmp_path / "claims.csv")["claim"].tolist() == ["begins above 0"]
    assert len(read_table(tmp_path / "figure3_grid_episodes.csv")) == 2 * 6 * 16
    assert len(read_table(tmp_path / "figure3_grid_bins.csv")) == 2 * 6 * 32
    with pytest.raises(ValueError, match="must differ.*'gla', '1'"):
        write_figure(tmp_path, "figure3_grid", [*curves, curves[0]], [claim])
