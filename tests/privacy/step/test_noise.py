"""privacy.md 7-9: σS on the sum, once a step, on everything trained; float64; from a cryptographic
generator."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.privacy import PrivacyEngine
from dpkernels.privacy.rng import streams as noise_module
from dpkernels.privacy.rng.model_draws import SecretSeeds
from dpkernels.privacy.rng.streams import PURPOSE_INCLUSION, PURPOSE_NOISE, SecretStream, grid_of, nonce
from dpkernels.privacy.step import optimizer as optimizer_module
from dpkernels.privacy.step.fused import Release
from dpkernels.privacy.step.optimizer import DPOptimizer
from tests.privacy.private_run import KEY, Run, losses_of, private_run, train

SIGMA, CLIP, EXPECTED = 1.5, 0.25, 8


def noise_in(run: Run, *parts: tuple[int, ...]) -> dict[str, Tensor]:
    """What a released gradient holds beyond the clipped sum, in units of σS."""
    indices = [index for part in parts for index in part]
    total = run.clipped_sum(indices)
    released = run.release(*parts)
    scale = SIGMA * run.optimizer.sensitivity
    return {name: (gradient * EXPECTED - total[name]) / scale for name, gradient in released.items()}


def check_noise(run: Run, *parts: tuple[int, ...]) -> None:
    """Some noise on every trained parameter, of standard deviation 1 on each large one and on all
    together."""
    found = noise_in(run, *parts)
    for name, values in found.items():
        assert values.abs().max() > 0, f"{name}: no noise"
        if values.numel() >= 24:
            slack = 5 / math.sqrt(2 * values.numel())
            assert abs(float(values.square().mean().sqrt()) - 1) < slack, f"{name}: wrong deviation"
    everything = torch.cat([values.flatten() for values in found.values()])
    deviation = float(everything.square().mean().sqrt())
    assert abs(deviation - 1) < 4 / math.sqrt(2 * everything.numel()), f"deviation {deviation}"
    assert abs(float(everything.mean())) < 4 / math.sqrt(everything.numel())


def a_run(**arguments: object) -> Run:
    return private_run(sigma=SIGMA, clip=CLIP, batch_size=EXPECTED, **arguments)  # type: ignore[arg-type]


def a_fixed_run(**arguments: object) -> Run:
    """With the tests' key: statistics that hold once hold always."""
    return a_run(key=KEY, **arguments)


# The ways in which one logical step can look; the noise must be the same in all.
BATCHES = {
    "one micro-batch": ((0, 1, 2, 3, 4),),
    "four micro-batches": ((0, 1), (2,), (3, 4), (5,)),
    "empty": (),
}


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
@pytest.mark.parametrize("parts", BATCHES.values(), ids=BATCHES)
def test_noise_is_sigma_on_the_sum_once_a_step(parts: tuple[tuple[int, ...], ...], unfused: bool) -> None:
    check_noise(a_fixed_run(unfused=unfused), *parts)


# --- planted faults of line 7 and 8, each with the batch that shows it; those of the fused step are in test_fused.py


Gradients = dict[nn.Parameter, Tensor]


def normals(stream: SecretStream, index: int, draw: int, like: Tensor) -> Tensor:
    """Those that a step's noise is made of, for one parameter."""
    secrets = stream.noise_secrets([index], draw=draw)
    flat = ops.chacha20_normal(like.numel(), key=secrets["key"], nonce=secrets["nonces"][0])
    return flat.view(like.shape)


def skip_without_gradient(self: DPOptimizer, draw: int) -> Gradients:
    seen = {p for p in self._trained if self._batch.of(p).any()}
    return {p: g if p in seen else torch.zeros_like(g) for p, g in ORIGINAL(self, draw).items()}


def skip_empty(self: DPOptimizer, draw: int) -> Gradients:
    found = ORIGINAL(self, draw)
    return found if self._batch.examples else {p: torch.zeros_like(g) for p, g in found.items()}


