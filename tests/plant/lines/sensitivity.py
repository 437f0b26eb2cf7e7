"""What an example can add at most: lines 3 to 5."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        3,
        "What an example adds has norm at most C; the rounding that examples share is counted in the sensitivity",
        tests={
            "tests/privacy/step/test_clipping.py::test_no_example_adds_more_than_the_clipping_norm": "no example adds more than C, in float32 and bfloat16",
            "tests/privacy/step/test_clipping.py::test_the_total_is_never_below_the_sum_of_the_parts": "the norm over all layers is never below the exact sum of their bounds",
            "tests/privacy/step/test_clipping.py::test_shared_rounding_stays_within_the_slack": "one example more changes the rounding of the others by less than the slack, in any order",
            "tests/privacy/step/test_clipping.py::test_slack_covers_its_derivation_and_reaches_the_noise": "the slack covers what its derivation needs, and the noise is scaled by it",
            "tests/privacy/step/test_clipping.py::test_examples_that_cancel_within_stay_within_the_slack": "examples whose parts cancel change the others' rounding by less than the slack",
            "tests/privacy/step/test_noise.py::test_noise_and_sums_are_float64_with_bf16_parameters": "sums are kept in float64 whatever the parameters are",
            "tests/privacy/step/test_strategies.py::test_no_strategy_lets_an_example_add_more_than_the_norm": "no example adds more than C in any strategy",
            "tests/privacy/step/test_strategies.py::test_a_half_precision_base_with_float32_adapters": "no example adds more than C where base and adapters have different dtypes",
            "tests/privacy/step/test_strategies.py::test_an_example_adds_at_most_c_whatever_the_second_backward": "no example adds more than C even if the second backward gives another gradient",
            "tests/privacy/step/test_strategies.py::test_reduced_factors_never_exceed_what_the_first_pass_allows": "factors that the second pass reduces are rounded down",
            "tests/privacy/step/test_strategies.py::test_reduced_factors_below_float32s_normal_numbers_are_rounded_down_too": "the same holds for subnormal factors",
            "tests/nn/layers/test_joint.py::test_norms_and_sums_are_those_of_each_example_alone": "a transducer's output layer has right norms and sums",
            "tests/nn/layers/test_joint.py::test_cells_in_pieces_and_gradients_made_twice": "so it has where its cells are made in pieces, twice",
            "tests/nn/layers/test_joint.py::test_an_example_adds_at_most_its_norm_whatever_the_second_product": "cells that are made again add no more than was measured",
            "tests/privacy/test_transducer.py::test_every_strategy_sums_one_by_one_clipped_gradients": "a transducer's clipped sum is right in every strategy",
        },
        faults=(
            Fault(
                "norm rounded to bf16",
                "dpkernels/privacy/step/strategies.py",
                "norm_sq = total_norm_sq(records, batch_size, losses.device)",
                "norm_sq = total_norm_sq(records, batch_size, losses.device).bfloat16().double()",
                "tests/privacy/step/test_clipping.py::test_no_example_adds_more_than_the_clipping_norm",
            ),
            Fault(
                "norms added up in float32",
                "dpkernels/privacy/step/clipping.py",
                "torch.zeros(batch_size, dtype=torch.float64, device=device), 0",
                "torch.zeros(batch_size, device=device), 0",
                "tests/privacy/step/test_clipping.py::test_the_total_is_never_below_the_sum_of_the_parts",
            ),
            Fault(
                "sums in float32",
                "dpkernels/privacy/step/sums.py",
                "dtype=torch.float64",
                "dtype=torch.float32",
                "tests/privacy/step/test_noise.py::test_noise_and_sums_are_float64_with_bf16_parameters",
            ),
            Fault(
                "a slack of sums in whole examples",
                "dpkernels/privacy/step/clipping.py",
                "additions = examples * _PIECES + ",
                "additions = examples + ",
                "tests/privacy/step/test_clipping.py::test_slack_covers_its_derivation_and_reaches_the_noise",
            ),
            Fault(
                "noise without the slack",
                "dpkernels/privacy/step/clipping.py",
                "return per_unit * max_grad_norm * (1 + rounding_slack(examples, ranks))",
                "return per_unit * max_grad_norm",
                "tests/privacy/step/test_clipping.py::test_slack_covers_its_derivation_and_reaches_the_noise",
            ),
            Fault(
                "trust in a repeatable backward",
                "dpkernels/privacy/step/strategies.py",
                "factors_within(factors, before, again))",
                "factors)",
                "tests/privacy/step/test_strategies.py::test_an_example_adds_at_most_c_whatever_the_second_backward",
            ),
            Fault(
                "reduced factors rounded to the nearest",
                "dpkernels/nn/tensors.py",
                "    capped = torch.where(nearest > exact, nearest.nextafter(torch.zeros_like(nearest)), nearest)",
                "    capped = nearest",
                "tests/privacy/step/test_strategies.py::test_reduced_factors_never_exceed_what_the_first_pass_allows",
                "tests/privacy/step/test_strategies.py::test_reduced_factors_below_float32s_normal_numbers_are_rounded_down_too",
            ),
            Fault(
                "a strategy that clips to twice the norm",
                "dpkernels/privacy/step/strategies.py",
                "ops.clip_factors(norm_sq, self._norms.together(record.parameters))",
                "ops.clip_factors(norm_sq, 2 * self._norms.together(record.parameters))",
                "tests/privacy/step/test_strategies.py::test_no_strategy_lets_an_example_add_more_than_the_norm[per_layer-full-0.001-plain]",
            ),
            Fault(
                "a transducer's norm without its bias",
                "dpkernels/nn/layers/joint_records.py",
                "return sum_up([part.norm_sq() for part in parts])",
                "return sum_up([part.norm_sq() for part in parts[:1]])",
                "tests/nn/layers/test_joint.py::test_norms_and_sums_are_those_of_each_example_alone",
                "tests/privacy/test_transducer.py::test_every_strategy_sums_one_by_one_clipped_gradients",
            ),
            Fault(
                "the bias of a transducer forgotten",
                "dpkernels/nn/layers/joint_records.py",
                "of_bias += g.sum(1, dtype=wide)",
                "pass",
                "tests/nn/layers/test_joint.py::test_norms_and_sums_are_those_of_each_example_alone",
            ),
            Fault(
                "frames of a piece that are dropped",
                "dpkernels/nn/layers/joint_records.py",
                "(self.frame_lengths[rows] - t).clamp(0, encoder.shape[1])",
                "(self.frame_lengths[rows] - t).clamp(0, 1)",
                "tests/nn/layers/test_joint.py::test_cells_in_pieces_and_gradients_made_twice",
            ),
            Fault(
                "trust in cells that repeat their bits",
                "dpkernels/nn/layers/joint_records.py",
                "own = factors_within(own, self._norm_sq[rows].double(), _norm_sq_of(parts).double())",
                "pass",
                "tests/nn/layers/test_joint.py::test_an_example_adds_at_most_its_norm_whatever_the_second_product",
            ),
            Fault(
                "a transducer's norm below its sum",
                "dpkernels/nn/layers/joint_records.py",
                "self._kept.append(parts)",
                "self._kept.append(tuple(type(p)(p.layer, p.parameter, 1.01 * p.g) for p in parts))",
                "tests/nn/layers/test_joint.py::test_norms_and_sums_are_those_of_each_example_alone",
            ),
        ),
    ),
    Line(
        4,
        "An example that is not finite contributes 0 by selection, and is counted",
        tests={
            "tests/privacy/step/test_clipping.py::test_non_finite_examples_contribute_nothing_and_are_counted": "examples with NaN or infinite gradients add exactly 0 and are counted",
            "tests/privacy/step/test_clipping.py::test_a_nan_loss_invalidates_no_other_example": "a NaN loss changes nothing of the other examples",
            "tests/privacy/step/test_strategies.py::test_non_finite_examples_are_left_out_of_two_passes": '"two_pass" leaves such an example out in both passes',
            "tests/privacy/step/test_per_layer.py::test_a_layer_where_an_example_is_not_finite_gets_nothing_of_it": '"per_layer" leaves such an example out of the layers in which it is not finite',
        },
        faults=(
            Fault(
                "factor × NaN in the sum",
                "dpkernels/privacy/step/sums.py",
                "add_weighted_sums(records, factors, self.sums)",
                """add_weighted_sums(records, factors, self.sums)
        for record in records:
            self.of(record.parameters[0]).add_((factors * record.g.flatten(1).sum(1)).sum() * 0)""",
                "tests/privacy/step/test_clipping.py::test_non_finite_examples_contribute_nothing_and_are_counted",
                "tests/privacy/step/test_clipping.py::test_a_nan_loss_invalidates_no_other_example",
            ),
            Fault(
                "factor 1 for a NaN norm",
                "dpkernels/privacy/step/strategies.py",
                """add(records, factors)
