"Attention weights are those of the network, and contexts are what the agent has read."

from dataclasses import replace
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from gla_nb.agent import GLA, layout_of
from gla_nb.attention import (
    attention,
    attention_table,
    by_age,
    cut,
    go_on,
    mass,
    relations,
    relive,
    visible,
)
from gla_nb.films import record
from gla_nb.projections import SIZES, TokenLayout
from gla_nb.transformer import GLAConfig

ROOT = Path(__file__).resolve().parents[1]
GRID = TokenLayout(observation=9, action=4, discrete=True)
PENDULUM = TokenLayout(observation=3, action=1, discrete=False, normalise=32)
PROJECTED = TokenLayout(*SIZES, False, normalise=32, projection="orthonormal")


def agent_of(layout, **changes):
    shape = {"layers": 2, "width": 32, "heads": 2, "window": 32} | changes
    return GLA(GLAConfig(layout, **shape), seed=1).eval()


class Stepwise:
    "Keeps the outputs of an agent that reads one token after the other."

    def __init__(self, agent):
        self.agent, self.outputs = agent, []

    def __getattr__(self, name):
        return getattr(self.agent, name)

    def step(self, tokens, cache, active=None):
        self.outputs.append(self.agent.step(tokens, cache, active))
        return self.outputs[-1]


@pytest.mark.parametrize(
    "task, layout, changes",
    [
        ("grid", GRID, {}),
        ("pendulum", PENDULUM, {"window": 300}),  # never full
        ("pendulum", PENDULUM, {"layers": 3}),
        ("pendulum", PROJECTED, {"matching": 2}),
    ],
)
def test_explicit_attention_is_that_of_the_network(task, layout, changes):
    agent = agent_of(layout, **changes)
    stepwise = Stepwise(agent)
    _, (context,) = relive(stepwise, record(task, "random", [3], 230))
    seen, window = attention(agent, context.tokens), agent.config.window
    count = len(context.tokens)
    assert count > 230
    with torch.inference_mode():
        whole = agent(context.tokens[None])[0]
    assert (seen.outputs - whole).abs().max() < 1e-5
    assert (seen.outputs - torch.cat(stepwise.outputs)).abs().max() < 1e-5
    age = np.arange(count)[:, None] - np.arange(count)
    outside = torch.from_numpy((age < 0) | (age >= window))
    weights = seen.weights.flatten(0, 1)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5 and weights.min() >= 0
    assert not weights[:, outside].any()
    assert (weights[:, ~outside] > 0).float().mean() > 0.9


def test_altering_what_is_not_attended_changes_nothing():
    "What lies beyond the reach of all layers, and what comes later."
    agent = agent_of(GRID)
    _, (context,) = relive(agent, record("grid", "random", [3], 120))
    altered = context.tokens.clone()
    altered[:20] += 1
    altered[111:] += 1
    seen = [attention(agent, tokens, [110]) for tokens in (context.tokens, altered)]
    assert torch.equal(seen[0].weights[..., 20:111], seen[1].weights[..., 20:111])
    altered[105] += 1
    assert not torch.equal(seen[0].weights, attention(agent, altered, [110]).weights)


def test_tokens_carry_the_transitions_of_the_recording():
    recording = record("pendulum", "random", [5, 6], 205)  # episodes of 200
    agent = agent_of(TokenLayout(3, 1, False))
    _, contexts = relive(agent, recording)
    for row, context in enumerate(contexts):
        assert len(context.tokens) == 206 and (~context.acts).sum() == 1
        carried = context.transition >= 0
        tokens, at = context.tokens[carried].numpy(), context.transition[carried]
        assert np.array_equal(tokens[:, 3:6], recording.observation[row, at])
        assert np.array_equal(tokens[:, 6:7], recording.action[row, at])
        assert np.array_equal(tokens[:, 7], recording.shown[row, at])
        assert np.array_equal(context.tokens[:, :3].numpy(), context.observation)
        assert np.array_equal(np.flatnonzero(~carried), [0, 201])
        assert np.isnan(context.reward[~carried]).all()


