"""What the pictures and the page of a report hold, read back from files; intervals against closed values."""

import base64
import html.parser
import math
import os

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from jax_trustdiff.evaluation import report, statistics
from jax_trustdiff.types import InputError


@pytest.fixture
def figures(monkeypatch):
  """The matplotlib figures that were saved, in order."""
  saved = []
  original = matplotlib.figure.Figure.savefig

  def savefig(self, *args, **kwargs):
    saved.append(self)
    return original(self, *args, **kwargs)

  monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
  return saved


def read_png(path):
  with Image.open(path) as picture:
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB"))


def places(picture, tile):
  """(top, left) of every exact occurrence of `tile` in `picture`."""
  h, w, _ = tile.shape
  corner = (picture[: 1 - h or None, : 1 - w or None] == tile[0, 0]).all(axis=2)
  return [
    (top, left)
    for top, left in np.argwhere(corner)
    if (picture[top : top + h, left : left + w] == tile).all()
  ]


def metric_rows():
  rows = []
  for step in range(10, 210, 10):
    rows.append({"step": step, "loss": 3 / step, "ce": 2 / step, "kl": 1 / step, "clean_correct": step / 250})
    rows[-1] |= {
      "learning_rate": 0.1,
      "momentum": 0.9,
      "grad_norm": 1.0 + step,
      "odd_one": -step,
      "part/a": 7.0,
    }
    if step % 50 == 0:
      accuracy = {50: 0.2, 100: 0.4, 150: 0.4, 200: 0.3}[step]
      rows.append({"step": step, "validation/clean_accuracy": 0.5, "validation/pgd40_accuracy": accuracy})
  return rows


# ---- training curves ----


def drawn_curves(figure):
  return [line.get_xydata() for axis in figure.axes for line in axis.lines if len(line.get_xydata()) > 2]


def test_training_curves_draw_every_scalar(tmp_path, figures):
  rows = metric_rows()
  report.training_curves(rows, tmp_path / "deep" / "curves.png", title="A title")
  assert read_png(tmp_path / "deep" / "curves.png").std() > 5
  curves = drawn_curves(figures[0])
  names = {name for row in rows for name in row} - {"step"}
  assert len(names) == 11
  for name in names:
    wanted = np.array([(row["step"], row[name]) for row in rows if name in row], float)
    assert any(np.array_equal(curve, wanted) for curve in curves), f"{name} is not in the picture"
  assert len(curves) == len(names)
  titles = [axis.get_title(loc="left") for axis in figures[0].axes]
  assert titles == ["Loss", "Accuracy", "Learning rate", "Gradient norm", "odd one", "part", ""]
  accuracy = figures[0].axes[1]
  labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
  assert labels == ["training clean", "validation clean", "validation PGD-40", "best: 40.0% at step 150"]
  assert accuracy.yaxis.get_major_formatter()(0.5) == "50%"
  assert os.listdir(tmp_path / "deep") == ["curves.png"], "a temporary file is left"


def test_training_curves_mark_the_best_validation(tmp_path, figures):
  def star(figure):
    return [
      tuple(line.get_xydata()[0]) for axis in figure.axes for line in axis.lines if line.get_marker() == "*"
    ]

  report.training_curves(metric_rows(), tmp_path / "a.png")
  assert star(figures[0]) == [(150, 0.4)], "of equal scores the last is the best, as for checkpoints"
  report.training_curves(metric_rows(), tmp_path / "b.png", score="validation/clean_accuracy")
  assert star(figures[1]) == [(200, 0.5)]
  report.training_curves([{"step": 1, "loss": 2.0}], tmp_path / "c.png")
  assert star(figures[2]) == []
  report.training_curves(metric_rows(), tmp_path / "e.png", score="")
  assert star(figures[3]) == []
  with pytest.raises(InputError, match="validation/fid.*there are: loss"):
    report.training_curves([{"step": 1, "loss": 2.0}], tmp_path / "d.png", score="validation/fid")
  assert not (tmp_path / "d.png").exists()


