"""Several processes: line 23."""

from tests.plant.data import Fault, Line

_SAME = "tests/privacy/ranks/test_same_update.py::test_processes_take_the_step_of_one"
_SETTING = "tests/privacy/ranks/test_same_update.py::test_in_every_setting"
_MISUSE = "tests/privacy/ranks/test_misuse.py"
_STEP = "tests/privacy/ranks/test_agreement.py::test_a_step_that_one_rank_must_not_take_is_taken_by_none"

LINES = (
    Line(
        23,
        "Several processes: one draw, one divisor, one noise a parameter, one ledger",
        tests={
            _SAME: "two to four processes take the step of one, to the order of addition",
            _SETTING: "and so with every strategy, sampling, dtype and split, empty parts, and memory that runs out on one",
            "tests/privacy/ranks/test_same_update.py::test_a_run_goes_on_with_another_number_of_processes": "a run resumed by another number of processes goes on as it would have",
            "tests/privacy/ranks/test_same_update.py::test_fresh_keys_one_draw_and_noise_of_their_own": "noise keys are fresh on each rank, and the draw is one",
            "tests/privacy/ranks/test_same_update.py::test_a_batch_is_dealt_out_by_lengths": "every example of a batch goes to one rank",
            "tests/privacy/ranks/test_same_update.py::test_every_piece_has_one_owner": "every entry has one owner",
            "tests/privacy/ranks/test_agreement.py::test_runs_that_differ_are_refused_by_name": "ranks with other constants, data or keys are refused by name",
            "tests/privacy/ranks/test_agreement.py::test_models_and_versions_that_differ_are_refused_by_name": "ranks with another model or version are refused by name",
            "tests/privacy/ranks/test_agreement.py::test_parameters_begin_with_those_of_rank_0": "trained parameters begin with rank 0's values",
            _STEP: "a step that one rank refuses, cannot count or drew otherwise is taken by none",
            "tests/privacy/ranks/test_agreement.py::test_a_step_without_a_fault_is_counted_by_all_and_written_once": "a step is counted by all ranks and written once",
            "tests/privacy/ranks/test_agreement.py::test_a_group_that_comes_up_later_is_refused_and_costs_nothing": "a process group that comes up after make_private is refused",
            "tests/privacy/ranks/test_agreement.py::test_torchrun_without_a_process_group_is_refused": "processes of torchrun that do not know one another are refused",
            f"{_MISUSE}::test_what_one_rank_does_alone_is_refused_on_all": "what one rank does alone is refused on all, and costs nothing",
            f"{_MISUSE}::test_a_rank_that_left_an_exchange_sends_nothing_more": "a rank that failed within an exchange sends nothing that others would take for its part",
            f"{_MISUSE}::test_a_forked_process_does_not_talk_for_its_parent": "a forked process does not talk for its parent",
            f"{_MISUSE}::test_parameters_are_compared_when_a_run_resumes": "parameters are compared when a run resumes, whatever its ledger counts",
            f"{_MISUSE}::test_parameters_in_another_order_are_refused": "parameters in another order are refused",
            f"{_MISUSE}::test_a_ledger_that_rank_0_does_not_see_is_refused": "steps in a ledger that rank 0 does not see are not forgotten",
            f"{_MISUSE}::test_augmented_examples_in_another_order_are_told_apart": "augmented examples in another order are told apart",
            "tests/privacy/step/test_clipping.py::test_slack_covers_its_derivation_and_reaches_the_noise": "the sensitivity counts the additions of the ranks' sums",
        },
        faults=(
            Fault(
                "noise on every rank, before the sums are added up",
                "dpkernels/privacy/step/optimizer.py",
                "                self._exchange.sums_to_owners(self._sums())\n",
                """                places = range(len(self._trained))
                noise = self._stream.noise_secrets(places, draw=draw)
                ops.noise_sums(self._sums(), **noise, noise_scale=self._release.noise_scale, divisor=1)
                self._exchange.sums_to_owners(self._sums())
""",
                f"{_SAME}[sgd-2]",
            ),
            Fault(
                "a piece without noise on the ranks after the first",
                "dpkernels/privacy/step/optimizer.py",
                "self._release = Release(scale, ",
                "self._release = Release(scale if ranks.is_first else 0.0, ",
                f"{_SAME}[sgd-2]",
            ),
            Fault(
                "streams of two ranks that coincide",
                "dpkernels/privacy/ranks/pieces.py",
                "pieces.append(Piece(len(pieces), place, start, min(start + most, entries)))",
                "pieces.append(Piece(len(pieces) // 2, place, start, min(start + most, entries)))",
                "tests/privacy/ranks/test_same_update.py::test_every_piece_has_one_owner",
            ),
            Fault(
                "one noise key for all ranks",
                "dpkernels/privacy/engine.py",
                "self._sampling_stream = SecretStream.with_secret(ranks.first(secret_key))",
                "self._sampling_stream = self._noise_stream = SecretStream.with_secret(ranks.first(secret_key))",
                "tests/privacy/ranks/test_same_update.py::test_fresh_keys_one_draw_and_noise_of_their_own",
            ),
            Fault(
                "the divisor of a rank",
                "dpkernels/privacy/step/optimizer.py",
                "self._release = Release(scale, grid_of(scale), expected_batch_size)",
                "self._release = Release(scale, grid_of(scale), expected_batch_size / ranks.size)",
                f"{_SAME}[sgd-2]",
            ),
            Fault(
                "a draw per rank",
                "dpkernels/privacy/engine.py",
                "SecretStream.with_secret(ranks.first(secret_key))",
                "SecretStream()",
                "tests/privacy/ranks/test_same_update.py::test_fresh_keys_one_draw_and_noise_of_their_own",
            ),
            Fault(
                "draws that are not compared",
                "dpkernels/privacy/step/optimizer.py",
                '            "drawn batch": self._drawn,\n',
                "",
                f"{_STEP}[draws-drawn batch]",
            ),
            Fault(
                "an example on two ranks",
                "dpkernels/privacy/ranks/pieces.py",
                "        given[rank].append(position)\n",
                "        given[rank].append(position)\n        given[-1 - rank].append(position)\n",
                "tests/privacy/ranks/test_same_update.py::test_a_batch_is_dealt_out_by_lengths",
            ),
            Fault(
                "an example left out",
                "dpkernels/privacy/ranks/pieces.py",
                "sorted(range(len(weights)), ",
                "sorted(range(1, len(weights)), ",
                "tests/privacy/ranks/test_same_update.py::test_a_batch_is_dealt_out_by_lengths",
            ),
            Fault(
                "a step applied although the ledger's line failed",
                "dpkernels/privacy/accounting/budget.py",
                "        self._run, self._runs, self._unplanned, self._ledger_hash = self._ranks.first(counted)\n",
                """        try:
            self._run, self._runs, self._unplanned, self._ledger_hash = self._ranks.first(counted)
        except LedgerError:
            self._runs[self._run] = (self.mechanism, self._runs[self._run][1] + 1)
""",
                f"{_STEP}[ledger-closed]",
            ),
            Fault(
                "a step that other ranks take while one refuses",
                "dpkernels/privacy/ranks/group.py",
                "        if any(refused):\n",
                "        if error is not None:\n",
                f"{_STEP}[a backward left out-fewer examples were back-propagated]",
            ),
            Fault(
                "every rank writes the ledger",
                "dpkernels/privacy/ranks/group.py",
                "            if self.is_first:\n                try:",
                "            if self.is_first or function():\n                try:",
                "tests/privacy/ranks/test_agreement.py::test_a_step_without_a_fault_is_counted_by_all_and_written_once",
            ),
            Fault(
                "frozen values that are not compared",
                "dpkernels/privacy/ranks/agreement.py",
                "kind if trained or not plain else",
                "kind if plain else",
                "tests/privacy/ranks/test_agreement.py::test_models_and_versions_that_differ_are_refused_by_name[frozen value-parameter '0.weight']",
            ),
            Fault(
                "constants that are not compared",
                "dpkernels/privacy/ranks/agreement.py",
                "{name: repr(value) for name, value in constants.items()}",
                "{}",
                "tests/privacy/ranks/test_agreement.py::test_runs_that_differ_are_refused_by_name[noise multiplier]",
            ),
            Fault(
                "data sets that are numbered otherwise",
                "dpkernels/privacy/engine.py",
                'constants["examples"] = digests_of(setup.arguments.data_loader.dataset)',
                "pass",
                "tests/privacy/ranks/test_agreement.py::test_models_and_versions_that_differ_are_refused_by_name[order of examples-examples: ]",
            ),
            Fault(
                "sums of other ranks that stay and count again",
                "dpkernels/privacy/ranks/exchange.py",
                "                        source.zero_()\n",
                "",
                f"{_SAME}[sgd-2]",
            ),
            Fault(
                "a slack without the ranks' additions",
                "dpkernels/privacy/step/clipping.py",
                " + (ranks if ranks > 1 else 0)",
                "",
                "tests/privacy/step/test_clipping.py::test_slack_covers_its_derivation_and_reaches_the_noise",
            ),
            Fault(
                "an exchange more on one rank",
                "dpkernels/privacy/step/optimizer.py",
                '            "optimizer.keep_gradients": self.keep_gradients,  # one exchange more\n',
                "",
                f"{_MISUSE}::test_what_one_rank_does_alone_is_refused_on_all[keep_gradients-optimizer.keep_gradients: False on rank 0, True on rank 1]",
            ),
            Fault(
                "a rank that goes on after an exchange that it left",
                "dpkernels/privacy/ranks/group.py",
                "            _BROKEN.add(self.group)\n",
                "",
                f"{_MISUSE}::test_a_rank_that_left_an_exchange_sends_nothing_more[OutOfMemoryError]",
            ),
            Fault(
                "a ledger of another machine that is not looked at",
                "dpkernels/privacy/accounting/budget.py",
                "            _check_longest(ledger, seen, others)\n",
                "",
                f"{_MISUSE}::test_a_ledger_that_rank_0_does_not_see_is_refused[longer]",
            ),
            Fault(
                "an order of parameters that is not compared",
                "dpkernels/privacy/setup.py",
                "        **_orders(run),\n",
                "",
                f"{_MISUSE}::test_parameters_in_another_order_are_refused[False-order of trained parameters]",
            ),
            Fault(
                "augmented examples that are not compared",
                "dpkernels/privacy/sampling/digests.py",
                "for item in part if part == second else",
                "for item in part if once == again else",
                f"{_MISUSE}::test_augmented_examples_in_another_order_are_told_apart[True]",
            ),
            Fault(
                "parameters that are compared by the steps of the ledger",
                "dpkernels/privacy/step/optimizer.py",
                "if not (self._taken + 1) & self._taken:",
                "if not self._budget.steps & (self._budget.steps - 1):",
                f"{_MISUSE}::test_parameters_are_compared_when_a_run_resumes",
            ),
            Fault(
                "a group that is not looked at in a step",
                "dpkernels/privacy/step/optimizer.py",
                "        self._ranks.check_unchanged()\n",
                "",
                "tests/privacy/ranks/test_agreement.py::test_a_group_that_comes_up_later_is_refused_and_costs_nothing",
            ),
        ),
    ),
)
