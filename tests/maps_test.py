"""A look inside models: receptive fields, implicit attention, directions."""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

import pallas_kernels
from tests import tolerances
import vimjax
from vimjax import maps, visualize

MODELS = {
  "vim": lambda: vimjax.Vim(depth=2, embed_dim=16, num_classes=4),
  "deit": lambda: vimjax.DeiT(depth=2, embed_dim=16, num_heads=2),
  "vmamba": lambda: vimjax.VMamba(depths=(1, 1), embed_dim=8),
  "mamba2": lambda: vimjax.VMamba(
    depths=(1, 1), embed_dim=16, mixer="ssd", state_size=4
  ),
  "mambavision": lambda: vimjax.MambaVision(
    dim=8, in_dim=8, depths=(1, 1, 2, 2), num_heads=(1, 1, 2, 4)
  ),
}


def _images(h=64, w=96, b=2):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((b, h, w, 3)), jnp.float32)


def _init(name, images):
  model = MODELS[name]()
  return model, jax.jit(model.init)(jax.random.key(0), images)


def test_implicit_attention_of_a_scan_is_that_of_its_matrix():
  """Against M_ij = C_i exp(A (delta_i + ... + delta_j+1)) delta_j B_j."""
  images = _images(32, 48, b=1)
  model, variables = _init("vim", images)
  seen = {}
  original = pallas_kernels.selective_scan

  def spy(*args, **kwargs):
    if not isinstance(args[0], jax.core.Tracer):
      seen.setdefault(len(seen), (args, kwargs))
    return original(*args, **kwargs)

  patch = pytest.MonkeyPatch()
  with patch.context() as context, jax.disable_jit():
    context.setattr(pallas_kernels, "selective_scan", spy)
    model.apply(variables, images)
  row = 3  # The class token among 2 x 3 patches.
  want = 0
  for i in (2, 3):  # Both directions of the second layer.
    (_, delta, A, B, C, D), options = seen[i]
    delta = jax.nn.softplus(delta[0] + options["delta_bias"])  # (l, d)
    step = -1 if options["reverse"] else 1
    delta, B, C = (x[::step] for x in (delta, B[0], C[0]))
    at = 6 - row if options["reverse"] else row
    line = []
    for j in range(7):
      decay = jnp.exp(A * delta[j + 1 : at + 1].sum(0)[:, None])
      m = (C[at] * decay * B[j]).sum(-1) * delta[j] if j <= at else 0 * D
      line.append(jnp.abs(m + (D if j == at else 0)).mean())
    want = want + np.stack(line)[::step]
  got = maps.token_attention(model, variables, images)
  assert got.shape == (1, 2, 3)
  want = np.delete(want, row).reshape(1, 2, 3)
  tolerances.assert_close(got, want, tolerances.GRADIENT["float32"])


def test_softmax_attention_is_the_mean_of_the_heads():
  images = _images()
  model, variables = _init("deit", images)
  got = maps.token_attention(model, variables, images, layer=0, token=(1, 2))
  assert got.shape == (2, 4, 6)
  # Besides the patches the token attends to the class token.
  assert (got.sum((1, 2)) < 1).all()
  _, state = model.apply(
    variables,
    images,
    capture_intermediates=lambda m, _: m.name == "qkv",
    mutable=["intermediates"],
  )
  layer = state["intermediates"]["layers_0"]
  (qkv,) = layer["attention"]["qkv"]["__call__"]
  q, k, _ = jnp.moveaxis(qkv.reshape(2, 25, 3, 2, 8), 2, 0)
  scores = jnp.einsum("bhs,blhs->bhl", q[:, 1 + 6 + 2], k) / np.sqrt(8)
  want = jax.nn.softmax(scores).mean(1)[:, 1:].reshape(2, 4, 6)
  tolerances.assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
  ("name", "layer", "grid"),
  [
    ("vim", 0, (4, 6)),
    ("vmamba", -1, (8, 12)),
    ("mamba2", 1, (8, 12)),
    ("mambavision", 0, (4, 6)),
    ("mambavision", 1, (4, 6)),
  ],
)
def test_a_map_per_image_for_every_family(name, layer, grid):
  images = _images()
  model, variables = _init(name, images)
  got = maps.token_attention(
    model, variables, images, layer=layer, token=(1, 1)
  )
  assert got.shape == (2, *grid)
  assert got.dtype == jnp.float32
  assert np.isfinite(got).all()
  assert (got >= 0).all()
  assert (got.max((1, 2)) > 0).all()


