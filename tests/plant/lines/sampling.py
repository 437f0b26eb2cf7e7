"""Sampling, and the loader's passes: lines 10 and 19."""

from tests.plant.data import Fault, Line

LINES = (
    Line(
        10,
        "Poisson sampling over units; truncated sampling with its own event; speakers with at most k examples; never shuffling",
        tests={
            "tests/privacy/sampling/test_sampling.py::test_micro_batches_within_a_frame_budget": "every drawn example is in one micro-batch",
            "tests/privacy/sampling/test_sampling.py::test_inclusion_is_poisson": "every example joins with probability q, independently of others and of earlier draws",
            "tests/privacy/sampling/test_sampling.py::test_a_capacity_keeps_a_uniform_subset": "a capacity keeps a uniformly random subset",
            "tests/privacy/sampling/test_sampling.py::test_speakers_are_sampled_with_at_most_k_examples": "speakers are sampled, at most k examples of each",
            "tests/privacy/sampling/test_sampling.py::test_examples_of_speakers_have_sensitivity_k_c": "for speakers the sensitivity is k times C",
            "tests/privacy/sampling/test_sampling.py::test_incomplete_units_are_refused": "speakers without ids or without a bound, and a capacity for them, are refused",
            "tests/privacy/sampling/test_sampling.py::test_other_loaders_are_refused": "data loaders that Poisson sampling cannot replace are refused with the reason",
            "tests/privacy/sampling/test_sampling.py::test_shuffling_is_refused_not_accounted_as_poisson": "shuffled batches are refused",
            "tests/privacy/sampling/test_sampling.py::test_batches_from_elsewhere_are_refused": "batches that did not come from the private loader are refused",
            "tests/privacy/sampling/test_sampling.py::test_the_loader_hands_out_what_was_drawn": "the loader hands out exactly the examples that were drawn",
            "tests/privacy/test_engine.py::test_one_step_for_every_logical_batch": "every logical batch needs exactly one step",
            "tests/privacy/test_engine.py::test_a_batch_processed_twice_is_refused": "a batch cannot be processed twice in a step",
            "tests/privacy/guards/test_bypasses.py::test_speaker_ids_compare_by_value_whatever_they_come_in": "speaker ids are compared by value, whatever container they come in",
            "tests/privacy/guards/test_bypasses.py::test_repeated_examples_are_refused": "a data set that names an example twice is refused",
            "tests/privacy/guards/test_bypasses.py::test_rows_of_one_tensor_in_two_data_sets_are_repetitions": "the same rows in two data sets are refused",
            "tests/privacy/step/test_recovery.py::test_only_sampled_examples_can_be_read_again": "collate() refuses examples that were not sampled",
            "tests/asr_finetune/data/test_repeats.py::test_each_recording_is_kept_once_and_counted_once": "a recording that is listed several times is kept and counted once",
            "tests/asr_finetune/data/test_repeats.py::test_a_repeat_adds_nothing_to_anyone_else": "listing a recording again changes no other utterance",
            "tests/asr_finetune/data/test_repeats.py::test_recordings_that_differ_in_one_byte_anywhere_are_kept": "recordings that differ in a single byte are different",
            "tests/asr_finetune/data/test_repeats.py::test_only_files_of_one_size_and_one_middle_are_read_whole": "whole files are read only where size and a piece agree",
            "tests/asr_finetune/data/test_repeats.py::test_rows_of_a_table_are_compared_by_their_bytes": "recordings in tables are compared by their bytes",
            "tests/privacy/guards/test_bypasses.py::test_rows_that_a_list_or_a_hub_data_set_repeats_are_repetitions": "so are rows that a list, or a data set of the hub, lists again",
            "tests/privacy/guards/test_bypasses.py::test_rows_that_a_table_of_the_hub_holds_twice_are_repetitions": "so are rows that its table holds twice",
            "tests/privacy/guards/test_bypasses.py::test_values_that_begin_within_their_memory_are_told_apart": "different rows of one memory are told apart",
            "tests/asr_finetune/data/test_repeats.py::test_a_speaker_may_repeat_a_recording": "one speaker's repetitions are left out without an error",
            "tests/asr_finetune/data/test_repeats.py::test_a_recording_of_two_speakers_is_refused_where_speakers_are_protected": "a recording of two speakers is refused where speakers are the unit",
            "tests/asr_finetune/data/test_pieces.py::test_several_pieces_of_a_recording_are_examples_only_where_that_is_said": "pieces of a recording count as examples only where that is said",
            "tests/asr_finetune/report/test_report.py::test_the_unit_is_a_piece_where_recordings_were_cut": "the report then calls the unit a piece",
            "tests/asr_finetune/training/test_export.py::test_a_cards_unit_is_a_piece_where_recordings_were_cut": "so does the model card",
            "tests/asr_finetune/data/test_pieces.py::test_no_sound_is_in_two_units": "pieces that share samples are refused",
            "tests/asr_finetune/data/test_pieces.py::test_the_same_piece_again_is_one_example": "a piece that is listed twice is one example",
            "tests/asr_finetune/data/test_several_sources.py::test_a_recording_in_two_sources_is_one_example_and_named": "a recording in two sources is one example",
            "tests/asr_finetune/data/test_several_sources.py::test_a_file_and_the_same_bytes_in_a_table_are_one_recording": "also where one source has it as a file and another as bytes",
            "tests/asr_finetune/data/test_several_sources.py::test_a_test_recording_is_found_in_several_sources": "a copy of a test recording is found in each of several sources",
            "tests/asr_finetune/data/test_provenance.py::test_other_recordings_of_training_speakers_are_not_public_where_speakers_are_protected": "validation data of training speakers is refused where speakers are the unit",
            "tests/asr_finetune/data/test_changed_audio.py::test_a_changed_file_is_not_read": "a file that was removed, cut or replaced since it was listed is not read",
            "tests/asr_finetune/data/test_changed_audio.py::test_other_bytes_in_a_table_are_not_read": "nor are other bytes in a table",
            "tests/asr_finetune/data/test_changed_audio.py::test_a_changed_recording_adds_nothing_unless_its_features_are_kept": "a changed recording adds nothing",
            "tests/asr_finetune/data/test_changed_audio.py::test_an_error_rate_leaves_out_what_cannot_be_read_and_says_so": "and is left out of error rates",
            "tests/asr_finetune/data/test_pieces.py::test_a_copy_of_a_file_is_shared_whatever_is_taken_of_it": "a copy of a training file is found in other data, whatever piece is taken of either",
        },
        faults=(
            Fault(
                "shuffled fixed-size batches",
                "dpkernels/privacy/sampling/samplers.py",
                "return np.flatnonzero(words < np.uint64(threshold))",
                "return np.sort(np.argsort(words)[: round(count * sample_rate)])",
                "tests/privacy/sampling/test_sampling.py::test_inclusion_is_poisson",
            ),
            Fault(
                "each example once an epoch",
                "dpkernels/privacy/sampling/samplers.py",
                "chosen = poisson(self.dataset_size, self.sample_rate, self._stream)",
                """every = round(1 / self.sample_rate)
        chosen = np.arange(self.dataset_size)[self._stream.next_draw() % every :: every]""",
                "tests/privacy/sampling/test_sampling.py::test_inclusion_is_poisson",
            ),
            Fault(
                "neighbours join together",
                "dpkernels/privacy/sampling/samplers.py",
                "np.flatnonzero(words < np.uint64(threshold))",
                "np.flatnonzero(np.repeat(words, 2)[:count] < np.uint64(threshold))",
                "tests/privacy/sampling/test_sampling.py::test_inclusion_is_poisson",
            ),
            Fault(
                "truncation to the first ones",
                "dpkernels/privacy/sampling/samplers.py",
                "return items[np.sort(np.argsort(words)[:size])]",
                "return items[:size]",
                "tests/privacy/sampling/test_sampling.py::test_a_capacity_keeps_a_uniform_subset",
            ),
            Fault(
                "no truncation",
                "dpkernels/privacy/sampling/samplers.py",
                "if self.max_batch_size is None:",
                "if True:",
                "tests/privacy/sampling/test_sampling.py::test_a_capacity_keeps_a_uniform_subset",
            ),
            Fault(
                "sampling examples for speakers",
                "dpkernels/privacy/sampling/samplers.py",
                "chosen = poisson(len(self._examples), self.sample_rate, self._stream)",
                "return poisson(sum(map(len, self._examples)), self.sample_rate, self._stream)",
                "tests/privacy/sampling/test_sampling.py::test_speakers_are_sampled_with_at_most_k_examples",
            ),
            Fault(
                "all examples of a speaker",
                "dpkernels/privacy/sampling/samplers.py",
                "uniform_subset(self._examples[speaker], self.max_examples_per_speaker, self._stream)",
                "self._examples[speaker]",
                "tests/privacy/sampling/test_sampling.py::test_speakers_are_sampled_with_at_most_k_examples",
            ),
            Fault(
                "speakers with the sensitivity of an example",
                "dpkernels/privacy/setup.py",
                "1 if whole_units else sampling.per_unit, ranks",
                "1, ranks",
                "tests/privacy/sampling/test_sampling.py::test_examples_of_speakers_have_sensitivity_k_c",
            ),
            Fault(
                "a capacity for speakers let through",
                "dpkernels/privacy/sampling/plan.py",
                """if max_batch_size is not None:
""",
                """if False:
""",
                "tests/privacy/sampling/test_sampling.py::test_incomplete_units_are_refused",
            ),
            Fault(
                "speakers told apart by identity",
                "dpkernels/privacy/sampling/plan.py",
                'list(speakers.tolist() if hasattr(speakers, "tolist") else speakers)',
                "list(speakers)",
                "tests/privacy/guards/test_bypasses.py::test_speaker_ids_compare_by_value_whatever_they_come_in",
            ),
            Fault(
                "a sampler of the user's own let through",
                "dpkernels/privacy/sampling/given_loader.py",
                "if type(data_loader.sampler) not in (RandomSampler, SequentialSampler) or getattr(",
                "if False and getattr(",
                "tests/privacy/sampling/test_sampling.py::test_other_loaders_are_refused",
            ),
            Fault(
                "dropped last batches let through",
                "dpkernels/privacy/sampling/given_loader.py",
                "if data_loader.drop_last:",
                "if False:",
                "tests/privacy/sampling/test_sampling.py::test_other_loaders_are_refused",
            ),
            Fault(
                "shuffling accounted as Poisson",
                "dpkernels/privacy/keywords.py",
                """"poisson_sampling": Refusal(
        bool,""",
                """"poisson_sampling": Refusal(
        lambda value: True,""",
                "tests/privacy/sampling/test_sampling.py::test_shuffling_is_refused_not_accounted_as_poisson",
            ),
            Fault(
                "batches from elsewhere let through",
                "dpkernels/privacy/step/sums.py",
                "if self.drawn is None:",
                """if self.drawn is None:
            return
        if False:""",
                "tests/privacy/sampling/test_sampling.py::test_batches_from_elsewhere_are_refused",
            ),
            Fault(
                "an example left out of the micro-batches",
                "dpkernels/privacy/sampling/logical_batch.py",
                "np.array_split(indices, count)",
                "np.array_split(indices[1:], count)",
                "tests/privacy/sampling/test_sampling.py::test_the_loader_hands_out_what_was_drawn",
            ),
            Fault(
                "a micro-batch left out within a frame budget",
                "dpkernels/privacy/sampling/logical_batch.py",
                "in pairwise(starts)]",
                "in pairwise(starts[1:])]",
                "tests/privacy/sampling/test_sampling.py::test_micro_batches_within_a_frame_budget",
            ),
            Fault(
                "a batch processed twice",
                "dpkernels/privacy/step/sums.py",
                "if total > self.drawn:",
                "if False:",
                "tests/privacy/test_engine.py::test_a_batch_processed_twice_is_refused",
            ),
            Fault(
                "a logical batch without a step",
                "dpkernels/privacy/step/sums.py",
                "if self.examples or self.drawn is not None:",
                "if False:",
                "tests/privacy/test_engine.py::test_one_step_for_every_logical_batch",
            ),
            Fault(
                "repeated examples let through",
                "dpkernels/privacy/sampling/given_loader.py",
                "if repeats:",
                "if False:",
                "tests/privacy/guards/test_bypasses.py::test_repeated_examples_are_refused",
            ),
            Fault(
                "rows that a data set of the hub repeats",
                "dpkernels/privacy/sampling/given_loader.py",
                'indices: Any = getattr(dataset, "_indices", None)',
                "indices: Any = None",
                "tests/privacy/guards/test_bypasses.py::test_rows_that_a_list_or_a_hub_data_set_repeats_are_repetitions",
            ),
            Fault(
                "a table of the hub with the same rows twice",
                "dpkernels/privacy/sampling/given_loader.py",
                " or chunks_repeat(dataset)",
                "",
                "tests/privacy/guards/test_bypasses.py::test_rows_that_a_table_of_the_hub_holds_twice_are_repetitions",
            ),
            Fault(
                "a table's rows told apart by their number",
                "dpkernels/privacy/sampling/given_loader.py",
                "elif (places := rows_in_memory(dataset)) is not None:",
                "elif (places := None) is not None:",
                "tests/privacy/guards/test_bypasses.py::test_rows_that_a_table_of_the_hub_holds_twice_are_repetitions",
            ),
            Fault(
                "one tensor in two data sets",
                "dpkernels/privacy/sampling/given_loader.py",
                "elif type(dataset) is TensorDataset and",
                "elif False and",
                "tests/privacy/guards/test_bypasses.py::test_rows_of_one_tensor_in_two_data_sets_are_repetitions",
            ),
            Fault(
                "any example read again",
                "dpkernels/privacy/sampling/logical_batch.py",
                "if unknown:",
                "if False:",
                "tests/privacy/step/test_recovery.py::test_only_sampled_examples_can_be_read_again",
            ),
            Fault(
                "a recording as often as it is listed",
                "asr_finetune/data/corpus.py",
                "None if first is item else repeat",
                "None",
                "tests/asr_finetune/data/test_repeats.py::test_each_recording_is_kept_once_and_counted_once",
            ),
            Fault(
                "recordings told apart by their size",
                "asr_finetune/data/repeats.py",
                "= (_size, _middle, _whole)",
                "= (_size,)",
                "tests/asr_finetune/data/test_repeats.py::test_recordings_that_differ_in_one_byte_anywhere_are_kept",
            ),
            Fault(
                "recordings told apart by a piece",
                "asr_finetune/data/repeats.py",
                "= (_size, _middle, _whole)",
                "= (_size, _middle)",
                "tests/asr_finetune/data/test_repeats.py::test_recordings_that_differ_in_one_byte_anywhere_are_kept",
            ),
            Fault(
                "rows of a table told apart by nothing",
                "asr_finetune/data/repeats.py",
                "[item.digest if item.path is None",
                "[item.id if item.path is None",
                "tests/asr_finetune/data/test_repeats.py::test_rows_of_a_table_are_compared_by_their_bytes",
            ),
            Fault(
                "one recording for two speakers",
                "asr_finetune/data/corpus.py",
                "if item.speaker != first.speaker:",
                "if False:",
                "tests/asr_finetune/data/test_repeats.py::test_a_recording_of_two_speakers_is_refused_where_speakers_are_protected",
            ),
            Fault(
                "pieces of a recording counted as recordings",
                "asr_finetune/training/sampling.py",
                'config.data.pieces == "refuse"',
                "False",
                "tests/asr_finetune/data/test_pieces.py::test_several_pieces_of_a_recording_are_examples_only_where_that_is_said",
            ),
            Fault(
                "a piece called a recording",
                "asr_finetune/training/record.py",
                '"piece" if record["data"].get("pieces")',
                '"piece" if False',
                "tests/asr_finetune/report/test_report.py::test_the_unit_is_a_piece_where_recordings_were_cut",
                "tests/asr_finetune/training/test_export.py::test_a_cards_unit_is_a_piece_where_recordings_were_cut",
            ),
            Fault(
                "sound in two examples",
                "asr_finetune/data/corpus.py",
                "if _extent(b)[0] < _extent(a)[1]",
                "if False",
                "tests/asr_finetune/data/test_pieces.py::test_no_sound_is_in_two_units",
            ),
            Fault(
                "sound of two speakers",
                "asr_finetune/training/sampling.py",
                "or pair[0].speaker != pair[1].speaker",
                "or False",
                "tests/asr_finetune/data/test_pieces.py::test_no_sound_is_in_two_units",
            ),
            Fault(
                "a piece as often as it is listed",
                "asr_finetune/data/corpus.py",
                "setdefault(item.piece, item)",
                "setdefault(item.name, item)",
                "tests/asr_finetune/data/test_pieces.py::test_the_same_piece_again_is_one_example",
            ),
            Fault(
                "a file and the same bytes in a table",
                "asr_finetune/data/repeats.py",
                "if any(item.path is None for item in utterances):",
                "if False:",
                "tests/asr_finetune/data/test_several_sources.py::test_a_file_and_the_same_bytes_in_a_table_are_one_recording",
            ),
            Fault(
                "copies of training recordings told apart by the name of their source",
                "asr_finetune/data/provenance.py",
                "item.id.removeprefix(item.origin), item.text",
                "item.id, item.text",
                "tests/asr_finetune/data/test_several_sources.py::test_a_test_recording_is_found_in_several_sources",
            ),
            Fault(
                "validation by training speakers",
                "asr_finetune/data/provenance.py",
                "if item.speaker in speakers]",
                "if item.speaker is speakers]",
                "tests/asr_finetune/data/test_provenance.py::test_other_recordings_of_training_speakers_are_not_public_where_speakers_are_protected",
            ),
            Fault(
                "a replaced file read as the one that was listed",
                "asr_finetune/data/audio.py",
                "    if changed:\n",
                "    if False:\n",
                "tests/asr_finetune/data/test_changed_audio.py::test_a_changed_file_is_not_read",
            ),
            Fault(
                "other bytes in a table read as those that were listed",
                "asr_finetune/data/audio.py",
                "if utterance.digest is not None and digest(content) != utterance.digest:",
                "if False:",
                "tests/asr_finetune/data/test_changed_audio.py::test_other_bytes_in_a_table_are_not_read",
            ),
            Fault(
                "silence scored in a lost recording's place",
                "asr_finetune/training/evaluate.py",
                "read = [index for index in chosen if index not in dataset.unread]",
                "read = chosen",
                "tests/asr_finetune/data/test_changed_audio.py::test_an_error_rate_leaves_out_what_cannot_be_read_and_says_so",
            ),
            Fault(
                "pieces compared by their own length",
                "asr_finetune/data/provenance.py",
                "    if item.stamp is not None:\n        return item.stamp[0]",
                "    if item.stamp is not None:\n        return round(1000 * item.seconds)",
                "tests/asr_finetune/data/test_pieces.py::test_a_copy_of_a_file_is_shared_whatever_is_taken_of_it",
            ),
        ),
    ),
    Line(
        19,
        "A drawn logical batch is stepped on exactly once",
        tests={
            "tests/privacy/step/test_passes.py::test_a_pass_begun_while_a_batch_is_open_is_refused": "a pass cannot begin while a batch is open",
            "tests/privacy/step/test_passes.py::test_a_refused_pass_takes_nothing_from_the_one_under_way": "a refused pass takes nothing from the one under way",
            "tests/privacy/step/test_passes.py::test_an_empty_batch_that_is_skipped_is_noticed": "an empty batch that is skipped is noticed",
            "tests/privacy/step/test_passes.py::test_zero_grad_does_not_close_a_batch": "zero_grad() does not close a batch",
            "tests/privacy/step/test_passes.py::test_what_a_broken_off_pass_had_drawn_comes_next": "what was drawn ahead of a pass that is left comes next",
            "tests/privacy/step/test_passes.py::test_a_batch_that_could_not_be_read_is_not_left_out": "a batch that could not be read is not left out",
            "tests/privacy/step/test_passes.py::test_a_batch_that_is_refused_comes_next": "a batch that is refused is handed out next",
            "tests/privacy/step/test_passes.py::test_of_two_iterators_the_older_ends_by_name": "of two iterators the older one ends with an error",
            "tests/privacy/step/test_passes.py::test_a_batch_of_an_older_pass_cannot_be_read_on": "a batch of an older pass cannot be read on",
            "tests/privacy/step/test_passes.py::test_every_draw_is_a_step_however_passes_are_left": "every draw is a step, empty ones too, however passes are left",
            "tests/privacy/step/test_recovery.py::test_no_example_is_given_twice_before_another_attempt": "no example is handed out twice before another attempt",
            "tests/privacy/step/test_flat.py::test_a_flat_loop_takes_the_nested_loops_steps": "a flat loop takes the nested loop's steps, those of empty batches too",
            "tests/privacy/step/test_flat.py::test_zero_grad_at_the_start_of_the_body_keeps_the_sums": "its zero_grad() does nothing within a logical batch",
            "tests/privacy/step/test_flat.py::test_a_loop_that_is_left_begins_again_with_its_batch": "a flat loop that is left within a batch begins again with that batch",
            "tests/privacy/step/test_flat.py::test_an_exception_in_the_body_loses_no_batch_and_a_nested_pass_may_follow": "also after an exception, and in a nested loop",
            "tests/privacy/step/test_flat.py::test_a_micro_batch_that_is_not_back_propagated_is_refused": "in it a micro-batch that is not back-propagated is refused",
            "tests/privacy/step/test_flat.py::test_a_last_micro_batch_without_its_step_is_refused": "and a last one without its step",
            "tests/privacy/step/test_flat.py::test_examples_that_were_not_handed_out_are_refused": "and examples that were not handed out",
            "tests/privacy/step/test_flat.py::test_a_second_step_after_one_micro_batch_is_refused": "and a second step",
            "tests/privacy/step/test_flat.py::test_a_schedule_in_the_body_is_refused": "and a learning rate that depends on the number of micro-batches",
            "tests/privacy/step/test_flat.py::test_a_schedule_after_the_last_micro_batch_is_refused": "or on the number of empty batches",
        },
        faults=(
            Fault(
                "a pass that may follow an open batch",
                "dpkernels/privacy/step/optimizer.py",
                "self._batch.check_closed()",
                "pass",
                "tests/privacy/step/test_passes.py::test_a_refused_pass_takes_nothing_from_the_one_under_way",
            ),
            Fault(
                "a batch that may follow an open one",
                "dpkernels/privacy/step/sums.py",
                "if self.examples or self.drawn is not None:",
                "if self.examples:",
                "tests/privacy/step/test_passes.py::test_an_empty_batch_that_is_skipped_is_noticed",
                "tests/privacy/step/test_passes.py::test_zero_grad_does_not_close_a_batch",
            ),
            Fault(
                "zero_grad closes a batch",
                "dpkernels/privacy/step/sums.py",
                """self.attempt += 1
        self.examples = 0""",
                """self.attempt += 1
        self.drawn = None
        self.examples = 0""",
                "tests/privacy/step/test_passes.py::test_zero_grad_does_not_close_a_batch",
            ),
            Fault(
                "what was drawn ahead dropped with its pass",
                "dpkernels/privacy/sampling/loader.py",
                "plan = _Plan(self._sampler, steps, self._split, self._unread)",
                "plan = _Plan(self._sampler, steps, self._split, deque())",
                "tests/privacy/step/test_passes.py::test_what_a_broken_off_pass_had_drawn_comes_next",
            ),
            Fault(
                "a batch taken from the queue before it is handed out",
                "dpkernels/privacy/sampling/loader.py",
                """            self._on_batch(sum(map(len, parts)), drawn=planned.drawn, digest=planned.digest)
            plan.hand_out()""",
                """            plan.hand_out()
            self._on_batch(sum(map(len, parts)), drawn=planned.drawn, digest=planned.digest)""",
                "tests/privacy/step/test_passes.py::test_a_batch_that_is_refused_comes_next",
            ),
            Fault(
                "a batch dropped that could not be read",
                "dpkernels/privacy/sampling/loader.py",
                """        while not self._unread:
            read_ahead()""",
                """        while not self._unread:
            try:
                read_ahead()
            except OSError:
                self._unread.clear()
                raise""",
                "tests/privacy/step/test_passes.py::test_a_batch_that_could_not_be_read_is_not_left_out",
            ),
            Fault(
                "an older iterator that reads on",
                "dpkernels/privacy/sampling/loader.py",
                "if self._plan is not plan:",
                "if False:",
                "tests/privacy/step/test_passes.py::test_a_batch_of_an_older_pass_cannot_be_read_on",
                "tests/privacy/step/test_passes.py::test_of_two_iterators_the_older_ends_by_name",
            ),
            Fault(
                "what collate gave not counted",
                "dpkernels/privacy/sampling/logical_batch.py",
                """        self._given.update(part)
""",
                "",
                "tests/privacy/step/test_recovery.py::test_no_example_is_given_twice_before_another_attempt[collate]",
            ),
            Fault(
                "what iterating gave not counted",
                "dpkernels/privacy/sampling/logical_batch.py",
                """            self._given_in_attempt().update(part)
""",
                "",
                "tests/privacy/step/test_recovery.py::test_no_example_is_given_twice_before_another_attempt[iterating]",
            ),
            Fault(
                "empty batches left out of a pass",
                "dpkernels/privacy/sampling/loader.py",
                "batch = self._split(self._sampler.draw())",
                """batch = self._split(self._sampler.draw())
        while not batch.drawn:
            batch = self._split(self._sampler.draw())""",
                "tests/privacy/step/test_passes.py::test_every_draw_is_a_step_however_passes_are_left",
            ),
            Fault(
                "a batch lost with the flat loop that is left",
                "dpkernels/privacy/sampling/loader.py",
                """            self._unread.appendleft(self._unfinished)
""",
                """            pass
""",
                "tests/privacy/step/test_flat.py::test_a_loop_that_is_left_begins_again_with_its_batch",
                "tests/privacy/step/test_flat.py::test_an_exception_in_the_body_loses_no_batch_and_a_nested_pass_may_follow",
            ),
            Fault(
                "sums kept of a flat loop that is left",
                "dpkernels/privacy/step/flat.py",
                """        self._batch.close()
""",
                """        self._batch.drawn = None
""",
                "tests/privacy/step/test_flat.py::test_a_loop_that_is_left_begins_again_with_its_batch",
            ),
            Fault(
                "no step for the empty batches of a flat loop",
                "dpkernels/privacy/sampling/flat.py",
                """        if not logical_batch.parts:
            steps.step()
        steps.check_closed()""",
                """        if not logical_batch.parts:
            steps.take_back()
        steps.check_closed()""",
                "tests/privacy/step/test_flat.py::test_a_flat_loop_takes_the_nested_loops_steps",
            ),
            Fault(
                "a flat loop's zero_grad that drops the sums",
                "dpkernels/privacy/step/flat.py",
                "return self.active and batch.drawn is not None and (batch.examples > 0 or batch.invalidated)",
                "return False",
                "tests/privacy/step/test_flat.py::test_zero_grad_at_the_start_of_the_body_keeps_the_sums",
            ),
            Fault(
                "a micro-batch of a flat loop left out",
                "dpkernels/privacy/step/flat.py",
                "if self._batch.drawn is not None and self._batch.examples < self.given:",
                "if False:",
                "tests/privacy/step/test_flat.py::test_a_micro_batch_that_is_not_back_propagated_is_refused",
            ),
            Fault(
                "a batch of a flat loop without its step",
                "dpkernels/privacy/step/flat.py",
                """        self.check_processed()
        if self._batch.drawn is not None:""",
                """        self.check_processed()
        if False:""",
                "tests/privacy/step/test_flat.py::test_a_last_micro_batch_without_its_step_is_refused",
            ),
            Fault(
                "more examples than a flat loop handed out",
                "dpkernels/privacy/step/flat.py",
                "self._batch.examples + examples > self.given",
                "False",
                "tests/privacy/step/test_flat.py::test_examples_that_were_not_handed_out_are_refused",
            ),
            Fault(
                "a step of a flat loop without a batch",
                "dpkernels/privacy/step/flat.py",
                """        if self._batch.drawn is None:
            raise RuntimeError(""",
                """        if False:
            raise RuntimeError(""",
                "tests/privacy/step/test_flat.py::test_a_second_step_after_one_micro_batch_is_refused",
            ),
            Fault(
                "a learning rate by the number of micro-batches",
                "dpkernels/privacy/step/flat.py",
                "if self._rates() != self._kept_rates:",
                "if False:",
                "tests/privacy/step/test_flat.py::test_a_schedule_in_the_body_is_refused",
                "tests/privacy/step/test_flat.py::test_a_schedule_after_the_last_micro_batch_is_refused",
            ),
            Fault(
                "a step of a flat loop at a changed learning rate",
                "dpkernels/privacy/step/flat.py",
                """        self.check_processed()
        self.check_rates()
""",
                """        self.check_processed()
""",
                "tests/privacy/step/test_flat.py::test_a_schedule_in_the_body_is_refused",
            ),
        ),
    ),
)
