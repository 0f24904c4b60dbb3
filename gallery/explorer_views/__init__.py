"""The views of the explorer, and the models that they share."""
