"""Canaries and the lower bound of an audit: line 26."""

from tests.plant.data import Fault, Line

_CANARIES = "tests/privacy/sampling/test_canaries.py"
_BOUND = "tests/auditing/test_one_run.py"
_COINS = "tests/auditing/test_coins.py"
_FAULTS = "tests/auditing/test_faults.py"
_RUNS = "tests/asr_finetune/training/test_audit.py"
_ONE_RUN = "dpkernels/auditing/one_run.py"
_SAMPLING = "dpkernels/privacy/sampling/canaries.py"

_NEVER = f"{_CANARIES}::test_an_absent_canary_is_never_read_and_every_present_one_is"
_NULL = f"{_BOUND}::test_scores_that_hold_nothing_show_something_no_more_often_than_allowed"
_BY_HAND = f"{_BOUND}::test_small_cases_by_hand"
_MODE = f"{_COINS}::test_they_are_read_as_they_were_written_and_by_their_owner_alone"
_OF_RUN = f"{_RUNS}::test_an_audit_of_a_finished_run"

LINES = (
    Line(
        26,
        "An audit's lower bound holds with its confidence, of the claimed mechanism; coins and scores stay private",
        tests={
            _NEVER: "an absent canary is never read by the training, and every present one is",
            f"{_CANARIES}::test_the_present_are_drawn_as_without_coins": "the others are drawn as if there were no coins",
            f"{_CANARIES}::test_size_rate_and_ledger_are_the_same_for_all_coins": "N, q, the divisor and the ledger do not depend on the coins",
            f"{_CANARIES}::test_coins_are_fair_and_fresh": "coins are fair, and no seed repeats them",
            f"{_CANARIES}::test_the_coins_have_a_stream_of_their_own": "coins have a stream of their own",
            f"{_CANARIES}::test_where_a_wrapper_hides_the_coins_training_stops": "a data set that hides the coins from the engine stops the training",
            f"{_CANARIES}::test_the_self_check_reads_no_absent_canary": "the self-check reads no absent canary",
            "tests/asr_finetune/training/test_audit.py::test_checks_before_training_read_no_absent_canary": "nor does that of a recogniser",
            f"{_CANARIES}::test_reading_an_absent_canary_raises_and_its_source_can_be_read": "reading an absent canary raises an error that does not name it",
            f"{_CANARIES}::test_what_would_be_another_claim_is_refused": "speakers and truncated batches are refused",
            f"{_CANARIES}::test_several_processes_are_refused": "several processes, which would draw several sets of coins, are refused",
            f"{_CANARIES}::test_repetitions_are_seen_through_it": "repeated examples are seen through it",
            _BY_HAND: "the tail is that of cases calculated by hand",
            f"{_BOUND}::test_the_tail_is_that_of_a_direct_sum": "and that of a direct sum",
            f"{_BOUND}::test_it_is_never_below_what_a_mechanism_of_this_epsilon_and_delta_does": "it bounds what (ε, δ)-DP mechanisms do, whatever δ reveals",
            f"{_BOUND}::test_against_randomised_response_the_error_is_the_allowed_one": "its error is the allowed one where the bound is tight",
            _NULL: "scores that hold nothing show something no more often than allowed",
            f"{_BOUND}::test_of_gaussian_mechanisms_it_stays_below_epsilon_and_grows_with_it": "of Gaussian mechanisms it stays below ε",
            f"{_BOUND}::test_the_error_is_shared_among_the_numbers_of_guesses": "several numbers of guesses share the allowed error",
            f"{_BOUND}::test_equal_scores_are_ordered_by_place_and_not_by_coin": "equal scores are not ordered by coin",
            _MODE: "the coins' file is for its owner alone",
            f"{_COINS}::test_coins_are_not_replaced": "and is never replaced",
            f"{_FAULTS}::test_a_run_without_noise_is_exposed_and_an_honest_one_is_not": "a run without noise is exposed, an honest one is not",
            _OF_RUN: "an audited run states the ε of its configuration, and keeps coins, sentences and losses in not_private",
        },
        faults=(
            Fault(
                "absent canaries in the draws",
                _SAMPLING,
                "return drawn[np.isin(drawn, self._dataset.present)]",
                "return drawn",
                _NEVER,
            ),
            Fault(
                "absent canaries that can be read",
                _SAMPLING,
                "if not all(self._present[index] for index in indices):",
                "if False:",
                f"{_CANARIES}::test_where_a_wrapper_hides_the_coins_training_stops",
            ),
            Fault(
                "a rate by the coins",
                "dpkernels/privacy/sampling/plan.py",
                "return Sampling(unit, examples, batch_size / examples, batch_size, 1, max_batch_size)",
                """present = getattr(data_loader.dataset, "present", range(examples))
        return Sampling(unit, examples, batch_size / len(present), batch_size, 1, max_batch_size)""",
                f"{_CANARIES}::test_size_rate_and_ledger_are_the_same_for_all_coins",
            ),
            Fault(
                "the number of the present in the ledger",
                "dpkernels/privacy/setup.py",
                '{"canaries": audited.canaries}',
                '{"canaries": audited.canaries, "examples": len(audited.present)}',
                f"{_CANARIES}::test_size_rate_and_ledger_are_the_same_for_all_coins",
            ),
            Fault(
                "unfair coins",
                _SAMPLING,
                "words < np.uint64(2**63)",
                "words < np.uint64(2**62)",
                f"{_CANARIES}::test_coins_are_fair_and_fresh",
            ),
            Fault(
                "coins under a known seed",
                _SAMPLING,
                "return coins_of(canaries, SecretStream())",
                "return np.random.random(canaries) < 0.5",
                f"{_CANARIES}::test_coins_are_fair_and_fresh",
            ),
            Fault(
                "coins from the sampling's stream",
                "dpkernels/privacy/rng/streams.py",
                "PURPOSE_CANARIES = 5",
                "PURPOSE_CANARIES = PURPOSE_INCLUSION",
                f"{_CANARIES}::test_the_coins_have_a_stream_of_their_own",
            ),
            Fault(
                "a self-check of absent canaries",
                "dpkernels/privacy/sampling/loader.py",
                "dataset, lengths = present_part(self.dataset, self._lengths)",
                'dataset, lengths = getattr(self.dataset, "dataset", self.dataset), self._lengths',
                f"{_CANARIES}::test_the_self_check_reads_no_absent_canary",
            ),
            Fault(
                "a recogniser's self-check of absent canaries",
                "asr_finetune/training/setup.py",
                "return Subset(dataset, present), [lengths[index] for index in present]",
                "return dataset, lengths",
                "tests/asr_finetune/training/test_audit.py::test_checks_before_training_read_no_absent_canary",
            ),
            Fault(
                "an absent canary named in an error",
                _SAMPLING,
                'f"CanaryDataset: {len(indices)} examples were asked for',
                'f"CanaryDataset: {indices} examples were asked for',
                f"{_CANARIES}::test_reading_an_absent_canary_raises_and_its_source_can_be_read",
            ),
            Fault(
                "an audit of truncated batches",
                _SAMPLING,
                "if max_batch_size is not None:",
                "if False:",
                f"{_CANARIES}::test_what_would_be_another_claim_is_refused",
            ),
            Fault(
                "coins of each process",
                _SAMPLING,
                "if isinstance(dataset, CanaryDataset) and ranks > 1:",
                "if False:",
                f"{_CANARIES}::test_several_processes_are_refused",
            ),
            Fault(
                "a tail without what δ adds",
                _ONE_RUN,
                "return min(1.0, beta + 2 * canaries * delta * alpha)",
                "return beta",
                _BY_HAND,
                f"{_BOUND}::test_it_is_never_below_what_a_mechanism_of_this_epsilon_and_delta_does",
            ),
            Fault(
                "half of what δ adds",
                _ONE_RUN,
                "return min(1.0, beta + 2 * canaries * delta * alpha)",
                "return min(1.0, beta + canaries * delta * alpha)",
                _BY_HAND,
            ),
            Fault(
                "a tail without its first value",
                _ONE_RUN,
                "special.bdtrc(correct - 1, guesses, special.expit(epsilon))",
                "special.bdtrc(correct, guesses, special.expit(epsilon))",
                _BY_HAND,
                f"{_BOUND}::test_against_randomised_response_the_error_is_the_allowed_one",
            ),
            Fault(
                "the best of several numbers of guesses at the whole error",
                _ONE_RUN,
                "return plans, (1 - confidence) / len(plans)",
                "return plans, 1 - confidence",
                f"{_BOUND}::test_the_error_is_shared_among_the_numbers_of_guesses",
                _NULL,
            ),
            Fault(
                "equal scores ordered by coin",
                _ONE_RUN,
                'ranked = coins[np.argsort(-scores, kind="stable")]',
                "ranked = coins[np.lexsort((~coins, -scores))]",
                f"{_BOUND}::test_equal_scores_are_ordered_by_place_and_not_by_coin",
            ),
            Fault(
                "coins that others can read",
                "dpkernels/auditing/coins.py",
                "lambda file: file.write(text.encode()), mode=SECRET)",
                "lambda file: file.write(text.encode()))",
                _MODE,
            ),
            Fault(
                "coins replaced",
                "dpkernels/auditing/coins.py",
                "if path.exists():",
                "if False:",
                f"{_COINS}::test_coins_are_not_replaced",
            ),
            Fault(
                "canaries that are recordings of their own",
                "asr_finetune/training/audit.py",
                "if place not in chosen]",
                "]",
                _OF_RUN,
            ),
            Fault(
                "an audit that trains without its coins",
                "asr_finetune/training/start.py",
                "            self.coins,\n",
                "",
                _OF_RUN,
            ),
            Fault(
                "canaries that others can read",
                "asr_finetune/training/audit.py",
                "write_json(self.folder.canaries, values, secret=True)",
                "write_json(self.folder.canaries, values)",
                _OF_RUN,
            ),
        ),
    ),
)
