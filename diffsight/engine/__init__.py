"""How a run works: the model in a coroutine, the taps on it, and the order in which values are asked for.

The files in order; each imports only from those above it:

    threads         the thread of a run, and calls in threads that a model starts
    users_line      the line of the user's code that an error is about
    torch_state     grad mode, inference mode, autocast, function modes, random state
    function_code   what the code of functions uses
    random_generators   the random generators that a model may use, restored after a block
    coroutine       a stack that parks and resumes; each run has its own, so two can be open in lockstep
    checkpointed_regions    parts of the model that `backward()` computes again
    tapped_pickles  pickles of objects whose methods are tapped
    hooks           the hooks that a run puts on the model and removes again
    changes_in_place    which of its values a function changes in place
    users_hooks     forward hooks of others, and which of them may change an output
    unseen_modules  classes of modules whose outputs cannot be seen
    target          one thing that can be tapped, and its path
    wrapped_modules     sees through modules that wrap another
    structural_copy     a model without its weights and hooks
    batch_dimensions    which values have the batch as their first dimension
    batch_slicing   a part of a value, such as the rows of a batch
    weak_values     values that exist as long as somebody else holds them
    points          a point as a body asks for it, a value that passes one, an assignment to one
    innermost_run   which of several open runs `model.<path>` means
    late_weights    weights that are loaded when they are first needed
    step_clock      when a step begins
    attached_modules    the user's own modules, attached to parts of a model
    module_places   where modules stand, and which are called directly, bypassing those around them
    model_tree      everything that can be tapped in a model, and its names
    tapped_call     the calls of one module or method: counted, changed or skipped
    taps            all taps of a run, and when they start to count
    order           passed, too late, never reached
    turns           edits and the functions of `run.each`, and whose turn it is
    run_end         how a run ends, leaving nothing on the model
    run_to_point    runs the model up to the point that the body asks for
    scan_errors     the error of a scan that needs values
    scan_fakes      fake tensors, and zeros
    scan_state      the state of modules that a scan restores
    scan_mode       what functions compute in a scan
    scan            runs on shapes alone
    capture         the blocks of `with` statements that run later
"""
