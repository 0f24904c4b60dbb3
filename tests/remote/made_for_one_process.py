"""The tests that make no sense with a model on a server, and why. `swapped.py` runs all others there."""

COPIES = "values are copies of the model's own: these are the same objects, or take memory with it"
LATER = "what is assigned is sent with the next request, where an error of it is raised, at the line of the assignment"
GRADIENTS = "gradients need grad=True and run.backward(loss)"
MODES = "grad mode, autocast, function modes and context variables of the client do not reach the server"
ATTACHED = "modules that the user attaches are not sent, so they have no values in a run"
META = "a meta tensor has no data to send"
OBJECTS = "objects other than tensors and plain values stay on the server"
ERRORS = "errors of the model are copies, with the same class and text"
PLACES = "a client knows the step where the model stands, and not the point"
FUNCTIONS = "functions, models and other live objects are not sent as arguments"
OUTPUT = "progress bars and warnings of a lens or a pipeline go to the log of the server"
WEIGHTS = "the weights are on the server: when they are read, of which type, and on which device is decided there"
SHARED = "the models are kept for several tests, but each test has its own server"
MODULAR = "a modular pipeline returns a state, which cannot be sent, so a server refuses to serve it"
INSIDE = "how the engine works within one process: stacks, threads, interrupts, frames, what is compiled"

