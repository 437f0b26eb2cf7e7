"""The report says what the record and the ledger say and nothing private; it refuses contradictions."""

import html.parser
import re
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.report import plots
from asr_finetune.report.report import ReportError, write_report
from dpkernels.privacy import LedgerError, epsilon
from dpkernels.rounding import shown_epsilon
from tests.asr_finetune.report.report_run import (
    DELTA,
    HISTORY,
    RATE,
    SECRETS,
    SIGMA,
    STEPS,
    record,
    write_ledger,
    write_run,
)


class _Text(html.parser.HTMLParser):
    """What a reader sees: the text outside <style> and of the plots nothing (their glyphs are outlines)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("style", "svg"):
            self.hidden.append(tag)
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if self.hidden and self.hidden[-1] == tag:
            self.hidden.pop()

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def visible(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return re.sub(r"\s+", " ", " ".join(parser.parts))


def leaks(page: str, secrets: list[float]) -> list[tuple[float, str]]:
    """(secret, token) for every number on the page that is a secret, also rounded, or as a percentage."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "", visible(page))  # hashes hold any two digits sooner or later
    tokens = re.findall(r"\d+\.\d+|\d+", text)
    found = []
    for secret in secrets:
        for value in (secret, 100 * secret):
            for token in tokens:
                places = len(token.partition(".")[2])
                digits = token.replace(".", "").lstrip("0")
                if len(digits) >= 2 and f"{value:.{places}f}" == token:
                    found.append((secret, token))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    out = write_report(write_run(folder / "clinic"), folder / "made" / "report.html")
    return out.read_text()


def test_says_what_was_spent(page: str) -> None:
    text = visible(page)
    spent = epsilon(SIGMA, RATE, STEPS, DELTA)
    for part in (
        f"({shown_epsilon(spent)}, 1 × 10⁻⁵)-differential privacy",
        "add or remove one example",
        "privacy loss distributions (PLD)",
        f"{shown_epsilon(epsilon(SIGMA, RATE, STEPS, DELTA, accountant='rdp'))} by RDP",
        "Poisson: each recording joins a step independently with probability 0.05",
        f"Steps accounted for {STEPS}",
        f"ε from the ledger {shown_epsilon(spent)}",
        "Expected batch size 100 recordings",
        "Units, N 2 000 recordings",
        "It is treated as public",
        "Target ε 3: training stops",
        "ab" * 32,
        "43.0 % 40.0 % to 46.0 % 31.0 %",
        "21.0 % 18.0 % to 24.0 % 13.0 %",
        "17.0 % 14.0 % to 20.0 % 10.0 %",
        "removed 51 % of the word errors",
        "must be public or used with consent",
        "The search for settings",
        "Test data: test.jsonl, split clean; normalize basic.",
        "validation data (public.jsonl), with",
        "Machine cuda (NVIDIA X100), Linux 6.1",
        "dp-accounting 0.6.0",
    ):
        assert part in text.replace("\N{NARROW NO-BREAK SPACE}", " "), part


def test_speakers_are_sampled_and_their_recordings_clipped(tmp_path: Path) -> None:
    adjacency = "add or remove one speaker"
    values = record(unit="speaker", max_examples_per_speaker=3, adjacency=adjacency)
    run = write_run(tmp_path / "run", values)
    (run / "ledger.jsonl").unlink()
    write_ledger(run / "ledger.jsonl", STEPS, SIGMA, sensitivity=3.0000003, unit="speaker")
    text = visible(write_report(run, tmp_path / "report.html").read_text())
    for part in (
        "each speaker joins a step independently with probability 0.05",
        "each recording's gradient clipped",
        "Sensitivity of the sum 3.0000003 (3 · C plus an allowance for rounding)",
        "Expected batch size at most 100 recordings",
    ):
        assert part in text, part


