"""Shared by the results of all lenses: saving, the record, figures, image grids."""
