"""SAELens loads our autoencoders and we load theirs: both compute the same features.

SAELens is in an environment of its own: `SAELENS_PYTHON=/path/to/bin/python pytest tests/lenses/test_saelens.py`.
"""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsight.lenses import SAE

PYTHON = os.environ.get("SAELENS_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SAELENS_PYTHON is not set")

OURS = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
x = load_file(sys.argv[1] + "/x.safetensors")["x"]
save_file({"features": SAE.load_from_disk(sys.argv[1] + "/sae").encode(x).contiguous()}, sys.argv[1] + "/y.safetensors")
"""
THEIRS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
folder, kind = sys.argv[1:]
torch.manual_seed(0)
sae = {
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4)),
    "jumprelu": lambda: JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64)),
    "relu": lambda: StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, apply_b_dec_to_input=False)),
}[kind]()
with torch.no_grad():
    for name, parameter in sae.named_parameters():
        parameter.normal_(std=0.3).abs_() if name == "threshold" else parameter.normal_(std=0.3)
sae.save_model(folder + "/sae")
x = load_file(folder + "/x.safetensors")["x"]
save_file({"features": sae.encode(x).contiguous()}, folder + "/y.safetensors")
"""


@pytest.fixture
def x(tmp_path):
    x = torch.randn(16, 32)
    save_file({"x": x}, tmp_path / "x.safetensors")
    return x


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jumprelu", "relu"])
def test_saelens_loads_ours(x, kind, tmp_path):
    sae = SAE(32, 64, kind, 4 if "topk" in kind else None).eval()
    with torch.no_grad():
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.5)
        sae.encoder_bias.normal_(std=0.3), sae.decoder_bias.normal_(std=0.3)
    sae.save(tmp_path / "sae")
    subprocess.run([PYTHON, "-c", OURS, str(tmp_path)], check=True)
    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["features"], sae.encode(x))


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "relu"])
def test_we_load_theirs(x, kind, tmp_path):
    subprocess.run([PYTHON, "-c", THEIRS, str(tmp_path), kind], check=True)
    sae = SAE.load(tmp_path / "sae")
    assert sae.kind == kind
    torch.testing.assert_close(sae.encode(x), load_file(tmp_path / "y.safetensors")["features"])
