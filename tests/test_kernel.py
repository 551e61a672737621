"The compiled attention: what attention is by definition, from any thread, on any machine."

import ctypes
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gla_nb import kernel as module
from gla_nb.agent import GLA
from gla_nb.kernel import (
    FLAGS,
    SOURCE,
    build,
    compiled_attention,
    fastest,
    kernel_for,
    load,
    run_compiler,
    share_heads,
)
from gla_nb.projections import TokenLayout
from gla_nb.train import divergences, new_optimizer, total
from gla_nb.transformer import GLAConfig, causal_attention, plain_attention, rotate, rotations
from tests.test_train import tiny

compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX") or "c++"), reason="there is no C++ compiler"
)
KINDS = {
    "float32": (torch.float32, True),
    "bfloat16, vectors": (torch.bfloat16, True),
    "bfloat16, tiles": (torch.bfloat16, False),
}


@pytest.fixture(params=KINDS)
def kind(request):
    "A type of elements, and attention over them by a kernel."
    dtype, plain = KINDS[request.param]
    try:
        kernel = load(dtype, plain)
    except OSError as error:
        pytest.skip(str(error))  # the system lends no tiles
    if not plain and not kernel.tiled:
        pytest.skip("this processor has no tiles")
    return dtype, partial(compiled_attention, kernel)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "Nothing is compiled yet."
    fastest.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GLA_NB_KERNEL", raising=False)
    yield tmp_path / "gla_nb"
    fastest.cache_clear()


def inputs(batch, length, heads, size, turned, dtype=torch.float32, seed=0):
    "Queries, keys and values, rotations, and a gradient of the output."
    made = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, length, 3, heads, size, generator=made).to(dtype)
    grad = torch.randn(batch, length, heads, size, generator=made).to(dtype)
    return qkv, rotations(torch.arange(length), 2 * turned, 100.0), grad


