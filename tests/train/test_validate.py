"""Every bad field is refused by name, before anything compiles."""

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

import distrain_jax as dj
from distrain_jax import methods, train
from distrain_jax.train import validate

MESH = {"data": 8}


@pytest.mark.parametrize(
  "field, value, message",
  [
    (
      "optimizer.name",
      "adamx",
      "Did you mean 'adam'? It is one of adam, adamw",
    ),
    ("optimizer.schedule", "cosin", "Did you mean 'cosine'"),
    ("stats", "average", "Did you mean 'averaged'"),
    ("bad_step.action", "skp", "Did you mean 'skip'"),
    ("evaluation.split", "train", "It is one of test, validation"),
    ("steps", 0, "must be at least 1"),
    ("batch_size", 0, "must be at least 1"),
    ("evaluation.batch_size", 0, "must be at least 1"),
    ("log.every", 0, "must be at least 1"),
    ("checkpoint.keep", 0, "must be at least 1"),
    ("profile.steps", 0, "must be at least 1"),
    ("seed", -1, "must be at least 0"),
    ("checkpoint.every", -1, "must be at least 0"),
    ("checkpoint.keep_best", -1, "must be at least 0"),
    ("evaluation.every", -1, "must be at least 0"),
    ("evaluation.recalibrate", -1, "must be at least 0"),
    ("optimizer.learning_rate", -0.1, "must be at least 0"),
    ("optimizer.warmup_steps", -1, "must be at least 0"),
    ("optimizer.weight_decay", -0.1, "must be at least 0"),
    ("profile.start", -1, "must be at least 0"),
  ],
)
def test_a_bad_value_is_refused_by_its_field(field, value, message, tiny):
  with pytest.raises(ValueError) as e:
    validate.validate(tiny(**{field: value}), MESH, "data")
  assert str(e.value).startswith(f"config.{field}={value!r}")
  assert message in str(e.value)


def test_a_batch_that_the_workers_cannot_share_is_refused(tiny):
  with pytest.raises(ValueError) as e:
    validate.validate(tiny(batch_size=100), MESH, "data")
  assert str(e.value) == (
    "config.batch_size=100 is the global batch and must be a multiple of the 8 "
    "workers of config.mesh={'data': 8} times config.method.accumulate=1. "
    "Nearest: 96 or 104, e.g. --config.batch_size=104."
  )


def test_accumulation_counts_and_a_batch_too_small_is_told_the_smallest(tiny):
  c = tiny(**{"batch_size": 8, "method.accumulate": 3})
  with pytest.raises(ValueError, match=r"accumulate=3\. Nearest: 24, e\.g\."):
    validate.validate(c, MESH, "data")
  validate.validate(tiny(**{"method.accumulate": 3}), MESH, "data")


def test_a_step_of_two_halves_needs_twice_the_micro_batches(tiny):
  c = tiny(**{"batch_size": 72, "method.name": "acco", "method.accumulate": 3})
  with pytest.raises(ValueError) as e:
    validate.validate(c, MESH, "data")
  assert str(e.value) == (
    "config.batch_size=72 is the global batch and must be a multiple of the 2 "
    "halves of a step of acco times the 8 workers of config.mesh={'data': 8} "
    "times config.method.accumulate=3. Nearest: 48 or 96, e.g. "
    "--config.batch_size=96."
  )
  c.batch_size = 96
  validate.validate(c, MESH, "data")


