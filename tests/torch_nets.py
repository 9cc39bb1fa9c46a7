"""The swish networks of adversarial training in torch, as modules under the reference's names, written out by hand."""

import torch
import torch.nn.functional as F
from torch import nn


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
  return nn.Conv2d(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)


def same(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
  """A 3x3 convolution of stride 2 is padded below and to the right."""
  return conv(F.pad(x, (0, 1, 0, 1)) if conv.kernel_size[0] == 3 and conv.stride[0] == 2 else x)


class WideBlock(nn.Module):
  def __init__(self, inputs, outputs, stride):
    super().__init__()
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_0 = conv3(inputs, outputs, stride)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_1 = conv3(outputs, outputs)
    if inputs != outputs:
      self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

  def forward(self, x):
    activated = F.silu(self.batchnorm_0(x))
    h = self.conv_1(F.silu(self.batchnorm_1(same(self.conv_0, activated))))
    return h + (self.shortcut(activated) if hasattr(self, "shortcut") else x)


class Group(nn.Module):
  def __init__(self, blocks):
    super().__init__()
    self.block = nn.Sequential(*blocks)

  def forward(self, x):
    return self.block(x)


class WideResNet(nn.Module):
  def __init__(self, depth, width, channels):
    super().__init__()
    sizes = [16, 16 * width, 32 * width, 64 * width]
    self.init_conv = conv3(channels, 16)
    self.layer = nn.Sequential(
      *(
        Group(
          WideBlock(sizes[i] if j == 0 else sizes[i + 1], sizes[i + 1], 2 if i > 0 and j == 0 else 1)
          for j in range((depth - 4) // 6)
        )
        for i in range(3)
      )
    )
    self.batchnorm = nn.BatchNorm2d(sizes[3])
    self.logits = nn.Linear(sizes[3], 10)

  def forward(self, x):
    return self.logits(F.silu(self.batchnorm(self.layer(self.init_conv(x)))).mean((2, 3)))


class PreActBlock(nn.Module):
  def __init__(self, inputs, outputs, stride):
    super().__init__()
    self.batchnorm_0 = nn.BatchNorm2d(inputs)
    self.conv_2d_1 = conv3(inputs, outputs, stride)
    self.batchnorm_1 = nn.BatchNorm2d(outputs)
    self.conv_2d_2 = conv3(outputs, outputs)
    if inputs != outputs:
      self.shortcut = conv3(inputs, outputs, stride)

  def forward(self, x):
    h = same(self.conv_2d_1, F.silu(self.batchnorm_0(x)))
    h = self.conv_2d_2(F.silu(self.batchnorm_1(h)))
    return h + (same(self.shortcut, x) if hasattr(self, "shortcut") else x)


class PreActResNet(nn.Module):
  def __init__(self, numbers, width, channels):
    super().__init__()
    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    self.conv_2d = conv3(channels, width)
    for i, number in enumerate(numbers):
      blocks = [
        PreActBlock(sizes[i] if j == 0 else sizes[i + 1], sizes[i + 1], 2 if i > 0 and j == 0 else 1)
        for j in range(number)
      ]
      setattr(self, f"layer_{i}", nn.Sequential(*blocks))
    self.batchnorm = nn.BatchNorm2d(sizes[4])
    self.logits = nn.Linear(sizes[4], 10)

  def forward(self, x):
    x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
    return self.logits(F.silu(self.batchnorm(x)).mean((2, 3)))
