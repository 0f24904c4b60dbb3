"""The command line, and notebooks that show what the lenses find."""
