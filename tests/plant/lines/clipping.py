"""What is clipped and summed: lines 1 and 2."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        1,
        "One norm over all trained parameters, fresh in every step; no training of a parameter that has no norm rule",
        tests={
            "tests/privacy/step/test_clipping.py::test_clipped_sum_is_that_of_flat_clipping": "the released sum is that of gradients clipped one by one, at small and large clipping norms",
            "tests/privacy/step/test_clipping.py::test_a_second_step_uses_fresh_norms": "the second step clips by its own norms, not by those of the first",
            "tests/privacy/step/test_clipping.py::test_a_parameter_without_gradient_counts_zero": "a parameter that no gradient reaches adds 0 to the norm and to the sum",
            "tests/privacy/step/test_clipping.py::test_a_trained_parameter_without_rule_is_refused_by_name": "make_private refuses a trained parameter that has no norm rule, and names it",
            "tests/privacy/guards/test_bypasses.py::test_a_frozen_parameter_with_a_gradient_is_refused": "step() refuses a frozen parameter of the optimizer that has a gradient",
            "tests/privacy/guards/test_bypasses.py::test_make_private_refuses_gradients_left_over_on_frozen_parameters": "make_private refuses a frozen parameter of the optimizer that has a gradient",
            "tests/privacy/guards/test_bypasses.py::test_a_parameter_added_to_the_optimizer_later_is_refused": "step() refuses a parameter that was added to the optimizer after make_private",
            "tests/privacy/guards/test_bypasses.py::test_hooks_that_see_gradients_before_clipping_are_refused": "make_private refuses a parameter with a hook that would see its unclipped gradient",
            "tests/privacy/step/test_strategies.py::test_every_strategy_sums_one_by_one_clipped_gradients": "every strategy releases the sum of gradients clipped one by one, checkpointed or not",
            "tests/privacy/step/test_strategies.py::test_a_second_step_uses_fresh_norms_in_every_strategy": "the second step clips by its own norms in every strategy",
            "tests/privacy/step/test_strategies.py::test_two_passes_give_the_bits_of_bookkeeping": '"two_pass" releases what "bookkeeping" does, bit by bit where nothing is clipped',
            "tests/privacy/step/test_strategies.py::test_statistics_are_those_of_the_whole_gradient": "reported norms and clip rates are those of whole gradients before clipping",
            "tests/privacy/step/test_strategies.py::test_streaming_strategies_hold_no_record": '"two_pass" and "per_layer" free the record of each layer before the next one is made',
        },
        faults=(
            Fault(
                "stale norms",
                "dpkernels/privacy/step/strategies.py",
                "norm_sq = total_norm_sq(records, batch_size, losses.device)",
                """fresh = total_norm_sq(records, batch_size, losses.device)
            norm_sq = self.__dict__.setdefault(f"norms of {batch_size}", fresh)""",
                "tests/privacy/step/test_clipping.py::test_a_second_step_uses_fresh_norms",
            ),
            Fault(
                "norm of the first layer only",
                "dpkernels/privacy/step/strategies.py",
                "total_norm_sq(records, batch_size",
                "total_norm_sq(records[:1], batch_size",
                "tests/privacy/step/test_clipping.py::test_clipped_sum_is_that_of_flat_clipping",
            ),
            Fault(
                "factors of 1: clipping after the sum",
                "dpkernels/privacy/step/strategies.py",
                """add(records, factors)
""",
                """add(records, torch.ones_like(factors))
