"""Settings of the test suite."""

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
