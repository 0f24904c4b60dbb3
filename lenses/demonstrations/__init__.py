"""Helpers of the lens on function vectors: prompts with demonstrations of a task."""
