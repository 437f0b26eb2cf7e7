"""bench.gpu.normals: a million draws pass, and each fault of a generator is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.gpu import normals as many_normals
from bench.gpu.normals import LANES, Figure, Sums, blocks, figures, of_poisson

DRAWS, SIZE = 1 << 20, 1 << 17
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def judged(
    fault: Callable[[Tensor], Tensor] = lambda z: z, dtype: torch.dtype = torch.float64
) -> list[Figure]:
    sums = Sums(DEVICE)
    for block in blocks(DRAWS, DEVICE, dtype, size=SIZE):
        sums.take(fault(block))
    assert sums.draws == DRAWS
    return figures(sums)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_million_draws_are_sound(dtype: torch.dtype) -> None:
    found = judged(dtype=dtype)
    assert not [figure for figure in found if not figure.sound]
    # The standard errors are what they are called: none of the single ones would be this small by chance.
    single = [abs(f.value) for f in found if f.limit == many_normals.SINGLE]
    assert 0.4 < torch.tensor(single).median() < 1.1


def shifted(z: Tensor) -> Tensor:
    return z + 0.01


def wide(z: Tensor) -> Tensor:
    return z * 1.01


def uniform_grid(z: Tensor) -> Tensor:
    return (z * 32).round() / 32


def cut(z: Tensor) -> Tensor:
    return torch.where(z.abs() > 4, z.sign(), z)


def heavy(z: Tensor) -> Tensor:
    return torch.where(z.abs() > 3.99, z * 1.4, z)


def neighbours(z: Tensor) -> Tensor:
    flat = z.reshape(-1)
    mixed = (flat + 0.1 * flat.roll(1)) / math.sqrt(1.01)
    return torch.where(torch.arange(flat.numel(), device=z.device) % 2 == 0, flat, mixed).view_as(z)


def repeated_lane(z: Tensor) -> Tensor:
    rounds = z.reshape(-1, LANES).clone()
    rounds[:, 77] = rounds[:, 13]
    return rounds.view_as(z)


def shared_radius(z: Tensor) -> Tensor:
    rounds = z.reshape(-1, LANES).clone()
    rounds[:, 77] = rounds[:, 13] * rounds[:, 77].sign()
    return rounds.view_as(z)


def loud_lane(z: Tensor) -> Tensor:
    rounds = z.reshape(-1, LANES).clone()
    rounds[:, 5] *= 1.2
    return rounds.view_as(z)


def one_stream_for_two_parameters(z: Tensor) -> Tensor:
    return z[[0, 0, 2, 3]]


def one_stream_for_two_steps(z: Tensor) -> Tensor:
    return z[[0, 1, 0, 3]]


def not_a_number(z: Tensor) -> Tensor:
    return torch.cat((z[:, :-1], torch.full_like(z[:, :1], float("nan"))), 1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (shifted, "moment 1"),
        (wide, "moment 2"),
        (uniform_grid, "chi-square"),
        (cut, "tail beyond 4"),
        (heavy, "upper tail beyond 5"),
        (neighbours, "lag 1"),
        (repeated_lane, "lanes, largest"),
        (shared_radius, "squares of lanes, largest"),
        (loud_lane, "variance of lanes"),
        (one_stream_for_two_parameters, "streams: parameter 0, step 0; parameter 1, step 0"),
        (one_stream_for_two_steps, "streams: parameter 0, step 0; parameter 0, step 1"),
        (not_a_number, "moment 1"),
    ],
)
def test_faults_are_named(fault: Callable[[Tensor], Tensor], name: str) -> None:
    unsound = [figure.name for figure in judged(fault) if not figure.sound]
    assert any(name in one for one in unsound), unsound


def test_blocks_never_repeat_a_key_stream_and_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def record(n: int, *, nonce: bytes, counter: int, **_: object) -> Tensor:
        place = {(nonce, counter + i) for i in range(-(-n // 8))}
        assert not used & place
        used.update(place)
        return torch.zeros(n)

    monkeypatch.setattr(many_normals, "chacha20_normal", record)
    assert (
        sum(block.numel() for block in blocks(40 * 4 * 256, "cpu", torch.float64, size=256)) == 40 * 4 * 256
    )
    assert len(used) == 40 * 4 * 256 // 8


def test_rare_counts_are_judged_by_poissons_law() -> None:
    assert of_poisson(0, 0.4) == 1.0
    assert of_poisson(20, 0.4) < 1e-20
    assert of_poisson(0, 30.0) == pytest.approx(2 * math.exp(-30.0))
    exact = sum(math.exp(-7.5) * 7.5**k / math.factorial(k) for k in range(4))
    assert of_poisson(3, 7.5) == pytest.approx(2 * exact)


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert many_normals.main(["--device", "cpu", "--draws", "1e6", "--seconds", "60"]) == 0
    [path] = tmp_path.glob("*/many_normals.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent.name == found["about"]["slug"]
    assert found["draws"] >= 1e6
    assert found["largest"] > 4
    assert all(figure["sound"] for figure in found["figures"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_ten_billion_draws_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert many_normals.main(["--device", "cuda", "--draws", "1e10"]) == 0
