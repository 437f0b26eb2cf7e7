"""The noise source: RFC 8439's vectors, the normals' distribution out to the ends, and what is refused."""

import math
import os
from collections.abc import Iterator
from types import ModuleType

import mpmath
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpkernels.backends import native, registry
from dpkernels.backends.native_ops import chacha20 as native_chacha20
from dpkernels.ops import chacha20
from dpkernels.reference import chacha20 as reference

COUNTING_KEY = bytes(range(32))
ZERO_KEY, ZERO_NONCE = bytes(32), bytes(12)

# RFC 8439: (section, key, counter, nonce, keystream)
VECTORS = [
    (
        "2.3.2",
        COUNTING_KEY,
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "2.4.2",
        COUNTING_KEY,
        1,
        "000000000000004a00000000",
        "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf788a3b0aa372600a92b57974cded2b9334794cba40c6"
        "3e34cdea212c4cf07d41b769a6749f3f630f4122cafe28ec4dc47e26d4346d70b98c73f3e9c53ac40c5945398b6eda1a832c89c167"
        "eacd901d7e2bf363",
    ),
    (
        "A.1 #1",
        ZERO_KEY,
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "A.1 #2",
        ZERO_KEY,
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "A.1 #3",
        bytes(31) + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "A.1 #4",
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "A.1 #5",
        ZERO_KEY,
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]

has_native = native.library("cpu").handle is not None
needs_native = pytest.mark.skipif(
    not has_native, reason=native.library("cpu").reason or "the CPU library loads"
)
ISAS = ("baseline", "avx2", "avx512")
BACKENDS = [
    pytest.param(reference, id="reference"),
    pytest.param(native_chacha20, id="native", marks=needs_native),
]


def draw(n: int, nonce: int = 0, **options: object) -> Tensor:
    return chacha20.chacha20_normal(n, key=COUNTING_KEY, nonce=nonce.to_bytes(12, "little"), **options)  # type: ignore[arg-type]


@pytest.fixture
def any_isa() -> Iterator[None]:
    yield
    if has_native:
        native.set_isa("")


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("section", "key", "counter", "nonce", "expected"), VECTORS, ids=[v[0] for v in VECTORS]
)
def test_rfc_8439_vectors(backend, section, key, counter, nonce, expected) -> None:
    size = len(expected) // 2
    stream = backend.chacha20_keystream(key, counter, bytes.fromhex(nonce), -(-size // 64))
    assert bytes(stream.tolist())[:size].hex() == expected


def test_the_op_serves_the_rfc_vector() -> None:
    _, key, counter, nonce, expected = VECTORS[0]
    stream = chacha20.chacha20_keystream(key, counter, bytes.fromhex(nonce), 1)
    assert stream.dtype == torch.uint8
    assert bytes(stream.tolist()).hex() == expected


@needs_native
@pytest.mark.parametrize("blocks", [0, 1, 3, 17, 2049, 5000])
def test_native_and_reference_make_the_same_keystream(blocks) -> None:
    key, nonce = os.urandom(32), os.urandom(12)
    ours = native_chacha20.chacha20_keystream(key, 7, nonce, blocks)
    assert torch.equal(ours, reference.chacha20_keystream(key, 7, nonce, blocks))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_block_of_the_counter_is_served_and_not_wrapped(backend) -> None:
    last = backend.chacha20_keystream(ZERO_KEY, (1 << 32) - 2, ZERO_NONCE, 2)
    assert torch.equal(last[64:], backend.chacha20_keystream(ZERO_KEY, (1 << 32) - 1, ZERO_NONCE, 1))
    assert not torch.equal(last[64:], backend.chacha20_keystream(ZERO_KEY, 0, ZERO_NONCE, 1))
    with pytest.raises(ValueError, match="not wrapped"):
        backend.chacha20_keystream(ZERO_KEY, (1 << 32) - 2, ZERO_NONCE, 3)
    with pytest.raises(ValueError, match="not wrapped"):
        backend.chacha20_normal(17, key=ZERO_KEY, nonce=ZERO_NONCE, counter=(1 << 32) - 2)


# ---- the transform -------------------------------------------------------------------------------

WORDS = [0, 1, 2, 1 << 52, (1 << 53) - 1, (1 << 62) - 1, 1 << 62, (1 << 63) - 2, (1 << 63) - 1, 1 << 63]
WORDS += [(1 << 63) + 1, 3 << 62, 13043817825332782212, 13043817825332782213, (1 << 64) - 2, (1 << 64) - 1]
ANGLES = [(k << 61) + shift & (1 << 64) - 1 for k in range(8) for shift in (-1, 0, 1)]


def signed(words: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([[w - (1 << 64) if w >> 63 else w for w in pair] for pair in words])


def exact(w0: int, w1: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    with mpmath.workdps(60):
        radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(w0 + 1) / 2**64))
        turn = mpmath.mpf(w1) / 2**63
        return radius * mpmath.cospi(turn), radius * mpmath.sinpi(turn)


def worst_error(normals: Tensor, words: list[tuple[int, int]]) -> float:
    """Largest error relative to the exact value, in units of 2⁻⁵³; where that is 0, the value has to be 0."""
    worst = 0.0
    for got, pair in zip(normals.tolist(), words, strict=True):
        for z, target in zip(got, exact(*pair), strict=True):
            error = abs(mpmath.mpf(z) - target)
            worst = max(worst, float(error / abs(target) * 2**53) if target else float(error and math.inf))
    return worst


def check_extreme_words(backend: ModuleType) -> None:
    words = [(w0, w1) for w0 in WORDS for w1 in WORDS + ANGLES]
    normals = backend.box_muller(signed(words))
    assert torch.isfinite(normals).all()
    assert worst_error(normals, words) < 6
    corner = backend.box_muller(signed([(0, 0), ((1 << 64) - 1, 5), ((1 << 64) - 2, 0)]))
    assert corner[0, 0] == pytest.approx(math.sqrt(128 * math.log(2)), rel=1e-15)
    assert corner[0, 1] == 0
    assert corner[1].tolist() == [0, 0]
    assert corner[2, 0] == pytest.approx(2**-31.5, rel=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_box_muller_at_the_extreme_words(backend, any_isa) -> None:
    if backend is reference:
        check_extreme_words(backend)
        return
    for name in ISAS[: ISAS.index(native.isa()) + 1]:
        native.set_isa(name)
        check_extreme_words(backend)


@needs_native
def test_a_cruder_uniform_would_be_noticed() -> None:
    """The check above has teeth: u rounded to a double before the logarithm loses the small radii."""
    words = [((1 << 64) - 1000, 12345)]
    w0, w1 = words[0]
    radius, turn = math.sqrt(-2 * math.log((w0 + 1) * 2.0**-64)), w1 * 2.0**-63 * math.pi
    crude = torch.tensor([[radius * math.cos(turn), radius * math.sin(turn)]], dtype=torch.float64)
    assert worst_error(crude, words) > 1e6


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_are_box_muller_of_the_keystream(backend) -> None:
    nonce = bytes(range(12))
    stream = backend.chacha20_keystream(COUNTING_KEY, 3, nonce, 100)
    words = stream.view(torch.int64).reshape(-1, 2)
    normals = backend.chacha20_normal(795, key=COUNTING_KEY, nonce=nonce, counter=3)
    torch.testing.assert_close(normals, reference.box_muller(words).reshape(-1)[:795], rtol=1e-15, atol=0)
    unsigned = [(a % (1 << 64), b % (1 << 64)) for a, b in words[:397].tolist()]
    assert worst_error(normals[:794].reshape(-1, 2), unsigned) < 6
    single = backend.chacha20_normal(795, key=COUNTING_KEY, nonce=nonce, counter=3, dtype=torch.float32)
    assert torch.equal(single, normals.float())


@needs_native
def test_native_and_reference_normals_agree() -> None:
    options = {"key": os.urandom(32), "nonce": os.urandom(12), "counter": 11}
    ours, theirs = (module.chacha20_normal(200_003, **options) for module in (native_chacha20, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=0)


@needs_native
def test_same_bits_for_every_thread_count(torch_threads) -> None:
    drawn = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        drawn.append((draw(300_001), chacha20.chacha20_keystream(COUNTING_KEY, 0, ZERO_NONCE, 40_001)))
    assert all(torch.equal(n, drawn[0][0]) and torch.equal(k, drawn[0][1]) for n, k in drawn)


@needs_native
def test_same_bits_for_every_instruction_set(any_isa) -> None:
    drawn = []
    for name in ISAS[: ISAS.index(native.isa()) + 1]:
        native.set_isa(name)
        assert native.isa() == name
        drawn.append(draw(50_001))
    assert all(torch.equal(n, drawn[0]) for n in drawn)
    with pytest.raises(ValueError, match="isa"):
        native.set_isa("mmx")


# ---- the distribution ----------------------------------------------------------------------------


def tail_probability(threshold: float) -> float:
    return math.erfc(threshold / math.sqrt(2))


def assert_standard_normal(z: Tensor) -> None:
    """Moments and two-sided tails within 5 standard errors, for any sample of 10⁵ or more."""
    n = z.numel()
    for threshold in (0.5, 1, 2, 3, 4, 4.5, 5, 5.5, 6):
        p = tail_probability(threshold)
        for side, beyond in (("upper", z > threshold), ("lower", z < -threshold)):
            count, expected = int(beyond.sum()), n * p / 2
            slack = 5 * math.sqrt(expected) + 5
            assert abs(count - expected) < slack, f"{side} tail beyond {threshold}: {count}"
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}  # power: (mean, variance)
    for power, (mean, variance) in moments.items():
        assert abs(z.pow(power).mean().item() - mean) < 5 * math.sqrt(variance / n), f"moment {power}"


@pytest.mark.slow
def test_four_million_draws_are_standard_normal() -> None:
    z = draw(4_000_000)
    assert_standard_normal(z)
    # Kolmogorov-Smirnov over all draws; 1.95/√n is its 0.1 % point. The key is fixed: no flakes.
    ordered = z.sort().values
    cdf = torch.special.ndtr(ordered)
    rank = torch.arange(1, z.numel() + 1, dtype=torch.float64) / z.numel()
    assert max((cdf - rank).abs().max().item(), (cdf - rank + 1 / z.numel()).abs().max().item()) < 1.95 / 2000
    cosine, sine = z[0::2], z[1::2]
    assert abs((cosine * sine).mean().item()) < 5 / math.sqrt(cosine.numel())
    assert abs((cosine.square() * sine.square()).mean().item() - 1) < 5 * math.sqrt(8 / cosine.numel())
    for lag in (1, 2, 7, 8, 9, 128, 16384):
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 5 / math.sqrt(z.numel() - lag), f"lag {lag}"


def test_the_distribution_check_notices_faults() -> None:
    """A tail that ends at 4 σ, a scale off by 0.2 % and a mean off by 0.003 σ all fail it."""
    z = draw(4_000_000, nonce=1)
    with pytest.raises(AssertionError, match="tail"):
        assert_standard_normal(torch.where(z.abs() > 4.0, z.sign() * 1.0, z))
    with pytest.raises(AssertionError, match=r"moment 2|tail"):
        assert_standard_normal(z * 1.002)
    with pytest.raises(AssertionError, match=r"moment 1|tail"):
        assert_standard_normal(z + 0.003)


@pytest.mark.parametrize("change", ["key", "nonce", "counter"])
def test_streams_are_independent(change) -> None:
    n = 400_000
    first = draw(n)
    if change == "key":
        other = chacha20.chacha20_normal(n, key=COUNTING_KEY[::-1], nonce=ZERO_NONCE)
    elif change == "nonce":
        other = draw(n, nonce=1)
    else:
        other = draw(n, counter=n // 8)
    correlation = (first * other).mean().item()
    assert abs(correlation) < 5 / math.sqrt(n)
    assert not torch.isin(first[:1000], other).any()
    p_value = stats.ks_2samp(first[:50_000].numpy(), other[:50_000].numpy()).pvalue
    assert p_value > 1e-3


def test_a_later_counter_continues_the_stream() -> None:
    assert torch.equal(draw(800)[400:], draw(400, counter=50))


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": bytes(31)}, ValueError, "key: expected 32 bytes; given 31"),
        ({"key": "k" * 32}, TypeError, "key: expected bytes; given str"),
        ({"nonce": bytes(8)}, ValueError, "nonce: expected 12 bytes; given 8"),
        ({"counter": -1}, ValueError, "counter: expected 0"),
        ({"counter": 1 << 32}, ValueError, "counter: expected 0"),
        ({"counter": (1 << 32) - 1, "n": 9}, ValueError, "n=9: needs 2 blocks .* 1 remain before"),
        ({"n": (1 << 35) + 1}, ValueError, "remain before the 32-bit counter repeats"),
        ({"n": -1}, ValueError, "n: expected 0 or more; given -1"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype: expected float64 or float32"),
    ],
)
def test_refused_normals(arguments, error, message) -> None:
    given = {"n": 4, "key": COUNTING_KEY, "nonce": ZERO_NONCE} | arguments
    with pytest.raises(error, match=message):
        chacha20.chacha20_normal(given.pop("n"), **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((COUNTING_KEY, 0, ZERO_NONCE, -1), "blocks: expected 0 or more; given -1"),
        ((COUNTING_KEY, 5, ZERO_NONCE, 1 << 32), "blocks=4294967296: needs"),
        ((bytes(33), 0, ZERO_NONCE, 1), "key: expected 32 bytes; given 33"),
    ],
)
def test_refused_keystreams(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        chacha20.chacha20_keystream(*arguments)


def test_no_message_shows_the_key() -> None:
    secret = b"\xde\xad\xbe\xef" * 7
    with pytest.raises(ValueError, match="key") as caught:
        chacha20.chacha20_normal(1, key=secret, nonce=ZERO_NONCE)
    assert "dead" not in str(caught.value)
    assert repr(secret)[2:10] not in str(caught.value)


@needs_native
def test_the_library_itself_refuses_what_the_op_refuses() -> None:
    """Called past the op, the C ABI still checks, and says why."""
    with pytest.raises(ValueError, match="counter is -1"):
        native_chacha20.chacha20_normal(8, key=ZERO_KEY, nonce=ZERO_NONCE, counter=-1)
    with pytest.raises(ValueError, match="normals are F32 or F64"):
        native_chacha20.chacha20_normal(8, key=ZERO_KEY, nonce=ZERO_NONCE, dtype=torch.float16)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(backend, n) -> None:
    normals = backend.chacha20_normal(n, key=COUNTING_KEY, nonce=ZERO_NONCE)
    assert normals.shape == (n,)
    assert normals.dtype == torch.float64
    whole = backend.chacha20_normal(64, key=COUNTING_KEY, nonce=ZERO_NONCE)
    assert torch.equal(normals, whole[:n])


def test_the_registry_names_a_backend_for_both_ops() -> None:
    rows = {row.op: row for row in registry.explain(("cpu",)) if row.op.startswith("chacha20")}
    assert set(rows) == {"chacha20_keystream", "chacha20_normal"}
    assert all(row.backend == "native" or row.reason for row in rows.values())
