"""Every file under configs/ is valid, and is what its head says it is."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest

from distrain_jax import data, train
from distrain_jax.method import Variables
from distrain_jax.train import experiment

FOLDER = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def image(name, side, channels, classes):
  shape = (side, side, channels)
  return data.Info(name, "image", 0, shape=shape, num_classes=classes)


def text(name, length, vocab):
  return data.Info(name, "text", 0, length=length, vocab_size=vocab)


# A config's argument -> what the data that it loads is like.
RUNS = {
  ("cifar10_resnet", None): image("cifar10", 32, 3, 10),
  ("digits", None): image("digits", 8, 1, 10),
  ("fashion_mnist", None): image("fashion_mnist", 28, 1, 10),
  ("fineweb_llama", "134M"): text("tokens", 1024, 32_000),
  ("fineweb_llama", "500M"): text("tokens", 1024, 32_000),
  ("fineweb_llama", "1B"): text("tokens", 2048, 32_000),
  ("imagenet_resnet50", None): image("imagenet2012", 224, 3, 1000),
  ("text", None): text("stdlib_text", 128, 256),
}
METHODS = ("ddp", "zero1")


def load(name):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(params=RUNS, ids=lambda run: ":".join(filter(None, run)))
def given(request):
  """The config of a file and argument, and the data's description."""
  name, argument = request.param
  return load(name).get_config(argument), RUNS[request.param]


def test_every_file_is_tested():
  assert sorted({name for name, _ in RUNS}) == NAMES


def test_a_config_is_locked_and_asks_for_data_that_can_be(given):
  c, info = given
  assert c.is_locked
  fields = dict(c.data.items())
  assert set(fields) <= set(data.FIELDS) and fields["name"] == info.name
  assert fields["length"] == info.length
  data.Augmentation  # noqa: B018
  data.augment.parse(c.data.augment, info)


def model_of(c, info):
  """(program, shapes of what it trains)."""
  program = experiment.program(c, info)
  return program, jax.eval_shape(program.params)


def test_the_head_tells_the_command_and_the_number_of_parameters(given):
  c, info = given
  name = next(n for (n, _), i in RUNS.items() if i is info)
  head = load(name).__doc__
  assert f"launch/train.py --config=configs/{name}.py" in head
  _, model = model_of(c, info)
  params = model.params if isinstance(model, Variables) else model
  count = sum(x.size for x in jax.tree.leaves(params))
  assert f"{count:,}" in re.findall(r"\d[\d,]*\d", head)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_full_size_keeps_what_the_state_is(given, method):
  c, info = given
  c.method.name = method
  program, model = model_of(c, info)
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = program.run.abstract(key, model)
  batch = {
    name: jax.ShapeDtypeStruct((c.batch_size, *x.shape[1:]), x.dtype)
    for name, x in experiment.example(info).items()
  }
  after, metrics = program.run.step.lower(state, batch, key).out_info
  like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert like(after) == like(state)
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", NAMES)
def test_quick_takes_few_steps_and_other_arguments_are_refused(name):
  get_config = load(name).get_config
  quick = "134M,quick" if name == "fineweb_llama" else "quick"
  assert get_config(quick).steps == 20
  with pytest.raises(ValueError, match=f"configs/{name}.py:quik: .*quick"):
    get_config("quik")


TINY = {
  "digits": {},
  "fashion_mnist": {"model.width": 1 / 16},
  "text": {"model.layers": 1},
}


@pytest.mark.parametrize("name", TINY)
def test_small_configs_train(name, tmp_path):
  c = load(name).get_config()
  small = {
    "steps": 2,
    "batch_size": 16,
    "data.max_records": 32,
    "evaluation.batch_size": 16,
    "compilation_cache": "",
    **TINY[name],
  }
  with c.unlocked():
    c.update_from_flattened_dict(small)
  try:
    built = train.build(c)
  except FileNotFoundError as e:
    pytest.skip(str(e))
  result = train.train(built, tmp_path)
  assert result.metrics["test_loss"] < 10
  steps = [x["step"] for x in train.read_metrics(tmp_path)]
  assert steps == [2, 2, 2]  # the last step, its validation and the test