def on_the_mean(self: DPOptimizer, draw: int) -> Gradients:
    found = {}
    for index, p in enumerate(self._trained):
        noise = self.noise_multiplier * self.sensitivity * normals(self._stream, index, draw, p)
        found[p] = (self._batch.of(p) / self.expected_batch_size + noise).float()
    return found


def by_actual_size(self: DPOptimizer, draw: int) -> Gradients:
    ratio = self.expected_batch_size / max(self._batch.examples, 1)
    return {p: g * ratio for p, g in ORIGINAL(self, draw).items()}


def twice(self: DPOptimizer, draw: int) -> Gradients:
    found = ORIGINAL(self, draw)
    for index, (p, gradient) in enumerate(found.items()):
        noise = normals(self._stream, index, draw + 1000, p)
        gradient += (self.noise_multiplier * self.sensitivity * noise / self.expected_batch_size).float()
    return found


def without_multiplier(self: DPOptimizer, draw: int) -> Gradients:
    return {
        p: (
            (self._batch.of(p) + normals(self._stream, index, draw, p) * self.sensitivity)
            / self.expected_batch_size
        ).float()
        for index, p in enumerate(self._trained)
    }


ORIGINAL = DPOptimizer._noised_gradients


@pytest.mark.parametrize(
    ("fault", "batch"),
    [
        (skip_without_gradient, "one micro-batch"),
        (skip_without_gradient, "empty"),
        (skip_empty, "empty"),
        (on_the_mean, "one micro-batch"),
        (by_actual_size, "four micro-batches"),
        (by_actual_size, "empty"),
        (twice, "one micro-batch"),
        (without_multiplier, "one micro-batch"),
    ],
)
def test_planted_noise_faults_are_caught(
    fault: Callable, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DPOptimizer, "_noised_gradients", fault)
    with pytest.raises(AssertionError):
        check_noise(a_fixed_run(unfused=True), *BATCHES[batch])


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_planted_noise_per_micro_batch_is_caught(unfused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_fixed_run(unfused=unfused)
    optimizer, add = run.optimizer, run.optimizer._batch.add

    def noisy(records: list, factors: Tensor) -> None:
        add(records, factors)
        for index, parameter in enumerate(optimizer._trained):
            extra = normals(optimizer._stream, index, optimizer._stream.next_draw(), parameter)
            optimizer._batch.of(parameter).add_(optimizer.noise_multiplier * optimizer.sensitivity * extra)

    monkeypatch.setattr(optimizer._batch, "add", noisy)
    with pytest.raises(AssertionError):
        check_noise(run, *BATCHES["four micro-batches"])


def test_the_divisor_is_the_expected_batch_size() -> None:
    run = private_run(sigma=0, clip=1e-2, batch_size=8)
    total = run.clipped_sum((0, 1, 2))
    released = run.release((0, 1, 2))
    torch.testing.assert_close(released["last.weight"], total["last.weight"] / 8, rtol=1e-4, atol=1e-9)


# --- 8: fp32 or better, also with bf16 parameters


def grid_share(values: Tensor) -> float:
    """Share of entries that bfloat16 holds exactly."""
    return float((values == values.bfloat16().double()).double().mean())


def total_before_rounding(run: Run, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The noised and divided sum, as it is just before it is rounded to the parameter's dtype."""
    kept: list[Tensor] = []
    original = ops.noise_sums

    def spy(sums: list[Tensor], **noise: Any) -> None:
        original(sums, **noise)
        kept.extend(total.clone() for total in sums if total.shape == run.model.unused.weight.shape)

    monkeypatch.setattr(ops, "noise_sums", spy)
    run.release((0, 1, 2))
    monkeypatch.undo()
    return kept[-1] * run.optimizer._release.divisor


def test_noise_and_sums_are_float64_with_bf16_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(dtype=torch.bfloat16, unfused=True)
    run.optimizer._release = Release(1.0, grid_of(1.0), 8)  # powers of two: bfloat16's own grid stays visible
    total = total_before_rounding(run, monkeypatch)
    assert total.dtype == torch.float64
    # The grid leaves 12 or 13 binary places, of which bfloat16 has 8: one entry in seven or so fits by chance.
    assert grid_share(total) < 0.3
    run.optimizer.begin_logical_batch(3)
    run.optimizer.backward(losses_of(run.model, run.data[[0, 1, 2]]))
    assert {total.dtype for total in run.optimizer._batch.sums.values()} == {torch.float64}


def plain_noise(
    monkeypatch: pytest.MonkeyPatch, normals_of: Callable[[Tensor, bytes, bytes], Tensor]
) -> None:
    """The step's noise made of other normals: of a sum, the key and its nonce."""

    def noise_sums(sums: list[Tensor], *, key: bytes, nonces: list[bytes], **noise: float) -> None:
        for total, stream in zip(sums, nonces, strict=True):
            total += normals_of(total, key, stream) * noise["noise_scale"]
            total.div_(noise["grid"]).round_().mul_(noise["grid"] / noise["divisor"])

    monkeypatch.setattr(ops, "noise_sums", noise_sums)


def test_planted_bf16_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(total: Tensor, key: bytes, stream: bytes) -> Tensor:
        exact = ops.chacha20_normal(total.numel(), key=key, nonce=stream)
        return exact.view(total.shape).bfloat16().double()

    plain_noise(monkeypatch, coarse)
    run = private_run(sigma=1.0, clip=1.0, dtype=torch.bfloat16, unfused=True)
    run.optimizer._release = Release(
        1.0, grid_of(1.0), 8
    )  # a power of two: bfloat16's own grid stays visible
    with monkeypatch.context() as inner:
        assert grid_share(total_before_rounding(run, inner)) > 0.9


@pytest.mark.parametrize("scale", [1.0, 0.3, 1.5, 7e-9, 3e12, 2.0**-30])
def test_the_grid_is_a_power_of_two_far_below_the_noise(scale: float) -> None:
    grid = grid_of(scale)
    assert math.frexp(grid)[0] == 0.5
    assert scale / 2**13 < grid <= scale / 2**12
    assert grid_of(0.0) == 0


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_what_is_released_lies_on_the_grid(unfused: bool) -> None:
    """Whatever the sum's own last bits: releases of two batches have the same set of possible values."""
    run = a_run(unfused=unfused)
    grid = grid_of(SIGMA * run.optimizer.sensitivity)
    for parts in (((0, 1, 2),), ()):
        for name, gradient in run.release(*parts).items():
            steps = gradient * EXPECTED / grid
            assert torch.equal(steps, steps.round()), name


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_planted_release_off_the_grid_is_caught(unfused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "grid_of", lambda scale: grid_of(scale) / 2**10)
    run = a_run(unfused=unfused)
    monkeypatch.undo()
    gradient = run.release((0, 1, 2))["last.weight"]
    steps = gradient * EXPECTED / grid_of(SIGMA * run.optimizer.sensitivity)
    assert not torch.equal(steps, steps.round())


# --- 9: where the noise comes from


def draw(stream: SecretStream, *, index: int = 0, number: int = 1, count: int = 64) -> Tensor:
    return normals(stream, index, number, torch.empty(count))


def bytes_of_torch(count: int) -> bytes:
    return torch.randint(0, 256, (count,), dtype=torch.uint8).numpy().tobytes()


def check_fresh(first: SecretStream, second: SecretStream) -> None:
    assert not torch.equal(draw(first), draw(second)), "two share their stream"


def check_engines_keys_are_fresh() -> None:
    first, second = PrivacyEngine(), PrivacyEngine()
    check_fresh(first._noise_stream, first._sampling_stream)
    check_fresh(first._noise_stream, second._noise_stream)
    check_fresh(first._sampling_stream, second._sampling_stream)


def test_every_engine_draws_a_fresh_key() -> None:
    check_engines_keys_are_fresh()


def test_planted_fixed_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module.os, "urandom", lambda count: bytes(count))
    with pytest.raises(AssertionError):
        check_engines_keys_are_fresh()


@pytest.mark.parametrize("shared", ["noise and sampling", "noise of all", "sampling of all"])
def test_planted_keys_that_are_shared_are_caught(shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, of_all = PrivacyEngine.__init__, SecretStream()

    def share(self: PrivacyEngine, **arguments: object) -> None:
        made(self, **arguments)  # type: ignore[arg-type]
        if shared == "noise and sampling":
            self._sampling_stream = self._noise_stream
        else:
            setattr(self, "_noise_stream" if shared == "noise of all" else "_sampling_stream", of_all)

    monkeypatch.setattr(PrivacyEngine, "__init__", share)
    with pytest.raises(AssertionError, match="share"):
        check_engines_keys_are_fresh()


def check_seeds_touch_nothing(unfused: bool) -> None:
    """Two runs, their global generators seeded alike once they are made (make_private seeds them anew)."""
    noise, joined = [], []
    for _ in range(2):
        run = a_run(unfused=unfused)
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        noise.append(run.release(())["unused.weight"])
        joined.append([run.loader._sampler.draw().tolist() for _ in range(10)])
    assert not torch.equal(*noise), "a seed fixes the noise"
    assert joined[0] != joined[1], "a seed fixes who is sampled"


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_torch_seeds_do_not_touch_noise_or_sampling(unfused: bool) -> None:
    check_seeds_touch_nothing(unfused)


def test_planted_noise_of_torchs_generator_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_noise(monkeypatch, lambda total, key, stream: torch.randn(total.shape, dtype=torch.float64))
    monkeypatch.setattr(SecretSeeds, "renew", lambda self: None)  # each batch is seeded anew
    monkeypatch.setattr(SecretSeeds, "replaced", lambda self: [])
    with pytest.raises(AssertionError, match="fixes the noise"):
        check_seeds_touch_nothing(unfused=True)


@pytest.mark.parametrize("source", [np.random.bytes, random.randbytes, bytes_of_torch])
def test_planted_sampling_by_a_seeded_generator_is_caught(
    source: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        SecretStream, "words", lambda self, count, **_: np.frombuffer(source(8 * count), dtype=np.uint64)
    )
    monkeypatch.setattr(SecretSeeds, "renew", lambda self: None)  # each batch is seeded anew
    monkeypatch.setattr(SecretSeeds, "replaced", lambda self: [])
    with pytest.raises(AssertionError, match="fixes who is sampled"):
        check_seeds_touch_nothing(unfused=False)


def check_streams_distinct() -> None:
    with pytest.warns(UserWarning, match="tests"):
        stream = SecretStream(KEY)
    streams = [draw(stream, index=i, number=n) for i in range(3) for n in range(1, 4)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert not torch.equal(one, other), "two parameters or steps share their noise"


def test_no_two_purposes_share_a_number() -> None:
    numbers = [value for name, value in vars(noise_module).items() if name.startswith("PURPOSE_")]
    assert len(numbers) >= 6
    assert len(set(numbers)) == len(numbers)


def test_streams_are_distinct_by_parameter_and_step() -> None:
    check_streams_distinct()
    fields = {nonce(p, i, d, r) for p in (1, 2) for i in (0, 1, 256) for d in (1, 2, 2**40) for r in (0, 1)}
    assert len(fields) == 36
    assert nonce(PURPOSE_NOISE, 0, 1) != nonce(PURPOSE_INCLUSION, 0, 1)
    for bad in ((1, 2**32, 1), (1, 0, 2**48), (256, 0, 1), (1, -1, 1)):
        with pytest.raises(ValueError, match="nonce"):
            nonce(*bad)


def test_planted_nonce_without_parameter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        noise_module, "nonce", lambda purpose, index, number, rank=0: nonce(purpose, 0, number, rank)
    )
    with pytest.raises(AssertionError):
        check_streams_distinct()


def check_rank_streams() -> None:
    """Under one key, what a test may fix, ranks draw differently; no shift of the counter makes one the other's."""
    streams = [
        ops.chacha20_normal(4096, key=KEY, nonce=noise_module.nonce(PURPOSE_NOISE, 3, 7, rank))
        for rank in (0, 1, 2)
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert not torch.isin(one, other).any(), "two ranks share their noise"
            assert abs(float((one * other).mean())) < 5 / 64


def test_ranks_draw_from_streams_of_their_own() -> None:
    check_rank_streams()


def test_planted_rank_streams_that_coincide_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        noise_module, "nonce", lambda purpose, index, number, rank=0: nonce(purpose, index, number, 0)
    )
    with pytest.raises(AssertionError, match="two ranks"):
        check_rank_streams()


def check_no_repeat_after_rollback(run: Run) -> None:
    state = run.engine.state_dict()
    first = run.release(())["unused.weight"]
    run.engine.load_state_dict(state)
    again = run.release(())["unused.weight"]
    assert not torch.equal(first, again), "a step repeated after a rollback repeats its noise"


def test_a_rollback_never_repeats_noise() -> None:
    check_no_repeat_after_rollback(a_run())


def test_planted_draw_by_step_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecretStream, "next_draw", lambda self: 1)
    with pytest.raises(AssertionError):
        check_no_repeat_after_rollback(a_run())


def test_a_fixed_key_warns_and_repeats() -> None:
    with pytest.warns(UserWarning, match="noise_key"):
        PrivacyEngine(noise_key=KEY)
    first, second = (a_run(key=KEY).release(())["last.weight"] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="32 bytes"):
        PrivacyEngine(noise_key=b"short")


def test_a_fork_draws_its_own_key() -> None:
    stream = SecretStream()
    stream.next_draw()
    before = stream._key
    stream._pid -= 1  # what a child process sees
    stream.next_draw()
    assert stream._key != before
    fixed = a_run(key=KEY).engine._noise_stream
    fixed._pid -= 1
    with pytest.raises(RuntimeError, match="forked"):
        fixed.next_draw()


def check_keys_stay_secret(run: Run, ledger: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(run, 2)
    buffer = io.BytesIO()
    torch.save([run.engine.state_dict(), run.optimizer.state_dict(), run.model.state_dict()], buffer)
    texts = [
        buffer.getvalue(),
        ledger.read_bytes(),
        caplog.text.encode(),
        repr([run.engine, run.optimizer, run.loader, vars(run.engine), vars(run.optimizer)]).encode(),
        json.dumps(run.engine.state_dict()).encode(),
    ]
    for stream in (run.engine._noise_stream, run.engine._sampling_stream):
        for form in (stream._key, stream._key.hex().encode(), repr(stream._key).encode()):
            assert not any(form in text for text in texts), "a key leaked"


def test_no_key_in_checkpoints_ledger_log_or_repr(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with caplog.at_level(0):
        check_keys_stay_secret(a_run(ledger=ledger), ledger, caplog)


def test_planted_key_in_repr_is_caught(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SecretStream, "__repr__", lambda self: f"SecretStream({self._key!r})")
    with pytest.raises(AssertionError):
        check_keys_stay_secret(a_run(ledger=tmp_path / "l"), tmp_path / "l", caplog)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_keys_are_never_pickled_or_copied(duplicate: Callable) -> None:
    run = a_run()
    for holder in (run.engine._noise_stream, run.optimizer, run.engine):
        with pytest.raises(TypeError, match=r"never|secret|key"):
            duplicate(holder)
