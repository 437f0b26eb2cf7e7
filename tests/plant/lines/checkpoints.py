"""Checkpoints that lack weights: line 22."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        22,
        "Weights that a checkpoint lacks are never used silently",
        tests={
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_missing_output_layer_is_refused_with_the_fix": "a missing output layer is refused with the fix",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_two_loads_of_one_adapter_are_one_model_where_the_output_layer_is_new": "a new output layer is saved with its adapter",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_missing_weight_is_refused_whatever_the_head": "any other missing weight is refused, with a new output layer too",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_missing_weights_of_whisper_are_refused": "so are Whisper's",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_weights_of_another_shape_are_refused": "weights of another shape are refused",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_token_table_of_another_shape_is_refused": "so is a token table",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_new_head_of_as_many_classes_takes_nothing_of_the_old_one": "a new output layer takes nothing of the old one",
            "tests/asr_finetune/models/test_checkpoint_fit.py::test_an_adapter_that_is_not_whole_is_refused": "an adapter that lacks weights is refused",
        },
        faults=(
            Fault(
                "missing weights accepted",
                "asr_finetune/models/checkpoint_fit.py",
                'missing = {key for key in info["missing_keys"] if matters(key)}',
                "missing: set[str] = set()",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_missing_weights_of_whisper_are_refused",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_missing_weight_is_refused_whatever_the_head",
            ),
            Fault(
                "missing statistics accepted",
                "asr_finetune/models/checkpoint_fit.py",
                '_STATISTICS = ("running_mean", "running_var")',
                "_STATISTICS = ()",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_missing_weight_is_refused_whatever_the_head",
            ),
            Fault(
                "other shapes accepted",
                "asr_finetune/models/checkpoint_fit.py",
                "if shapes:",
                "if False:",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_token_table_of_another_shape_is_refused",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_weights_of_another_shape_are_refused",
            ),
            Fault(
                "adapters that lack keys accepted",
                "asr_finetune/models/checkpoint_fit.py",
                "if missing or unknown:",
                "if unknown and not missing:",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_an_adapter_that_is_not_whole_is_refused",
            ),
            Fault(
                "a missing head accepted without new_head",
                "asr_finetune/models/checkpoint_fit.py",
                "not (new_head and key.startswith(of_head))",
                "not key.startswith(of_head)",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_missing_output_layer_is_refused_with_the_fix",
            ),
            Fault(
                "the old head kept",
                "asr_finetune/models/ctc.py",
                "model.get_submodule(head).reset_parameters()",
                "pass",
                "tests/asr_finetune/models/test_checkpoint_fit.py::test_a_new_head_of_as_many_classes_takes_nothing_of_the_old_one",
            ),
        ),
    ),
)
