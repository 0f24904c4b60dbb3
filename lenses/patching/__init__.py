"""Helpers of activation and attribution patching: pairs of prompts, and the rows of a sweep."""
