"""The command line: plan, train, evaluate, report, synthesise, demo; `commands.py` has those on a run's output.

Modules that load torch are imported when a command runs.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from asr_finetune import commands
from asr_finetune.config.schema import SECTIONS, Config, ConfigError
from asr_finetune.config.values import fields_of, help_of, types_within
from asr_finetune.config.yaml_io import load_yaml, overridden, template
from asr_finetune.console import Reporter, show_warning, tell
from asr_finetune.files import write_json
from dpkernels.errors import UserError
from dpkernels.files import NO_ROOM, unwritten

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Fine-tune speech recognisers with differential privacy.",
)


def _show_version(requested: bool) -> None:
    if requested:
        from importlib import metadata

        typer.echo(f"asr-finetune {metadata.version('dpkernels')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that precede a command."""


_Configuration = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file, or a recipe's name; flags and --set override it.",
        show_default=False,
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the configuration; may be repeated."),
]
# Flags of keys whose flag has another name than the key.
_FLAGS = {
    "model.name": ("--model",),
    "data.train": ("--data", "--train"),
    "method.kind": ("--method",),
    "output": ("--output", "-o"),
}


def _configured(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's argument `flags` by one flag for each of these keys, with the key's type and help.

    The command receives {key: value}; the value of a flag that is not given is None.
    """

    def option(key: str) -> inspect.Parameter:
        section, _, name = key.rpartition(".")
        field = fields_of(SECTIONS[section] if section else Config)[name]
        names = _FLAGS.get(key, (f"--{name.replace('_', '-')}",))
        kinds = list(types_within(field.annotation))
        hint: Any = next((kind for kind in (int, float, list[str]) if kind in kinds), str)
        flag = typer.Option(*names, help=help_of(field), show_default=False)
        return inspect.Parameter(
            key.replace(".", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[hint | None, flag],
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = {key: option(key) for key in keys}
        parameters: list[inspect.Parameter] = []
        for name, argument in inspect.signature(command, eval_str=True).parameters.items():
            parameters += (
                options.values() if name == "flags" else [argument.replace(kind=argument.KEYWORD_ONLY)]
            )

        def run(**arguments: Any) -> None:
            flags = {key: arguments.pop(parameter.name) for key, parameter in options.items()}
            flags = {key: None if value == [] else value for key, value in flags.items()}
            command(flags=flags, **arguments)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@app.command()
@_configured(
    *("privacy.epsilon", "privacy.delta", "privacy.noise_multiplier", "privacy.max_batch_size"),
    *("train.batch_size", "train.steps", "train.physical_batch_size", "model.name", "method.kind"),
)
def plan(
    flags: dict[str, Any],
    examples: Annotated[
        int | None, typer.Option(help="Number of training examples (or speakers).", show_default=False)
    ] = None,
    config: _Configuration = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="With --model: length of an utterance; default 12.3, or the model's window if shorter.",
            show_default=False,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB: find strategy and micro-batch for a GPU of this size instead of measuring this machine.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        int, typer.Option(help="With --model: also the time on so many GPUs like this machine's, calculated.")
    ] = 1,
    settings: _Settings = None,
) -> None:
    """Show the noise that a target ε needs; with a model, also the time and memory of a run.

    Without a model nothing is loaded, and the plan shows the noise multiplier σ by PLD and by RDP, the sampling rate,
    and ε over the steps. With --model or --config, a few micro-batches of synthetic audio are timed on this machine:
    training only, without reading audio, self-check and evaluations. With --gpu-memory, nothing is timed: the memory
    of a private step is estimated without data or GPU, and the plan shows the largest micro-batch of each strategy,
    with and without activation checkpointing.

    **Examples**

    - `asr-finetune plan --examples 281241 --epsilon 10 --delta 3.52e-6 --batch-size 4096 --steps 2000`
    - `asr-finetune plan --config run.yaml`
    - `asr-finetune plan --examples 28000 --epsilon 8 --delta 1e-6 --batch-size 512 --steps 500 --model
      openai/whisper-tiny.en`
    - `asr-finetune plan --config run.yaml --gpu-memory 80`
    - `asr-finetune plan --config run.yaml --gpus 8`
    """
    from asr_finetune.planning import command as planning

    values = load_yaml(config) if config is not None else None
    tables = planning.run(
        values, flags, settings or (), examples=examples, seconds=seconds, gpu_memory=gpu_memory, gpus=gpus
    )
    for table in tables:
        Console().print(table)


@app.command()
@_configured(
    *("model.name", "data.train", "data.test", "data.valid", "output", "method.kind", "method.rank"),
    *(
        "privacy.epsilon",
        "privacy.delta",
        "privacy.noise_multiplier",
        "privacy.max_grad_norm",
        "privacy.unit",
    ),
    *("train.batch_size", "train.physical_batch_size", "train.steps", "train.learning_rate", "train.seed"),
    *("model.device", "model.alphabet"),
)
def train(
    flags: dict[str, Any],
    config: _Configuration = None,
    not_private: Annotated[
        bool, typer.Option("--not-private", help="Ordinary training, for comparison. No guarantee.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished --not-private run to compare this one with.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in the output folder, if there is one.")
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check data, model, memory and accounting; write and spend nothing."),
    ] = False,
    settings: _Settings = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration, every key explained, and stop.")
    ] = False,
) -> None:
    """Fine-tune a recogniser with a stated (ε, δ), evaluate it before and after, and write an auditable
    record.

    The same command continues a run that was killed or interrupted; the ledger in the output folder keeps the privacy
    budget that was spent. Sampling and noise use fresh keys from the operating system.

    **Examples**

    - `asr-finetune train --print-config > run.yaml`
    - `asr-finetune train --config run.yaml --epsilon 8 --delta 1e-6 --output runs/first`
    - `asr-finetune train --config run.yaml --not-private --output runs/plain`
    - `asr-finetune train --config run.yaml --set train.steps=60 --set data.speakers=[anna,ben]`
    - `asr-finetune train --config wav2vec2_bert_lora --train LIBRISPEECH --test LIBRISPEECH --dry-run`
    - `asr-finetune train --config run.yaml --data LIBRISPEECH --data calls.csv --set data.columns={text: words}`
    """
    values = load_yaml(config) if config is not None else {}
    merged = overridden(values, flags | {"privacy.enabled": False if not_private else None}, settings or ())
    if print_config:
        typer.echo(template(merged), nl=False)
        return
    loaded = Config.from_dict(merged)
    loaded.check_trainable()
    if dry_run:
        from asr_finetune.planning.dry_run import check_run, check_table

        checks = check_run(loaded, resume=resume, compare=compare, progress=not quiet)
        Console().print(check_table(checks))
        raise typer.Exit(0 if all(check.passed for check in checks) else 1)
    from asr_finetune.training.run import train as run_training

    run_training(loaded, progress=not quiet, resume=resume, compare=compare)


@app.command()
@_configured("model.name", "model.device")
def evaluate(
    data: Annotated[
        list[str], typer.Option(help="Folder, listing or `datasets` id, see docs/data.md; may be repeated.")
    ],
    flags: dict[str, Any],
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an adapter; without --model it is loaded on its own base model.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split, subset, or a listing's `split` value.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result and all transcripts as JSON.", show_default=False)
    ] = None,
    settings: _Settings = None,
) -> None:
    """Word and character error rates of a recogniser, with a 95 % bootstrap interval over utterances.

    Texts are compared in lower case without punctuation. --set evaluate.normalize=english selects Whisper's
    normalisation, none compares texts as they are.

    **Examples**

    - `asr-finetune evaluate --model openai/whisper-tiny.en --data test.jsonl`
    - `asr-finetune evaluate --model openai/whisper-tiny.en --adapter runs/first/adapter --data test.jsonl`
    - `asr-finetune evaluate --model runs/first/model --data LibriSpeech --split test-clean --set
      evaluate.batch_size=8`
    """
    model = flags["model.name"]
    if model is None and adapter is None:
        raise ConfigError("evaluate: give --model, --adapter, or both")
    flags |= {"model.name": model or str(adapter), "data.train": data, "output": "."}
    loaded = Config.from_dict(overridden({}, flags, settings or ()))
    from asr_finetune.models.loading import load_recognizer, load_with_adapter
    from asr_finetune.training.evaluate import evaluate as run_evaluation
    from asr_finetune.training.setup import load

    reporter = Reporter()
    if model is not None and adapter is not None:
        recognizer = load_with_adapter(loaded.model, adapter)
    else:
        recognizer = load_recognizer(loaded.model)
    options = {"cache": loaded.train.cache_features, "cache_states": False}
    dataset = load(data, split, loaded.data, reporter, "data", recognizer, **options)
    result = run_evaluation(recognizer, dataset.corpus, loaded.evaluate, dataset=dataset, reporter=reporter)
    reporter.say(str(result))
    if out is not None:
        write_json(out, result.to_dict(hypotheses=True))
        reporter.say(f"written to {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write the privacy report of a finished run, one HTML file: the guarantee, its scope, and the error rates.

    About the training data it states the number of recordings (or speakers), which is treated as public, and a
    keyed fingerprint. Nothing else in it is computed from that data without noise. Error rates are those on the test
    data.

    **Example**

    - `asr-finetune report runs/first`
    """
    from asr_finetune.report.report import write_report

    written = write_report(run, out if out is not None else run / "report.html")
    typer.echo(f"written to {written}")


for command in (
    commands.recipes,
    commands.transcribe,
    commands.export,
    commands.merge,
    commands.audit,
    commands.verify,
):
    app.command()(command)


@app.command()
def synthesise(
    texts: Annotated[Path, typer.Option(help="Public sentences, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for WAV files and manifest.jsonl.")],
    voices: Annotated[int, typer.Option(min=1, help="Number of voices; each speaks every sentence.")] = 4,
) -> None:
    """Synthesise speech of public sentences: training data for the warm start of a new output layer, at no ε.

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
    """Synthesise speech, train a small recogniser on it with differential privacy, and write the report. No
    download.

    The command fails if private training lowers the word error rate by less than a quarter.

    **Example**

    - `asr-finetune demo --output runs/demo`
    """
    from asr_finetune.demo.demo import run

    result = run(output)
    if result.private > 0.75 * result.before:
        typer.echo(
            f"error: private training took the WER from {result.before:.1%} to {result.private:.1%}, which is less "
            "than a quarter lower: this installation is faulty; please report it with the output of "
            "`python -m dpkernels`",
            err=True,
        )
        raise typer.Exit(1)


def main() -> None:
    """Entry point. An expected error is printed as a message; the exit code is 2 (130 after an interruption)."""
    warnings.showwarning = show_warning
    warnings.filterwarnings("default", ".* is now called ", DeprecationWarning)  # dpkernels' old names
    try:
        app()
    except UserError as error:
        tell(f"error: {error}", "red")
        sys.exit(getattr(error, "exit_code", 2))
    except OSError as error:  # of a library, which writes a cache or a recording
        if error.errno not in NO_ROOM:
            raise
        tell(f"error: {unwritten(error.filename or 'a file', error)}", "red")
        sys.exit(2)
