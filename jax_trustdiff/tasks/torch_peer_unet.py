"""A PyTorch DDPM++ U-Net with its EDM sampler and training step, for `configs/benchmark.py` to be measured against.

A program of its own (it needs torch and nothing of this package), driven over its standard input as `torch_peer.py` is:
first one line of JSON with the settings, answered by {"ready": ..., "parameters": ...}; then each line "<n>" runs n
samplings of a batch or n training steps and is answered by {"seconds": ..., "loss": ...}. The sampler starts from given
noise and leaves its images in a file.

Written from Karras et al. 2022 (arXiv:2206.00364) and Song et al. 2021 (arXiv:2011.13456); modules have the names under
which weights of such networks are exchanged.
"""

import json
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SYM6 = (
  0.015404109327027373,
  0.0034907120842174702,
  -0.11799011114819057,
  -0.048311742585633,
  0.4910559419267466,
  0.787641141030194,
  0.3379294217276218,
  -0.07263752278646252,
  -0.021060292512300564,
  0.04472490177066578,
  0.0017677118642428036,
  -0.007800708325034148,
)  # Daubechies 1992


def norm(channels: int) -> nn.GroupNorm:
  return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
  """Two convolutions with the noise embedding between them, a shortcut, and self-attention of one head."""

  def __init__(self, inputs: int, outputs: int, embedding: int, attention: bool, resample: str):
    super().__init__()
    self.resample = resample
    self.norm0, self.norm1 = norm(inputs), norm(outputs)
    self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
    self.affine = nn.Linear(embedding, outputs)
    self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
    self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or resample else None
    if attention:
      self.norm2 = norm(outputs)
      self.qkv, self.proj = nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)
    self.attention = attention

  def forward(self, x, embedding):
    h = self.conv0(self.resized(F.silu(self.norm0(x))))
    h = F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None]))
    h = self.conv1(h)
    shortcut = self.resized(x)
    x = (h + (shortcut if self.skip is None else self.skip(shortcut))) * math.sqrt(0.5)
    return (x + self.mixed(x)) * math.sqrt(0.5) if self.attention else x

  def resized(self, x):
    if not self.resample:
      return x
    return F.interpolate(x, scale_factor=2) if self.resample == "up" else F.avg_pool2d(x, 2)

  def mixed(self, x):
    b, c, height, width = x.shape
    # channels are ordered (channel, q k v)
    q, k, v = self.qkv(self.norm2(x)).reshape(b, c, 3, height * width).transpose(1, 3).unbind(2)
    found = F.scaled_dot_product_attention(q, k, v)
    return self.proj(found.transpose(1, 2).reshape(b, c, height, width))