""",
                """add(records, torch.where(norm_sq.isfinite(), factors, 1.0))
""",
                "tests/privacy/step/test_clipping.py::test_non_finite_examples_contribute_nothing_and_are_counted",
            ),
            Fault(
                "factor 1 for a NaN norm of a layer",
                "dpkernels/privacy/step/strategies.py",
                """add([record], factors)
""",
                """add([record], torch.where(norm_sq.isfinite(), factors, 1.0))
""",
                "tests/privacy/step/test_per_layer.py::test_a_layer_where_an_example_is_not_finite_gets_nothing_of_it",
            ),
            Fault(
                "factor 1 for a NaN norm in two passes",
                "dpkernels/privacy/step/strategies.py",
                "factors_within(factors, before, again))",
                "torch.where(again.isfinite(), factors, 1.0))",
                "tests/privacy/step/test_strategies.py::test_non_finite_examples_are_left_out_of_two_passes",
            ),
            Fault(
                "no count of non-finite examples",
                "dpkernels/privacy/step/statistics.py",
                "int((~finite).sum().item())",
                "0",
                "tests/privacy/step/test_clipping.py::test_non_finite_examples_contribute_nothing_and_are_counted",
            ),
        ),
    ),
    Line(
        5,
        "Clippings of another sensitivity are accounted as such, or refused",
        tests={
            "tests/privacy/step/test_clipping.py::test_clipping_other_than_flat_is_refused_with_the_reason": "adaptive and automatic clipping, and norms that are not finite and positive, are refused",
            "tests/privacy/step/test_per_layer.py::test_layer_sensitivity_is_the_root_of_the_sum_of_squares": "the sensitivity of per-layer clipping is the root of the sum of the squared norms",
            "tests/privacy/step/test_per_layer.py::test_layer_norms_keep_to_the_budget_exactly": "in exact arithmetic the layers' norms stay within that sensitivity, however they are grouped",
            "tests/privacy/step/test_per_layer.py::test_layer_norms_can_be_given_by_name_and_in_order": "norms given by name or in order are applied to the right layers",
            "tests/privacy/step/test_per_layer.py::test_wrong_layer_norms_are_refused_by_name": "missing, unknown or invalid norms are refused by name",
            "tests/privacy/step/test_per_layer.py::test_a_parameter_unfrozen_later_has_no_norm": "a parameter that is unfrozen after make_private is refused",
            "tests/privacy/step/test_per_layer.py::test_the_ledger_says_how_it_was_clipped": "the ledger records the kind of clipping and its norms",
            "tests/privacy/step/test_strategies.py::test_epsilon_is_that_of_the_stated_sensitivity": "the same σ and sampling give the same ε in every strategy",
        },
        faults=(
            Fault(
                "the largest norm for the sensitivity",
                "dpkernels/privacy/step/clipping.py",
                "math.sqrt(math.fsum(norm**2 for norm in given.values())) * _UP",
                "max(given.values())",
                "tests/privacy/step/test_per_layer.py::test_layer_norms_keep_to_the_budget_exactly[7]",
                "tests/privacy/step/test_per_layer.py::test_layer_norms_can_be_given_by_name_and_in_order",
            ),
            Fault(
                "each layer clipped to the whole norm",
                "dpkernels/privacy/step/clipping.py",
                "each = total / math.sqrt(len(trained)) * _DOWN",
                "each = total",
                "tests/privacy/step/test_per_layer.py::test_layer_sensitivity_is_the_root_of_the_sum_of_squares",
            ),
            Fault(
                "norms of a group rounded up",
                "dpkernels/privacy/step/clipping.py",
                "for p in parameters)) * _DOWN",
                "for p in parameters)) * _UP",
                "tests/privacy/step/test_per_layer.py::test_layer_norms_keep_to_the_budget_exactly",
            ),
            Fault(
                "other clippings accepted",
                "dpkernels/privacy/keywords.py",
                'if clipping != "flat" and (clipping, strategy) != ("per_layer", "per_layer"):',
                "if False:",
                "tests/privacy/step/test_clipping.py::test_clipping_other_than_flat_is_refused_with_the_reason",
            ),
            Fault(
                "a list of norms accepted for flat clipping",
                "dpkernels/privacy/keywords.py",
                "if is_per_layer(max_grad_norm):",
                "if False:",
                "tests/privacy/step/test_clipping.py::test_clipping_other_than_flat_is_refused_with_the_reason",
            ),
            Fault(
                "unknown names of norms accepted",
                "dpkernels/privacy/step/clipping.py",
                "if missing or unknown:",
                "if missing:",
                "tests/privacy/step/test_per_layer.py::test_wrong_layer_norms_are_refused_by_name",
            ),
            Fault(
                "any norm for a parameter that had none",
                "dpkernels/privacy/step/clipping.py",
                "unknown = [tuple(p.shape) for p in parameters if p not in self.of]",
                """parameters = [p for p in parameters if p in self.of] or list(self.of)[:1]
        unknown = []""",
                "tests/privacy/step/test_per_layer.py::test_a_parameter_unfrozen_later_has_no_norm",
            ),
            Fault(
                "clipping by layers called flat in the ledger",
                "dpkernels/privacy/setup.py",
                """    if layers is None:
        return {""",
                """    if True:
        return {""",
                "tests/privacy/step/test_per_layer.py::test_the_ledger_says_how_it_was_clipped",
            ),
            Fault(
                "the sensitivity of a strategy is another",
                "dpkernels/privacy/setup.py",
                "sensitivity=sensitivity(norm, bound, sampling.per_unit, ranks)",
                "sensitivity=sensitivity(norm if layers is None else norm / 2, bound, sampling.per_unit, ranks)",
                "tests/privacy/step/test_strategies.py::test_epsilon_is_that_of_the_stated_sensitivity",
            ),
        ),
    ),
)
