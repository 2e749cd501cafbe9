"""Meta-training: what it learns, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distrain_jax import learned, spmd
from distrain_jax.learned import meta

KEY = jax.random.key(0)
SETTINGS = meta.Settings(8, 3, 0.01, 4, 9)


def problem_of(target):
  """Theta moves a point; the loss is the distance to a target."""

  def reset(key):
    return jax.random.normal(key, (2,))

  def step(theta, state, data, key):
    noise = 0.1 * jax.random.normal(key, (2,))
    new = state - theta["rate"] * (state - target)
    return new, jnp.sum((state - target - data + noise) ** 2)

  return meta.Problem(reset, step)


PROBLEMS = [problem_of(0.0), problem_of(1.0)]
DATA = (jnp.zeros(2), jnp.zeros(2))
THETA = {"rate": np.zeros(2, np.float32)}


def make(mesh=None, settings=SETTINGS):
  return meta.trainer(PROBLEMS, optax.adam(0.03), settings, mesh=mesh)


def run(trainer, steps, state=None):
  state = trainer.init(THETA, KEY) if state is None else state
  for _ in range(steps):
    state, metrics = trainer.step(state, DATA, KEY)
  return state, metrics


@pytest.fixture(scope="module")
def alone():
  trainer = make()
  return trainer, jax.tree.map(np.asarray, run(trainer, 6))


def near(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("devices", [8])
def test_the_number_of_devices_changes_nothing(alone, devices):
  mesh = spmd.make_mesh({"tasks": devices}, jax.devices()[:devices])
  state, metrics = run(make(mesh), 6)
  near((state, metrics), alone[1])
  pairs = state.pairs[0].states
  assert len(pairs.sharding.device_set) == devices
  shards = {x.data.shape for x in pairs.addressable_shards}
  assert shards == {(8 // devices, 2, 2)}


def test_saved_and_restored_goes_on_to_the_bit(alone, tmp_path):
  trainer, (wanted, _) = alone
  state, _ = run(trainer, 4)
  meta.save(tmp_path / "state.npz", state)
  like = trainer.init(THETA, jax.random.key(9))
  state = meta.restore(tmp_path / "state.npz", like)
  state, _ = run(trainer, 2, state)
  jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_state_of_another_run_is_refused(alone, tmp_path):
  _, (state, _) = alone
  meta.save(tmp_path / "state.npz", state)
  other = make(settings=SETTINGS._replace(pairs=4)).init(THETA, KEY)
  with pytest.raises(ValueError, match=r"state of another run.*workdir"):
    meta.restore(tmp_path / "state.npz", other)


def test_theta_learns_and_the_callers_stays(alone):
  trainer, _ = alone
  state, metrics = run(trainer, 150)
  assert float(metrics["meta_loss"]) < 1.5
  assert np.all(np.asarray(state.theta["rate"]) > 0.3)
  assert not THETA["rate"].any()
  assert int(state.step) == 150


def test_what_does_not_divide_or_fit_is_refused():
  mesh = spmd.make_mesh({"tasks": 8})
  with pytest.raises(ValueError, match=r"`pairs`=6.*multiple of the 8"):
    make(mesh, SETTINGS._replace(pairs=6))
  mesh = spmd.make_mesh({"data": 8})
  with pytest.raises(ValueError, match=r"mesh axis 'tasks'; the mesh has"):
    make(mesh)


def test_the_outer_rate_warms_up_falls_and_stays():
  tx = meta.outer_adamw(1000, weight_decay=0.0)
  params = jnp.zeros(())
  state, update, rates = tx.init(params), jax.jit(tx.update), []
  for _ in range(1000):
    step, state = update(jnp.ones(()), state, params)
    rates.append(-float(step))
  np.testing.assert_allclose(max(rates), 3e-3, rtol=1e-3)
  assert np.argmax(rates) == 100 and rates[0] < 1e-6
  np.testing.assert_allclose(rates[980:], 1e-3, rtol=1e-3)


def small_task(mup=True):
  data = meta.teacher_data(inputs=8, classes=3, count=128)
  return meta.mlp_task(data, (6,), batch_size=16, mup=mup)


def test_a_training_problem_is_mulo_on_rescaled_parameters():
  task, theta = small_task(), jax.jit(learned.init_theta)(KEY)
  problem = meta.training(task, augment=10.0)
  state = jax.jit(problem.reset)(KEY)
  step = jax.jit(problem.step)
  new, loss = step(theta, state, task.data, KEY)
  for_batch, _ = jax.random.split(KEY)
  batch = jax.jit(task.batch)(task.data, for_batch)
  scale = lambda p: jax.tree.map(jnp.multiply, p, state.scales)
  loss_fn = lambda p: task.loss(scale(p), batch, KEY)
  wanted, grads = jax.jit(jax.value_and_grad(loss_fn))(state.params)
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  tx = learned.mulo(theta, mup=task.mup)
  updates, _ = jax.jit(tx.update)(grads, tx.init(state.params), state.params)
  near(optax.apply_updates(state.params, updates), new.params)
  # However it is scaled, the network at the start is the same one.
  near(
    scale(state.params), jax.jit(meta.training(task).reset)(KEY).params, 1e-5
  )


def test_a_network_in_mup_starts_without_a_guess():
  task = small_task()
  params = jax.jit(task.init)(KEY)
  batch = jax.jit(task.batch)(task.data, KEY)
  np.testing.assert_array_equal(params["w1"], 0.0)
  assert task.mup == {"w0": 1.0, "b0": 1.0, "w1": 1.0, "b1": 1.0}
  deep = meta.MLP(8, (6, 5), 3).multipliers()
  assert deep["w1"] == 1 / 6 and deep["w2"] == 1.0
  assert abs(float(task.loss(params, batch, KEY)) - np.log(3)) < 0.3
  assert small_task(mup=False).mup == 1.0


def test_a_loss_that_is_not_finite_costs_the_most():
  normalise = small_task().normalise
  top = 1.5 * np.log(3)
  for loss, wanted in ((np.nan, top), (np.inf, top), (9.0, top), (0.5, 0.5)):
    np.testing.assert_allclose(normalise(jnp.asarray(loss)), wanted, rtol=1e-6)


def test_uneven_data_is_refused():
  with pytest.raises(ValueError, match=r"got 3 of x, 2 of y"):
    meta.mlp_task({"x": np.ones((3, 2)), "y": np.ones(2, int)}, (4,))


def test_losses_of_a_training_fall_under_a_good_optimizer():
  task = small_task()
  run = meta.trained(task, lambda rate: learned.mup_adamw(rate, task.mup), 60)
  got = run(jnp.asarray(0.03), task.data, KEY)[1]
  assert got.shape == (60,)
  assert float(got[-5:].mean()) < 0.8 * float(got[:5].mean())
