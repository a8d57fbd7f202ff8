"""The faults of checkpoints and of data, by their number, and the tests that hold what the user sees.

A number in brackets behind a test's name says the same in its place.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Number: what happens, and the tests of it.
ROWS = {
    16: (
        "an old checkpoint goes only when a newer one is complete",
        "test_training_faults::test_an_old_checkpoint_goes_when_a_newer_one_is_complete",
    ),
    17: (
        "two jobs, one output",
        "test_foundation::test_a_second_writer_is_told_who_holds_the_lock",
        "test_training_resume::test_a_folder_in_use_is_refused_with_its_owner",
    ),
    18: (
        "modes by the umask",
        "test_foundation::test_files_written_have_the_mode_that_umask_asks_for",
        "test_conversion_roundtrip::test_files_are_written_for_whoever_the_umask_lets_read",
    ),
    19: (
        "links stay links",
        "test_foundation::test_a_link_to_the_output_stays_a_link",
        "test_conversion_roundtrip::test_links_keep_pointing_where_they_point",
    ),
    20: ("input is output", "test_conversion_faults::test_output_is_input_or_one_lies_in_the_other"),
    21: (
        "a truncated shard",
        "test_conversion_files::test_a_truncated_shard",
        "test_conversion_directory::test_a_truncated_distcp_file",
    ),
    22: ("a shard of no bytes", "test_conversion_files::test_a_shard_without_a_whole_header"),
    23: (
        "a flipped bit",
        "test_conversion_report::test_a_flipped_bit_is_named_with_both_hashes",
        "test_conversion_report::test_a_flipped_bit_stops_an_import",
        "test_conversion_report::test_a_step_of_training_is_held_against_its_manifest",
    ),
    24: ("NaN and Inf", "test_conversion_faults::test_weights_that_are_not_finite"),
    25: (
        "missing tensors",
        "test_conversion_faults::test_everything_missing_unexpected_and_misshaped_comes_at_once",
        "test_conversion_directory::test_everything_wrong_with_a_megatron_directory_comes_at_once",
    ),
    26: (
        "tensors too many",
        "test_conversion_faults::test_everything_missing_unexpected_and_misshaped_comes_at_once",
        "test_conversion_faults::test_inverse_frequencies_of_older_checkpoints_are_ignored",
    ),
    27: (
        "another shape",
        "test_conversion_faults::test_everything_missing_unexpected_and_misshaped_comes_at_once",
    ),
    28: (
        "another type",
        "test_conversion_faults::test_layers_of_several_types_need_a_choice",
        "test_conversion_faults::test_a_cast_that_overflows_is_not_called_a_bad_weight",
        "test_conversion_report::test_a_cast_a_note_and_what_is_left_out_are_said",
    ),
    29: ("a missing shard", "test_conversion_files::test_missing_shards_are_all_named"),
    30: (
        "index against headers",
        "test_conversion_files::test_the_index_and_the_headers_are_held_against_each_other",
    ),
    31: (
        "paths and links that lead away",
        "test_conversion_files::test_unsafe_shard_paths",
        "test_conversion_files::test_a_shard_that_is_a_link_out_of_the_folder",
        "test_conversion_doors::test_a_weight_map_that_leads_away",
        "test_conversion_doors::test_a_link_out_of_the_folder_is_not_handed_on",
        "test_conversion_doors::test_a_link_out_of_a_step_folder",
        "test_safe_pickle::test_a_path_that_leaves_the_folder",
    ),
    32: (
        "a config that is none, an unknown architecture",
        "test_conversion_files::test_config_json_that_is_not_one",
        "test_conversion_doors::test_code_that_auto_map_names_is_data",
    ),
    33: (
        "code of the model's authors",
        "test_conversion_doors::test_code_that_auto_map_names_is_data",
        "test_conversion_doors::test_code_that_auto_map_names_is_not_run_to_compare_logits",
    ),
    34: (
        "pickles that would run",
        "test_safe_pickle::test_a_payload_in_the_metadata",
        "test_safe_pickle::test_a_payload_in_common_pt",
        "test_safe_pickle::test_a_payload_in_a_byte_object",
        "test_safe_pickle::test_a_payload_in_the_place_of_a_tensor",
        "test_conversion_doors::test_a_payload_in_a_bin_file",
        "test_training_faults::test_a_poisoned_checkpoint_never_runs",
    ),
    35: (
        "archives of whole models, and bombs",
        "test_conversion_doors::test_an_archive_of_a_model_is_not_unpacked",
        "test_conversion_doors::test_an_archive_that_unpacks_to_more_than_it_is",
    ),
    36: (
        "TP divides nothing",
        "test_training_settings::test_a_layout_that_cannot_be_names_the_nearest_that_can",
        "test_training_settings::test_all_broken_rules_of_a_layout_come_together",
    ),
    37: (
        "PP divides no layers",
        "test_training_settings::test_a_layout_that_cannot_be_names_the_nearest_that_can",
    ),
    38: ("padded vocabularies", "test_conversion_directory::test_vocabulary_rows"),
    39: (
        "tied embeddings",
        "test_conversion_directory::test_a_tied_megatron_directory_may_carry_its_output_layer_when_it_is_the_embedding",
        "test_conversion_faults::test_a_tied_checkpoint_may_carry_its_output_layer_when_it_is_the_embedding",
        "test_conversion_mcore::test_a_directory_that_megatron_core_saved_exports",
        "test_planning::test_tied_embeddings_of_a_pipeline_are_said",
    ),
    40: (
        "sizes are read, not listed",
        "test_conversion_plan::test_models_have_as_many_parameters_as_their_authors_say",
        "test_launch_arguments::test_a_wrong_word_is_refused_with_exit_2",
    ),
    41: (
        "there and back differs",
        "test_conversion_resume::test_what_differs_is_found_before_anything_is_published",
        "test_conversion_report::test_the_first_differences_are_described_and_all_counted",
        "test_verify_logits::test_another_model",
    ),
    42: (
        "another layout",
        "test_conversion_mcore::test_a_directory_that_megatron_core_saved_exports",
        "test_training_resume::test_another_layout_goes_on_with_the_same_losses",
    ),
    43: (
        "another version of Temper",
        "test_conversion_report::test_a_record_of_a_later_version",
        "test_training_resume::test_a_step_of_a_newer_version_is_named",
    ),
    44: (
        "larger than memory",
        "test_conversion_memory::test_memory_stays_below_twice_the_largest_tensor_and_a_half_gigabyte",
        "test_conversion_memory::test_memory_of_a_sparse_checkpoint_of_20_gb",
    ),
    45: (
        "tokenizer files",
        "test_conversion_report::test_every_other_file_is_copied_and_hashed",
        "test_conversion_report::test_a_changed_tokenizer_is_named_but_stops_no_import",
        "test_conversion_export::test_tokenizer_and_template_are_those_of_the_source",
    ),
    46: (
        "malformed JSON",
        "test_data_records::test_a_malformed_line_is_explained_and_clipped",
        "test_data_records::test_a_malformed_list_is_located_by_line",
        "test_data_build::test_skipped_rows_are_written_down_with_their_reasons",
    ),
    47: (
        "a last line that was cut off",
        "test_data_records::test_a_malformed_line_is_explained_and_clipped",
    ),
    48: (
        "bytes that are no UTF-8",
        "test_data_records::test_bytes_of_another_encoding_are_located_and_read_on_request",
    ),
    49: (
        "marks, CRLF and blank lines",
        "test_data_records::test_marks_crlf_and_blank_lines_are_accepted_and_counted",
    ),
    50: (
        "a lone surrogate",
        "test_data_records::test_an_escaped_lone_surrogate_reaches_the_check",
    ),
    51: (
        "a list in a .jsonl file",
        "test_data_records::test_lists_and_lines_are_told_apart_by_content",
    ),
    52: (
        "alpaca without input",
        "test_data_records::test_alpaca_joins_instruction_and_input_by_a_newline",
    ),
    53: (
        "content that is no text",
        "test_data_records::test_a_bad_row_is_named",
    ),
    54: (
        "an answer without a token",
        "test_data_records::test_a_bad_row_is_named",
        "test_data_chat::test_a_row_of_which_nothing_is_trained_is_an_error",
    ),
    55: (
        "a row of which nothing is trained",
        "test_data_audit_tokens::test_prompts_as_long_as_the_row_are_all_masked",
    ),
    56: (
        "rows that are too long",
        "test_data_audit_tokens::test_too_long_rows_say_how_many_and_where_the_longest_is",
        "test_training_batches::test_too_long_can_drop_or_stop",
        "test_data_doubled::test_conversations_that_are_too_long_are_cut_behind_a_whole_answer_or_refused",
    ),
    57: (
        "turns out of order",
        "test_data_records::test_a_bad_row_is_named",
        "test_data_records::test_neighbours_of_one_role_are_joined_on_request",
    ),
    58: (
        "an unknown role",
        "test_data_records::test_a_bad_row_is_named",
    ),
    59: (
        "control text in a message",
        "test_data_chat::test_control_text_in_a_message_stays_text",
    ),
    60: (
        "special tokens that are missing or doubled",
        "test_data_audit_tokens::test_a_template_that_writes_bos_twice",
        "test_data_audit_tokens::test_endings_are_those_that_a_loop_finds",
    ),
    61: (
        "a prompt that does not begin the text",
        "test_data_templates::test_a_prompt_that_does_not_begin_the_text_shows_both",
    ),
    62: (
        "an end that generation does not stop at",
        "test_data_audit_tokens::test_the_end_that_generation_does_not_stop_at",
        "test_conversion_export::test_generation_ends_where_answers_were_trained_to_end",
    ),
    63: (
        "padding that is the end token",
        "test_data_chat::test_the_mask_goes_by_position_not_by_the_pad_token",
    ),
    64: (
        "another tokenizer",
        "test_training_faults::test_a_dataset_of_another_tokenizer_is_refused_with_both_names",
    ),
    65: (
        "a token without an embedding row",
        "test_training_start::test_a_token_without_an_embedding_row_is_found_with_its_row",
    ),
    66: (
        "a file of a pair is missing",
        "test_data_dataset::test_damage_is_seen_at_the_door",
        "test_data_dataset::test_an_unfinished_build_is_mentioned",
    ),
    67: (
        "a .bin of another size",
        "test_data_dataset::test_damage_is_seen_at_the_door",
    ),
    68: (
        "a damaged .idx",
        "test_data_dataset::test_damage_is_seen_at_the_door",
    ),
    69: (
        "a builder that was killed",
        "test_data_build::test_a_killed_builder_leaves_the_old_dataset_whole",
    ),
    70: (
        "two builders on one prefix",
        "test_data_build::test_two_builders_on_one_prefix",
    ),
    71: (
        "a worker that dies",
        "test_data_workers::test_a_process_that_dies_is_named_with_its_rows",
    ),
    72: (
        "labels beside unsigned tokens",
        "test_data_dataset::test_the_bytes_are_these",
    ),
    73: (
        "more than 2^31 bytes",
        "test_data_dataset::test_offsets_beyond_four_gigabytes_are_right",
    ),
    74: (
        "another SEQ_LEN than the doubled set's",
        "test_data_doubled::test_there_and_back_is_equal_token_for_token",
        "test_training_start::test_data_of_another_seq_len_is_read_and_said",
    ),
    75: (
        "files of two builds",
        "test_data_dataset::test_files_of_two_builds_are_not_taken_for_one",
    ),
    76: (
        "overlap, copies, equal sides, one class",
        "test_data_audit::test_copies_and_rows_that_are_nearly_equal",
        "test_data_audit::test_what_of_the_validation_set_is_trained_on",
        "test_data_audit::test_equal_sides_of_a_pair_are_named",
        "test_data_audit::test_labels_of_one_class",
    ),
    77: (
        "too little data",
        "test_training_start::test_too_little_data_is_said_with_numbers",
        "test_data_audit_tokens::test_fewer_rows_than_a_global_batch",
        "test_data_audit_tokens::test_a_validation_set_without_rows",
        "test_data_filter_choice::test_a_part_that_would_be_empty_is_refused",
    ),
}


def test_every_fault_has_its_row():
    assert sorted(ROWS) == list(range(16, 78))


@pytest.mark.parametrize("row", ROWS)
def test_every_test_that_a_row_names_exists(row):
    for name in ROWS[row][1:]:
        file, _, test = name.partition("::")
        tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
