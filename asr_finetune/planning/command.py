"""`asr-finetune plan`: the noise of a run; with a model also its time here, or the micro-batches that a GPU holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.config.values import as_config_error
from asr_finetune.config.yaml_io import overridden, typed
from asr_finetune.planning.tables import memory_table, plan_table, probe_table
from asr_finetune.training.sampling import assumed_sampling, sampling_of
from dpkernels.privacy import AdaptiveClipping, NoisePlan, NoisyCount, noisy_count, plan_noise

if TYPE_CHECKING:
    from asr_finetune.data.corpus import Corpus
    from asr_finetune.models.recognizer import Recognizer
    from asr_finetune.planning.memory import MemoryPlan

_ABSENT = "-"  # model and data of a plan without a file: neither is loaded


def run(
    values: Mapping[str, Any] | None,
    flags: Mapping[str, Any],
    settings: Sequence[str] = (),
    *,
    examples: int | None = None,
    seconds: float | None = None,
    gpu_memory: float | None = None,
    gpus: int = 1,
) -> Iterator[Table]:
    """The tables of a plan, each as soon as it is computed: the noise comes first, since a measurement takes longer.

    Args:
        values: the values of the configuration file. None: sizes come from `flags` and `settings`, and a model is
            loaded if they name one.
        flags: the command line's flags by key; None: not given.
        settings: "section.key=value"; they override flags.
        examples: number of units, for which no data is read; None: those of the training data.
        seconds: length of an utterance, used without training data.
        gpu_memory: GiB of the GPU to plan for; None: this machine is measured.
        gpus: number of GPUs like this machine's that share the run.

    Raises:
        ConfigError: values are missing or inconsistent.
        ValueError, FileNotFoundError: the model or the data cannot be read.
    """
    config = _configuration(values, flags, settings, examples)
    if gpus < 1 or (gpus > 1 and (gpu_memory is not None or config.model.name == _ABSENT)):
        raise ConfigError(
            f"plan: --gpus {gpus}: a number from 1 on, of GPUs like the one that is measured here; it needs --model or "
            "--config, and goes without --gpu-memory, whose micro-batches are those of each GPU"
        )
    if gpu_memory is not None and config.model.name == _ABSENT:
        raise ConfigError("plan: --gpu-memory needs a model to plan for; give --model or --config as well")
    _check_given(config, typed(flags, settings), examples, file=values is not None)
    config.privacy.check()
    recognizer = corpus = None
    if config.data.train != _ABSENT:
        from asr_finetune.training.setup import fitted_corpus, recognizer_of

        recognizer = recognizer_of(config)
        corpus = fitted_corpus(config.data.train, config.data.train_split, config.data, recognizer)
    yield plan_table(*_noise(config, corpus, examples))
    if config.model.name == _ABSENT:
        return
    # Imported here, as elsewhere in this file: a plan without a model must not load transformers.
    from asr_finetune.training.setup import recognizer_of

    recognizer = recognizer or recognizer_of(config)
    if gpu_memory is None:
        from asr_finetune.planning.timing import probe

        yield probe_table(probe(config, recognizer, corpus, seconds=seconds), gpus)
    else:
        yield memory_table(_fits(config, recognizer, corpus, seconds, gpu_memory))


def _configuration(
    values: Mapping[str, Any] | None, flags: Mapping[str, Any], settings: Sequence[str], examples: int | None
) -> Config:
    """The configuration of a plan; values that a plan does not need are filled in."""
    given = typed(flags, settings)
    if given.get("privacy.epsilon") is not None and given.get("privacy.noise_multiplier") is not None:
        raise ConfigError(
            "plan: --epsilon and --noise-multiplier: give one; the first plans the noise for an epsilon, the second "
            "the epsilon of a noise"
        )
    if values is None:
        values = {"model": {"name": _ABSENT}, "data": {"train": _ABSENT}}
    config = Config.from_dict(overridden({"output": ".", **values}, flags, settings))
    if examples is not None:
        config = config.with_values("data", train=_ABSENT)
    config.check_filled()
    if not config.privacy.enabled:
        raise ConfigError(
            "plan: privacy.enabled is false: such a run has no epsilon and no noise to plan; set it to true"
        )
    return config


def _check_given(config: Config, given: Mapping[str, Any], examples: int | None, file: bool) -> None:
    """Check that all sizes of a plan are given: without a configuration file, defaults are not a run's sizes."""
    needed = {"--delta": config.privacy.delta}
    if config.data.train == _ABSENT and not file:
        needed |= {
            "--examples": examples,
            "--batch-size": given.get("train.batch_size"),
            "--steps": given.get("train.steps"),
        }
    missing = [flag for flag, value in needed.items() if value is None]
    if missing:
        raise ConfigError(f"plan: {', '.join(missing)} missing; see asr-finetune plan --help for an example")


@as_config_error()
def _noise(
    config: Config, corpus: Corpus | None, examples: int | None
) -> tuple[NoisePlan, NoisyCount | None]:
    """The noise for the target ε, or of the noise multiplier, as in a run; the count of adaptive flat clipping."""
    privacy = config.privacy
    if examples is not None:
        sampling = assumed_sampling(config, examples)
    else:
        assert corpus is not None  # else _check_given requires examples
        sampling = sampling_of(config, corpus)
    assert privacy.delta is not None
    if privacy.noise_multiplier == 0:
        raise ConfigError("plan: --noise-multiplier 0 must be above 0: without noise epsilon is infinite")
    plan = plan_noise(
        sampling,
        delta=privacy.delta,
        steps=config.train.steps,
        epsilon=privacy.epsilon if privacy.noise_multiplier is None else None,
        noise_multiplier=privacy.noise_multiplier,
        accountant=privacy.accountant,
    )
    if (
        privacy.clipping != "adaptive" or privacy.strategy == "per_layer"
    ):  # a count for each layer of the model
        return plan, None
    whole_units = privacy.clips() == "speaker"
    return plan, noisy_count(AdaptiveClipping(), plan.noise_multiplier, sampling, whole_units=whole_units)


def _fits(
    config: Config, recognizer: Recognizer, corpus: Corpus | None, seconds: float | None, gpu_memory: float
) -> MemoryPlan:
    """The micro-batches that fit into so many GiB, without checkpointing and, if the model has it, with it."""
    from asr_finetune.models.methods import apply_method
    from asr_finetune.planning.memory import plan_memory
    from dpkernels.blocks import has_checkpointing

    apply_method(recognizer, config.method)
    both = (False, True) if has_checkpointing(recognizer.model) else (False,)
    memory = round(gpu_memory * 2**30)
    return plan_memory(config, recognizer, memory, corpus=corpus, seconds=seconds, checkpointing=both)
