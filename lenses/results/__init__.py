"""What the results of lenses share: saving, records, plots and image grids."""