def definition(qkv, rotation, window):
    "Attention term by term, in float64."
    q, k, v = (part.transpose(1, 2) for part in qkv.double().unbind(2))
    turns = F.pad(rotation.to(torch.complex128), (0, q.shape[-1] // 2 - rotation.shape[1]), value=1)
    q, k = (
        torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        for part in (q, k)
    )
    past = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill((past < 0) | (past >= window), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def with_gradient(attention, qkv, rotation, grad, window):
    "Output, and the gradients of queries, keys and values, each flat and in float64."
    qkv = qkv.clone().requires_grad_()
    y = attention(qkv, rotation, window)
    y.backward(grad.to(y))
    return [part.flatten().double() for part in (y.detach(), *qkv.grad.unbind(2))]


def error(ours, exact):
    return ((ours - exact).norm() / exact.norm().clamp(min=1e-9)).item()


SHAPES = [  # batch, length, heads, size, pairs that are turned, window
    (1, 1, 1, 2, 1, 1),
    (2, 7, 1, 32, 16, 3),
    (3, 63, 2, 16, 8, 63),
    (2, 64, 1, 8, 4, 64),
    (1, 65, 3, 40, 20, 1000),
    (2, 128, 2, 24, 6, 64),
    (1, 129, 2, 96, 8, 65),
    (1, 200, 1, 64, 32, 1),
    (2, 256, 2, 32, 16, 63),
    (1, 300, 1, 128, 64, 129),
    (1, 321, 2, 34, 0, 128),
    (1, 130, 2, 32, 16, 34),
    (1, 100, 1, 32, 16, 2),
    (1, 1030, 1, 32, 16, 400),
]


@compiler
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_by_definition(kind, shape):
    "Blocks that are full, begun and of one token; windows that end within a block and between two."
    dtype, attention = kind
    *sizes, window = shape
    qkv, rotation, grad = inputs(*sizes, dtype)
    ours = with_gradient(attention, qkv, rotation, grad, window)
    exact = with_gradient(definition, qkv, rotation, grad, window)
    for each, expected in zip(ours, exact, strict=True):
        if expected.norm() < 1e-9:  # a query that sees one key has no gradient
            assert each.norm() < 1e-6 * grad.double().norm()
        else:
            assert error(each, expected) < (1e-6 if dtype == torch.float32 else 6e-3)


def pytorch_in_bfloat16(qkv, rotation, window):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    q, k = (rotate(part, rotation).to(v) for part in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@compiler
def test_bfloat16_errs_no_more_than_its_digits(kind):
    "No further from the exact result than PyTorch's attention is when all of it is in bfloat16."
    dtype, attention = kind
    if dtype == torch.float32:
        pytest.skip("not of bfloat16")
    qkv, rotation, grad = inputs(3, 300, 2, 16, 8, dtype)
    exact, theirs, ours = (
        torch.cat(with_gradient(f, 2 * qkv, rotation, grad, 300))
        for f in (definition, pytorch_in_bfloat16, attention)
    )
    assert error(ours, exact) < 1.2 * error(theirs, exact) < 0.02


@compiler
def test_no_number_of_threads_changes_a_bit(kind):
    dtype, attention = kind
    qkv, rotation, grad = inputs(3, 150, 3, 32, 16, dtype)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            found.append(torch.cat(with_gradient(attention, qkv, rotation, grad, 100)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


@compiler
def test_sequences_and_the_future_do_not_matter_to_each_other(kind):
    dtype, attention = kind
    qkv, rotation, _ = inputs(2, 150, 2, 32, 16, dtype)
    other = qkv.clone()
    other[1], other[0, 90:] = 7, -3
    y, changed = (attention(part, rotation, 60) for part in (qkv, other))
    assert torch.equal(y[0, :90], changed[0, :90])
    assert not torch.equal(y[0, 90], changed[0, 90])
    other = qkv.clone()
    other[0, 0, 1:] = 50.0  # what has left the window is forgotten, to the last bit
    y, changed = (attention(part, rotation, 60) for part in (qkv, other))
    assert torch.equal(y[0, 60:], changed[0, 60:]) and not torch.equal(y[0, 59], changed[0, 59])


@compiler
def test_large_scores_and_numbers_that_are_none(kind):
    dtype, attention = kind
    qkv, rotation, grad = inputs(1, 100, 1, 32, 16, dtype)
    qkv[:, :, :2] *= 1000  # one key takes all
    parts = with_gradient(attention, qkv, rotation, grad, 100)
    assert all(part.isfinite().all() for part in parts)
    assert error(parts[0], with_gradient(definition, qkv, rotation, grad, 100)[0]) < 1e-2
    qkv[:, 70, 2] = torch.nan  # is not hidden from those who see it
    y = attention(qkv, rotation, 100)
    assert y[0, :64].isfinite().all() and y[0, 70:].isnan().all()


@compiler
def test_it_takes_views_and_leaves_its_input_alone(kind):
    dtype, attention = kind
    qkv, rotation, grad = inputs(2, 70, 2, 16, 8, dtype)
    kept = qkv.clone()
    there = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert not there.is_contiguous()
    ours, expected = (
        torch.cat(with_gradient(attention, x, rotation, g, 70))
        for x, g in ((there, grad[:1].expand_as(grad)), (qkv, grad[:1].repeat(2, 1, 1, 1)))
    )
    assert torch.equal(ours, expected) and torch.equal(qkv, kept)


TILES = r"""
struct alignas(64) tiles { unsigned char palette, start, zeros[14]; unsigned short bytes[16];
    unsigned char rows[16]; };
extern "C" void configure() {
    tiles ours = {}; ours.palette = 1; ours.bytes[3] = 24; ours.rows[3] = 5;
    asm volatile("ldtilecfg %0" ::"m"(ours)); }
extern "C" int configured() {
    tiles now; asm volatile("sttilecfg %0" : "=m"(now)); return now.bytes[3] * 100 + now.rows[3]; }
extern "C" void release() { asm volatile("tilerelease"); }
"""


@compiler
def test_tiles_are_configured_afterwards_as_they_were_before(tmp_path):
    "Of whoever else multiplies in this thread."
    try:
        kernel = load(torch.bfloat16)
    except OSError as error:
        pytest.skip(str(error))
    if not kernel.tiled:
        pytest.skip("this processor has no tiles")
    run_compiler("-o", str(tmp_path / "tiles.so"), given=TILES)
    tiles = ctypes.CDLL(str(tmp_path / "tiles.so"))
    qkv, rotation, _ = inputs(1, 70, 1, 16, 8, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tiles.configure()
    try:
        compiled_attention(kernel, qkv, rotation, 70)
        assert tiles.configured() == 24 * 100 + 5
        tiles.release()
        compiled_attention(kernel, qkv, rotation, 70)
        assert tiles.configured() == 0
    finally:
        tiles.release()
        torch.set_num_threads(before)


@compiler
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_narrower_vectors(fresh, monkeypatch, march):
    "16 and 32 bytes: of processors that have no wider ones."
    if platform.machine() != "x86_64":
        pytest.skip("not a processor of this kind")
    flags = [f"-march={march}" if flag.startswith("-march") else flag for flag in FLAGS]
    monkeypatch.setattr(module, "FLAGS", tuple(flags))
    for dtype, allowed in (torch.float32, 1e-6), (torch.bfloat16, 6e-3):
        attention = partial(compiled_attention, load(dtype, plain=True))
        for *sizes, window in (2, 70, 2, 24, 6, 40), (1, 129, 1, 96, 8, 200):
            qkv, rotation, grad = inputs(*sizes, dtype)
            parts = [with_gradient(f, qkv, rotation, grad, window) for f in (attention, definition)]
            assert error(*(torch.cat(part) for part in parts)) < allowed


@compiler
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**32 + 5, 10**12, 2**64 + 3])
def test_windows_of_any_length(kind, window):
    dtype, attention = kind
    qkv, rotation, grad = inputs(1, 70, 1, 16, 8, dtype)
    ours, whole = (with_gradient(attention, qkv, rotation, grad, w) for w in (window, 70))
    assert all(map(torch.equal, ours, whole))


@compiler
@pytest.mark.parametrize("shape", [(0, 9, 3, 1, 16), (2, 0, 3, 1, 16), (2, 9, 3, 0, 16)], ids=str)
def test_nothing_at_all(kind, shape):
    dtype, attention = kind
    qkv = torch.zeros(shape, dtype=dtype, requires_grad=True)
    y = attention(qkv, rotations(torch.arange(shape[1]), 16, 100.0), 4)
    y.sum().backward()
    assert y.shape == (*shape[:2], *shape[3:]) and not qkv.grad.any()


@compiler
def test_gradients_under_checkpointing_and_other_defaults(kind):
    "What was saved may come back at other addresses; memory is of the kernel's own types."
    dtype, attention = kind
    qkv, rotation, grad = inputs(2, 90, 2, 16, 8, dtype)
    expected = with_gradient(attention, qkv, rotation, grad, 50)
    again = partial(checkpoint, attention, use_reentrant=False)
    assert all(map(torch.equal, with_gradient(again, qkv, rotation, grad, 50), expected))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: x.numpy(force=True).copy() if x.dtype != torch.bfloat16 else x.clone(),
        torch.as_tensor,
    ):
        assert all(map(torch.equal, with_gradient(attention, qkv, rotation, grad, 50), expected))
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        y = attention(qkv, rotation.to(torch.complex128), 50)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(y.flatten().double(), expected[0])


@compiler
def test_after_an_interrupt_threads_still_own_what_they_write_to():
    "A share that fails does not free the memory of one that goes on."
    started, go_on, seen = threading.Event(), threading.Event(), []

    def run(first, last, memory):
        if first:
            started.wait(10)
            raise KeyboardInterrupt
        started.set()
        go_on.wait(10)
        memory.fill_(7)
        seen.append(memory)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threading.Timer(0.3, go_on.set).start()
        with pytest.raises(KeyboardInterrupt):
            share_heads(run, 2, 1000)
        assert (seen[0] == 7).all() and len(seen[0]) == 1000
    finally:
        torch.set_num_threads(before)


@compiler
def test_a_process_that_was_forked_has_threads_of_its_own():
    qkv, rotation, _ = inputs(2, 70, 2, 16, 8)
    attention = partial(compiled_attention, load(torch.float32))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = attention(qkv, rotation, 70)  # the threads are there
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.apply_async(fork_attends, (qkv.numpy(), rotation.numpy())).get(60)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.from_numpy(found), expected)


def fork_attends(qkv, rotation):
    qkv, rotation = torch.from_numpy(qkv), torch.from_numpy(rotation)
    return compiled_attention(load(torch.float32), qkv, rotation, 70).numpy()


@compiler
@pytest.mark.parametrize(
    "qkv, rotation, window",
    [
        ((2, 9, 3, 16), (9, 8), 4),
        ((2, 9, 2, 1, 16), (9, 8), 4),
        ((2, 9, 3, 1, 16), (8, 8), 4),
        ((2, 9, 3, 1, 16), (9, 9), 4),
        ((2, 9, 3, 1, 16), (9, 8), 0),
    ],
    ids=str,
)
def test_other_shapes_are_refused(qkv, rotation, window):
    "They would be read beyond their ends."
    with pytest.raises(ValueError, match=r"give \(B, T, 3, H, D\)"):
        compiled_attention(
            load(torch.float32),
            torch.zeros(qkv),
            torch.zeros(rotation, dtype=torch.complex64),
            window,
        )
    with pytest.raises(ValueError, match=r"give \(B, T, 3, H, D\)"):
        plain_attention(torch.zeros(qkv), torch.zeros(rotation, dtype=torch.complex64), window)


@compiler
def test_other_types_are_refused():
    qkv, rotation, _ = inputs(1, 9, 1, 8, 4)
    kernel = load(torch.float32)
    for other in (qkv.bfloat16(), qkv.double(), qkv.to("meta")):
        with pytest.raises(ValueError, match="a kernel for torch.float32 on a CPU"):
            compiled_attention(kernel, other, rotation, 9)
    with pytest.raises(ValueError, match="complex"):
        compiled_attention(kernel, qkv, rotation.real, 9)


@compiler
def test_second_derivatives_are_refused():
    qkv, rotation, _ = inputs(1, 9, 1, 8, 4)
    y = compiled_attention(load(torch.float32), qkv.requires_grad_(), rotation, 9)
    (slope,) = torch.autograd.grad(y.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# What is used, and when -------------------------------------------------------------------------


@compiler
def test_it_is_compiled_once_and_whole(fresh, monkeypatch):
    first = build(BFLOAT16=0)
    assert list(fresh.iterdir()) == [first]  # and nothing beside it
    made = first.stat().st_mtime_ns
    assert build(BFLOAT16=0) == first and first.stat().st_mtime_ns == made
    assert build(BFLOAT16=1) != first
    monkeypatch.setattr(module, "SOURCE", SOURCE + "\n// changed\n")
    assert build(BFLOAT16=0) not in (first, None)
    monkeypatch.setattr(module, "SOURCE", SOURCE + "\nthis is no C++\n")
    with pytest.raises(OSError, match="failed:"):
        build(BFLOAT16=0)
    assert len(list(fresh.iterdir())) == 3


@compiler
def test_processes_may_compile_at_once(fresh):
    code = "import torch; from gla_nb.kernel import load; print(load(torch.float32).element)"
    calls = [subprocess.Popen([sys.executable, "-c", code], stdout=-1) for _ in range(3)]
    assert [call.communicate(timeout=120)[0] for call in calls] == [b"torch.float32\n"] * 3
    assert len(list(fresh.iterdir())) == 1


@compiler
def test_a_processor_that_lends_no_tiles_uses_vectors(fresh, monkeypatch):
    asked = []

    def refuse(element, plain=False):
        asked.append(plain)
        if not plain:
            raise OSError("the system lends this process no tiles")
        return load(element, plain)

    monkeypatch.setattr(module, "load", refuse)
    assert not fastest(torch.bfloat16).tiled and asked == [False, True]


@compiler
def test_compilers_with_options(monkeypatch):
    found = shlex.split(os.environ.get("CXX") or "c++")
    monkeypatch.setenv("CXX", shlex.join([*found, "-DFROM_CXX=12"]))
    assert "#define FROM_CXX 12" in run_compiler("-dM", "-E", given="")


@compiler
def test_without_a_home(fresh, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME to a folder: no home"):
        assert fastest(torch.float32) is None


@pytest.mark.parametrize(
    "name, why", [("no-such-compiler", "there is no C++"), ("false", "failed")]
)
def test_without_a_compiler_pytorch_attends(fresh, monkeypatch, name, why):
    monkeypatch.setenv("CXX", name)
    qkv, rotation, _ = inputs(2, 70, 2, 16, 8)
    with pytest.warns(UserWarning, match=f"attention is not compiled.*{why}"):
        y = causal_attention(qkv, rotation, 30)
    assert torch.equal(y, plain_attention(qkv, rotation, 30))
    with warnings.catch_warnings():  # it says so once
        warnings.simplefilter("error")
        assert kernel_for(qkv) is None
    assert not fresh.exists()


@compiler
def test_what_has_no_kernel(fresh, monkeypatch):
    qkv, rotation, _ = inputs(2, 70, 2, 16, 8)
    assert kernel_for(qkv) is not None and kernel_for(qkv) is kernel_for(qkv)
    assert kernel_for(qkv.bfloat16()) not in (None, kernel_for(qkv))
    assert kernel_for(qkv.double()) is None and kernel_for(qkv.to("meta")) is None
    torch.testing.assert_close(
        causal_attention(qkv, rotation, 30), plain_attention(qkv, rotation, 30), atol=1e-5, rtol=0
    )
    monkeypatch.setenv("GLA_NB_KERNEL", "0")
    assert kernel_for(qkv) is None


@compiler
def test_no_warning_of_a_compiler():
    for defines in ("-DBFLOAT16=0",), ("-DBFLOAT16=1",), ("-DBFLOAT16=1", "-DPLAIN=1"):
        strict = ("-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-S", "-o", "/dev/null")
        run_compiler(*strict, *defines, given=SOURCE)
    assert "-O3" in FLAGS


@compiler
@pytest.mark.parametrize("matching", [0, 2], ids=["plain layers", "equivariant layers"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_agents_learn_the_same_with_and_without(monkeypatch, matching, bfloat16):
    "Loss and weights after some steps on sequences of two windows and a half."
    layout = TokenLayout(64, 16, False, projection="orthonormal" if matching else None)
    config = GLAConfig(layout, layers=2, width=32, heads=2, window=60, matching=matching)
    made = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 150, layout.width, generator=made)
    action = torch.randn(2, 150, 16, generator=made)
    teacher = torch.cat([action, torch.zeros_like(action)], -1)
    found, weights = {}, []
    for kernel in ("0", "1"):
        monkeypatch.setenv("GLA_NB_KERNEL", kernel)
        agent, losses = GLA(config, seed=1), []
        optimizer = new_optimizer(tiny(), agent)
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = agent(tokens).float()[..., :32]
            loss = total(divergences(tiny(), False, output, teacher, action)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        found[kernel] = torch.stack(losses)
        weights.append(torch.cat([part.detach().flatten() for part in agent.parameters()]))
    assert found["0"][-1] < found["0"][0] - 0.01
    torch.testing.assert_close(*found.values(), rtol=2e-3 if bfloat16 else 1e-5, atol=0)
    assert not torch.equal(*weights)  # they are two ways