@pytest.mark.parametrize("name", methods.OF_A_LOSS)
def test_a_batch_that_is_let_through_can_be_cut_and_no_smaller_one(name, tiny):
  workers, accumulate = 2, 3
  loss_fn = lambda params, batch, key: (jnp.mean((batch @ params) ** 2), {})
  key, params = jax.random.key(0), jax.ShapeDtypeStruct((4,), jnp.float32)
  options = {"accumulate": accumulate}
  if name == "sdp":
    options |= {"names": ("hidden",), "shapes": params, "coverage": 1.0}
  if name == "papa":
    options |= {"tied": False}
  method = methods.FACTORIES[name](loss_fn, optax.sgd(0.1), **options)
  run = dj.simulate(method, workers=workers)
  state = run.abstract(key, params)

  def step(rows):
    batch = jax.ShapeDtypeStruct((rows, 4), jnp.float32)
    return run.step.trace(state, batch, key)

  def checked(rows):
    changes = {"batch_size": rows, "evaluation.batch_size": workers}
    changes |= {"method.name": name, "method.accumulate": accumulate}
    if name == "dart":
      changes["population.same_init"] = True
    c = tiny(**changes)
    validate.validate(c, {"data": workers}, "data")

  least = workers * accumulate * methods.HALVES.get(name, 1)
  checked(least)
  step(least)
  for refuses in (checked, step):
    with pytest.raises(ValueError, match="accumulate"):
      refuses(least - workers)


def test_only_the_methods_axis_divides_the_batch(tiny):
  mesh = {"data": 4, "tensor": 2}
  validate.validate(tiny(batch_size=100), mesh, "data")


def test_an_evaluation_batch_that_the_workers_cannot_share_is_refused(tiny):
  c = tiny(**{"evaluation.batch_size": 100})
  with pytest.raises(ValueError, match=r"--config\.evaluation\.batch_size=104"):
    validate.validate(c, MESH, "data")


def test_a_mesh_without_the_methods_axis_is_refused(tiny):
  with pytest.raises(ValueError, match=r"has no axis 'data'.*'ddp' works on"):
    validate.validate(tiny(), {"workers": 8}, "data")


@pytest.mark.parametrize("target", ["data", "fsdp"])
def test_parameters_are_sharded_over_axes_beside_the_methods(target, tiny):
  c = tiny(sharding=ConfigDict({"hidden_0": target}))
  with pytest.raises(ValueError, match=rf"sharding\.hidden_0='{target}' must"):
    validate.validate(c, {"data": 4, "tensor": 2}, "data")


def test_a_method_that_is_not_there_is_refused(tiny):
  c = tiny(**{"method.name": "zero_1"})
  with pytest.raises(ValueError, match=r"'zero_1' is no method\. Did you mean"):
    validate.chosen_method_options(c)


def test_an_option_of_another_method_is_refused(tiny):
  c = tiny(**{"method.wire_dtype": "bfloat16"})
  with pytest.raises(ValueError) as e:
    validate.chosen_method_options(c)
  assert str(e.value) == (
    "config.method.wire_dtype='bfloat16', but ddp has no such option; it has "
    "accumulate, clip_norm. Leave it unset, or choose another "
    "config.method.name."
  )


@pytest.mark.parametrize("option", ["wire_dtype", "param_dtype"])
def test_a_dtype_that_is_not_there_is_refused(option, tiny):
  c = tiny(**{"method.name": "zero1", f"method.{option}": "bfloat17"})
  with pytest.raises(ValueError, match=rf"{option}='bfloat17'\. Did you mean"):
    validate.chosen_method_options(c)


def test_the_estimate_may_travel_in_8_bits_and_nothing_else_may(tiny):
  given = {"method.name": "acco", "method.estimate_dtype": "int8"}
  options = validate.chosen_method_options(tiny(**given))
  assert options["estimate_dtype"] == "int8"
  with pytest.raises(ValueError, match=r"estimate_dtype='int4'\. Did you mean"):
    given["method.estimate_dtype"] = "int4"
    validate.chosen_method_options(tiny(**given))
  with pytest.raises(ValueError, match=r"wire_dtype='int8'\. It is one of bf"):
    wire = {"method.name": "acco", "method.wire_dtype": "int8"}
    validate.chosen_method_options(tiny(**wire))


def test_a_pipeline_s_batch_is_shared_by_pipelines_not_by_stages(tiny):
  options = {"method.name": "petra", "method.accumulate": 3, "batch_size": 8}
  c = tiny(**options)
  with pytest.raises(ValueError, match=r"2 pipelines of .* Nearest: 6 or 12"):
    validate.validate(c, {"stage": 4, "data": 2}, "stage")
  c.batch_size = 12
  validate.validate(c, {"stage": 4, "data": 2}, "stage")


