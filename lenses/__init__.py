"""Lenses: functions from a model and inputs to a result that can be looked at."""
