"""The list of recipes, and the commands on what a run leaves: transcribe, export, merge, verify.

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