def test_long_training_curves_are_smoothed_and_kept(tmp_path, figures):
  noise = np.random.default_rng(0).normal(size=400)
  noise[7] = math.nan
  rows = [{"step": i + 1, "loss": float(v)} for i, v in enumerate(noise)]
  report.training_curves(rows, tmp_path / "curves.png")
  faint, bold = drawn_curves(figures[0])
  np.testing.assert_array_equal(faint[:, 1], noise)
  np.testing.assert_allclose(bold[100], [105.5, noise[100:110].mean()])
  np.testing.assert_allclose(bold[0], [5.5, np.nanmean(noise[:10])])


@pytest.mark.parametrize(
  "rows, message",
  [
    ([], "no scalars"),
    ([{"step": 3}], "no scalars to draw in 1 row"),
    ([{"loss": 1.0}], "needs the key 'step', found the keys 'loss'"),
    ([{"step": 3, "loss": "low"}], "'loss' at step 3 must be a number, found 'low'"),
  ],
)
def test_training_curves_refuse_what_is_no_metric(tmp_path, rows, message):
  with pytest.raises(InputError, match=message):
    report.training_curves(rows, tmp_path / "curves.png")


# ---- grids ----


@pytest.mark.floor
@pytest.mark.parametrize("size, channels", [(8, 1), (32, 3)])
def test_adversarial_grid_pixels(tmp_path, size, channels):
  rng = np.random.default_rng(size)
  x = rng.uniform(0.2, 0.8, (3, size, size, channels)).astype(np.float32)
  x_adv = x.copy()
  x_adv[0] += rng.choice([-0.1, 0.1, 0.05], x[0].shape).astype(np.float32)
  x_adv[2] -= np.float32(0.1)
  verdicts = dict(labels=[0, 1, 2], predictions=[0, 1, 1], adversarial_predictions=np.array([2, 1, 0]))
  caption = report.adversarial_grid(
    x, x_adv, tmp_path / "grid.png", **verdicts, class_names=["cat", "dog", "bird"]
  )
  picture = read_png(tmp_path / "grid.png")

  def tile(image):
    scale = math.ceil(104 / size)
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.kron(np.broadcast_to(pixels, (size, size, 3)), np.ones((scale, scale, 1), np.uint8))

  difference = 0.5 + (x_adv - x) * (0.5 / np.abs(x_adv - x).max())
  (clean,), (adversarial,), (changed,) = (
    places(picture, tile(images[0])) for images in (x, x_adv, difference)
  )
  assert clean[0] < adversarial[0] < changed[0] and clean[1] == adversarial[1] == changed[1]
  same = places(picture, tile(x[1]))
  assert [top for top, _ in same] == [clean[0], adversarial[0]], "image 1 is its own adversarial image"
  right, side = same[0][1], tile(x[1]).shape[0]
  grey = picture[changed[0] : changed[0] + side, right : right + side]
  assert (grey == 128).all(), "no difference is mid-grey"
  assert (picture[changed[0] : changed[0] + side, 2 * right - clean[1] :][:, :side] == 0).all()
  assert "0.5 + 5 \N{MULTIPLICATION SIGN}" in caption and "25.5/255" in caption
  report.adversarial_grid(x, x, tmp_path / "same.png", **verdicts)
  assert len(places(read_png(tmp_path / "same.png"), np.full((side, side, 3), 128, np.uint8))) == 3


def test_adversarial_grid_shows_the_verdicts(tmp_path):
  """Another prediction changes the tick under that image, and nothing elsewhere."""
  x = np.zeros((2, 8, 8, 1), np.float32)
  verdicts = dict(labels=[0, 1], predictions=[0, 1], class_names=["same", "same"])
  for name, predictions in (("a", [0, 1]), ("b", [0, 0])):
    report.adversarial_grid(x, x, tmp_path / f"{name}.png", **verdicts, adversarial_predictions=predictions)
  a, b = (read_png(tmp_path / f"{name}.png") for name in "ab")
  rows, columns = np.nonzero((a != b).any(axis=2))
  black = np.argwhere((a == 0).all(axis=2))
  second_column = a.shape[1] - 14 - 104
  assert rows.size and columns.min() >= second_column
  assert black[:, 0].min() + 104 < rows.min() and rows.max() < black[:, 0].max() + 30


