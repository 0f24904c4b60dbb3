"""Showing what lenses find: image grids and the command line."""
