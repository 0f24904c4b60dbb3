"""The packaged tiny pipelines: scenes of coloured shapes, the scripts that trained on them, and the weights."""