def test_stands_alone(page: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*""", page)
    assert "url(http" not in page
    assert "@import" not in page
    assert page.count("<svg ") == 2
    assert "recordings/&lt;clinic&gt; &amp; co" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert set(references) <= set(identifiers)


def test_head_of_the_ledger(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    last = (run / "ledger.jsonl").read_text().splitlines()[-1]
    assert (
        re.search('"sha256": "([0-9a-f]{64})"', last).group(1)
        in write_report(run, tmp_path / "r.html").read_text()
    )


def test_no_private_figure(page: str) -> None:
    assert leaks(page, SECRETS) == []


def test_unknown_figures_in_the_record_are_not_shown(tmp_path: Path) -> None:
    """A later version that writes losses into run.json must not make them public."""
    values = record()
    for section in ("privacy", "data", "model", "method", "training"):
        values[section]["loss"] = HISTORY[0]["loss"]
    values["history"] = HISTORY
    values["curve"][0]["loss"] = HISTORY[1]["loss"]
    shown = write_report(write_run(tmp_path / "run", values), tmp_path / "r.html").read_text()
    assert leaks(shown, SECRETS) == []
    assert "loss 3" not in visible(shown)


@pytest.mark.parametrize("shown", ["38.7194", "38.72", "39", "88.7 %", "0.887", "67.4"])
def test_a_leak_would_be_found(page: str, shown: str) -> None:
    """The planted fault: the checker sees a private figure however it is written."""
    assert leaks(page.replace("<h2>The record", f"<p>{shown}</p><h2>The record"), SECRETS)


def test_not_private_is_never_opened(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report(run, tmp_path / "a.html").read_text()
    for path in (run / "not_private").iterdir():
        path.unlink()
    (run / "not_private").rmdir()
    assert write_report(run, tmp_path / "b.html").read_text() == first


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"steps": STEPS - 1}, "privacy.steps=5, the ledger 6"),
        ({"noise_multiplier": 2.0}, "noise_multiplier=2.0, the ledger 1.1"),
        ({"epsilon": 0.5}, "epsilon=0.5, the ledger's steps spend 1.1"),
        ({"epsilon": None}, "epsilon=None"),
        ({"dataset_size": 4000}, "dataset_size=4000"),
        ({"unit": "speaker"}, "unit='speaker', the ledger 'example'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_record_that_contradicts_the_ledger_is_refused(tmp_path: Path, claim: dict, message: str) -> None:
    run = write_run(tmp_path / "run", record(**claim))
    with pytest.raises(ReportError, match=re.escape(message)):
        write_report(run, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_tampered_ledger_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(LedgerError):
        write_report(run, tmp_path / "r.html")


def test_no_ledger_and_no_run_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "ledger.jsonl").unlink()
    with pytest.raises(ReportError, match="is missing"):
        write_report(run, tmp_path / "r.html")
    (run / "run.json").unlink()
    with pytest.raises(ReportError, match=r"no run\.json"):
        write_report(run, tmp_path / "r.html")


def test_automatic_clipping_is_said(tmp_path: Path) -> None:
    for clipping, said in (("automatic", "scaled to just below C"), ("flat", "gradient clipped")):
        run = write_run(tmp_path / clipping, record(clipping=clipping))
        text = visible(write_report(run, tmp_path / "r.html").read_text())
        assert said in text


def test_run_without_privacy_says_so(tmp_path: Path) -> None:
    absent = ("epsilon", "delta", "target_epsilon", "max_grad_norm", "unit", "accountant", "noise_multiplier")
    absent += ("adjacency", "sampling", "epsilon_pld", "epsilon_rdp", "steps", "sample_rate", "dataset_size")
    run = write_run(tmp_path / "run", record(enabled=False, **dict.fromkeys(absent)))
    text = visible(write_report(run, tmp_path / "r.html").read_text())
    assert "This model is not private." in text
    assert "after, NOT private" in text
    assert "differential privacy promises" not in text
    assert "ε =" not in text


def test_run_without_noise_says_so(tmp_path: Path) -> None:
    values = record(noise_multiplier=0.0, epsilon=None, epsilon_pld=None, epsilon_rdp=None)
    values["evaluation"] = dict.fromkeys(values["evaluation"])
    page = write_report(write_run(tmp_path / "run", values, sigma=0.0), tmp_path / "r.html").read_text()
    text = visible(page)
    assert "This model is not private." in text
    assert "ε is infinite" in text
    assert "Key figures" not in page  # there are none


@pytest.mark.parametrize("pieces", [True, False])
def test_the_unit_is_a_piece_where_recordings_were_cut(tmp_path: Path, pieces: bool) -> None:
    values = record()
    values["data"]["pieces"] = pieces
    text = visible(write_report(write_run(tmp_path / "run", values), tmp_path / "r.html").read_text())
    for said in ("a piece of a recording with its transcript", "each piece joins a step", "one piece"):
        assert (said in text) is pieces


@pytest.mark.slow
def test_careless_delta_is_marked(tmp_path: Path) -> None:
    values = record(delta=1e-3, epsilon=epsilon(SIGMA, RATE, STEPS, 1e-3))
    text = visible(write_report(write_run(tmp_path / "run", values), tmp_path / "r.html").read_text())
    assert "is not below 1/N" in text


def test_plots_refuse_to_plot_nothing() -> None:
    for function in (plots.wer_over_steps, plots.epsilon_over_steps, plots.wer_against_epsilon):
        with pytest.raises(ValueError, match="nothing to plot"):
            function([])


def test_wer_against_epsilon_shows_every_run() -> None:
    results = [
        {"epsilon": e, "wer": 0.1 + 0.1 / e + 0.01 * seed, "seed": seed} for e in (1, 4, 8) for seed in (0, 1)
    ]
    figure = plots.wer_against_epsilon(results, non_private=[0.08, 0.1], zero_shot=0.4, title="demo")
    (axes,) = figure.axes
    points = [(x, y) for line in axes.lines if line.get_marker() == "o" for x, y in line.get_xydata()]
    assert sorted(points) == sorted((r["epsilon"], r["wer"]) for r in results)
    means = next(line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) == 3)
    assert list(means.get_ydata()) == pytest.approx([0.205, 0.13, 0.1175])
    labels = {text.get_text() for text in axes.texts}
    assert {"before training 40.0%", "without privacy 9.0%"} <= labels
    assert axes.get_ylim()[0] == 0


def test_svg_is_the_same_for_the_same_figure() -> None:
    curve = record()["curve"]
    one, other = (plots.svg(plots.wer_over_steps(curve), "WER") for _ in range(2))
    assert one == other
    assert "currentColor" in one
    assert plots.svg(plots.wer_over_steps(curve), "another") != one


def test_incomplete_record_is_refused(tmp_path: Path) -> None:
    values = record()
    del values["data"]["fingerprint"]
    with pytest.raises(ReportError, match="fingerprint"):
        write_report(write_run(tmp_path / "run", values), tmp_path / "r.html")


def made(folder: Path, values: dict[str, Any]) -> str:
    page = write_report(write_run(folder / "run", values), folder / "r.html").read_text()
    return visible(page).replace("\N{NARROW NO-BREAK SPACE}", " ")


def test_the_second_opinion_is_the_other_accountants(tmp_path: Path) -> None:
    pld, rdp = (epsilon(SIGMA, RATE, STEPS, DELTA, accountant=name) for name in ("pld", "rdp"))
    text = made(tmp_path, record(accountant="rdp", epsilon=rdp))
    assert f"({shown_epsilon(rdp)}, 1 × 10⁻⁵)-differential privacy" in text
    assert f"Second opinion ε = {shown_epsilon(pld)} by PLD, a tighter bound" in text
    assert "privacy loss distributions (PLD), whichever accountant the run used" in text


def test_its_own_choices_of_delta_are_not_warned_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_report(write_run(tmp_path / "run"), tmp_path / "r.html")
    assert not [warning for warning in recwarn if "delta=" in str(warning.message)]


@pytest.mark.parametrize(("dtype", "said"), [("float32", False), ("bfloat16", True)])
def test_half_precision_is_not_covered(tmp_path: Path, dtype: str, said: bool) -> None:
    values = record()
    values["model"]["dtype"] = dtype
    assert ("The stated sensitivity does not cover this effect" in made(tmp_path, values)) is said


@pytest.mark.parametrize(("low", "said"), [(0.41, True), (0.18, False)])
def test_overlapping_intervals_are_said(tmp_path: Path, low: float, said: bool) -> None:
    values = record()
    values["evaluation"]["after"]["wer_ci"] = [0.1, low]
    assert ("The intervals before and after overlap" in made(tmp_path, values)) is said


def test_how_it_was_scored(tmp_path: Path) -> None:
    values = record(target_epsilon=None)
    values["scoring"] = {"normalize": "english", "restrict_to": ["one", "two"]}
    values["data"]["test_shares_training"] = True
    text = made(tmp_path, values)
    assert "normalize english, restrict to one, two." in text
    assert "Target ε none: the noise multiplier was given" in text
    assert "The test data holds training recordings." in text


def test_the_curve_starts_where_before_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float | None] = []
    original = plots.wer_over_steps

    def wer_over_steps(curve: Any, *, before: float | None = None) -> Any:
        starts.append(before)
        return original(curve, before=before)

    monkeypatch.setattr(plots, "wer_over_steps", wer_over_steps)
    for number, start in enumerate((None, 0.43)):
        made(tmp_path / str(number), {**record(), "curve_start": start})
    assert starts == [None, 0.43]


def test_failed_starts_in_the_ledger_do_not_count(tmp_path: Path) -> None:
    """A start that ended before its first step leaves a header, of another mechanism perhaps."""
    run = write_run(tmp_path / "run")
    (run / "ledger.jsonl").unlink()
    write_ledger(run / "ledger.jsonl", 0, 7.0, sensitivity=3.0)
    write_ledger(run / "ledger.jsonl", STEPS, SIGMA)
    text = visible(write_report(run, tmp_path / "r.html").read_text())
    assert f"verified, {STEPS} steps" in text
    assert "Sensitivity of the sum 1.0000001" in text


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("delta", "said"), [(4e-5, "is well below 1/N"), (4.5e-4, "but close to it"), (5e-4, "is not below 1/N")]
)
def test_delta_is_judged_against_one_over_n(tmp_path: Path, delta: float, said: str) -> None:
    text = made(tmp_path, record(delta=delta, epsilon=epsilon(SIGMA, RATE, STEPS, delta)))
    judgements = ("is well below 1/N", "but close to it", "is not below 1/N")
    assert [judgement in text for judgement in judgements] == [judgement == said for judgement in judgements]


def test_what_was_left_out_is_said_and_of_private_data_not_counted(tmp_path: Path) -> None:
    values = record()
    values["data"]["filters"] = ["0.05 to 30 s", "corpus clinic", "chosen speakers only (data.speakers)"]
    values["evaluation"]["after"]["left_out"] = {"too long": 3, "no such file": 1}
    text = made(tmp_path / "private", values)
    for part in (
        "Filters 0.05 to 30 s; corpus clinic; chosen speakers only (data.speakers)",
        "How many is an exact figure of the private data",
        "Left out of the test data: 3 × too long, 1 × no such file.",
        "150 of 154",
    ):
        assert part in text, part
    absent = ("epsilon", "delta", "target_epsilon", "max_grad_norm", "unit", "accountant", "noise_multiplier")
    absent += ("adjacency", "sampling", "epsilon_pld", "epsilon_rdp", "steps", "sample_rate", "dataset_size")
    values["privacy"] |= {"enabled": False, **dict.fromkeys(absent)}
    values["data"]["left_out"] = {"too short": 7}
    assert "Left out 7 × too short" in made(tmp_path / "plain", values)


def test_what_an_auditor_can_verify_is_said(page: str) -> None:
    text = visible(page)
    assert "asr-finetune verify RUN" in text
    assert "From no file: that this program, unchanged, made the run" in text
