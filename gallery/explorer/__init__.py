"""The explorer: the lenses in a browser. `explore` serves it; each tab has the fields and the work of some lenses."""
