"""Every file under configs/ is valid, and is what its head says it is."""

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from ml_collections import ConfigDict

from distrain_jax import data, train
from distrain_jax.data import augment
from distrain_jax.method import Variables
from distrain_jax.train import experiment, populations

FOLDER = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(
  str(path.relative_to(FOLDER).with_suffix(""))
  for path in FOLDER.rglob("*.py")
  if path.parent.name != "mulo"  # of launch/meta_train.py
)


def image(name, side, channels, classes):
  shape = (side, side, channels)
  return data.Info(name, "image", 0, shape=shape, num_classes=classes)


def text(name, length, vocab):
  return data.Info(name, "text", 0, length=length, vocab_size=vocab)


# (file, argument) -> what the data that it asks for is like
RUNS = {
  ("acco/paper_alpaca", None): text("tokens", 512, 50_257),
  ("acco/paper_openwebtext_125m", None): text("tokens", 1024, 50_257),
  ("acco/text", None): text("stdlib_text", 128, 256),
  ("cifar10_resnet", None): image("cifar10", 32, 3, 10),
  ("digits", None): image("digits", 8, 1, 10),
  ("digits_mulo", None): image("digits", 8, 1, 10),
  ("fashion_mnist", None): image("fashion_mnist", 28, 1, 10),
  ("fashion_mnist_vit", None): image("fashion_mnist", 28, 1, 10),
  ("fineweb_llama", "134M"): text("tokens", 1024, 32_000),
  ("fineweb_llama", "500M"): text("tokens", 1024, 32_000),
  ("fineweb_llama", "1B"): text("tokens", 2048, 32_000),
  ("imagenet_resnet50", None): image("imagenet2012", 224, 3, 1000),
  ("petra/digits", None): image("digits", 8, 1, 10),
  ("petra/fashion_mnist", None): image("fashion_mnist", 28, 1, 10),
  ("petra/paper_cifar10", "revnet18"): image("cifar10", 32, 3, 10),
  ("petra/paper_imagenet", "revnet50"): image("imagenet2012", 224, 3, 1000),
  ("petra/text", None): text("stdlib_text", 128, 256),
  ("sdp/fashion_mnist", None): image("fashion_mnist", 28, 1, 10),
  ("sdp/paper_cifar_resnet18", "cifar10"): image("cifar10", 32, 3, 10),
  ("sdp/paper_cifar_resnet18", "cifar100"): image("cifar100", 32, 3, 100),
  ("sdp/paper_fineweb", "134M"): text("tokens", 1024, 32_000),
  ("sdp/paper_fineweb", "500M"): text("tokens", 1024, 32_000),
  ("sdp/paper_fineweb", "1B"): text("tokens", 2048, 32_000),
  ("sdp/paper_imagenet", "resnet50"): image("imagenet2012", 224, 3, 1000),
  ("sdp/paper_imagenet", "vit_s16"): image("imagenet2012", 224, 3, 1000),
  ("sdp/text", None): text("stdlib_text", 128, 256),
  ("text", None): text("stdlib_text", 128, 256),
  ("wash/digits", None): image("digits", 8, 1, 10),
  ("wash/fashion_mnist", None): image("fashion_mnist", 28, 1, 10),
  ("wash/paper_cifar", "cifar10"): image("cifar10", 32, 3, 10),
  ("wash/paper_cifar", "cifar100"): image("cifar100", 32, 3, 100),
  ("wash/paper_cifar", "cifar10,papa"): image("cifar10", 32, 3, 10),
  ("wash/paper_cifar", "cifar10,papa_all"): image("cifar10", 32, 3, 10),
  ("wash/paper_imagenet", None): image("imagenet2012", 224, 3, 1000),
  ("wash/text", None): text("stdlib_text", 128, 256),
}
# file -> the argument that it takes where none is given
DEFAULTS = dict(reversed(RUNS))
# Where every subnetwork is a program of its own: two in place of eight.
FEWER = {"assignment": "balanced"}
RESNETS = (
  "sdp/fashion_mnist",
  "sdp/paper_cifar_resnet18",
  "sdp/paper_imagenet",
)
LARGE = [("fineweb_llama", "1B"), ("cifar10_resnet", None)]


