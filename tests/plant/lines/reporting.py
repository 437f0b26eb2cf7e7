"""Recomputation, statistics, and changed parameters: lines 13 to 16."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        13,
        "Recomputed passes see the same masks",
        tests={
            "tests/privacy/self_check/test_independence.py::test_recomputed_passes_see_the_same_masks": "a checkpointed block recomputes with the masks of its forward",
            "tests/asr_finetune/models/test_checkpointing.py::test_the_masks_of_dropout_are_those_of_the_forward": "so do the recognisers' blocks",
            "tests/privacy/step/test_strategies.py::test_both_passes_see_the_masks_of_the_forward": 'both passes of "two_pass" see the masks of the forward',
            "tests/privacy/step/test_strategies.py::test_other_dropout_masks_in_the_second_backward_are_refused": "other masks in the second backward are refused",
            "tests/privacy/step/test_strategies.py::test_a_second_backward_unlike_the_first_is_refused": "a second backward with other gradients is refused",
            "tests/privacy/step/test_strategies.py::test_a_second_backward_without_a_layer_of_the_first_is_refused": "a second backward that lacks a layer is refused",
            "tests/privacy/step/test_strategies.py::test_a_second_backward_that_only_rounds_otherwise_is_trimmed_not_refused": "a second backward that differs by rounding is accepted, within C",
        },
        faults=(
            Fault(
                "fresh masks in the recomputation",
                "dpkernels/blocks.py",
                'enable({"use_reentrant": False, **options})',
                'enable({"use_reentrant": False, "preserve_rng_state": False, **options})',
                "tests/asr_finetune/models/test_checkpointing.py::test_the_masks_of_dropout_are_those_of_the_forward",
            ),
            Fault(
                "no comparison of the passes",
                "dpkernels/privacy/step/strategies.py",
                "moved.logical_or_(~((again.sqrt() - before.sqrt()).abs() <= allowed))",
                "pass",
                "tests/privacy/step/test_strategies.py::test_a_second_backward_unlike_the_first_is_refused",
                "tests/privacy/step/test_strategies.py::test_other_dropout_masks_in_the_second_backward_are_refused",
            ),
            Fault(
                "layers of the first pass alone let through",
                "dpkernels/privacy/step/strategies.py",
                "if first or int(moved.sum()):",
                "if int(moved.sum()):",
                "tests/privacy/step/test_strategies.py::test_a_second_backward_without_a_layer_of_the_first_is_refused",
            ),
            Fault(
                "rounding refused between the passes",
                "dpkernels/privacy/step/strategies.py",
                "REPEAT_TOLERANCE = 2.0**-6",
                "REPEAT_TOLERANCE = 2.0**-20",
                "tests/privacy/step/test_strategies.py::test_a_second_backward_that_only_rounds_otherwise_is_trimmed_not_refused",
            ),
        ),
    ),
    Line(
        14,
        "What is not private is marked, and kept out of what others get",
        tests={
            "tests/asr_finetune/training/test_run_log.py::test_each_value_goes_to_its_folder": "TensorBoard's public folder has no statistic of the data",
            "tests/privacy/step/test_recovery.py::test_a_halving_is_logged_as_not_private": "messages about halved micro-batches are marked",
            "tests/privacy/step/test_per_layer.py::test_layer_statistics_count_an_example_clipped_in_any_layer": "per-layer statistics count an example that was clipped in any layer",
            "tests/privacy/step/test_reporting.py::test_step_statistics_are_right_and_marked_not_private": "step statistics are right and marked",
            "tests/privacy/step/test_reporting.py::test_nothing_kept_holds_statistics_of_the_data": "no statistic of the data is in the ledger or in a state_dict",
        },
        faults=(
            Fault(
                "losses in the public log",
                "asr_finetune/training/run_log.py",
                'PUBLIC = ("epsilon", "learning_rate", ',
                'PUBLIC = ("epsilon", "learning_rate", "loss", ',
                "tests/asr_finetune/training/test_run_log.py::test_each_value_goes_to_its_folder",
            ),
            Fault(
                "clip rate in the ledger",
                "dpkernels/privacy/step/optimizer.py",
                "        self._budget.spend()\n",
                """        self._budget.spend()
        ledger, seen = self._budget._ledger, self.last_step
        if ledger is not None and seen is not None:
            ledger._append({"kind": "epsilon", "clip_rate": seen.clip_rate})
""",
                "tests/privacy/step/test_reporting.py::test_nothing_kept_holds_statistics_of_the_data",
            ),
            Fault(
                "statistics in the engine's state",
                "dpkernels/privacy/engine.py",
                "spent = self._require_budget().state_dict()",
                """assert self._optimizer is not None
        seen = self._optimizer.last_step
        spent = self._require_budget().state_dict() | {"clip_rate": seen and seen.clip_rate}""",
                "tests/privacy/step/test_reporting.py::test_nothing_kept_holds_statistics_of_the_data",
            ),
            Fault(
                "statistics in the optimizer's state",
                "dpkernels/privacy/step/optimizer.py",
                "return {**self.original_optimizer.state_dict(), SPENT: self._budget.state_dict()}",
                """seen = self.last_step
            return self.original_optimizer.state_dict() | {"mean_norm": seen and seen.mean_norm}""",
                "tests/privacy/step/test_reporting.py::test_nothing_kept_holds_statistics_of_the_data",
            ),
            Fault(
                "statistics without the mark",
                "dpkernels/privacy/step/statistics.py",
                'f"StepStats(NOT PRIVATE: examples',
                'f"StepStats(examples',
                "tests/privacy/step/test_reporting.py::test_step_statistics_are_right_and_marked_not_private",
            ),
            Fault(
                "a halving without the mark",
                "dpkernels/privacy/step/recovery.py",
                'f"NOT PRIVATE: a micro-batch',
                'f"a micro-batch',
                "tests/privacy/step/test_recovery.py::test_a_halving_is_logged_as_not_private",
            ),
            Fault(
                "clipping in one layer counted nowhere",
                "dpkernels/privacy/step/strategies.py",
                "torch.minimum(least, factors, out=least)",
                "pass",
                "tests/privacy/step/test_per_layer.py::test_layer_statistics_count_an_example_clipped_in_any_layer",
            ),
        ),
    ),
    Line(
        15,
        "A parameter that the optimizer no longer holds",
        tests={
            "tests/privacy/test_engine.py::test_a_changed_parameter_is_noticed_by_name": "a parameter that was replaced, frozen, dropped from its group or added is noticed by name",
        },
        faults=(
            Fault(
                "no check of the model's parameters",
                "dpkernels/privacy/guards/model.py",
                "if now.trained != self._initial.trained:",
                "if False:",
                "tests/privacy/test_engine.py::test_a_changed_parameter_is_noticed_by_name",
            ),
            Fault(
                "no check of the optimizer's parameters",
                "dpkernels/privacy/guards/model.py",
                "if lost:",
                "if False:",
                "tests/privacy/test_engine.py::test_a_changed_parameter_is_noticed_by_name",
            ),
        ),
    ),
    Line(
        16,
        "Hyper-parameter search is not in ε",
        tests={},
        without="what a search over hyper-parameters spends is said in the report's text, which the tests of `asr_finetune`'s report hold; no code computes it.",
    ),
)
