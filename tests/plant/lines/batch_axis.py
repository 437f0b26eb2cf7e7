"""Rows of the records: line 17."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        17,
        "The private forward is the plain model's, and row i of every record is example i, at every batch size",
        tests={
            "tests/privacy/test_batch_axis.py::test_shared_tensors_stay_shared_at_every_batch_size": "tensors that examples share are told from the batch at every batch size",
            "tests/privacy/test_batch_axis.py::test_shared_tensors_stay_shared_in_every_strategy": "so they are in every strategy",
            "tests/privacy/test_batch_axis.py::test_rows_that_are_not_the_examples_are_refused": "layers whose rows are permuted, mixed or not the examples' are refused",
            "tests/privacy/test_batch_axis.py::test_rows_back_in_their_order_are_right_where_nothing_is_trained_between": "rows that are sorted and put back are right where nothing is trained between",
            "tests/privacy/test_batch_axis.py::test_a_row_check_comes_with_a_parameter_that_was_not_seen": "a layer that joins later is checked at its first backward",
            "tests/privacy/test_batch_axis.py::test_a_call_that_contradicts_what_was_learnt_raises": "a call whose batch axis contradicts earlier calls raises",
            "tests/privacy/test_batch_axis.py::test_a_model_that_computes_with_one_batch_size_only_is_confirmed_by_its_gradients": "a model for one batch size is confirmed by its gradients, or refused",
            "tests/privacy/test_batch_axis.py::test_a_reentrant_checkpoint_hides_rows_and_is_refused": "reentrant checkpoints are refused with the fix",
            "tests/privacy/test_batch_axis.py::test_a_forward_that_asks_what_its_parameter_is_is_refused": "a private forward that computes something else than the plain one is refused",
            "tests/privacy/test_batch_axis.py::test_a_function_that_mixes_examples_is_refused_in_every_micro_batch": "a function that mixes examples is refused in every micro-batch",
            "tests/privacy/test_batch_axis.py::test_channels_of_what_examples_share_are_not_taken_for_others": "channels of shared tensors are not taken for the batch",
            "tests/privacy/test_batch_axis.py::test_two_of_eight_rows_that_change_places_are_found_every_time": "two rows that change places are found every time",
            "tests/privacy/test_batch_axis.py::test_a_time_first_layer_behind_a_gate_that_is_zero": "a time-first layer is right though its gradient is 0 at first",
            "tests/privacy/test_batch_axis.py::test_layers_that_hold_a_batch_of_their_own_layout": "torch's time-first layers are right",
            "tests/privacy/step/test_clipping.py::test_an_input_broadcast_over_the_batch_is_clipped_example_by_example": "a layer over positions that all examples share is clipped example by example",
            "tests/nn/layers/test_expanded.py::test_uses_of_a_raw_parameter_of_a_module_with_children": "every way to use a raw parameter gives right per-sample gradients, or is refused",
            "tests/nn/layers/test_expanded.py::test_raw_parameters_that_another_module_reads": "raw parameters that another module reads are right",
            "tests/nn/layers/test_expanded.py::test_a_leaf_that_draws_is_asked_with_its_own_draws": "a module that draws at random is recomputed with its own draws",
            "tests/nn/layers/test_embedding.py::test_ids_that_examples_share_at_every_batch_size": "ids that examples share are right at every batch size",
        },
        faults=(
            Fault(
                "an axis by its size alone",
                "dpkernels/nn/batch/batch_axis.py",
                """common = evidence.axes & axes
""",
                """common = axes
""",
                "tests/privacy/test_batch_axis.py::test_shared_tensors_stay_shared_at_every_batch_size",
                "tests/privacy/test_batch_axis.py::test_a_call_that_contradicts_what_was_learnt_raises",
            ),
            Fault(
                "a call that contradicts earlier ones let through",
                "dpkernels/nn/batch/batch_axis.py",
                "if evidence.axes and evidence.certain and not common:",
                "if False:",
                "tests/privacy/test_batch_axis.py::test_a_call_that_contradicts_what_was_learnt_raises",
            ),
            Fault(
                "another function than the plain model's let through",
                "dpkernels/nn/batch/batch_axis.py",
                "and not _alike(after, private):",
                "and False:",
                "tests/privacy/test_batch_axis.py::test_a_forward_that_asks_what_its_parameter_is_is_refused",
            ),
            Fault(
                "no row check",
                "dpkernels/nn/recording/row_check.py",
                "return len(losses) > 1 and (",
                "return False and (",
                "tests/privacy/test_batch_axis.py::test_rows_that_are_not_the_examples_are_refused[rows rolled-bookkeeping]",
            ),
            Fault(
                "rows that differ let through",
                "dpkernels/nn/recording/row_check.py",
                "if bool(wrong.any()):",
                "if False:",
                "tests/privacy/test_batch_axis.py::test_rows_that_are_not_the_examples_are_refused[rows rolled-bookkeeping]",
            ),
            Fault(
                "one weight for all rows",
                "dpkernels/nn/recording/row_check.py",
                "return values[torch.randperm(count, generator=generator)].to(device)",
                "return torch.ones_like(values).to(device)",
                "tests/privacy/test_batch_axis.py::test_rows_that_are_not_the_examples_are_refused[rows rolled-bookkeeping]",
                "tests/privacy/test_batch_axis.py::test_two_of_eight_rows_that_change_places_are_found_every_time",
            ),
            Fault(
                "few weights for the rows",
                "dpkernels/nn/recording/row_check.py",
                "torch.tensor([1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125]).repeat(count // 8 + 1)",
                "torch.tensor([1.0, -1.0]).repeat(count // 2 + 1)",
                "tests/privacy/test_batch_axis.py::test_two_of_eight_rows_that_change_places_are_found_every_time",
            ),
            Fault(
                "no row check of a parameter that was not seen",
                "dpkernels/nn/recording/row_check.py",
                "any(parameter not in self.seen for parameter in self._tape.used())",
                "False",
                "tests/privacy/test_batch_axis.py::test_a_row_check_comes_with_a_parameter_that_was_not_seen",
            ),
            Fault(
                "rows that a reentrant checkpoint hides",
                "dpkernels/nn/recording/row_check.py",
                "            raise RowError(_unseen_message(record.layer))",
                "            return True",
                "tests/privacy/test_batch_axis.py::test_a_reentrant_checkpoint_hides_rows_and_is_refused",
            ),
            Fault(
                "a function that mixes examples let through",
                "dpkernels/nn/batch/shared_functions.py",
                "if not error <= 0.05 * plain[finite].abs().amax():",
                "if False:",
                "tests/privacy/test_batch_axis.py::test_a_function_that_mixes_examples_is_refused_in_every_micro_batch",
            ),
            Fault(
                "channels of what examples share taken for others",
                "dpkernels/nn/batch/shared.py",
                "if channels_second and self.shape[:1] != (1,):",
                "if False:",
                "tests/privacy/test_batch_axis.py::test_channels_of_what_examples_share_are_not_taken_for_others",
            ),
            Fault(
                "shared rows sliced like the batch's",
                "dpkernels/nn/layers/leaf_calls.py",
                """    if not has_values(part):
        return True""",
                "    return True",
                "tests/privacy/test_batch_axis.py::test_shared_tensors_stay_shared_at_every_batch_size[ZeroAtFirst]",
            ),
        ),
    ),
)
