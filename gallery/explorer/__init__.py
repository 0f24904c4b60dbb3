"""The explorer: the lenses in a browser. `explore` serves it; each tab contains the fields of some lenses."""