""",
                "tests/privacy/step/test_clipping.py::test_clipped_sum_is_that_of_flat_clipping",
            ),
            Fault(
                "no check of frozen gradients before a step",
                "dpkernels/privacy/guards/model.py",
                "check_no_gradient([p for p in parameters if id(p) not in trained])",
                "pass",
                "tests/privacy/guards/test_bypasses.py::test_a_frozen_parameter_with_a_gradient_is_refused",
            ),
            Fault(
                "no check of frozen gradients in make_private",
                "dpkernels/privacy/guards/preconditions.py",
                "check_no_gradient([parameter for key, parameter in held.items() if key not in trained])",
                "pass",
                "tests/privacy/guards/test_bypasses.py::test_make_private_refuses_gradients_left_over_on_frozen_parameters",
            ),
            Fault(
                "parameters added to the optimizer unnoticed",
                "dpkernels/privacy/guards/model.py",
                "if added:",
                "if False:",
                "tests/privacy/guards/test_bypasses.py::test_a_parameter_added_to_the_optimizer_later_is_refused",
            ),
            Fault(
                "hooks before clipping let through",
                "dpkernels/privacy/guards/preconditions.py",
                "if hooked:",
                "if False:",
                "tests/privacy/guards/test_bypasses.py::test_hooks_that_see_gradients_before_clipping_are_refused",
            ),
            Fault(
                "parameters without a rule let through",
                "dpkernels/nn/convert/attaching.py",
                "if reason is not None and not (merely_holds and parameter in has_rule):",
                "if False:",
                "tests/privacy/step/test_clipping.py::test_a_trained_parameter_without_rule_is_refused_by_name",
            ),
            Fault(
                "streamed records: stale factors",
                "dpkernels/privacy/step/strategies.py",
                "allowed = REPEAT_TOLERANCE",
                """factors = self.__dict__.setdefault(f"factors of {batch_size}", factors)
            allowed = REPEAT_TOLERANCE""",
                "tests/privacy/step/test_strategies.py::test_a_second_step_uses_fresh_norms_in_every_strategy[two_pass]",
            ),
            Fault(
                "streamed records: stale factors of a layer",
                "dpkernels/privacy/step/strategies.py",
                """add([record], factors)
""",
                """place = f"{record.layer} of {batch_size}: {len(record.parameters[0].shape)}"
            add([record], self.__dict__.setdefault(place, factors))
""",
                "tests/privacy/step/test_strategies.py::test_a_second_step_uses_fresh_norms_in_every_strategy[per_layer]",
            ),
            Fault(
                "streamed records: factor applied twice",
                "dpkernels/privacy/step/strategies.py",
                "factors_within(factors, before, again))",
                "factors_within(factors * factors, before, again))",
                "tests/privacy/step/test_strategies.py::test_every_strategy_sums_one_by_one_clipped_gradients[two_pass-full-plain]",
            ),
            Fault(
                "streamed records: a layer summed twice",
                "dpkernels/privacy/step/sums.py",
                "add_weighted_sums(records, factors, self.sums)",
                "add_weighted_sums([*records, *records], factors, self.sums)",
                "tests/privacy/step/test_strategies.py::test_every_strategy_sums_one_by_one_clipped_gradients[per_layer-full-plain]",
            ),
            Fault(
                "streamed records: summed in both backwards",
                "dpkernels/privacy/step/strategies.py",
                "first[record.parameters] = _norm_sq(record, device)",
                """first[record.parameters] = _norm_sq(record, device)
            add([record], torch.ones(batch_size))""",
                "tests/privacy/step/test_strategies.py::test_every_strategy_sums_one_by_one_clipped_gradients[two_pass-full-plain]",
            ),
            Fault(
                "streamed records: kept to the end of the backward",
                "dpkernels/privacy/step/strategies.py",
                "self.tape.open(losses.shape[0], sink=of_unit, unit=unit)",
                "self.tape.open(losses.shape[0], unit=unit)",
                "tests/privacy/step/test_strategies.py::test_streaming_strategies_hold_no_record[plain]",
            ),
            Fault(
                "statistics of clipped gradients",
                "dpkernels/privacy/step/statistics.py",
                "finite = torch.isfinite(norm_sq)",
                """norm_sq = norm_sq * factors.double().square()
    finite = torch.isfinite(norm_sq)""",
                "tests/privacy/step/test_strategies.py::test_statistics_are_those_of_the_whole_gradient",
            ),
        ),
    ),
    Line(
        2,
        "Losses have shape [B]; their sum is back-propagated",
        tests={
            "tests/privacy/step/test_clipping.py::test_other_losses_are_refused": "losses of another shape, type or kind are refused, with the fix",
            "tests/privacy/step/test_clipping.py::test_the_sum_is_back_propagated_not_the_mean": "the backward starts from the sum of the losses",
        },
        faults=(
            Fault(
                "mean in place of the sum",
                "dpkernels/privacy/step/strategies.py",
                """losses.sum().backward()
""",
                """losses.mean().backward()
""",
                "tests/privacy/step/test_clipping.py::test_the_sum_is_back_propagated_not_the_mean",
            ),
            Fault(
                "reduced losses let through",
                "dpkernels/privacy/guards/preconditions.py",
                "if losses.dim() != 1:",
                "if False:",
                "tests/privacy/step/test_clipping.py::test_other_losses_are_refused",
            ),
        ),
    ),
)
