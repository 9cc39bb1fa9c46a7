"""A PyTorch implementation of the adversarial training step, for `configs/benchmark.py:at_step` to be measured against.

A program of its own (it needs torch and nothing of this package), driven over its standard input: first one line of
JSON with the settings, answered by {"ready": ..., "parameters": ...}; then each line "<n>" runs n training steps and is
answered by {"seconds": ..., "loss": ...}.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


def same(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
  """Pads a 3x3 convolution of stride 2 as 'SAME' does for even sizes: below and to the right."""
  return conv(F.pad(x, (0, 1, 0, 1))) if conv.stride[0] == 2 and conv.kernel_size[0] == 3 else conv(x)


def conv3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)


class Block(nn.Module):
  """Pre-activation block; the shortcut is the input or a 1x1 convolution of the activated input."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    self.norm0, self.norm1 = nn.BatchNorm2d(inputs, momentum=0.01), nn.BatchNorm2d(outputs, momentum=0.01)
    self.conv0, self.conv1 = conv3(inputs, outputs, stride), conv3(outputs, outputs, 1)
    self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

  def forward(self, x):
    a = F.silu(self.norm0(x))
    h = self.conv1(F.silu(self.norm1(same(self.conv0, a))))
    return h + (x if self.shortcut is None else self.shortcut(a))


class WideResNet(nn.Module):
  """WRN-depth-width with SiLU and built-in normalisation."""

  def __init__(self, depth: int, width: int, num_classes: int):
    super().__init__()
    self.conv = conv3(3, 16, 1)
    sizes, blocks = [16, 16 * width, 32 * width, 64 * width], []
    for group in range(3):
      for i in range((depth - 4) // 6):
        inputs = sizes[group] if i == 0 else sizes[group + 1]
        blocks.append(Block(inputs, sizes[group + 1], 2 if group > 0 and i == 0 else 1))
    self.blocks = nn.Sequential(*blocks)
    self.norm = nn.BatchNorm2d(sizes[-1], momentum=0.01)
    self.logits = nn.Linear(sizes[-1], num_classes)

  def forward(self, x):
    x = (x - 0.47) / 0.25
    return self.logits(F.silu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))


class Peer:
  """One network, its optimizer, one batch, and the two training steps."""

  def __init__(self, settings: dict):
    torch.manual_seed(0)
    self.settings = settings
    self.device = torch.device(settings["device"])
    if settings["threads"]:
      torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    net = WideResNet(settings["depth"], settings["width"], 10)
    self.net = net.to(self.device, memory_format=torch.channels_last).train()
    self.optimizer = torch.optim.SGD(
      self.net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    b = settings["batch_size"]
    self.x = torch.rand(b, 3, 32, 32, device=self.device).contiguous(memory_format=torch.channels_last)
    self.y = torch.randint(0, 10, (b,), device=self.device)

  def run(self, num_steps: int) -> float:
    for _ in range(num_steps):
      loss = getattr(self, self.settings["objective"])()
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      self.optimizer.step()
    return loss.item()  # waits for the device

  def pgd_at(self):
    self.net.eval()
    x_adv = self.ascend(lambda x: F.cross_entropy(self.net(x), self.y, reduction="sum"))
    self.net.train()
    return F.cross_entropy(self.net(x_adv), self.y)

  def trades(self):
    self.track(False)
    with torch.no_grad():
      p = F.softmax(self.net(self.x), dim=1)
    x_adv = self.ascend(lambda x: F.kl_div(F.log_softmax(self.net(x), dim=1), p, reduction="sum"))
    self.track(True)
    z, z_adv = self.net(self.x), self.net(x_adv)
    kl = F.kl_div(F.log_softmax(z_adv, dim=1), F.softmax(z, dim=1), reduction="batchmean")
    return F.cross_entropy(z, self.y, label_smoothing=0.1) + 5 * kl

  def ascend(self, loss):
    radius, step_size = 8 / 255, 2 / 255
    x_adv = (self.x + radius * (2 * torch.rand_like(self.x) - 1)).clamp(0, 1)
    for _ in range(self.settings["num_steps"]):
      x_adv.requires_grad_(True)
      (gradient,) = torch.autograd.grad(loss(x_adv), [x_adv])
      x_adv = x_adv.detach() + step_size * gradient.sign()
      x_adv = torch.minimum(torch.maximum(x_adv, self.x - radius), self.x + radius).clamp(0, 1)
    return x_adv

  def track(self, on: bool):
    for module in self.net.modules():
      if isinstance(module, nn.BatchNorm2d):
        module.momentum = 0.01 if on else 0.0


def serve() -> None:
  """Answers lines on standard input until it ends."""
  peer = Peer(json.loads(sys.stdin.readline()))
  parameters = sum(p.numel() for p in peer.net.parameters())
  print(json.dumps({"ready": torch.__version__, "parameters": parameters}), flush=True)
  for line in sys.stdin:
    start = time.perf_counter()
    loss = peer.run(int(line))
    print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


if __name__ == "__main__":
  serve()
