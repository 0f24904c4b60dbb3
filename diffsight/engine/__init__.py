"""How a run works: the model in a coroutine, its taps, and the order in which values are asked for."""
