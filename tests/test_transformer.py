"The network on sequences and with its cache, the action distributions, and saved agents."

import copy
import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy import stats
from torch import distributions

from gla_nb import transformer
from gla_nb.agent import GLA
from gla_nb.kernel import kernel_for
from gla_nb.projections import TokenLayout
from gla_nb.stages import plain
from gla_nb.transformer import GLAConfig, config_from, entropy, kl, log_probability, sample

GRID = TokenLayout(observation=9, action=4, discrete=True)
ANT = TokenLayout(observation=27, action=8, discrete=False, eta=("gap",))


def make_agent(layout=GRID, seed=0, **fields) -> GLA:
    "A small agent whose weights are large enough that every part shows in the outputs."
    agent = GLA(GLAConfig(layout, **{"layers": 2, "width": 32, "window": 8} | fields), seed)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(1.5)
        agent.head.weight.mul_(6.0)
    return agent


def random_tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(agent, tokens):
    return agent(tokens)


# The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [GRID, ANT])
@pytest.mark.parametrize("heads", [1, 4])
def test_cached_outputs_agree_before_and_after_the_window_fills(layout, heads):
    agent = make_agent(layout, heads=heads, layers=3)
    tokens = random_tokens(3, 40, layout.width)
    cache = agent.new_cache(3)
    steps = torch.stack([agent.step(tokens[:, t], cache) for t in range(40)], 1)
    assert steps.dtype == torch.float32 and steps.std() > 0.1
    torch.testing.assert_close(steps, full(agent, tokens), rtol=0, atol=1e-5)


def test_lifetimes_at_different_positions_pause_and_start_again():
    agent, lifetimes, window = make_agent(), 6, 8
    rng, cache = np.random.default_rng(0), agent.new_cache(6)
    histories = [[] for _ in range(lifetimes)]
    compared_full = emptied = 0
    for t in range(70):
        active = torch.tensor(rng.random(lifetimes) < [1.0, 0.9, 0.7, 0.5, 0.3, 0.1])
        # Rows that pause get rubbish, which must never be seen again.
        tokens = random_tokens(lifetimes, GRID.width, seed=t)
        outputs = agent.step(torch.where(active[:, None], tokens, torch.nan), cache, active)
        for row in active.nonzero().flatten().tolist():
            histories[row].append(tokens[row])
            expected = full(agent, torch.stack(histories[row])[None])[0, -1]
            torch.testing.assert_close(outputs[row], expected, rtol=0, atol=1e-5)
            compared_full += len(histories[row]) > window
        assert cache.positions.tolist() == [len(history) for history in histories]
        if t % 23 == 22:  # once as booleans, then as indices
            rows = torch.tensor([False, True, False, True, False, False])
            cache.empty(rows if t < 23 else rows.nonzero().flatten())
            histories[1], histories[3] = [], []
            emptied += 2
    assert compared_full > 60 and emptied == 6


def pausing(step, agent, device="cpu"):
    "Outputs (T, B, ...) of lifetimes that pause and are emptied, NaN where they did; positions."
    rng, cache, kept = np.random.default_rng(1), agent.new_cache(5), []
    for t in range(60):
        active = torch.tensor(rng.random(5) < [1.0, 0.9, 0.6, 0.3, 0.1], device=device)
        tokens = random_tokens(5, agent.config.layout.width, seed=t).to(device)
        outputs = step(tokens, cache, active)
        kept.append(torch.where(active[:, None], outputs, torch.nan))
        if t == 30:
            cache.empty(torch.tensor([False, True, False, True, False], device=device))
    return torch.stack(kept).cpu(), cache.positions.tolist()


PROJECTED = TokenLayout(64, 16, discrete=False, normalise=64, projection="orthonormal")
SHAPES = [(GRID, 0), (ANT, 0), (PROJECTED, 3)]


