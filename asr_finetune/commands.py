"""The list of recipes, and the commands on what a run leaves: transcribe, export, merge, audit, verify.

`cli.py` has the commands that make a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from asr_finetune.console import Reporter, tell

_Run = Annotated[Path, typer.Argument(help="Output folder of a run.", show_default=False)]


def recipes() -> None:
    """List the recipes, configurations that come with the package; `train --config NAME` takes one by its name.

    **Example**

    - `asr-finetune recipes`
    """
    from asr_finetune.config.yaml_io import recipe_titles

    titles = recipe_titles()
    for name, title in titles.items():
        typer.echo(f"{name.ljust(max(map(len, titles)))}  {title}")


def transcribe(
    audio: Annotated[
        list[Path],
        typer.Argument(help="Audio, folders of it, or listings (see docs/data.md).", show_default=False),
    ],
    model: Annotated[
        str, typer.Option(help="Folder or hub id of a model, an adapter, or a run.", show_default=False)
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter, or its run, on --model.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File; of srt a folder, with one file each.", show_default="the screen"
        ),
    ] = None,
    form: Annotated[
        Literal["text", "json", "srt"],
        typer.Option("--format", help="Lines of text, lines of JSON with times, or subtitles."),
    ] = "text",
    language: Annotated[str | None, typer.Option(help="Multilingual Whisper.", show_default=False)] = None,
    audio_column: Annotated[
        str | None,
        typer.Option(help="A listing's column of audio, if its name is unusual.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Transcribe recordings of any length.

    Whisper decodes what is longer than its window segment by segment, by its own timestamps; CTC models read
    overlapping windows. A recording that cannot be read is named at the end, and the exit code is then 1. Listings are
    those that `train` takes (NeMo, CSV, Kaldi, parquet, ...), with or without transcripts.

    **Examples**

    - `asr-finetune transcribe call.wav --model runs/first`
    - `asr-finetune transcribe calls/ --model openai/whisper-small --adapter runs/first --format srt -o subtitles`
    - `asr-finetune transcribe test.jsonl --model runs/first --format json --output transcripts.jsonl`
    - `asr-finetune transcribe calls.csv --audio-column clip --model runs/first`
    """
    from asr_finetune.config.schema import ConfigError, ModelConfig
    from asr_finetune.models.loading import load_recognizer, load_with_adapter
    from asr_finetune.training import transcribe as transcripts
    from asr_finetune.training.run_folder import saved_model

    files = transcripts.recordings(audio, {"audio": audio_column} if audio_column else None)
    if form == "srt" and output is None and len(files) > 1:
        raise ConfigError("--format srt: subtitles are one file for each recording: give --output FOLDER")
    config = ModelConfig(str(saved_model(Path(model))), language=language, device=device)
    recognizer = (
        load_recognizer(config) if adapter is None else load_with_adapter(config, saved_model(adapter))
    )
    reporter = Reporter(not quiet, Console(stderr=True))
    made = transcripts.transcribe(recognizer, files, times=form != "text", reporter=reporter)
    failed = transcripts.write(made, form, output, say=typer.echo)
    for transcript in failed:
        tell(f"not transcribed: {transcript.audio}: {transcript.problem}", "yellow")
    raise typer.Exit(1 if failed else 0)


def export(
    run: _Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder.", show_default="RUN/adapter or RUN/model")
    ] = None,
) -> None:
    """Write the adapter (or model) of a run's last checkpoint: what there is of a run that was stopped.

    The folder gets a model card, README.md, with ε of all steps that the ledger counts. `asr-finetune report RUN` then
    writes the report. The data is not read, and the run can still be continued.

    **Example**

    - `asr-finetune export runs/first`
    """
    from asr_finetune.training.export import export as write

    typer.echo(f"written to {write(run, output, say=typer.echo)}")


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter, or of its run.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model; it must be free.")],
    model: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the one that the adapter names")
    ] = None,
) -> None:
    """Merge an adapter into its base model: a folder that transformers loads without PEFT, at the same ε.

    **Example**

    - `asr-finetune merge runs/first/adapter --output runs/first/merged`
    """
    from asr_finetune.training.export import merge as write

    typer.echo(f"written to {write(adapter, output, model)}")


def audit(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a run, or a YAML configuration or recipe.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The audit's own folder.", show_default="the run's, with -audit at its end"
        ),
    ] = None,
    canaries: Annotated[
        int | None, typer.Option(help="Number of canaries.", show_default="1000, or half of the recordings")
    ] = None,
    words: Annotated[
        Path | None,
        typer.Option(
            help="Text file of public words for their sentences.", show_default="common English words"
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Any key of the configuration; may be repeated."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Attack a configuration: train it with canaries, and state a lower bound on its ε beside the upper one.

    The audit trains a model of its own, with the run's data, noise and steps, in which some recordings have sentences
    of public words, each included by a secret coin. From the losses before and after the training the coins are
    guessed. The result is in audit.json and in the report of the audit's folder; both are computed from the recordings
    without noise, and ε does not cover them. It exits with 1 if the lower bound is above the stated ε.

    **Examples**

    - `asr-finetune audit runs/first`
    - `asr-finetune audit run.yaml --canaries 500 --output runs/audit`
    """
    from asr_finetune.config.schema import Config
    from asr_finetune.config.yaml_io import load_yaml, overridden
    from asr_finetune.files import MissingFile
    from asr_finetune.report.report import write_report
    from asr_finetune.training.audit import PUBLIC_WORDS
    from asr_finetune.training.audit import audit as run_audit
    from asr_finetune.training.run_folder import RunFolder

    values = RunFolder(run).written_config().to_dict() if run.is_dir() else load_yaml(run)
    values["output"] = str(output) if output is not None else f"{values.get('output') or run.stem}-audit"
    config = Config.from_dict(overridden(values, {}, settings or ()))
    public = PUBLIC_WORDS
    if words is not None:
        if not words.is_file():
            raise MissingFile(f"--words {words}: no such file")
        public = tuple(words.read_text(encoding="utf-8").split())
    result = run_audit(config, canaries=canaries, words=public, confidence=confidence, progress=not quiet)
    report = write_report(config.output, Path(config.output) / "report.html")
    typer.echo(f"written to {report}")
    raise typer.Exit(1 if result["contradicts"] else 0)


def verify(run: _Run) -> None:
    """Recompute ε from a run's ledger with dp-accounting alone, and compare it with what the run states.

    The command reads the ledger with code of its own, checks the chain of hashes from the first line to the last, and
    compares steps, noise, sampling, N and ε with run.json, report.html and the adapter's README.md, where they exist.
    It exits with 1 if anything differs. It needs neither the recordings nor the model.

    **Example**

    - `asr-finetune verify runs/first`
    """
    from asr_finetune.report import verify as checks

    findings = checks.verify(run)
    Console().print(checks.table(findings))
    raise typer.Exit(0 if all(finding.agrees for finding in findings) else 1)
