"""Noise, and what is released: lines 7 and 8."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        7,
        "Noise of σS on the sum, once a step, on every trained parameter, also on an empty batch; divided by the expected batch size",
        tests={
            "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step": "the noise has deviation σS on every parameter, for one, several or no micro-batches, in the fused and the unfused step",
            "tests/privacy/step/test_noise.py::test_the_divisor_is_the_expected_batch_size": "the noised sum is divided by the expected batch size, not by the actual one",
            "tests/privacy/step/test_fused.py::test_the_fused_step_equals_noise_and_then_the_optimizers_step": "the fused step equals noise and then the optimizer's own step",
            "tests/privacy/step/test_fused.py::test_a_failure_in_the_middle_is_spent_and_its_batch_gone": "a step that fails half-way is counted, and its batch is never released again",
            "tests/privacy/step/test_fused.py::test_nothing_is_changed_before_everything_is_allocated": "a step that runs out of memory while it allocates changes no parameter",
            "tests/privacy/guards/test_bypasses.py::test_what_is_accounted_cannot_be_changed_afterwards": "σ, C, the sensitivity and the divisor cannot be set after make_private",
            "tests/privacy/guards/test_bypasses.py::test_a_batch_processed_in_part_is_refused_and_costs_nothing": "step() refuses a batch of which examples are missing, and counts nothing",
            "tests/privacy/guards/test_bypasses.py::test_an_interrupt_within_a_backward_invalidates_the_batch": "a batch whose backward was interrupted is not released",
            "tests/privacy/test_engine.py::test_a_batch_processed_twice_is_refused": "more examples than the logical batch holds are refused",
            "tests/privacy/step/test_recovery.py::test_training_out_of_memory_gives_the_parameters_of_training_in_memory": "recovery from out-of-memory errors gives the parameters that training without them gives",
            "tests/privacy/step/test_recovery.py::test_recover_says_what_a_failure_left": "recover() says whether the sums were dropped, and drops them where they are invalid",
            "tests/privacy/step/test_recovery.py::test_a_invalidated_batch_is_done_again": "a batch with invalid sums is done again from its start",
        },
        faults=(
            Fault(
                "skipped without a gradient, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "pieces.setdefault(sums[span.place].device, []).extend(span.pieces)",
                """if bool(sums[span.place].any()):
                pieces.setdefault(sums[span.place].device, []).extend(span.pieces)""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-unfused]",
            ),
            Fault(
                "skipped on empty batches, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "noise_scale=release.noise_scale,",
                "noise_scale=release.noise_scale if self._batch.examples else 0.0,",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[empty-unfused]",
            ),
            Fault(
                "σ on the mean, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "noise_scale=release.noise_scale,",
                "noise_scale=release.noise_scale * release.divisor,",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-unfused]",
            ),
            Fault(
                "÷ actual batch size, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "divisor=release.divisor,",
                "divisor=max(self._batch.examples, 1),",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[four micro-batches-unfused]",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[empty-unfused]",
            ),
            Fault(
                "twice, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "for of_device in pieces.values():",
                """for of_device in pieces.values():
            ops.noise_sums(
                [piece.of(sums[piece.place]) for piece in of_device],
                **self._stream.noise_secrets([piece.index for piece in of_device], draw=draw + 1000),
                noise_scale=release.noise_scale,
                divisor=1,
            )""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-unfused]",
            ),
            Fault(
                "σ forgotten, in both steps",
                "dpkernels/privacy/step/optimizer.py",
                "return self.noise_multiplier * self.sensitivity",
                "return self.sensitivity",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step",
            ),
            Fault(
                "once a micro-batch",
                "dpkernels/privacy/step/optimizer.py",
                "self._batch.count(batch_size, clipped)",
                """self._batch.count(batch_size, clipped)
        ops.noise_sums(
            [self._batch.of(p) for p in self._trained],
            **self._stream.noise_secrets(range(len(self._trained)), draw=self._stream.next_draw()),
            noise_scale=self._release.noise_scale,
            divisor=1,
        )""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[four micro-batches-fused]",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[four micro-batches-unfused]",
            ),
            Fault(
                "skipped without a gradient, in the fused step",
                "dpkernels/privacy/step/fused.py",
                """    totals = part.sums
""",
                """    totals = part.sums
    if not all(bool(total.any()) for total in totals):
        common["noise_scale"] = 0.0
""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-fused]",
            ),
            Fault(
                "skipped on empty batches, in the fused step",
                "dpkernels/privacy/step/fused.py",
                """    totals = part.sums
""",
                """    totals = part.sums
    if not any(bool(total.any()) for total in totals):
        common["noise_scale"] = 0.0
""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[empty-fused]",
            ),
            Fault(
                "σ on the mean, in the fused step",
                "dpkernels/privacy/step/fused.py",
                '"noise_scale": release.noise_scale,',
                '"noise_scale": release.noise_scale * release.divisor,',
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-fused]",
            ),
            Fault(
                "÷ actual batch size, in the fused step",
                "dpkernels/privacy/step/optimizer.py",
                """            self._release,
""",
                """            Release(self._release.noise_scale, self._release.grid, max(self._batch.examples, 1)),
""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[four micro-batches-fused]",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[empty-fused]",
            ),
            Fault(
                "twice, in the fused step",
                "dpkernels/privacy/step/fused.py",
                """    totals = part.sums
""",
                """    totals = part.sums
    secrets = stream.noise_secrets(part.indices, draw=draw + 1000)
    ops.noise_sums(totals, **secrets, noise_scale=release.noise_scale, divisor=1)
""",
                "tests/privacy/step/test_noise.py::test_noise_is_sigma_on_the_sum_once_a_step[one micro-batch-fused]",
            ),
            Fault(
                "a divisor that is not the expected batch size",
                "dpkernels/privacy/engine.py",
                "expected_batch_size=setup.sampling.expected_batch_size",
                "expected_batch_size=setup.bound",
                "tests/privacy/step/test_noise.py::test_the_divisor_is_the_expected_batch_size",
            ),
            Fault(
                "the fused step leaves weight decay out",
                "dpkernels/privacy/step/fused.py",
                '"weight_decay": float(group["weight_decay"])',
                '"weight_decay": 0.0',
                "tests/privacy/step/test_fused.py::test_the_fused_step_equals_noise_and_then_the_optimizers_step[AdamW]",
            ),
            Fault(
                "sums kept that a failure invalidated",
                "dpkernels/privacy/step/sums.py",
                """        if self.invalidated:
            self.forget()""",
                "        self.invalidated = False",
                "tests/privacy/step/test_recovery.py::test_recover_says_what_a_failure_left",
                "tests/privacy/step/test_recovery.py::test_a_invalidated_batch_is_done_again",
            ),
            Fault(
                "an interrupted sum not noticed",
                "dpkernels/privacy/step/sums.py",
                "self.invalidated = self.dirty = True",
                "self.dirty = True",
                "tests/privacy/guards/test_bypasses.py::test_an_interrupt_within_a_backward_invalidates_the_batch",
            ),
            Fault(
                "examples left out of a step",
                "dpkernels/privacy/step/sums.py",
                "if self.drawn is not None and self.examples < self.drawn and self._claimed:",
                "if False:",
                "tests/privacy/guards/test_bypasses.py::test_a_batch_processed_in_part_is_refused_and_costs_nothing",
            ),
            Fault(
                "examples again on top of the sums",
                "dpkernels/privacy/step/sums.py",
                "if total > self.drawn:",
                "if False:",
                "tests/privacy/test_engine.py::test_a_batch_processed_twice_is_refused",
            ),
            Fault(
                "accounted constants changed afterwards",
                "dpkernels/privacy/step/optimizer.py",
                "if name in _FIXED and name in self.__dict__:",
                "if False:",
                "tests/privacy/guards/test_bypasses.py::test_what_is_accounted_cannot_be_changed_afterwards",
            ),
            Fault(
                "a batch kept after its step failed",
                "dpkernels/privacy/step/optimizer.py",
                """            self._batch.close()
""",
                """            pass
""",
                "tests/privacy/step/test_fused.py::test_a_failure_in_the_middle_is_spent_and_its_batch_gone",
            ),
            Fault(
                "a halved micro-batch of which a half is lost",
                "dpkernels/privacy/step/recovery.py",
                "todo = [(piece, None) for piece in _cut(part, size, unit)] + todo",
                "todo = [(piece, None) for piece in _cut(part, size, unit)[:1]] + todo",
                "tests/privacy/step/test_recovery.py::test_training_out_of_memory_gives_the_parameters_of_training_in_memory",
            ),
            Fault(
                "parameters stepped on while others are being prepared",
                "dpkernels/privacy/step/fused.py",
                """        for these in _by_device(group["params"], span_of)
    ]
    for part in parts:
        _run(optimizer, states, part, release, stream, draw, stochastic_rounding)""",
                """        for these in _by_device(group["params"], span_of)
        for part in [_prepare(optimizer, states, group, these, trained, sums, gradients)]
        if [_run(optimizer, states, part, release, stream, draw, False)]
    ]""",
                "tests/privacy/step/test_fused.py::test_nothing_is_changed_before_everything_is_allocated",
            ),
        ),
    ),
    Line(
        8,
        "Noise and sums are not in half precision",
        tests={
            "tests/privacy/step/test_noise.py::test_noise_and_sums_are_float64_with_bf16_parameters": "noise and sums are float64 where parameters are bfloat16",
            "tests/privacy/step/test_noise.py::test_the_grid_is_a_power_of_two_far_below_the_noise": "the release's grid is a power of two, 2¹² to 2¹³ below the noise",
            "tests/privacy/step/test_noise.py::test_what_is_released_lies_on_the_grid": "every released value lies on the grid, in the fused and the unfused step",
            "tests/privacy/step/test_fused.py::test_noise_is_not_bf16_with_bf16_parameters": "the fused step's noise has more bits than bfloat16",
            "tests/privacy/step/test_fused.py::test_bf16_parameters_keep_float32_state_through_a_checkpoint": "the optimizer's state stays float32 through a checkpoint",
        },
        faults=(
            Fault(
                "bf16 noise, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                """            ops.noise_sums(
                [piece.of(sums[piece.place]) for piece in of_device],
                **self._stream.noise_secrets([piece.index for piece in of_device], draw=draw),
                noise_scale=release.noise_scale,""",
                """            totals = [piece.of(sums[piece.place]) for piece in of_device]
            noise = [torch.zeros_like(total) for total in totals]
            secrets = self._stream.noise_secrets([piece.index for piece in of_device], draw=draw)
            ops.noise_sums(noise, **secrets, noise_scale=release.noise_scale, divisor=1)
            torch._foreach_add_(totals, [part.bfloat16().double() for part in noise])
            ops.noise_sums(
                totals,
                **secrets,
                noise_scale=0,""",
                "tests/privacy/step/test_noise.py::test_noise_and_sums_are_float64_with_bf16_parameters",
            ),
            Fault(
                "bf16 noise, in the fused step",
                "dpkernels/privacy/step/fused.py",
                """    totals = part.sums
""",
                """    totals = part.sums
    noise = [torch.zeros_like(total) for total in totals]
    secrets = stream.noise_secrets(part.indices, draw=draw)
    ops.noise_sums(noise, **secrets, noise_scale=release.noise_scale, divisor=1)
    torch._foreach_add_(totals, [part.bfloat16().double() for part in noise])
    common["noise_scale"] = 0.0
""",
                "tests/privacy/step/test_fused.py::test_noise_is_not_bf16_with_bf16_parameters",
            ),
            Fault(
                "a release on no grid, in the unfused step",
                "dpkernels/privacy/step/optimizer.py",
                "grid=release.grid,",
                "grid=0.0,",
                "tests/privacy/step/test_noise.py::test_what_is_released_lies_on_the_grid[unfused]",
            ),
            Fault(
                "a release on no grid, in the fused step",
                "dpkernels/privacy/step/fused.py",
                '"grid": release.grid,',
                '"grid": 0.0,',
                "tests/privacy/step/test_noise.py::test_what_is_released_lies_on_the_grid[fused]",
            ),
            Fault(
                "a release on too fine a grid",
                "dpkernels/privacy/step/optimizer.py",
                "Release(scale, grid_of(scale), expected_batch_size)",
                "Release(scale, grid_of(scale) / 2**10, expected_batch_size)",
                "tests/privacy/step/test_noise.py::test_what_is_released_lies_on_the_grid",
            ),
            Fault(
                "a grid that is no power of two",
                "dpkernels/privacy/rng/streams.py",
                "2.0 ** (math.frexp(noise_scale)[1] - 1 - GRID_BITS)",
                "noise_scale * 2.0**-GRID_BITS",
                "tests/privacy/step/test_noise.py::test_the_grid_is_a_power_of_two_far_below_the_noise",
            ),
            Fault(
                "state narrowed by a checkpoint",
                "dpkernels/privacy/step/optimizer.py",
                "restore_wide_states(self.original_optimizer, state_dict)",
                "pass",
                "tests/privacy/step/test_fused.py::test_bf16_parameters_keep_float32_state_through_a_checkpoint",
            ),
        ),
    ),
)