class UNet(nn.Module):
  """The raw network F(x; noise label) of DDPM++, NCHW; without class labels and dropout."""

  def __init__(
    self, image_shape, model_channels, channel_mult, num_blocks, attention_resolutions, num_augment_labels=0
  ):
    super().__init__()
    size, _, channels = image_shape
    wide = 4 * model_channels
    self.model_channels, levels = model_channels, list(enumerate(channel_mult))
    self.map_layer0, self.map_layer1 = nn.Linear(model_channels, wide), nn.Linear(wide, wide)
    if num_augment_labels:
      self.map_augment = nn.Linear(num_augment_labels, model_channels, bias=False)

    def named(part, level):
      return f"{size >> level}x{size >> level}_{part}"

    self.enc = nn.ModuleDict({named("conv", 0): nn.Conv2d(channels, model_channels, 3, padding=1)})
    width, widths = model_channels, [model_channels]
    for level, mult in levels:
      if level:
        self.enc[named("down", level)] = Block(width, width, wide, False, "down")
        widths.append(width)
      for i in range(num_blocks):
        attention = size >> level in attention_resolutions
        self.enc[named(f"block{i}", level)] = Block(width, mult * model_channels, wide, attention, "")
        width = mult * model_channels
        widths.append(width)
    self.dec = nn.ModuleDict()
    for level, mult in reversed(levels):
      if level == len(levels) - 1:
        self.dec[named("in0", level)] = Block(width, width, wide, True, "")
        self.dec[named("in1", level)] = Block(width, width, wide, False, "")
      else:
        self.dec[named("up", level)] = Block(width, width, wide, False, "up")
      for i in range(num_blocks + 1):
        attention = i == num_blocks and size >> level in attention_resolutions
        inputs = width + widths.pop()
        self.dec[named(f"block{i}", level)] = Block(inputs, mult * model_channels, wide, attention, "")
        width = mult * model_channels
    self.dec[named("aux_norm", 0)] = norm(width)
    self.dec[named("aux_conv", 0)] = nn.Conv2d(width, channels, 3, padding=1)

  def forward(self, x, noise_labels, augment_labels=None):
    half = self.model_channels // 2
    frequencies = (1 / 10000) ** (torch.arange(half, device=x.device) / (half - 1))
    angles = noise_labels[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    if augment_labels is not None:
      embedding = embedding + self.map_augment(augment_labels)
    embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))
    skips = []
    for module in self.enc.values():
      x = module(x, embedding) if isinstance(module, Block) else module(x)
      skips.append(x)
    for name, module in self.dec.items():
      if isinstance(module, Block):
        x = module(torch.cat([x, skips.pop()], 1) if "_block" in name else x, embedding)
      else:
        x = module(F.silu(x) if name.endswith("_aux_conv") else x)
    return x.float()


def denoise(net, x, sigma, augment_labels=None):
  """D(x; sigma), sigma [b]: Karras et al. 2022, eq. 7, table 1."""
  s = sigma[:, None, None, None]
  total = s**2 + 0.25
  found = net(x * total.rsqrt(), sigma.log() / 4, augment_labels)
  return 0.25 / total * x + s * 0.5 * total.rsqrt() * found


def edm_sample(net, noise, num_steps: int, sigma_min=0.002, sigma_max=80.0, rho=7.0):
  """Karras et al. 2022, algorithm 1: 2 num_steps - 1 evaluations."""
  i = np.arange(num_steps) / (num_steps - 1)
  sigmas = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
  sigmas = [*map(float, sigmas), 0.0]
  x = noise * sigmas[0]

  def slope(x, sigma):
    return (x - denoise(net, x, torch.full((len(x),), sigma, device=x.device))) / sigma

  for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
    d = slope(x, sigma)
    euler = x + (following - sigma) * d
    x = euler if following == 0 else x + (following - sigma) * (d + slope(euler, following)) / 2
  return x


def augment(images, probability: float):
  """(images, labels [b 9]): mirrored, scaled, turned, stretched and moved (Karras et al. 2022, appendix F.2, table 6)."""
  b, height = images.shape[0], images.shape[2]

  def normal():
    return torch.randn(b, device=images.device)

  def uniform():
    return torch.rand(b, device=images.device)

  def chosen(values):
    return values * (uniform() < probability)

  xflip, yflip = (uniform() < 0.5).float(), chosen((uniform() < 0.5).float())
  scale, angle = chosen(normal()), chosen((2 * uniform() - 1) * math.pi)
  coin = (uniform() < probability).float()
  stretch, axis = normal() * coin, (2 * uniform() - 1) * math.pi * (uniform() < 0.5) * coin
  coin = (uniform() < probability).float()
  move = torch.stack([normal() * coin, normal() * coin], 1)
  images = torch.where(xflip[:, None, None, None] == 1, images.flip(3), images)
  images = torch.where(yflip[:, None, None, None] == 1, images.flip(2), images)
  linear = diagonal(2 ** (-0.2 * scale), 2 ** (-0.2 * scale)) @ rotation(angle)
  factor = 2 ** (0.2 * stretch)
  linear = linear @ rotation(-axis) @ diagonal(1 / factor, factor) @ rotation(axis)
  inverse = torch.cat([linear, -linear @ (0.125 * height * move[..., None])], 2)
  labels = [xflip, yflip, scale, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin()]
  return resample(images, inverse), torch.stack([*labels, move[:, 0], move[:, 1]], 1)


