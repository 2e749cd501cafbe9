"""All fields are there, typed, and no others."""

import typing

import pytest

from distrain_jax import methods, train
from distrain_jax.train import config
from distrain_jax.train.config import default_of


def test_every_option_of_every_method_is_a_field_of_the_right_type():
  c = train.default_config()
  c.method.update(accumulate=2, clip_norm=0.5, wire_dtype="float16")
  assert {"accumulate", "clip_norm", "wire_dtype", "param_dtype"} < set(
    c.method
  )
  for option, wrong in (("accumulate", "x"), ("clip_norm", "x")):
    with pytest.raises(TypeError):
      c.method[option] = wrong


def test_what_the_trainer_passes_itself_is_no_number_or_choice():
  """A name that means something plain elsewhere would be hidden there."""
  for name, factory in methods.FACTORIES.items():
    hints = typing.get_type_hints(factory)
    for option in {*config.OWN_OPTIONS} & hints.keys() - {"axis"}:
      plain = {bool, int, float} & {
        hints[option],
        *typing.get_args(hints[option]),
      }
      assert not plain, (name, option)
      choice = default_of(factory, option)
      assert not isinstance(choice, str), (name, option, choice)


def test_a_config_is_closed_and_typed(tiny):
  c = tiny()
  with pytest.raises(AttributeError, match='Did you mean "batch_size"'):
    c.batch_sise = 3
  with pytest.raises(TypeError):
    c.steps = "many"


def test_every_option_of_a_model_is_a_field():
  c = train.model_config("mlp", widths=(8,))
  assert c.widths == (8,)
  assert c.dropout is None  # the model's own default
  c.dropout = 0.5
  with pytest.raises(TypeError):
    c.dropout = "x"


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("mpl", {}, "Did you mean 'mlp'"),
    ("mlp", {"width": (8,)}, r"config\.model\.width: mlp has.*mean 'widths'"),
  ],
)
def test_a_model_that_is_not_there_is_refused_where_it_is_named(
  name, options, message
):
  with pytest.raises(ValueError, match=message):
    train.model_config(name, **options)


def test_a_config_files_argument_is_quick_or_none():
  assert [train.quick_or(300, arg) for arg in (None, "quick")] == [300, 20]
  with pytest.raises(ValueError, match=r"takes the argument :quick.*got :fast"):
    train.quick_or(300, "fast")