@pytest.mark.parametrize("layout, matching", SHAPES)
def test_static_shapes_give_the_same(layout, matching):
    agent = make_agent(layout, matching=matching)
    outputs, positions = pausing(agent.step, agent)
    static, same = pausing(agent.static_step, agent)
    assert positions == same and positions[0] == 60 > positions[4] > 0
    assert outputs.isnan().any() and outputs[~outputs.isnan()].std() > 0.1
    # Of order 5 at most, where float32 resolves 5e-7, after two layers of weights made large.
    torch.testing.assert_close(static, outputs, rtol=0, atol=2e-5, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("layout, matching", SHAPES)
def test_a_recorded_graph_gives_the_same(layout, matching):
    agent = make_agent(layout, matching=matching)
    expected, positions = pausing(agent.step, agent)
    agent.to("cuda")
    outputs, same = pausing(agent.step, agent, "cuda")
    assert positions == same
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4, equal_nan=True)


def test_shapes_of_a_graph_never_change_and_nothing_waits():
    agent = make_agent(PROJECTED, matching=2)
    cache, everybody = agent.new_cache(3), torch.ones(3, dtype=torch.bool)
    shapes = set()
    for _ in range(20):
        agent.static_step(torch.randn(3, PROJECTED.width), cache, everybody)
        reading = cache.static()
        parts = (reading.rows, reading.positions, reading.slots, reading.hidden)
        shapes.add((*(tuple(part.shape) for part in parts), reading.seen))
    assert shapes == {((3,), (3,), (3,), (3, 1, 8), 8)}
    # A tensor without numbers refuses to give one: what waits for a GPU would raise here.
    with torch.device("meta"):
        empty = make_agent_without_numbers(PROJECTED, matching=2)
        outputs = empty.static_step(torch.zeros(3, PROJECTED.width), empty.new_cache(3), everybody)
    assert outputs.shape == (3, 33)


def make_agent_without_numbers(layout, **fields):
    return GLA(GLAConfig(layout, **{"layers": 2, "width": 32, "window": 8} | fields)).to("meta")


@pytest.mark.parametrize("matching", [0, 2])
def test_what_is_not_active_is_not_read(matching):
    agent = make_agent(PROJECTED, matching=matching)
    cache, tokens = agent.new_cache(6), random_tokens(6, 20, PROJECTED.width)
    for t in range(19):
        agent.step(tokens[:, t], cache)
    active = torch.tensor([False, True, True, False, False, True])
    alone, poisoned = copy.deepcopy(cache), copy.deepcopy(cache)
    expected = agent.step(tokens[:, 19], alone)
    for part in (poisoned.keys[0], poisoned.values[0]):
        part[~active] = torch.nan
    outputs = agent.step(tokens[:, 19], poisoned, active)
    torch.testing.assert_close(outputs[active], expected[active], rtol=0, atol=1e-5)
    assert (outputs[~active] == 0).all()


def test_emptying_everything_equals_a_new_cache():
    agent, tokens = make_agent(), random_tokens(2, 12, GRID.width)
    used = agent.new_cache(2)
    for t in range(12):
        agent.step(tokens[:, t], used)
    used.empty()
    fresh = agent.new_cache(2)
    for t in range(12):
        assert torch.equal(agent.step(tokens[:, t], used), agent.step(tokens[:, t], fresh))