def diagonal(x, y):
  return torch.diag_embed(torch.stack([x, y], 1))


def rotation(angle):
  cos, sin = angle.cos(), angle.sin()
  return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def resample(images, inverse):
  """Square images [b c n n] under affine maps [b 2 3] of centred pixel coordinates (x, y): Karras et al. 2020, appendix B.

  Mirrored edges, twice the resolution by the wavelet, bilinear, and back.
  """
  b, c, n, _ = images.shape
  taps = torch.tensor(SYM6, device=images.device) * math.sqrt(2)
  x = F.pad(images, (n - 1,) * 4, mode="reflect").reshape(b * c, 1, 3 * n - 2, 3 * n - 2)
  x = F.conv_transpose2d(x, taps[None, None, None], stride=(1, 2))
  x = F.conv_transpose2d(x, taps[None, None, :, None], stride=(2, 1)).reshape(
    b, c, *(2 * (3 * n - 2) + 10,) * 2
  )
  at = (torch.arange(2 * n + 10, device=images.device) - 5) / 2 - (n - 1) / 2
  y_at, x_at = torch.meshgrid(at, at, indexing="ij")
  places = torch.stack([x_at, y_at, torch.ones_like(x_at)], -1) @ inverse[:, None].transpose(2, 3)
  places = 2 * places + (3 * n - 3) + 5  # on the fine grid, its sample 2 k + j is tap j of pixel k
  x = F.grid_sample(x, (2 * places + 1) / x.shape[-1] - 1, align_corners=False)
  x = x.reshape(b * c, 1, 2 * n + 10, 2 * n + 10)
  x = F.conv2d(x, taps[None, None, None] / 2, stride=(1, 2))
  return F.conv2d(x, taps[None, None, :, None] / 2, stride=(2, 1)).reshape(b, c, n, n)


class Peer:
  """The network and one of two jobs: 'sample' a batch, or 'train' on one for a step."""

  def __init__(self, settings: dict):
    torch.manual_seed(0)
    self.settings = settings
    self.device = torch.device(settings["device"])
    if settings["threads"]:
      torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    net = UNet(**settings["network"])
    given = np.load(settings["arrays"])
    weights = {
      name.removeprefix("model."): torch.tensor(value)
      for name, value in given.items()
      if name not in ("noise", "images")
    }
    net.load_state_dict(weights)
    self.net = net.to(self.device, memory_format=torch.channels_last)
    self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")
    self.saved = False
    batch = torch.tensor(given["noise" if settings["job"] == "sample" else "images"], device=self.device)
    self.batch = batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    if settings["job"] == "train":
      self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
      self.average = [p.detach().clone() for p in self.net.parameters()]

  def run(self, count: int) -> float:
    for _ in range(count):
      value = getattr(self, self.settings["job"])()
    return float(value)  # waits for the device

  @torch.no_grad()
  def sample(self):
    with self.autocast:
      x = edm_sample(self.net, self.batch, self.settings["num_steps"])
    if not self.saved:
      np.save(self.settings["output"], x.permute(0, 2, 3, 1).cpu().numpy())
      self.saved = True
    return x.abs().mean()

  def train(self):
    x0, labels = self.batch, None
    if self.settings["augment"]:
      x0, labels = augment(x0, self.settings["augment"])
      x0 = x0.contiguous(memory_format=torch.channels_last)
    sigma = (-1.2 + 1.2 * torch.randn(len(x0), device=self.device)).exp()
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    with self.autocast:
      error = denoise(self.net, x, sigma, labels) - x0
    loss = ((1 / sigma**2 + 4) * (error**2).sum((1, 2, 3))).mean()
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    self.optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(self.average, list(self.net.parameters()), 1e-3)
    return loss.detach()


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
