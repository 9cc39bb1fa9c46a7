"""The AutoAttack of the package pyautoattack on a torch network, for `configs/benchmark.py:autoattack` to be measured against.

A program of its own (it needs torch and pyautoattack, and nothing of this package), driven over its standard input: first one
line of JSON with the settings, answered by {"ready": ..., "parameters": ...}; then each line runs one evaluation and is answered by
{"seconds": ..., "robust": [...]}.
"""

import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import nn
from torch_peer import WideResNet

PREFERENCE = 30.0
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Graph(nn.Module):
  """A classifier from an .npz file: a graph of ONNX operators, and its parameters by name."""

  def __init__(self, path: str):
    super().__init__()
    with np.load(path) as file:
      arrays = {name: file[name] for name in file.files}
    self.graph = json.loads(bytes(arrays.pop("__graph__")).decode())
    self.names = {name: f"p{i}" for i, name in enumerate(arrays)}
    for name, array in arrays.items():
      self.register_parameter(self.names[name], nn.Parameter(torch.tensor(array), requires_grad=False))
    for name in ("mean", "std"):
      self.register_buffer(name, torch.tensor(self.graph["norm"][name]).reshape(1, -1, 1, 1))

  def forward(self, x):
    values = {name: getattr(self, attribute) for name, attribute in self.names.items()}
    values[self.graph["input"]] = (x - self.mean) / self.std
    for node in self.graph["nodes"]:
      inputs = [values[name] for name in node["inputs"] if name in values]
      values[node["outputs"][0]] = self.compute(node["op"], node["attrs"], inputs)
    return values[self.graph["output"]]

  @staticmethod
  def compute(op, attrs, inputs):
    if op == "Conv":
      x, kernel, bias = inputs
      top, left, bottom, right = attrs["pads"]
      if top == bottom and left == right:
        return F.conv2d(x, kernel, bias, attrs["strides"], (top, left))
      return F.conv2d(F.pad(x, (left, right, top, bottom)), kernel, bias, attrs["strides"])
    if op == "Gemm":
      return F.linear(*inputs)
    if op == "Relu":
      return F.relu(inputs[0])
    return inputs[0] + inputs[1] if op == "Add" else inputs[0].flatten(1)


class Peer:
  """One network, some images, and AutoAttack."""

  def __init__(self, settings: dict):
    torch.manual_seed(0)
    self.device = torch.device(settings["device"])
    if settings["threads"]:
      torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True
    graph = settings["graph"]
    net = Graph(graph) if graph else WideResNet(settings["depth"], settings["width"], 10)
    self.net = net.to(self.device).eval()
    for parameter in self.net.parameters():
      parameter.requires_grad_(False)
    with np.load(settings["images"]) as file:
      self.x = torch.tensor(file["x"]).permute(0, 3, 1, 2).contiguous().to(self.device)
      self.y = torch.tensor(file["y"]).long().to(self.device)
    if not graph:  # a fresh network: its first class is preferred by far, as in ours
      with torch.no_grad():
        self.net.logits.bias[0] += PREFERENCE
    self.settings = settings

  def run(self) -> list[bool]:
    s = self.settings
    rapid = s["version"] == "rapid"  # ours: the first two of standard, with its settings
    version = "standard" if rapid else s["version"]
    attack = AutoAttack(
      self.net, norm=NORMS[s["norm"]], eps=s["radius"], version=version, seed=0, device=self.device
    )
    if rapid:
      attack.attacks_to_run = ["apgd-ce", "apgd-t"]
    with open("/dev/null", "w") as quiet:
      out, sys.stdout = sys.stdout, quiet
      try:
        x_adv = attack.run_standard_evaluation(self.x, self.y, batch_size=s["batch_size"])
        x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv  # images, then labels
      finally:
        sys.stdout = out
    with torch.no_grad():
      parts = zip(x_adv.split(s["batch_size"]), self.y.split(s["batch_size"]), strict=True)
      return torch.cat([self.net(x.to(self.device)).argmax(1) == y for x, y in parts]).tolist()


def serve() -> None:
  """Answers lines on standard input until it ends."""
  peer = Peer(json.loads(sys.stdin.readline()))
  parameters = sum(p.numel() for p in peer.net.parameters())
  print(json.dumps({"ready": torch.__version__, "parameters": parameters}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    robust = peer.run()
    print(json.dumps({"seconds": time.perf_counter() - start, "robust": robust}), flush=True)


if __name__ == "__main__":
  serve()