class Given(NamedTuple):
  name: str
  head: str
  config: ConfigDict
  info: data.Info
  program: experiment.Program
  model: Any  # shapes of what is trained, by all members of a population
  members: int


def load(name):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def name_of(run):
  return ":".join(filter(None, run))


@pytest.fixture(scope="module", params=RUNS, ids=name_of)
def given(request):
  name, argument = request.param
  file, info = load(name), RUNS[request.param]
  c = file.get_config(argument)
  program = experiment.program(c, info)
  model = jax.eval_shape(program.params)
  members = program.run.workers if populations.start_apart(c) else 1
  return Given(name, file.__doc__, c, info, program, model, members)


def test_every_file_is_tested():
  assert sorted({name for name, _ in RUNS}) == NAMES


def test_a_config_is_locked_and_its_data_fields_make_sense(given):
  c, info = given.config, given.info
  assert c.is_locked
  assert set(c.data) == set(data.FIELDS)
  assert (c.data.name, c.data.length) == (info.name, info.length)
  augment.parse(c.data.augment, info)


def test_the_head_tells_the_command_and_the_number_of_parameters(given):
  assert f"launch/train.py --config=configs/{given.name}.py" in given.head
  model = given.model
  params = model.params if isinstance(model, Variables) else model
  count = sum(x.size for x in jax.tree.leaves(params)) // given.members
  assert f"{count:,}" in re.findall(r"\d[\d,]*\d", given.head)


def check_step(given, **changes):
  c, program = given.config.copy_and_resolve_references(), given.program
  if changes:
    c.method.update(changes)
    program = experiment.program(c, given.info)
  run = program.run
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = run.abstract(key, given.model)
  batch = {
    name: jax.ShapeDtypeStruct((c.batch_size, *x.shape[1:]), x.dtype)
    for name, x in experiment.example(given.info).items()
  }
  after, metrics = run.step.trace(state, batch, key).out_info
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(after) == kinds(state)
  assert metrics["loss"].shape == ()


def test_a_step_at_full_size_keeps_what_the_state_is(given):
  check_step(given, **FEWER if given.name in RESNETS else {})


@pytest.mark.parametrize("given", LARGE, indirect=True, ids=name_of)
def test_so_does_a_step_of_zero1(given):
  check_step(given, name="zero1")


@pytest.mark.parametrize(("name", "argument"), DEFAULTS.items())
def test_quick_takes_few_steps_and_other_arguments_are_refused(name, argument):
  get_config = load(name).get_config
  quick = get_config(",".join(filter(None, (argument, "quick"))))
  assert quick.steps == 20
  experiment.program(quick, RUNS[name, argument])  # is valid
  with pytest.raises(ValueError, match=r"quick.*quik|quik.*quick"):
    get_config("quik")


TINY = {
  "digits": {},
  "fashion_mnist": {"model.width": 1 / 16},
  "fashion_mnist_vit": {"model.layers": 1},
  "text": {"model.layers": 1},
  "acco/text": {"model.layers": 1},
  "petra/digits": {"mesh.data": 4},
  "petra/text": {"model.layers": 1, "mesh.data": 2},
  "sdp/fashion_mnist": {
    "model.width": 1 / 16,
    "method.assignment": "balanced",  # see FEWER
    "evaluation.recalibrate": 1,
  },
  "sdp/text": {"model.layers": 1},
  "wash/digits": {},
  "wash/text": {"model.layers": 1},
}


@pytest.mark.parametrize("name", TINY)
def test_small_configs_train(name, tmp_path):
  c = load(name).get_config("quick")
  small = {
    "steps": 2,
    "batch_size": 16,
    "data.max_records": 32,
    "evaluation.batch_size": 16,
    "optimizer.warmup_steps": 0,
    "compilation_cache": "",
    **TINY[name],
  }
  with c.unlocked():
    c.update_from_flattened_dict(small)
  try:
    built = train.build(c)
  except FileNotFoundError as e:  # Fashion-MNIST is a package of Debian's
    pytest.skip(str(e))
  result = train.train(built, tmp_path)
  assert result.metrics["test_loss"] < 10
  steps = [line["step"] for line in train.read_metrics(tmp_path)]
  assert steps == [2, 2, 2]  # training, validation, test
