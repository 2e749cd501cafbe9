"""Every wrong option, name, table and loss, and what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sdp import toys

import distrain_jax as dj
from distrain_jax.methods.sdp import assignments

pytestmark = pytest.mark.core

KEY = toys.KEY


@pytest.mark.parametrize(
  ("options", "says"),
  [
    ({"level": "rows"}, "`level` is neuron, block, both; got"),
    ({"coverage": 0.0}, r"`coverage` .* in \(0, 1\], .* one number; got 0\.0"),
    ({"coverage": 1.5}, r"`coverage` .*; got 1\.5"),
    ({"coverage": "half"}, "`coverage` .*; got 'half'"),
    (
      {"coverage": (0.5, 0.5)},
      r"level='neuron' one number; got \(0\.5, 0\.5\)",
    ),
    (
      {"level": "both", "coverage": (0.5,)},
      r"level='both' \(of the layers, of their units\); got \(0\.5,\)",
    ),
    ({"masking": "sideways"}, "`masking` is forward, backward; got 'sideways'"),
    ({"redraw_every": 0}, "`redraw_every` is the number of .* got 0"),
    ({"redraw_every": 2}, "redraw_every=2 and assignment='cyclic' do not go"),
    ({"assignment": "rolling"}, "redraw_every=None and assignment='rolling'"),
    ({"rescale": "twice"}, "`rescale` is none, train, test; got 'twice'"),
    (
      {"rescale": "train", "masking": "backward"},
      "rescale='train' makes up .* every worker runs the whole model",
    ),
    (
      {"rescale": "test", "level": "block"},
      "rescale='test' at level='block' needs `writers`",
    ),
    ({"assignment": "random"}, "`assignment` is cyclic, shuffled.*'random'"),
    ({"accumulate": 0}, "`accumulate`.*at least 1; got 0"),
    ({"clip_norm": 0.0}, r"`clip_norm`.*got 0\.0"),
    ({"wire_dtype": "int8"}, "`wire_dtype`.*got 'int8'"),
    ({"param_dtype": jnp.int32}, "`param_dtype`"),
    ({"shared": ("mlp",)}, "no parameter has an axis that level='neuron' sa"),
    ({"shared": ("mpl",)}, r"`shared` is .*\('mpl',\).*has embed, layers, mlp"),
    ({"shared": "mlp"}, "`shared` is a tuple of logical names.* got 'mlp'"),
    (
      {"level": "block", "shared": ("layers",)},
      r"level='block' samples \(layers\); their names are embed, layers, mlp",
    ),
    (
      {"level": "block", "rescale": "test", "writers": {"a": True}},
      "`writers` must have the structure of `shapes`",
    ),
  ],
)
def test_wrong_options_are_refused_by_name(options, says):
  with pytest.raises(ValueError, match=f"sdp: .*{says}"):
    toys.make(**options)


def build(names, shapes, loss=toys.loss_fn, **options):
  tree = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  return dj.sdp(loss, optax.sgd(0.1), names=names, shapes=tree, **options)


@pytest.mark.parametrize(
  ("names", "shapes", "says"),
  [
    (
      {"w": ("hidden",)},
      {"w": (4, 4)},
      r"names\['w'\] is \('hidden',\).*2 str",
    ),
    ({"w": "hidden"}, {"w": (4,)}, r"names\['w'\] is 'hidden'"),
    ({"w": (1,)}, {"w": (4,)}, r"names\['w'\] is \(1,\)"),
    ({"v": ("hidden",)}, {"w": (4,)}, "`names` must have the structure"),
    (
      {"a": ("hidden",), "b": ("hidden",)},
      {"a": (4,), "b": (8,)},
      r"params\['b'\] has \(layers, units\) \(1, 8\) of 'hidden'.*hidden_0",
    ),
    ({"w": (None,)}, {"w": (4,)}, "their names are none"),
    # Two groups of one name would need each other's units.
    ({"w": ("hidden", "hidden")}, {"w": (4, 4)}, "no parameter has an axis"),
    ((), (), "no parameter has an axis .* their names are none"),
  ],
)
def test_names_that_do_not_fit_are_refused(names, shapes, says):
  with pytest.raises(ValueError, match=f"sdp: .*{says}"):
    build(names, shapes)


def begin(method, workers=4, params=None):
  run = dj.simulate(method, workers=workers)
  params = toys.float32(toys.start()) if params is None else params
  return run, run.init(KEY, params)


def test_other_params_than_those_that_were_read_are_refused_by_init():
  with pytest.raises(ValueError, match="not those of `shapes`"):
    begin(toys.make(), params=toys.float32(toys.start(units=12)))


def test_an_optimizer_over_norms_is_refused_by_init():
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
  with pytest.raises(ValueError, match=r"sdp shards.*clip_norm=\.\.\."):
    begin(toys.make(tx=tx))


def test_a_mesh_without_the_axis_is_refused(mesh):
  with pytest.raises(ValueError, match="sdp works on the axis 'workers'"):
    dj.distribute(toys.make(axis="workers"), mesh(2))


def test_statistics_are_averaged_or_refused():
  loss = dj.stateful(lambda *_: None, stats="local")
  with pytest.raises(ValueError, match="stats='local' has no meaning"):
    toys.make(loss=loss)


@pytest.mark.parametrize(
  ("options", "workers", "says"),
  [
    ({"coverage": 0.6}, 4, r"coverage=0\.6 .*Nearest: 0\.5 or 0\.75\.\s"),
    ({"coverage": 0.5}, 1, r"on 1 workers .*Nearest: 1\.\s"),
    ({"level": "block", "coverage": 0.3}, 4, r".*0\.25 or 0\.5"),
    (
      {"level": "both", "coverage": (0.5, 0.25)},
      4,
      r"coverage=0\.25 on 2 workers .*Nearest: 0\.5\.",
    ),
  ],
)
def test_a_coverage_of_uneven_holders_is_refused_with_the_nearest(
  options, workers, says
):
  with pytest.raises(ValueError, match=f"sdp: .*{says}"):
    begin(toys.make(**options), workers)


def test_three_of_eight_workers_may_hold_each_of_twelve_heads():
  method = build(
    {"a": ("heads",), "b": ("mlp",)}, {"a": (12,), "b": (16,)}, coverage=0.375
  )
  params = {"a": np.ones(12, np.float32), "b": np.ones(16, np.float32)}
  _, state = begin(method, 8, params)
  assert state.params.held["a"].shape == (8, 5)  # half of them have 4
  assert state.params.held["b"].shape == (8, 6)


def test_a_model_with_nothing_to_cut_for_so_many_is_refused():
  method = build({"w": ("hidden",)}, {"w": (1,)})
  with pytest.raises(ValueError, match=r"none of \{'hidden': \(1, 1\)\}"):
    begin(method, 4, {"w": np.zeros(1, np.float32)})


def some(family, layers, units, workers):
  return assignments.neurons(layers, units, workers, 0.5)


def losing(family, layers, units, workers):
  found = some(family, layers, units, workers)
  return found._replace(groups=np.zeros_like(found.groups))


def stolen(family, layers, units, workers):
  found = some(family, layers, units, workers)
  return found._replace(owners=(found.owners + 1) % workers)


@pytest.mark.parametrize(
  ("assignment", "says"),
  [
    (lambda *_: "all", "`assignment` gave no table of 'mlp': .* got 'all'"),
    (
      lambda f, layers, u, w: some(f, layers, u, 2 * w),
      "4 layers and 8 units .* for 4 w",
    ),
    (
      lambda f, layers, u, w: some(f, layers + 1, u, w),
      "`assignment` gave no table",
    ),
    (
      lambda f, layers, u, w: assignments.neurons(layers, 12, 3, 2 / 3),
      "`assignment` gave no table",
    ),
    (losing, "no worker holds group 1 of 'mlp' in layer 0"),
    (stolen, "an owner of 'mlp' is not among the holders"),
    (
      lambda f, layers, u, w: assignments.both(layers, u, w, (0.5, 1.0)),
      "layers that workers hold of 'mlp' are not all layers",
    ),
    (lambda *_: None, "none of"),
  ],
)
def test_a_table_by_which_something_would_be_lost_is_refused(assignment, says):
  with pytest.raises(ValueError, match=f"sdp: .*{says}"):
    begin(toys.make(assignment=assignment))


def test_families_whose_layers_part_are_refused():
  def parting(family, layers, units, workers):
    at = assignments.Places(np.random.default_rng(len(family)))
    return assignments.both(layers, units, workers, (0.5, 0.5), at)

  method = toys.make("both", assignment=parting)
  with pytest.raises(
    ValueError, match=r"are not those of '.*one block's arrays"
  ):
    begin(method)