# A key is a file, a test, or some parameters of one: "*" stands for any text.
TESTS = {
    "test_anywhere.py::test_under_tracing": INSIDE,
    "test_architectures_of_lenses.py": SHARED,
    "test_arguments.py::test_a_run_with_a_streamer_that_is_dropped_unread": FUNCTIONS,
    "test_arguments.py::test_old_keywords_that_a_pipeline_reads_from_its_kwargs_are_known": FUNCTIONS,
    "test_assignments.py::test_a_value_of_a_type_that_breaks_the_model_is_named[is on cpu*": META,
    "test_assignments.py::test_too_late_after_a_read_is_an_error_and_changes_nothing": LATER,
    "test_attention_maps.py::test_a_given_image": COPIES,
    "test_attention_values.py::test_a_run_that_is_dropped_tells_that_there_may_be_several_products": OUTPUT,
    "test_attention_values.py::test_gradients_through_the_pipeline": GRADIENTS,
    "test_attentions.py::test_an_image_prompt": MODES,
    "test_attentions.py::test_positions_that_are_not_square": MODES,
    "test_attentions.py::test_products_of_another_size": MODES,
    "test_attentions.py::test_probabilities_of_every_module": MODES,
    "test_attentions.py::test_reference_images_beside_the_image": MODES,
    "test_attentions.py::test_reference_images_in_a_product_of_their_own": MODES,
    "test_attentions.py::test_what_attends_to_what": MODES,
    "test_attentions.py::test_what_follows_a_linear_attention_is_not_kept": MODES,
    "test_attribution_patching.py": GRADIENTS,
    "test_branches.py::test_gradients_reach_a_branch_of_a_row": GRADIENTS,
    "test_branches.py::test_guidance_that_ends_half_way": FUNCTIONS,
    "test_branches.py::test_parts_are_views_of_the_batch": COPIES,
    "test_calls.py::test_inputs_by_number": COPIES,
    "test_compiled.py": INSIDE,
    "test_control.py::test_skip_too_late": LATER,
    "test_diffusion_components.py::test_casting": WEIGHTS,
    "test_diffusion_lazy_loading.py::test_a_component_exchanged_before_is_kept": WEIGHTS,
    "test_diffusion_lazy_loading.py::test_at_once": WEIGHTS,
    "test_diffusion_lazy_loading.py::test_using_the_model_loads_them": WEIGHTS,
    "test_diffusion_lens.py::test_a_progress_bar_over_the_layers": OUTPUT,
    "test_diffusion_lens.py::test_arguments_that_do_not_fit": FUNCTIONS,
    "test_diffusion_lens.py::test_unknown_words_are_warned_of_once_at_the_users_line": OUTPUT,
    "test_diffusion_loading.py::test_a_pipeline_whose_weights_are_needed_at_once_is_built_once": WEIGHTS,
    "test_diffusion_runs.py::test_a_given_generator_is_passed_on": FUNCTIONS,
    "test_diffusion_steps.py::test_previews_do_not_end_a_loop": FUNCTIONS,
    "test_diffusion_values.py::test_reading_what_the_vae_encodes": OBJECTS,
    "test_edits.py::test_a_copy_that_shares_the_weights": "the class of a model on a server is a subclass",
    "test_edits.py::test_an_attached_module_is_called_elsewhere": ATTACHED,
    "test_edits.py::test_an_attached_module_learns": ATTACHED,
    "test_edits.py::test_an_error_after_the_end_leaves_no_other_edit": INSIDE,
    "test_edits.py::test_attached_to_a_copy": ATTACHED,
    "test_edits.py::test_attached_within_the_edit": ATTACHED,
    "test_edits.py::test_features_are_changed": ATTACHED,
    "test_edits.py::test_many_runs_leave_nothing": ATTACHED,
    "test_edits.py::test_modes_are_those_of_the_run": MODES,
    "test_edits.py::test_on_a_pipeline": ATTACHED,
    "test_encoder_names.py::test_a_standard_name_and_the_real_one_are_the_same_point": COPIES,
    "test_errors.py::test_a_run_is_asked_by_a_model_that_its_own_model_runs": INSIDE,
    "test_errors.py::test_an_attribute_error_of_an_unread_run": ERRORS,
    "test_errors.py::test_an_invalid_assignment_in_a_helper[assigned too late]": LATER,
    "test_errors.py::test_the_models_own_error_surfaces_as_itself": ERRORS,
    "test_errors.py::test_the_position_is_named": PLACES,
    "test_follow.py::test_inputs": COPIES,
    "test_function_modes.py::test_a_run_opened_and_read_inside_a_mode_keeps_it": MODES,
    "test_generation_steps.py::test_a_loop_of_the_users_own": FUNCTIONS,
    "test_generation_steps.py::test_a_loop_of_the_users_own_that_tells_nothing_has_no_steps": FUNCTIONS,
    "test_generation_steps.py::test_a_step_is_a_token_in_every_mode[an assistant]": FUNCTIONS,
    "test_generation_steps.py::test_a_step_is_a_token_in_every_mode[sampling with an assistant]": FUNCTIONS,
    "test_generation_steps.py::test_an_assistant_with_another_tokenizer": FUNCTIONS,
    "test_generation_steps.py::test_assisted_decoding_of_an_encoder_with_a_decoder": FUNCTIONS,
    "test_gradient_checkpointing.py::test_a_saved_value_*": GRADIENTS,
    "test_gradient_checkpointing.py::test_checkpointing_of_diffusers": GRADIENTS,
    "test_gradient_checkpointing.py::test_checkpointing_of_transformers": GRADIENTS,
    "test_gradient_checkpointing.py::test_edits_that_stay_on_the_model": GRADIENTS,
    "test_gradient_checkpointing.py::test_gradients_are_those_without_checkpointing": GRADIENTS,
    "test_gradient_checkpointing.py::test_gradients_of_gradients": GRADIENTS,
    "test_gradient_checkpointing.py::test_reentrant_checkpointing_is_refused": GRADIENTS,
    "test_gradient_checkpointing.py::test_what_a_run_leaves_alone_is_still_checkpointed": GRADIENTS,
    "test_gradients.py::test_a_gradient_is_edited_on_its_way": GRADIENTS,
    "test_gradients.py::test_a_loss_on_the_image_reaches_the_text_encoder": GRADIENTS,
    "test_gradients.py::test_a_loss_reaches_any_point": GRADIENTS,
    "test_hooked_calls.py::test_the_body_keeps_its_grad_mode": MODES,
    "test_interrupts.py": INSIDE,
    "test_language.py::test_a_stopping_criterion_of_the_user_works_on": FUNCTIONS,
    "test_language.py::test_a_streamer_of_transformers_works": FUNCTIONS,
    "test_language.py::test_gradients_through_a_pass": GRADIENTS,
    "test_language_lazy_loading.py": WEIGHTS,
    "test_language_names.py::test_gradients_inside_an_attention": GRADIENTS,
    "test_latents.py::test_the_packaged_pipelines_need_no_arguments": OUTPUT,
    "test_left_behind.py::test_300_runs_leave_neither_hooks_nor_memory": INSIDE,
    "test_left_behind.py::test_an_interrupt_at_any_moment": INSIDE,
    "test_left_behind.py::test_nothing_is_left_behind[model_interrupt*": INSIDE,
    "test_letting_go.py::test_what_the_graph_holds_is_there_again": COPIES,
    "test_letting_go.py::test_what_was_read_is_let_go_when_the_model_moves_on": COPIES,
    "test_methods.py::test_order": LATER,
    "test_methods.py::test_the_methods_of_an_autoencoder": OBJECTS,
    "test_modes.py::test_a_context_of_the_body_does_not_reach_the_model": MODES,
    "test_modes.py::test_a_context_of_the_model_does_not_reach_the_body": MODES,
    "test_modes.py::test_a_loss_under_no_grad_in_the_body": MODES,
    "test_modes.py::test_a_run_keeps_the_modes_it_was_opened_in": MODES,
    "test_modes.py::test_context_variables_are_visible_in_the_model": MODES,
    "test_modes.py::test_contexts_that_cross": MODES,
    "test_modes.py::test_values_of_an_inference_model_in_a_body_with_gradients": MODES,
    "test_modular.py": MODULAR,
    "test_order.py::test_a_method_that_was_called_before_it_was_asked_for": LATER,
    "test_order.py::test_a_module_list_has_no_values": LATER,
    "test_order.py::test_never_of_a_later_pass[*-assign]": LATER,
    "test_order.py::test_never_of_a_later_pass[*-skip]": LATER,
    "test_order.py::test_those_inputs_can_no_longer_be_changed": LATER,
    "test_order.py::test_too_late[*-assign]": LATER,
    "test_order.py::test_too_late[*-skip]": LATER,
    "test_parts_of_values.py::test_backward_is_that_of_the_loss": GRADIENTS,
    "test_record.py::test_attached_values_carry_gradients": GRADIENTS,
    "test_record.py::test_objects_that_hold_tensors_are_copied_and_counted": OBJECTS,
    "test_record.py::test_objects_without_tensors_are_kept_as_they_are": OBJECTS,
    "test_rows.py::test_a_batch_in_the_second_dimension_is_an_error": LATER,
    "test_rows.py::test_a_row_assigned_without_gradients_leaves_those_of_the_others": GRADIENTS,
    "test_rows.py::test_gradients_flow_through_every_row_that_is_assigned": GRADIENTS,
    "test_rows.py::test_rows_read_their_part": COPIES,
    "test_rows.py::test_the_batch_is_copied_once_for_all_rows_that_are_assigned": COPIES,
    "test_stacks.py::test_nothing_of_a_stopped_or_failed_run_is_held": INSIDE,
    "test_states_of_both_sides.py::test_saved_tensor_hooks_of_a_checkpoint": MODES,
    "test_states_of_torch.py::test_a_run_inside_torch_func": MODES,
    "test_states_of_torch.py::test_the_bodys_block_is_not_around_the_model[no_grad]": MODES,
    "test_states_of_torch.py::test_the_models_own_block_is_not_around_the_body[no_grad]": MODES,
    "test_steps.py::test_print_shows_where_the_steps_stand": PLACES,
    "test_tasks.py::test_many_threads_on_one_model": INSIDE,
    "test_thousand_runs.py": INSIDE,
    "test_threads.py::test_two_threads_on_two_models": GRADIENTS,
    "test_threads_of_the_model.py": INSIDE,
    "test_unembedding.py::test_gradients_pass_through": GRADIENTS,
    "test_users_hooks.py::test_hooks_run_in_their_own_order": COPIES,
    "test_values.py::test_gradients_are_plain_pytorch": GRADIENTS,
    "test_values.py::test_gradients_while_the_model_waits": GRADIENTS,
    "test_values.py::test_the_input_is_what_the_forward_pass_gets": COPIES,
    "test_values.py::test_the_whole_models_values": COPIES,
    "test_values.py::test_values_are_the_models_own": COPIES,
    "test_values.py::test_values_of_any_kind_pass": COPIES,
}


def why_local(test: str) -> str | None:
    """Return why a test ("test_rows.py::test_each[3]") makes no sense with a model on a server; None if it does."""
    return next((why for key, why in TESTS.items() if _is_meant(key, test)), None)


def _is_meant(key: str, test: str) -> bool:
    start, star, end = key.partition("*")
    if star:
        return test.startswith(start) and test.endswith(end)
    return test == key or test.startswith((f"{key}::", f"{key}["))