def test_drops_are_fractions_of_the_run(tiny):
  c = tiny(**{"optimizer.schedule": "step", "optimizer.drops": (0.5, 75.0)})
  with pytest.raises(ValueError, match=r"drops=\(0.5, 75.0\) are fractions"):
    validate.validate(c, MESH, "data")


@pytest.mark.parametrize(
  "name, options",
  [
    ("acco", {"accumulate": 4, "warmup": 2, "slices": 1}),
    ("local_sgd", {"sync_every": 4, "opt_state": "averaged"}),
    (
      "diloco",
      {"sync_every": 6, "fragments": 3, "delay": 1, "mix": 0.5}
      | {"outer_learning_rate": 0.4, "outer_momentum": 0.5},
    ),
  ],
)
def test_options_of_every_kind_come_from_the_config(name, options, tiny):
  given = {f"method.{k}": v for k, v in options.items()}
  c = tiny(**{"method.name": name, "method.clip_norm": None}, **given)
  chosen = validate.chosen_method_options(c)
  assert chosen == options
  methods.FACTORIES[name](lambda *_: None, optax.sgd(0.1), **chosen)


def test_chosen_options_are_those_that_are_set(tiny):
  c = tiny(**{"method.name": "zero1", "method.wire_dtype": "bfloat16"})
  options = validate.chosen_method_options(c)
  assert options == {"clip_norm": 1.0, "wire_dtype": "bfloat16"}


# What needs the data, the model or the devices is found by `build`.
@pytest.mark.parametrize(
  "changes, message",
  [
    ({"mesh": ConfigDict({"data": 3})}, r"mesh of \{'data': 3\}.*there are 8"),
    ({"mesh": ConfigDict({"model": 8})}, "has no axis 'data'"),
    ({"data.name": None}, "data.name=None is the name of a data set: digits"),
    ({"data.name": "digit"}, "Did you mean 'digits'"),
    ({"data.length": 32}, "length=32 means nothing for data.name='digits'"),
    ({"data.augment": ("flop",)}, "Did you mean 'flip'"),
    ({"data.validation_fraction": 1.5}, r"validation_fraction"),
    ({"model": ConfigDict()}, "config.model.name is not set"),
    ({"model": ConfigDict({"name": "mpl"})}, "Did you mean 'mlp'"),
    (
      {"model": ConfigDict({"name": "mlp", "width": (8,)})},
      "mlp has no option 'width'. Did you mean 'widths'",
    ),
    (
      {"model": ConfigDict({"name": "mlp", "dtype": "float31"})},
      "Did you mean 'float32'",
    ),
    (
      {"loss": ConfigDict({"smoothing": 0.1})},
      "Did you mean 'label_smoothing'",
    ),
    ({"loss": ConfigDict({"label_smoothing": 2.0})}, r"must be in \[0, 1\)"),
    ({"method.accumulate": 0}, "ddp: `accumulate`.*got 0"),
    ({"method.clip_norm": 0.0}, r"ddp: `clip_norm`.*got 0\.0"),
    ({"bad_step.spike": 0.5}, "guard: `spike`.*got 0.5"),
  ],
)
def test_build_refuses_what_does_not_exist(changes, message, tiny):
  with pytest.raises(ValueError, match=message):
    train.build(tiny(**changes))


def test_missing_data_says_how_to_get_it(tiny, tmp_path):
  c = tiny(**{"data.name": "tokens", "data.folder": str(tmp_path / "none")})
  c.data.augment = ()
  c.data.length = 32
  with pytest.raises(FileNotFoundError, match="prepare_data"):
    train.build(c)


def test_the_loss_of_text_has_no_options(tiny):
  c = tiny(
    **{
      "data.name": "stdlib_text",
      "data.length": 32,
      "data.max_records": 64,
      "data.augment": (),
      "model": ConfigDict({"name": "llama", "preset": "tiny"}),
      "loss": ConfigDict({"label_smoothing": 0.1}),
    }
  )
  with pytest.raises(ValueError, match="language_model has no such option"):
    train.build(c)