def test_marked_grid_amplifies_the_difference(tmp_path):
  images = np.full((2, 26, 26, 3), 100, np.uint8)
  marked = images.copy()
  marked[1, :, :, 0] += 5
  caption = report.marked_grid(images, marked, tmp_path / "g.png", matches=[8, 7], num_bits=8)
  assert "largest change of a pixel is 5/255" in caption and "10" in caption
  pixels = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).reshape(-1, 3)
  colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
  assert {(100, 100, 100), (105, 100, 100), (128, 128, 128), (178, 128, 128)} <= colours
  for change, message in (
    (dict(marked=marked[:1]), "bytes of one shape"),
    (dict(matches=[8]), "1 numbers of matches for 2 images"),
  ):
    arguments = dict(marked=marked, matches=[8, 7]) | change
    with pytest.raises(InputError, match=message):
      report.marked_grid(
        images, arguments["marked"], tmp_path / "g.png", matches=arguments["matches"], num_bits=8
      )


def test_attack_panels_show_every_point(tmp_path, figures):
  """A bit accuracy far below chance, and a p-value of zero, are inside the picture."""
  points = {"noise": [(0.1, 0.9, 1e-9), (0.05, 0.99, 0.0)], "flip_bits": [(0.03, 0.02, 1.0)]}
  report.attack_panels(points, tmp_path / "a.png", before=1.0)
  assert len(figures[0].axes) == 4
  for axis in figures[0].axes:
    low, high = axis.get_ylim()
    for line in axis.get_lines():
      values = np.asarray(line.get_ydata(), float)
      assert low <= values.min() and values.max() <= high
  accuracies = figures[0].axes[0].get_lines()[0]
  np.testing.assert_array_equal(accuracies.get_xydata(), [[0.05, 0.99], [0.1, 0.9]])
  with pytest.raises(InputError, match="at least one attack"):
    report.attack_panels({}, tmp_path / "b.png", before=1.0)


def test_adversarial_grid_refuses(tmp_path):
  x = np.zeros((2, 8, 8, 1), np.float32)
  good = dict(labels=[0, 1], predictions=[0, 1], adversarial_predictions=[0, 1])
  with pytest.raises(
    InputError, match="predictions must hold one class for each of 2 images, found the shape"
  ):
    report.adversarial_grid(x, x, tmp_path / "g.png", **good | {"predictions": [0]})
  with pytest.raises(InputError, match="must be the same"):
    report.adversarial_grid(x, x[:, :4], tmp_path / "g.png", **good)
  with pytest.raises(InputError, match="1 or 3 channels"):
    report.adversarial_grid(x.repeat(2, 3), x, tmp_path / "g.png", **good)
  assert not (tmp_path / "g.png").exists()


