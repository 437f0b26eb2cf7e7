"""The command line: plan, train, evaluate, report, synthesise, demo.

Modules that load torch are imported when a command runs.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.config.yaml_io import load_yaml, overridden, template
from asr_finetune.messages import expected, show_warning, tell

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune speech recognisers with differential privacy.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"asr-finetune {metadata.version('dpkernels')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What comes before a command."""


_Configuration = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file, or a recipe's name; flags and --set go over it.",
        show_default=False,
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the configuration; may be repeated."),
]
_Model = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id of the recogniser.", show_default=False)
]
_Method = Annotated[str | None, typer.Option(help="full, lora, bitfit, dp_rp or head.", show_default=False)]
_Epsilon = Annotated[float | None, typer.Option(help="Target ε.", show_default=False)]
_Delta = Annotated[
    float | None, typer.Option(help="δ, well below 1 / number of examples.", show_default=False)
]
_Noise = Annotated[float | None, typer.Option("--noise-multiplier", help="σ by hand.", show_default=False)]
_Batch = Annotated[
    int | None, typer.Option("--batch-size", help="Expected logical batch.", show_default=False)
]
_Physical = Annotated[
    int | None, typer.Option("--physical-batch-size", help="Utterances in one forward.", show_default=False)
]
_Steps = Annotated[int | None, typer.Option(help="Logical steps.", show_default=False)]
_Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", show_default=False)]


@app.command()
def plan(
    examples: Annotated[
        int | None, typer.Option(help="Number of training examples (or speakers).", show_default=False)
    ] = None,
    epsilon: _Epsilon = None,
    delta: _Delta = None,
    batch_size: _Batch = None,
    steps: _Steps = None,
    noise_multiplier: _Noise = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Capacity of truncated Poisson batches.", show_default=False)
    ] = None,
    config: _Configuration = None,
    model: _Model = None,
    method: _Method = None,
    physical_batch_size: _Physical = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="With --model: length of an utterance; else 12.3, or the model's window.", show_default=False
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB: find strategy and micro-batch for such a GPU, here, instead of measuring this machine.",
            show_default=False,
        ),
    ] = None,
    settings: _Settings = None,
) -> None:
    """How much noise a target ε needs; with a model, how long a run takes and how much memory.

    Without a model nothing is loaded: the noise multiplier σ by PLD and by RDP, the sampling rate, and ε on
    the way. With --model or --config, a few micro-batches of synthetic audio are timed on this machine: the
    training alone, without reading audio, self-check and evaluations. With --gpu-memory as well, nothing is
    timed: a private step is rehearsed without data or GPU, and the largest micro-batch of each strategy shown,
    with and without activation checkpointing.

    **Examples**

    - `asr-finetune plan --examples 281241 --epsilon 10 --delta 3.52e-6 --batch-size 4096 --steps 2000`
    - `asr-finetune plan --config run.yaml`
    - `asr-finetune plan --examples 28000 --epsilon 8 --delta 1e-6 --batch-size 512 --steps 500 --model
      openai/whisper-tiny.en`
    - `asr-finetune plan --config run.yaml --gpu-memory 80`
    """
    from asr_finetune.planning import command as planning

    flags = {
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "privacy.noise_multiplier": noise_multiplier,
        "privacy.max_batch_size": max_batch_size,
        "train.batch_size": batch_size,
        "train.steps": steps,
        "train.physical_batch_size": physical_batch_size,
        "model.name": model,
        "method.kind": method,
    }
    values = load_yaml(config) if config is not None else None
    tables = planning.run(
        values, flags, settings or (), examples=examples, seconds=seconds, gpu_memory=gpu_memory
    )
    for table in tables:
        Console().print(table)


@app.command()
def train(
    config: _Configuration = None,
    model: _Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "--train", help="Training data: folder, manifest or `datasets` id.", show_default=False
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Data for error rates before and after.", show_default=False)
    ] = None,
    valid: Annotated[str | None, typer.Option(help="Public data for the curve.", show_default=False)] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder that everything is written to.", show_default=False),
    ] = None,
    method: _Method = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA.", show_default=False)] = None,
    epsilon: _Epsilon = None,
    delta: _Delta = None,
    noise_multiplier: _Noise = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clipping bound C.", show_default=False)] = None,
    unit: Annotated[
        str | None, typer.Option(help="What is protected: example or speaker.", show_default=False)
    ] = None,
    batch_size: _Batch = None,
    physical_batch_size: _Physical = None,
    steps: _Steps = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Initialisation; never noise or sampling.", show_default=False)
    ] = None,
    device: _Device = None,
    not_private: Annotated[
        bool, typer.Option("--not-private", help="Ordinary training, for comparison. No guarantee.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished --not-private run to put beside this one.", show_default=False
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a run that is in the output folder.")] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check data, model, memory and accounting; write and spend nothing."),
    ] = False,
    settings: _Settings = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration, every key explained, and stop.")
    ] = False,
) -> None:
    """Fine-tune a recogniser with a stated (ε, δ), evaluate it before and after, and write an auditable
    record.

    A run that was killed or interrupted continues when the same command is given again; what was spent is in
    the output folder's ledger and is never forgotten. Sampling and noise use fresh keys from the operating
    system.

    **Examples**

    - `asr-finetune train --print-config > run.yaml`
    - `asr-finetune train --config run.yaml --epsilon 8 --delta 1e-6 --output runs/first`
    - `asr-finetune train --config run.yaml --not-private --output runs/plain`
    - `asr-finetune train --config run.yaml --set train.steps=60 --set data.speakers=[anna,ben]`
    - `asr-finetune train --config wav2vec2_bert_lora --train LIBRISPEECH --test LIBRISPEECH --dry-run`
    """
    flags = {
        "model.name": model,
        "model.device": device,
        "data.train": data,
        "data.test": test,
        "data.valid": valid,
        "method.kind": method,
        "method.rank": rank,
        "privacy.epsilon": epsilon,
        "privacy.delta": delta,
        "privacy.noise_multiplier": noise_multiplier,
        "privacy.max_grad_norm": max_grad_norm,
        "privacy.unit": unit,
        "privacy.enabled": False if not_private else None,
        "train.batch_size": batch_size,
        "train.physical_batch_size": physical_batch_size,
        "train.steps": steps,
        "train.learning_rate": learning_rate,
        "train.seed": seed,
        "output": output,
    }
    values = load_yaml(config) if config is not None else {}
    given = overridden(values, flags, settings or ())
    if print_config:
        typer.echo(template(given), nl=False)
        return
    loaded = Config.from_dict(given)
    loaded.check_trainable()
    if dry_run:
        from asr_finetune.planning.dry_run import check_run, check_table

        checks = check_run(loaded, resume=resume, compare=compare, progress=not quiet)
        Console().print(check_table(checks))
        raise typer.Exit(0 if all(check.passed for check in checks) else 1)
    from asr_finetune.training.run import train as run_training

    run_training(loaded, progress=not quiet, resume=resume, compare=compare)