def test_lifetimes_that_end_at_different_times_keep_their_own_tokens():
    recording = record("Hopper-v4", "random", [0, 1, 2], 60)
    done = recording.lifetimes.done
    assert not np.array_equal(done[0], done[1]), "they should fall at different times"
    agent = agent_of(TokenLayout(11, 3, False))
    actor, contexts = relive(agent, recording)
    for row, context in enumerate(contexts):
        assert len(context.tokens) == 60 + done[row].sum() == actor.cache.positions[row]
        alone = replace(
            recording,
            lifetimes=record("Hopper-v4", "random", [row], 60).lifetimes,
            **{
                name: getattr(recording, name)[row : row + 1]
                for name in ("observation", "action", "shown", "seen")
            },
        )
        assert torch.equal(relive(agent, alone)[1][0].tokens, context.tokens)


def test_relations_are_what_they_say():
    recording = record("grid", "random", [10], 70)
    rewards = np.random.default_rng(0).random((1, 70), np.float32)
    recording = replace(recording, shown=rewards)
    agent = agent_of(GRID)
    _, (context,) = relive(agent, recording)
    queries = np.array([40, 60])
    found = relations(context, queries, 32)
    for i, query in enumerate(queries):
        near = visible(context, queries, 32)[i]
        assert near.sum() == 32 and near[query] and not near[query + 1]
        mean = np.nanmean(np.where(near, context.reward, np.nan))
        for token in np.flatnonzero(near):
            at = context.transition[token]
            step = recording.observation[0, at] if at >= 0 else None
            now = context.observation[query]
            assert found["same state"][i, token] == (at >= 0 and np.array_equal(step, now))
            paid = at >= 0 and recording.shown[0, at] > mean
            assert found["paid above average"][i, token] == paid
            assert found["this episode"][i, token] == (context.episode[token] == query // 21)
    assert found["paid above average"].any(1).tolist() == [True, True]
    assert np.array_equal(found["earlier episodes"], ~found["this episode"])


def test_even_attention_has_the_even_share_and_every_age_the_same_weight():
    agent = agent_of(GRID)
    with torch.no_grad():
        for block in agent.blocks:
            block.qkv.weight[: agent.config.width] = 0  # all scores are zero
    _, (context,) = relive(agent, record("grid", "random", [10], 19))  # within one episode
    table = attention_table(agent, context, [15, 18])
    assert np.allclose(table["mass"], table["even"], atol=1e-6) and table["even"].max() == 1
    seen = attention(agent, context.tokens, [18])
    assert np.allclose(by_age(seen, context), 1 / 19, atol=1e-6)
    one = np.zeros((1, 19), bool)
    one[0, 4] = True
    assert np.allclose(mass(seen.weights, one), 1 / 19)


def test_an_agent_goes_on_as_if_it_had_not_stopped():
    "Cut at an end of an episode, the context is that of the uncut lifetime."
    agent = agent_of(GRID)
    whole = record("grid", agent, [2], 100)
    reader, (context,) = relive(agent, cut(whole, 60))
    _, (longer,) = relive(agent, whole)
    assert torch.equal(context.tokens, longer.tokens[: len(context.tokens)])
    after = go_on(reader, "grid", [7], 40)
    assert after.reward.shape == (1, 40) and reader.steps == 100
    middle, (part,) = relive(agent, cut(whole, 50))  # in the middle it counts as truncated
    assert middle.first.all() and not part.acts[-1] and part.tokens[-1, -1] == 1


def test_shown_rewards_alone_differ():
    agent = GLA.from_pretrained(ROOT / "outputs" / "agents" / "grid")
    recording = record("grid", agent, [0], 40)
    hidden = replace(recording, shown=np.zeros_like(recording.shown))
    tokens = [relive(agent, r)[1][0].tokens for r in (recording, hidden)]
    differs = (tokens[0] != tokens[1]).any(0).nonzero().flatten().tolist()
    layout = layout_of(agent)
    reward = 2 * layout.observation + layout.action
    assert differs and set(differs) <= {reward, reward + 1}


def test_the_inside_notebook_runs(tmp_path):
    given = {"scale": "smoke"}
    path = ROOT / "nbs" / "33_inside.ipynb"
    papermill.execute_notebook(str(path), str(tmp_path / "i.ipynb"), given, progress_bar=False)