def test_image_grid_pixels(tmp_path):
  images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, 3), dtype=np.uint8)
  report.image_grid(images, tmp_path / "grid.png", columns=3, scale=2, gap=1)
  picture = read_png(tmp_path / "grid.png")
  assert picture.shape == (2 * 8 + 1, 3 * 12 + 2, 3)
  for i, image in enumerate(images):
    top, left = (i // 3) * 9, (i % 3) * 13
    np.testing.assert_array_equal(picture[top : top + 8 : 2, left : left + 12 : 2], image)
    np.testing.assert_array_equal(picture[top + 1 : top + 8 : 2, left + 1 : left + 12 : 2], image)
  assert (picture[9:, 26:] == 255).all(), "the empty place is white"
  report.image_grid(images[..., :1], tmp_path / "grey.png")
  assert read_png(tmp_path / "grey.png").shape == (2 * 4 * 11 + 2, 3 * 6 * 11 + 4, 3)
  with pytest.raises(InputError, match="uint8 images, found float32"):
    report.image_grid(images.astype(np.float32), tmp_path / "no.png")
  with pytest.raises(InputError, match="at least 1, found 0 and 1"):
    report.image_grid(images, tmp_path / "no.png", columns=0, scale=1)


# ---- bars ----


def test_bars_have_the_heights_and_texts_of_the_values(tmp_path, figures):
  groups = {"standard": {"clean": 0.989, "PGD-40": 0.021}, "adversarial": {"PGD-40": 0.714}}
  intervals = {"adversarial": {"PGD-40": (0.6, 0.8)}}
  report.bars(groups, tmp_path / "bars.png", ylabel="accuracy", intervals=intervals)
  assert read_png(tmp_path / "bars.png").std() > 5
  axis = figures[0].axes[0]
  assert sorted(patch.get_height() for patch in axis.patches) == [0.021, 0.714, 0.989]
  assert {text.get_text() for text in axis.texts} == {"98.9%", "2.1%", "71.4%"}
  assert [label.get_text() for label in axis.get_xticklabels()] == ["standard", "adversarial"]
  whiskers = [c for c in axis.collections if c.get_segments()]
  np.testing.assert_allclose(whiskers[0].get_segments()[0][:, 1], [0.6, 0.8])
  assert axis.get_ylabel() == "accuracy"
  report.bars({"a": {"speed": 1234.5}}, tmp_path / "speed.png", ylabel="images/s", percent=False)
  assert [text.get_text() for text in figures[1].axes[0].texts] == ["1234"]


def test_bars_refuse(tmp_path):
  with pytest.raises(InputError, match="at least one group"):
    report.bars({}, tmp_path / "bars.png", ylabel="accuracy")
  with pytest.raises(InputError, match="intervals without a bar: a/y"):
    report.bars(
      {"a": {"x": 1.0}}, tmp_path / "bars.png", ylabel="accuracy", intervals={"a": {"y": (0.0, 1.0)}}
    )


# ---- accuracy against something ----


def test_accuracy_curves(tmp_path, figures):
  curves = {"first": ([0.1, 1.0], [0.9, 0.4]), "last": ([0.1, 1.0], [1.0, 0.5])}
  report.accuracy_curves(curves, tmp_path / "a.png", xlabel="sigma", log=True, chance=0.1)
  assert read_png(tmp_path / "a.png").std() > 5
  axis = figures[0].axes[0]
  found = {line.get_label(): line.get_xydata() for line in axis.lines}
  for name, (x, accuracy) in curves.items():
    np.testing.assert_array_equal(found[name], np.stack([x, accuracy], 1))
  assert (found["chance"][:, 1] == 0.1).all() and len(found) == 3
  assert axis.get_xscale() == "log" and axis.yaxis.get_major_formatter()(0.5) == "50%"
  report.accuracy_curves({"one": curves["first"]}, tmp_path / "b.png", xlabel="radius")
  assert figures[1].axes[0].get_xscale() == "linear" and len(figures[1].axes[0].lines) == 1
  with pytest.raises(InputError, match="at least one curve"):
    report.accuracy_curves({}, tmp_path / "c.png", xlabel="sigma")


# ---- the page ----


class Page(html.parser.HTMLParser):
  """Texts by element, and the attributes of every element."""

  def __init__(self, text):
    super().__init__()
    self.open, self.texts, self.elements = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in ("meta", "img"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, f"</{tag}> closes nothing"

  def handle_data(self, data):
    if data.strip():
      self.texts.append((self.open[-1], data))

  def lines(self):
    """{heading of a table line: the cells after it}."""
    found, heading = {}, None
    for tag, text in self.texts:
      if tag == "th":
        heading = text
        found.setdefault(heading, [])
      elif tag == "td":
        found[heading].append(text)
    return found


def write_page(tmp_path, **changes):
  report.image_grid(np.zeros((1, 2, 2, 1), np.uint8), tmp_path / "a.png")
  report.image_grid(np.full((2, 2, 2, 1), 9, np.uint8), tmp_path / "b.png")
  arguments = dict(
    summary="First.\n\nSecond <script>alert(1)</script> & last.",
    metrics={
      "clean_accuracy": 0.95833,
      "pgd40_accuracy": np.float32(0.7139),
      "best_step": 1200,
      "loss": 0.123456,
    },
    figures=[(tmp_path / "a.png", 'A "quoted" <b>'), (tmp_path / "b.png", "B")],
    tables=[("Intervals", ["attack", "low"], [["clean", 0.5], ["<td>", 7]])],
    config_text="a = '<script>'",
    info={"seconds": 143.2, "versions": {"jax": "0.9.9"}},
  )
  report.html_report(tmp_path / "report.html", "Title <script>", **arguments | changes)
  text = (tmp_path / "report.html").read_text()
  return text, Page(text)


@pytest.mark.floor
def test_page_holds_everything_and_loads_nothing(tmp_path):
  text, page = write_page(tmp_path)
  assert page.open == [], "every element is closed"
  pictures = [attrs for tag, attrs in page.elements if tag == "img"]
  for attrs, name in zip(pictures, ("a.png", "b.png"), strict=True):
    kind, data = attrs["src"].split(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data) == (tmp_path / name).read_bytes()
  assert pictures[0]["alt"] == 'A "quoted" <b>'
  assert not any("href" in attrs or tag in ("script", "link", "iframe") for tag, attrs in page.elements)
  assert "http:" not in text and "https:" not in text and "url(" not in text
  assert "default-src 'none'" in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
  lines = page.lines()
  assert lines["clean_accuracy"] == ["95.8%"] and lines["pgd40_accuracy"] == ["71.4%"]
  assert lines["best_step"] == ["1,200"] and lines["loss"] == ["0.1235"]
  assert lines["clean"] == ["0.5"] and lines["<td>"] == ["7"]
  assert lines["seconds"] == ["143 (2 min)"] and lines["versions: jax"] == ["0.9.9"]
  assert ("pre", "a = '<script>'") in page.texts and ("h1", "Title <script>") in page.texts
  assert [t for tag, t in page.texts if tag == "p"] == ["First.", "Second <script>alert(1)</script> & last."]
  assert "<script" not in text
  assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "report.html"]


def test_page_puts_prefixes_side_by_side_and_intervals_behind(tmp_path):
  metrics = {f"{p}/{m}": v for p, v in (("one", 0.25), ("two", 0.5)) for m in ("a_accuracy", "last/b")}
  metrics |= {"one/a_accuracy/interval": 0.0123, "two/last/b/interval": 0.25, "two/only": 3}
  lines = write_page(tmp_path, metrics=metrics)[1].lines()
  assert "one" in lines and "two" in lines
  assert lines["a_accuracy"] == ["25.0% \N{PLUS-MINUS SIGN} 1.2", "50.0%"]
  assert lines["last/b"] == ["0.25", "0.5 \N{PLUS-MINUS SIGN} 0.25"]
  assert lines["only"] == ["3"]
  metrics = {"a_accuracy": 0.5, "last/a_accuracy": 0.25, "b/interval": 7}
  lines = write_page(tmp_path, metrics=metrics)[1].lines()
  assert (
    lines["a_accuracy"] == ["50.0%"]
    and lines["last/a_accuracy"] == ["25.0%"]
    and lines["b/interval"] == ["7"]
  )


def test_page_refuses_missing_and_foreign_pictures(tmp_path):
  (tmp_path / "c.jpg").write_bytes(b"\xff\xd8")
  for name, message in (("none.png", "no picture .*none.png"), ("c.jpg", "not a PNG")):
    with pytest.raises(InputError, match=message):
      write_page(tmp_path, figures=[(tmp_path / name, "")])
  assert not (tmp_path / "report.html").exists()


# ---- intervals ----


def upper_tail(k, n, p):
  """P(at least k successes of n)."""
  return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


@pytest.mark.floor
def test_binomial_interval_is_exact():
  """Its ends are the rates at which what was seen, or more (fewer), has the probability 2.5 %."""
  for k, n in ((1, 10), (5, 10), (17, 40), (39, 40)):
    low, high = statistics.binomial_interval(k, n)
    assert upper_tail(k, n, low) == pytest.approx(0.025, rel=1e-9)
    assert 1 - upper_tail(k + 1, n, high) == pytest.approx(0.025, rel=1e-9)
  assert statistics.binomial_interval(0, 10) == (0.0, pytest.approx(1 - 0.025**0.1))
  assert statistics.binomial_interval(10, 10) == (pytest.approx(0.025**0.1), 1.0)
  assert statistics.binomial_interval(5, 10, confidence=0.9) == pytest.approx((0.222441, 0.777559), abs=1e-6)


def test_mean_interval_is_students():
  mean, half_width = statistics.mean_interval([1.0, 2.0, 3.0])
  assert (mean, half_width) == pytest.approx((2.0, 4.302652729911275 / math.sqrt(3)))
  # With one degree of freedom Student's t is Cauchy's distribution, whose quantile is a tangent.
  assert statistics.mean_interval([0.0, 1.0]) == pytest.approx((0.5, 0.5 * math.tan(0.475 * math.pi)))
  assert statistics.mean_interval([0.5, 0.5, 0.5, 0.5]) == (0.5, 0.0)


def test_an_interval_of_shares_has_a_width():
  """Where all images are read right it is that of Clopper and Pearson, else the normal one inside [0, 1]."""
  assert statistics.share_interval(np.ones(100)) == statistics.binomial_interval(100, 100)
  assert statistics.share_interval(np.zeros(50)) == statistics.binomial_interval(0, 50)
  shares = np.array([1.0] * 99 + [0.5])
  low, high = statistics.share_interval(shares)
  assert low == pytest.approx(0.995 - 1.96 * shares.std(ddof=1) / 10, abs=1e-4) and high == 1


def test_crossed_interval_covers_the_mean_of_other_seeds_and_images():
  """Verdicts of a random-effects model; an interval over the images alone, or the seeds alone, is too narrow."""
  rng = np.random.default_rng(0)

  def draw(seed_spread, image_spread):
    """[3 seeds, 200 images] of differences in {-1, 0, 1}, whose expectation is 0."""
    rates = seed_spread * rng.standard_normal((3, 1)) + image_spread * rng.standard_normal((1, 200))
    return np.sign(rates) * (rng.random((3, 200)) < np.minimum(np.abs(rates), 1))

  def within(interval, spreads):
    tries = [interval(draw(*spreads)) for _ in range(2000)]
    return np.mean([abs(mean) <= half for mean, half in tries])

  def of_images(values):
    return statistics.crossed_interval(values.mean(0, keepdims=True))

  def of_seeds(values):
    return statistics.mean_interval(values.mean(1).tolist())

  for spreads in ((0.1, 0.1), (0.0, 0.5), (0.2, 0.0)):
    assert within(statistics.crossed_interval, spreads) > 0.94
  worlds = [draw(0.1, 0.1) for _ in range(500)]
  mean_width = np.mean([statistics.crossed_interval(values)[1] for values in worlds])
  spread = np.std([values.mean() for values in worlds])
  assert 2 * spread < mean_width < 4.5 * spread  # the quantile of three seeds is 4.3
  assert within(of_images, (0.2, 0.0)) < 0.5
  assert within(of_seeds, (0.0, 0.5)) < 0.9


def test_a_paired_difference_is_exact_without_one_and_finds_one():
  rng = np.random.default_rng(0)

  def found(shift, together, n=12, num_resamples=99):
    common = together * rng.standard_normal(n)
    values = np.concatenate([common + rng.exponential(size=n) + shift, common + rng.exponential(size=n)])
    return statistics.paired_difference(lambda rows: float(values[rows].mean()), n, num_resamples, seed=1)

  same = [found(0.0, together=3.0) for _ in range(300)]
  for level in (0.05, 0.2, 0.5):  # within 3.3 standard deviations of 300 tries
    share = np.mean([one.p <= level for one in same])
    assert abs(share - level) < 3.3 * math.sqrt(level * (1 - level) / 300), level
  assert 0.85 < np.mean([one.low < 0 < one.high for one in same]) < 0.99  # of 12 pairs it is somewhat narrow
  other = [found(2.0, together=3.0) for _ in range(20)]
  assert np.mean([one.value for one in other]) == pytest.approx(2, abs=0.4)
  assert sum(one.p < 0.05 and one.low > 0 for one in other) >= 19  # were partners not kept together, common noise would hide it


def test_a_paired_difference_says_how_far_it_is():
  seen = []
  values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, *[0.0] * 5])
  found = statistics.paired_difference(lambda rows: float(values[rows].sum()), 5, 20, 0, seen.append)
  assert found.value == 15 and 5 <= found.low <= 15 <= found.high <= 25
  assert seen[-1] == 40 and seen == sorted(seen)


def test_intervals_refuse():
  for n, num_resamples in ((1, 20), (2, 19)):
    with pytest.raises(InputError, match=f"found {n} and {num_resamples}"):
      statistics.paired_difference(lambda rows: 0.0, n, num_resamples, 0)
  with pytest.raises(InputError, match="at least 2, found 1"):
    statistics.crossed_interval(np.ones((3, 1)))
  with pytest.raises(ValueError, match="at least 2 values, found 1"):
    statistics.mean_interval([1.0])
  for k, n in ((-1, 5), (6, 5), (0, 0)):
    with pytest.raises(InputError, match=f"found {k} of {n}"):
      statistics.binomial_interval(k, n)
  with pytest.raises(InputError, match="confidence is 95"):
    statistics.binomial_interval(1, 5, confidence=95.0)