@app.command()
def evaluate(
    data: Annotated[str, typer.Option(help="Folder, manifest or `datasets` id.")],
    model: _Model = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of an adapter; alone: on the model it was trained on.", show_default=False),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split, subset, or a manifest's `split` value.", show_default=False)
    ] = None,
    device: _Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result and all transcripts as JSON.", show_default=False)
    ] = None,
    settings: _Settings = None,
) -> None:
    """Word and character error rates of a recogniser, with a 95 % bootstrap interval over utterances.

    Texts are compared in lower case without punctuation (--set evaluate.normalize=english is Whisper's, none as they
    are).

    **Examples**

    - `asr-finetune evaluate --model openai/whisper-tiny.en --data test.jsonl`
    - `asr-finetune evaluate --model openai/whisper-tiny.en --adapter runs/first/adapter --data test.jsonl`
    - `asr-finetune evaluate --model runs/first/model --data LibriSpeech --split test-clean --set
      evaluate.batch_size=8`
    """
    if model is None and adapter is None:
        raise ConfigError("evaluate: give --model, --adapter, or both")
    flags = {"model.name": model or str(adapter), "model.device": device, "data.train": data, "output": "."}
    loaded = Config.from_dict(overridden({}, flags, settings or ()))
    from asr_finetune.models.loading import load_recognizer, load_with_adapter
    from asr_finetune.progress import Reporter
    from asr_finetune.training import checkpoint
    from asr_finetune.training.evaluate import evaluate as run_evaluation
    from asr_finetune.training.setup import load

    reporter = Reporter()
    if model is not None and adapter is not None:
        recognizer = load_with_adapter(loaded.model, adapter)
    else:
        recognizer = load_recognizer(loaded.model)
    corpus = load(data, split, loaded.data, reporter, "data", recognizer)
    result = run_evaluation(recognizer, corpus, loaded.evaluate, reporter=reporter)
    reporter.say(str(result))
    if out is not None:
        checkpoint.write_json(out, result.to_dict(hypotheses=True))
        reporter.say(f"written to {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """The privacy report of a finished run, one HTML file: the guarantee, what it covers, the error rates.

    Of the training data it states the number of recordings (or speakers), which is treated as public, and a
    keyed fingerprint; nothing else in it was computed from that data without noise. Error rates are of the test
    data.

    **Example**

    - `asr-finetune report runs/first`
    """
    from asr_finetune.report.report import write_report

    written = write_report(run, out if out is not None else run / "report.html")
    typer.echo(f"written to {written}")


@app.command()
def synthesise(
    texts: Annotated[Path, typer.Option(help="Public sentences, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for WAV files and manifest.jsonl.")],
    voices: Annotated[int, typer.Option(min=1, help="Voices that each sentence is said by.")] = 4,
) -> None:
    """Synthetic speech of public sentences: what a new output layer may be warmed up on, at no ε.

    **Example**

    - `asr-finetune synthesise --texts sentences.txt --output speech`
    """
    from asr_finetune.demo.synth import speak

    written, count = speak(texts, output, voices)
    typer.echo(f"{count} recordings, listed in {written}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the demo's run.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Make speech, train a small recogniser on it with differential privacy, and show the report. No
    download.

    Fails where private training takes less than a quarter off the word error rate, which is what it is to show.

    **Example**

    - `asr-finetune demo --output runs/demo`
    """
    from asr_finetune.demo.demo import run

    result = run(output)
    if result.private > 0.75 * result.before:
        typer.echo(
            f"error: private training took the WER from {result.before:.1%} to {result.private:.1%}, less than a "
            "quarter off: something is wrong with this installation; please report it with `python -m dpkernels`",
            err=True,
        )
        raise typer.Exit(1)


def main() -> None:
    """Entry point. Expected errors are printed as a message, exit code 2 (130 after an interruption)."""
    warnings.showwarning = show_warning
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, to their callers: nothing a user can fix
    try:
        app()
    except Exception as error:
        if not expected(error):
            raise
        tell(f"error: {error}", "red")
        sys.exit(130 if type(error).__name__ == "Interrupted" else 2)
