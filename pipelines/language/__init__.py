"""Language models: the wrapper, generation, standard names and accessors."""
