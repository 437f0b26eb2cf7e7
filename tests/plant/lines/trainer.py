"""transformers' Trainer: line 25."""

from tests.plant.data import Fault, Line

_LOOP = "tests/interop/test_trainer.py"
_LOSSES = "tests/interop/test_trainer_losses.py"
_SAVED = "tests/interop/test_trainer_checkpoints.py"
_REFUSED = "tests/interop/test_trainer_refusals.py"
_SEEDS = "tests/interop/test_trainer_seeds.py"
_TRAINERS = "dpkernels/interop/trainer/trainers.py"
_ARGUMENTS = "dpkernels/interop/trainer/arguments.py"

_SAME = f"{_LOOP}::test_it_takes_the_steps_of_the_engines_own_loop"
_LOGGED = f"{_LOOP}::test_epsilon_is_in_every_log_and_no_norm_or_count_of_the_data"
_OWN = f"{_LOSSES}::test_each_loss_is_the_models_own_for_that_example_alone"
_NAMED = f"{_REFUSED}::test_an_argument_is_refused_by_name"

LINES = (
    Line(
        25,
        "A private Trainer takes the engine's steps on one loss for each example; what is not private is refused or marked",
        tests={
            _SAME: "its parameters after each step are those of the engine's own loop, to the bit",
            f"{_LOOP}::test_the_logical_batch_is_the_same_in_other_micro_batches": "batch size × accumulation is the expected logical batch, however it is cut",
            f"{_LOOP}::test_empty_logical_batches_are_steps": "an empty logical batch is a step",
            _LOGGED: "each log and checkpoint has ε, rounded up, and no norm or count of the data",
            f"{_LOOP}::test_the_loss_of_the_training_batches_may_be_left_out": "the loss of the training batches is marked, or left out",
            f"{_LOOP}::test_the_self_check_runs_before_the_first_step_and_stops_the_run": "the self-check stops a run before its first step",
            f"{_LOOP}::test_training_stops_at_its_limit": "training stops before a step that would exceed the target",
            f"{_LOOP}::test_trainers_of_one_model_in_turn_state_one_epsilon": "trainers that train one model in turn state one ε",
            f"{_LOOP}::test_the_accelerator_wraps_neither_model_nor_optimizer": "accelerate wraps neither model nor optimizer",
            f"{_LOOP}::test_the_accelerators_backward_is_refused": "a backward of one number for a batch is refused",
            _OWN: "the loss of an example is the model's own for it alone, whatever is beside it",
            f"{_LOSSES}::test_a_loss_with_a_term_of_its_own_is_refused": "a model whose loss has another term is refused",
            f"{_LOSSES}::test_a_collator_that_packs_is_refused": "so is a collator that packs",
            f"{_SAVED}::test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one": "a resumed run takes the steps of an uninterrupted one",
            f"{_SAVED}::test_damaged_spending_is_refused": "a checkpoint whose spent steps are damaged is refused",
            f"{_SAVED}::test_the_ledger_counts_the_steps_after_the_checkpoint": "steps after the checkpoint stay counted",
            f"{_SAVED}::test_without_a_ledger_the_checkpoint_counts": "without a ledger the checkpoint counts",
            f"{_SAVED}::test_a_checkpoint_that_lacks_a_file_is_refused": "a checkpoint without optimizer, schedule or count is refused",
            f"{_SAVED}::test_a_checkpoint_of_several_runs_is_refused": "so is one whose files are of several runs",
            f"{_SEEDS}::test_every_logical_batch_has_a_secret_seed_of_its_own": "Trainer's seed reaches no forward",
            f"{_SEEDS}::test_a_callback_that_seeds_within_a_batch_is_refused": "nor does one that a callback sets",
            f"{_SEEDS}::test_a_plain_trainer_after_make_private_is_noticed": "a Trainer that is made beside the engine's own loop is noticed",
            f"{_SEEDS}::test_a_checkpoint_tells_no_generators_state": "a checkpoint has no state from which masks would follow",
            _NAMED: "arguments that cannot be private are refused by name",
            f"{_REFUSED}::test_an_argument_that_needs_other_machines_is_refused_by_name": "so are float16, DeepSpeed, FSDP, DataParallel and TRL's packing",
            f"{_REFUSED}::test_optimizers_that_act_before_the_step_are_refused": "so are optimizers that act before the step",
            f"{_REFUSED}::test_collators_that_pack_are_refused_by_name": "so are collators that pack",
            f"{_REFUSED}::test_a_collator_with_a_known_seed_is_refused": "so are collators with a known seed",
            f"{_REFUSED}::test_a_loss_over_the_batch_is_refused": "so is a loss over the batch",
        },
        faults=(
            Fault(
                "generators' states in a Trainer's checkpoint",
                _TRAINERS,
                '"""Nothing: the generators\' states would tell the dropout masks of this run."""',
                "super()._save_rng_state(output_dir)",
                f"{_SEEDS}::test_a_checkpoint_tells_no_generators_state",
            ),
            Fault(
                "a norm in Trainer's log",
                _TRAINERS,
                '"""Nothing: a norm without noise is not private, and Trainer would log it."""',
                "return super()._get_grad_norm(model, grad_norm)",
                _LOGGED,
            ),
            Fault(
                "Trainer's count of operations",
                _TRAINERS,
                "        return 0\n",
                "        return 0 if inputs is None else sum(map(len, inputs.parts))\n",
                _LOGGED,
            ),
            Fault(
                "the training loss under Trainer's own name",
                _TRAINERS,
                'logs[f"{name}_NOT_PRIVATE"] = loss',
                "logs[name] = loss",
                _LOGGED,
            ),
            Fault(
                "a training loss that cannot be left out",
                _TRAINERS,
                "if self.privacy.log_training_loss:",
                "if self.privacy:",
                f"{_LOOP}::test_the_loss_of_the_training_batches_may_be_left_out",
            ),
            Fault(
                "ε rounded down in Trainer's log",
                _TRAINERS,
                "float(shown_epsilon(epsilon))",
                "math.floor(epsilon * 1000) / 1000",
                _LOGGED,
            ),
            Fault(
                "a checkpoint with the ε of an earlier step",
                _TRAINERS,
                'logged[-1]["step"] != step or ',
                "",
                _LOGGED,
            ),
            Fault(
                "a Trainer without its self-check",
                _TRAINERS,
                "if self.privacy.self_check:",
                "if self.privacy.self_check is None:",
                f"{_LOOP}::test_the_self_check_runs_before_the_first_step_and_stops_the_run",
            ),
            Fault(
                "a logical batch without accumulation",
                _TRAINERS,
                "            batch_size=self._expected_batch_size(),\n",
                "            batch_size=self.args.per_device_train_batch_size,\n",
                f"{_LOOP}::test_the_logical_batch_is_the_same_in_other_micro_batches",
            ),
            Fault(
                "a model that accelerate wraps",
                "dpkernels/interop/trainer/loop.py",
                "        return model\n",
                "        return super().prepare_model(model, *_, **__)\n",
                f"{_LOOP}::test_the_accelerator_wraps_neither_model_nor_optimizer",
            ),
            Fault(
                "an optimizer that accelerate wraps",
                "dpkernels/interop/trainer/loop.py",
                "        return optimizer\n",
                "        return super().prepare_optimizer(optimizer, *_, **__)\n",
                f"{_LOOP}::test_the_accelerator_wraps_neither_model_nor_optimizer",
            ),
            Fault(
                "losses over the tokens of a batch",
                "dpkernels/interop/trainer/losses.py",
                "    return cross_entropy_per_example(logits, labels, label_smoothing=label_smoothing)\n\n\ndef _kind_of",
                '    sums = cross_entropy_per_example(logits, labels, reduction="sum", label_smoothing=label_smoothing)\n'
                "    return sums * len(labels) / (labels != IGNORED).sum()\n\n\ndef _kind_of",
                _OWN,
            ),
            Fault(
                "a loss that is not compared with the model's",
                "dpkernels/interop/trainer/losses.py",
                "            if own:\n",
                "            if own is None:\n",
                f"{_LOSSES}::test_a_loss_with_a_term_of_its_own_is_refused",
            ),
            Fault(
                "a number of rows that is not compared",
                "dpkernels/interop/trainer/losses.py",
                "losses.shape != (2,)",
                "losses.dim() != 1",
                f"{_LOSSES}::test_a_collator_that_packs_is_refused",
            ),
            Fault(
                "a resumed Trainer that forgets what was spent",
                "dpkernels/interop/trainer/checkpoints.py",
                "    engine.load_state_dict(spent)\n",
                "",
                f"{_SAVED}::test_without_a_ledger_the_checkpoint_counts[False]",
            ),
            Fault(
                "a checkpoint with fewer steps than its weights",
                "dpkernels/interop/trainer/checkpoints.py",
                "min(counted, in_file) < trained or ",
                "",
                f"{_SAVED}::test_a_checkpoint_of_several_runs_is_refused[fewer_steps]",
            ),
            Fault(
                "a checkpoint with other steps than were written",
                "dpkernels/interop/trainer/checkpoints.py",
                'if state.pop("sha256") != _checksum(state):',
                'if not state.pop("sha256"):',
                f"{_SAVED}::test_damaged_spending_is_refused",
            ),
            Fault(
                "a checkpoint with other weights",
                "dpkernels/interop/trainer/checkpoints.py",
                ' or state["weights_sha256"] != digest_of(model)',
                "",
                f"{_SAVED}::test_a_checkpoint_of_several_runs_is_refused[other_weights]",
            ),
            Fault(
                "a checkpoint that lacks the optimizer",
                _TRAINERS,
                "            check_files(checkpoint)\n",
                "",
                f"{_SAVED}::test_a_checkpoint_that_lacks_a_file_is_refused[optimizer.pt]",
            ),
            Fault(
                "batches by length",
                _ARGUMENTS,
                'lambda value: value != "random",',
                'lambda value: value == "sequential",',
                f"{_NAMED}[train_sampling_strategy]",
            ),
            Fault(
                "clipping of the mean gradient",
                _ARGUMENTS,
                'lambda value: value not in (0, None, _default_of("max_grad_norm")),',
                "lambda value: value is None,",
                f"{_NAMED}[max_grad_norm]",
            ),
            Fault(
                "scaled losses of float16",
                _ARGUMENTS,
                '        "fp16",\n        bool,\n',
                '        "fp16",\n        lambda value: value is None,\n',
                f"{_REFUSED}::test_an_argument_that_needs_other_machines_is_refused_by_name[fp16]",
            ),
            Fault(
                "optimizers that act in the backward",
                _ARGUMENTS,
                '_OPTIMIZERS = ("lomo", "adalomo", "schedule_free", "layerwise")',
                '_OPTIMIZERS = ("schedule_free",)',
                f"{_REFUSED}::test_optimizers_that_act_before_the_step_are_refused",
            ),
            Fault(
                "a collator that packs",
                _ARGUMENTS,
                'if name in _PACKING or getattr(collator, "padding_free", False):',
                'if getattr(collator, "packs", False):',
                f"{_REFUSED}::test_collators_that_pack_are_refused_by_name",
            ),
            Fault(
                "a collator with a known seed",
                _ARGUMENTS,
                'if getattr(collator, "seed", None) is not None:',
                'if getattr(collator, "seed", None) is False:',
                f"{_REFUSED}::test_a_collator_with_a_known_seed_is_refused",
            ),
            Fault(
                "a loss over the batch that is passed over",
                _ARGUMENTS,
                "if compute_loss is not Trainer.compute_loss and not given:",
                "if compute_loss is None:",
                f"{_REFUSED}::test_a_loss_over_the_batch_is_refused",
            ),
        ),
    ),
)