def test_a_lifetime_does_not_depend_on_its_neighbours():
    agent, tokens = make_agent(), random_tokens(5, 20, GRID.width)
    together, alone = agent.new_cache(5), agent.new_cache(1)
    for t in range(20):
        outputs = agent.step(tokens[:, t], together)
        torch.testing.assert_close(
            outputs[3:4], agent.step(tokens[3:4, t], alone), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("offset", [1_000_000, 10**9])
def test_far_positions_are_exact(offset):
    agent = make_agent(layers=3)
    tokens, near, far = random_tokens(2, 60, GRID.width), agent.new_cache(2), agent.new_cache(2)
    far.positions += offset  # with empty slots that count as filled, until the window has passed
    differences = [
        (agent.step(tokens[:, t], near) - agent.step(tokens[:, t], far)).abs().max().item()
        for t in range(60)
    ]
    reach = 3 * (8 - 1)  # tokens that layers * (window - 1) steps back can still matter
    assert max(differences[:reach]) > 1e-3
    assert max(differences[reach:]) < 1e-5


def test_rotations_turn_by_the_distance_alone():
    x, y = random_tokens(2, 16)
    for start in (0, 12345, 10**9):
        for distance in (0, 1, 100):
            a = transformer.rotations(torch.tensor(start), 16, 10_000.0)
            b = transformer.rotations(torch.tensor(start + distance), 16, 10_000.0)
            inner = transformer.rotate(x, a) @ transformer.rotate(y, b)
            frequencies = 10_000.0 ** (-np.arange(0, 16, 2) / 16)
            pairs = x.numpy()[::2] + 1j * x.numpy()[1::2], y.numpy()[::2] + 1j * y.numpy()[1::2]
            expected = (
                pairs[0] * np.conj(pairs[1] * np.exp(1j * distance * frequencies))
            ).real.sum()
            assert inner.item() == pytest.approx(expected, abs=2e-6)


# Sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 20])  # with the plain causal path and with the window's mask
def test_the_future_changes_nothing(length):
    agent, tokens = make_agent(), random_tokens(1, length, GRID.width)
    before = full(agent, tokens)
    for t in range(length):
        changed = tokens.clone()
        changed[:, t] += 1.0
        after = full(agent, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


def test_one_layer_sees_exactly_its_window():
    agent, tokens = make_agent(layers=1, window=5), random_tokens(1, 20, GRID.width)
    changed = tokens.clone()
    changed[:, 7] += 1.0
    difference = (full(agent, changed) - full(agent, tokens)).abs().amax(-1)[0]
    assert difference.nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


def test_bfloat16_is_near_float32():
    for layout in (GRID, ANT):
        agent, tokens = make_agent(layout), random_tokens(4, 20, layout.width)
        with torch.autocast("cpu", torch.bfloat16):
            low = agent(tokens)
        low.square().mean().backward()
        exact = full(agent, tokens)
        assert low.dtype == torch.float32 and agent.embed.weight.grad.dtype == torch.float32
        assert 1e-5 < (low - exact).abs().mean() < 0.03 * exact.std()


def test_every_parameter_is_used():
    agent = make_agent()
    agent(random_tokens(2, 12, GRID.width)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.parameters())


def test_weights_depend_on_the_seed_and_nobody_elses_numbers_change():
    before = torch.random.get_rng_state()
    one, same, other = (GLA(GLAConfig(GRID), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    tokens = random_tokens(1, 3, GRID.width)
    assert torch.equal(full(one, tokens), full(same, tokens))
    assert not torch.equal(full(one, tokens), full(other, tokens))
    # An untrained agent is close to uniform, yet not the same everywhere.
    probabilities = full(one, random_tokens(8, 64, GRID.width)).softmax(-1)
    assert 0.1 < probabilities.min() and probabilities.max() < 0.5 and probabilities.std() > 1e-3


def test_log_stds_are_clamped():
    agent = make_agent(ANT, log_std_min=-0.1, log_std_max=0.2)
    log_std = full(agent, random_tokens(4, 20, ANT.width)).chunk(2, -1)[1]
    assert log_std.min().item() == pytest.approx(-0.1) and log_std.max().item() == pytest.approx(
        0.2
    )


def test_wrong_shapes_are_named():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"\(2, 3, 7\) do not fit \('B', 'T', 25\)"):
        agent(torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"\(3, 25\) do not fit \(2, 25\)"):
        agent.step(torch.zeros(3, 25), agent.new_cache(2))
    with pytest.raises(ValueError, match="width=30"):
        GLAConfig(GRID, width=30, heads=4)
    with pytest.raises(ValueError, match="window must be a whole number of at least 1, not 0"):
        GLAConfig(GRID, window=0)
    with pytest.raises(ValueError, match="log_std_min=3.0"):
        GLAConfig(GRID, log_std_min=3.0)


def overfit(agent, target, steps):
    tokens = random_tokens(*target.shape[:2], agent.config.layout.width)
    optimizer, losses = torch.optim.Adam(agent.parameters(), 3e-3), []
    for _ in range(steps):
        outputs, discrete = agent(tokens), agent.config.layout.discrete
        loss = (kl(target, outputs, discrete) + kl(outputs, target, discrete)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_discrete_head_overfits():
    target = 2 * random_tokens(4, 16, 4, seed=1)
    losses = overfit(GLA(GLAConfig(GRID, width=32, window=8)), target, 150)
    assert losses[0] > 1.0 and losses[-1] < 0.02


def test_gaussian_head_overfits():
    target = torch.cat((random_tokens(4, 16, 8, seed=1), random_tokens(4, 16, 8, seed=2) / 2), -1)
    losses = overfit(GLA(GLAConfig(ANT, width=64, window=8)), target, 300)
    assert losses[0] > 5.0 and losses[-1] < 0.1


# Action distributions --------------------------------------------------------------------------


def torch_distribution(params, discrete):
    if discrete:
        return distributions.Categorical(logits=params)
    mean, log_std = params.chunk(2, -1)
    return distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("discrete", [True, False])
def test_distributions_agree_with_torch(discrete):
    p, q = 2 * random_tokens(2, 3, 50, 6).double()
    theirs_p, theirs_q = torch_distribution(p, discrete), torch_distribution(q, discrete)
    close = {"rtol": 1e-9, "atol": 1e-9}
    expected = distributions.kl_divergence(theirs_p, theirs_q)
    torch.testing.assert_close(kl(p, q, discrete), expected, **close)
    assert (kl(p, q, discrete) - kl(q, p, discrete)).abs().max() > 0.1
    torch.testing.assert_close(entropy(p, discrete), theirs_p.entropy(), **close)
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(3, 50, generator=generator)
    action = sample(p, noise if discrete else random_tokens(3, 50, 3), discrete)
    ours = log_probability(p, action, discrete)
    torch.testing.assert_close(ours, theirs_p.log_prob(action), **close)


def test_kl_by_hand():
    # Coins with 1/2 and 1/4 heads: 1/2 log 2 + 1/2 log 2/3, and 1/4 log 1/2 + 3/4 log 3/2.
    even, quarter = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    assert kl(even, quarter, True).item() == pytest.approx(0.143841, abs=1e-6)
    assert kl(quarter, even, True).item() == pytest.approx(0.130812, abs=1e-6)
    # N(1, 1) and N(0, 2^2): log 2 + (1 + 1) / 8 - 1/2, and -log 2 + (4 + 1) / 2 - 1/2.
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.log(2)])
    assert kl(one, two, False).item() == pytest.approx(0.443147, abs=1e-6)
    assert kl(two, one, False).item() == pytest.approx(1.306853, abs=1e-6)
    # Two independent dimensions, order (mean, mean, log_std, log_std), add up.
    both = torch.tensor([1.0, 0.0, 0.0, math.log(2)]), torch.tensor([0.0, 1.0, math.log(2), 0.0])
    assert kl(*both, False).item() == pytest.approx(0.443147 + 1.306853, abs=1e-6)
    # An action of probability zero: nothing from p, everything from q.
    never = torch.tensor([1.0, 0.0]).log()
    assert kl(never, even, True).item() == pytest.approx(math.log(2), abs=1e-6)
    assert kl(even, never, True).item() == math.inf


@pytest.mark.parametrize("discrete", [True, False])
def test_kl_by_monte_carlo(discrete):
    p, q = random_tokens(2, 6, seed=5) / 2
    generator, number = torch.Generator().manual_seed(0), 200_000
    many = p.expand(number, 6)
    noise = (
        torch.rand(number, generator=generator)
        if discrete
        else torch.randn(number, 3, generator=generator)
    )
    action = sample(many, noise, discrete)
    ratio = log_probability(many, action, discrete) - log_probability(
        q.expand(number, 6), action, discrete
    )
    error = ratio.std().item() / math.sqrt(number)
    assert abs(ratio.mean().item() - kl(p, q, discrete).item()) < 4 * error < 0.04


def test_discrete_samples_follow_the_distribution():
    logits, number = random_tokens(4, seed=2), 10_000
    # Evenly spread noise gives every action its share, to one part in `number`.
    spread = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    counts = sample(logits.expand(number, 4), spread, True).bincount(minlength=4)
    assert (counts - number * logits.double().softmax(-1)).abs().max() < 1
    noise = torch.from_numpy(np.random.default_rng(0).random(number))
    counts = sample(logits.expand(number, 4), noise, True).bincount(minlength=4)
    expected = number * logits.double().softmax(-1)
    expected = expected / expected.sum() * number
    assert stats.chisquare(counts, expected).pvalue > 0.01


def test_samples_never_have_probability_zero():
    params = torch.tensor([-math.inf, 0.3, -math.inf, 0.1, -math.inf]).expand(5, 5)
    noise = torch.tensor([0.0, 1e-12, 0.5, 1 - 1e-7, 1.0])  # float32 noise can round up to 1
    assert set(sample(params, noise, True).tolist()) == {1, 3}


def test_gaussian_samples_follow_the_distribution():
    params, number = torch.tensor([1.0, -2.0, 0.5, -1.0]), 20_000
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((number, 2)))
    actions = sample(params.expand(number, 4), noise, False).numpy()
    for dimension in range(2):
        law = stats.norm(params[dimension].item(), math.exp(params[2 + dimension].item()))
        assert stats.kstest(actions[:, dimension], law.cdf).pvalue > 0.01
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.03


# Saved agents ----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    agent = make_agent()
    agent.save_pretrained(tmp_path / "agent", {"task": "grid", "gap": 4})
    return tmp_path / "agent"


def same_weights(one, two):
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def edit_config(folder, edit):
    values = json.loads((folder / "config.json").read_text())
    edit(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("layout", [GRID, ANT])
def test_a_saved_agent_comes_back_bit_for_bit(tmp_path, layout):
    agent = make_agent(layout, heads=4, log_std_max=1.5)
    about = {"task": "Ant-v4", "gap": "max", "config": {"learning_rate": 1e-3}}
    agent.save_pretrained(tmp_path / "new" / "agent", about)
    again = GLA.from_pretrained(tmp_path / "new" / "agent")
    assert again.config == agent.config and again.about == about
    assert same_weights(agent, again)
    tokens = random_tokens(2, 12, layout.width)
    assert torch.equal(full(agent, tokens), full(again, tokens))
    files = {path.name for path in (tmp_path / "new" / "agent").iterdir()}
    assert files == {"config.json", "model.safetensors", "README.md"}
    assert "Ant-v4" in (tmp_path / "new" / "agent" / "README.md").read_text()
    # Saved once more, it keeps what it knows about itself.
    again.save_pretrained(tmp_path / "copy")
    assert GLA.from_pretrained(str(tmp_path / "copy")).about == about


def test_half_the_size_in_bfloat16(tmp_path):
    agent = make_agent()
    agent.save_pretrained(tmp_path / "full")
    agent.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    again = GLA.from_pretrained(tmp_path / "half")
    assert again.head.weight.dtype == torch.float32
    assert torch.equal(again.head.weight, agent.head.weight.bfloat16().float())


def test_what_is_wrong_is_named(saved, tmp_path):
    with pytest.raises(ValueError, match="no agent in .*nowhere: config.json is missing"):
        GLA.from_pretrained(tmp_path / "nowhere")
    original = (saved / "config.json").read_text()
    cases = [
        (lambda c: c.update(version=2), "format version 2, and this library reads 1"),
        (lambda c: c.update(format="GPT"), "does not describe an agent"),
        (lambda c: c.pop("config"), "does not describe an agent"),
        (lambda c: c["config"].update(depth=3), r"unknown fields .*\['depth'\]"),
        (lambda c: c["config"].pop("layout"), "layout"),
        (lambda c: c["config"]["layout"].update(colour=1), "colour"),
        (lambda c: c["config"].update(width="64"), "width must be a whole .*, not '64'"),
        (lambda c: c["config"].update(width=33), "width=33"),
        (
            lambda c: c["config"].update(mlp_ratio=2),
            r"blocks.0.down.weight is \(32, 128\) in .*model.safetensors, and \(32, 64\)",
        ),
        (lambda c: c["config"]["layout"].update(observation=8), r"embed.weight is \(32, 25\)"),
        (lambda c: c["config"].update(layers=3), "blocks.2.attention_norm.weight is None in"),
        (lambda c: c["config"].update(layers=1), "blocks.1.*, and None by"),
    ]
    for edit, message in cases:
        (saved / "config.json").write_text(original)
        edit_config(saved, edit)
        with pytest.raises(ValueError, match=message):
            GLA.from_pretrained(saved)
    for text in ("{", "[]"):
        (saved / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json"):
            GLA.from_pretrained(saved)


def test_damaged_weights_are_named(saved):
    content = (saved / "model.safetensors").read_bytes()
    for damaged in (b"", content[:5], content[:-1], b"x" * 100):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            GLA.from_pretrained(saved)


class Trap:
    "Leaves a file behind where it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(saved, tmp_path):
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing; pickled weights are never"):
        GLA.from_pretrained(saved)
    (saved / "pytorch_model.bin").rename(saved / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        GLA.from_pretrained(saved)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_saving_leaves_the_earlier_agent(saved, call):
    "Killed before the first rename, and between the two."
    earlier = GLA.from_pretrained(saved)
    child = os.fork()
    if child == 0:
        calls, rename = [], os.rename

        def killed(*paths):
            calls.append(paths)
            os._exit(9) if len(calls) == call else rename(*paths)

        os.rename = killed
        make_agent(seed=1).save_pretrained(saved, {"gap": 8})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    again = GLA.from_pretrained(saved)
    assert same_weights(again, earlier) and again.about == {"task": "grid", "gap": 4}
    make_agent(seed=1).save_pretrained(saved, {"gap": 8})  # the next save cleans up
    assert not same_weights(GLA.from_pretrained(saved), earlier)
    assert [path.name for path in saved.parent.iterdir()] == ["agent"]


def test_a_full_disk_leaves_the_earlier_agent(saved, monkeypatch):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    earlier = GLA.from_pretrained(saved)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="agent: no space is left on the device"):
            make_agent(seed=1).save_pretrained(saved)
    assert same_weights(GLA.from_pretrained(saved), earlier)
    assert [path.name for path in saved.parent.iterdir()] == ["agent"]


def test_other_peoples_files_are_not_replaced(saved):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(notes.txt\): use a new folder"):
        make_agent(seed=1).save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    with pytest.raises(OSError, match="a part of the path is a file"):
        make_agent().save_pretrained(saved / "notes.txt" / "agent")
    with pytest.raises(ValueError, match="notes.txt is a file"):
        make_agent().save_pretrained(saved / "notes.txt")
    assert (saved / "notes.txt").read_text() == "mine"


def test_the_hub_gets_the_same_files(saved, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **_):
            uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    GLA.from_pretrained(saved).push_to_hub("somebody/agent")
    assert uploaded == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert safetensors.torch.load(uploaded["model.safetensors"]).keys()


def test_configurations_survive_json():
    config = GLAConfig(ANT, heads=4, log_std_min=-3.0)
    assert config_from(json.loads(json.dumps(plain(config)))) == config


# Attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [60, 150])
def test_a_block_attends_compiled_as_it_does_by_pytorch(monkeypatch, window):
    agent = make_agent(window=window)
    tokens, block = random_tokens(2, 150, 32), agent.blocks[0]
    turns = agent.rotation(torch.arange(150))

    def both():
        "With the kernel, and without."
        for kernel in "10":
            monkeypatch.setenv("GLA_NB_KERNEL", kernel)
            yield block(tokens, turns, window).float()

    ours, exact = both()
    monkeypatch.setenv("GLA_NB_KERNEL", "1")
    if kernel_for(tokens):
        assert not torch.equal(ours, exact)  # they are two ways
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [((y - exact).norm() / exact.norm()).item() for y in both()]
    assert errors[0] < 2 * errors[1] < 0.03