def test_windows_do_not_see_each_other():
  images = _images(64, 96, b=2)
  model = MODELS["mambavision"]().clone(window_size=(8, 8, 2, 2))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  for layer in (0, 1):  # A scan, then softmax attention.
    got = np.asarray(
      maps.token_attention(model, variables, images, layer=layer, token=(3, 5))
    )
    inside = np.zeros((4, 6), bool)
    inside[2:4, 4:6] = True
    assert (got[:, ~inside] == 0).all()
    assert (got[:, 3, 5] > 0).all()


def test_layers_are_listed_in_order():
  images = _images()
  model, variables = _init("mambavision", images)
  layers = maps.mixing_layers(model, variables, images)
  assert [layer.grid for layer in layers] == [(4, 6)] * 2 + [(2, 3)] * 2
  model, variables = _init("vim", images)
  layers = maps.mixing_layers(model, variables, images)
  assert [len(layer.parts) for layer in layers] == [2, 2]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"layer": 2}, "layer must be from -2 to 1, got 2"),
    ({"token": (4, 0)}, r"token must lie in a grid of 4x6, got \(4, 0\)"),
  ],
)
def test_wrong_layers_and_tokens_are_named(options, message):
  images = _images()
  model, variables = _init("vim", images)
  with pytest.raises(ValueError, match=message):
    maps.token_attention(model, variables, images, **options)


def test_receptive_field_is_the_gradient_of_the_centre():
  images = _images(32, 32)
  model, variables = _init("deit", images)
  got = maps.effective_receptive_field(model, variables, images)
  assert got.shape == (32, 32)
  assert (got >= 0).all()

  def centre(pixel):
    moved = images.at[0, 5, 7, 1].add(pixel)
    features = model.apply(variables, moved, method="features")
    return jax.nn.relu(features[:, 1, 1]).sum()

  def slope(channel):
    def f(pixel):
      moved = images.at[:, 5, 7, channel].add(pixel)
      features = model.apply(variables, moved, method="features")
      return jax.nn.relu(features[:, 1, 1]).sum(-1)

    return jax.jacobian(f)(jnp.zeros(2))

  # Each image's features depend on its own pixels only.
  slopes = [jnp.diagonal(slope(channel)) for channel in range(3)]
  want = sum(jnp.maximum(x, 0) for x in slopes).mean()
  assert got[5, 7] == pytest.approx(float(want), rel=1e-4)


def test_directions_of_features():
  rng = np.random.default_rng(0)
  strong = rng.standard_normal((2, 8, 8, 1))
  features = strong * np.array([3.0, 4.0, 0.0])
  features = features + 1e-3 * rng.standard_normal((2, 8, 8, 3))
  got = maps.feature_pca(features, components=1)
  assert got.shape == (2, 8, 8, 1)
  assert (got.min(), got.max()) == (0, 1)
  inner = (got > 0) & (got < 1)
  correlation = np.corrcoef(got[inner], strong[inner])[0, 1]
  assert abs(correlation) > 0.999
  with pytest.raises(ValueError, match="no 4 principal components"):
    maps.feature_pca(features, components=4)


@pytest.fixture
def small_models(monkeypatch):
  create = vimjax.create_model
  monkeypatch.setattr(
    visualize.registry,
    "create_model",
    lambda name, **fields: create(name, **{"depth": 1, **fields}),
  )


@pytest.mark.parametrize("what", ["erf", "scan", "features"])
def test_command_writes_a_picture(small_models, what, tmp_path, capsys):
  del small_models
  photo, output = tmp_path / "photo.png", tmp_path / "out.png"
  pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
  Image.fromarray(pixels).save(photo)
  code = visualize.main(
    [
      *(what, str(photo), "--model", "vim_tiny", "--size", "64"),
      *("--output", str(output)),
    ]
  )
  out, err = capsys.readouterr()
  assert code == 0, err
  assert "random" in err
  size = (64, 64) if what == "erf" else (128, 64)
  assert f"wrote {output} ({size[0]}x{size[1]} pixels)" in out
  with Image.open(output) as picture:
    assert picture.size == size
    assert np.asarray(picture).std() > 0


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["scan", "missing.png"], "No such file"),
    (["scan", "{photo}", "--layer", "7"], "layer must be from -1 to 0"),
    (["erf", "{photo}", "--size", "0"], "--size must be positive"),
  ],
)
def test_wrong_command_lines_are_one_clean_line(
  small_models, argv, message, tmp_path, capsys
):
  del small_models
  photo = tmp_path / "photo.png"
  Image.new("RGB", (64, 64)).save(photo)
  argv = [word.format(photo=photo) for word in argv]
  output = tmp_path / "out.png"
  argv += ["--model", "vim_tiny", "--output", str(output)]
  assert visualize.main(argv) == 1
  assert message in capsys.readouterr().err
  assert not output.exists()
