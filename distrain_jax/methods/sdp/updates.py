"""Who updates a parameter: all of its holders alike, or its owner alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from distrain_jax import gradients, layout
from distrain_jax.methods.sdp.cutting import Cut
from distrain_jax.methods.sdp.subnetworks import Parts, Subnetworks


class Holders(NamedTuple):
  """Every holder has the optimizer's state of what it holds.

  The owner's mean is what all of them get, so their copies stay equal to the
  bit.
  """

  nets: Subnetworks
  axis: str
  wire_dtype: DTypeLike | None

  def targets(self, trained: Parts, role: jax.Array) -> Any:
    """What the optimizer updates on this worker, as one tree."""
    del role
    return self.nets.join(trained)

  def means(self, grads: Parts, role: jax.Array) -> tuple[Any, jax.Array]:
    """Means over the holders like `targets`, and their squared norm."""
    wire = lambda x: x.astype(self.wire_dtype or x.dtype)
    shared = jax.lax.pmean(jax.tree.map(wire, grads.shared), self.axis)
    owned = self.nets.to_owners(grads.held, role, self.axis, self.wire_dtype)
    square = jax.lax.psum(gradients.squared_norm(owned), self.axis)
    square += gradients.squared_norm(shared)
    back = lambda x, g: x.astype(self.wire_dtype or g.dtype)
    owned = jax.tree.map(back, owned, grads.held)
    # None comes back before all have gone: gradients and means of all arrays
    # would be in memory together.
    owned = jax.lax.optimization_barrier(owned)
    held = self.nets.to_holders(owned, role, self.axis)
    return self.nets.join(Parts(shared, held)), square

  def publish(self, targets: Any, trained: Parts, role: jax.Array) -> Parts:
    """The new parameters of what this worker trains."""
    del trained, role
    return self.nets.sort(targets)

  def publish_to_all(
    self, targets: Any, trained: Parts, role: jax.Array
  ) -> Parts:
    """All new parameters, on every worker."""
    del trained
    new = self.nets.sort(targets)
    held = self.nets.to_all(self.nets.own(new.held, role), role, self.axis)
    return Parts(self.nets.join(new._replace(held=held)), None)


class Owners(NamedTuple):
  """One holder of each fragment updates it and sends it to the others.

  What is shared is cut between all workers, as by ZeRO-1.
  """

  nets: Subnetworks
  axis: str
  wire_dtype: DTypeLike | None

  def targets(self, trained: Parts, role: jax.Array) -> Any:
    shared = self._layout(trained).pieces(
      trained.shared, jax.lax.axis_index(self.axis)
    )
    owned = self.nets.own(trained.held, role)
    return self.nets.join(Parts(shared, self.nets.pieces(owned)))

  def means(self, grads: Parts, role: jax.Array) -> tuple[Any, jax.Array]:
    flat = self._layout(grads)
    shared = flat.reduce_scatter(grads.shared, self.axis, self.wire_dtype)
    owned = self.nets.to_owners(grads.held, role, self.axis, self.wire_dtype)
    means = self.nets.join(Parts(shared, self.nets.pieces(owned)))
    return means, jax.lax.psum(gradients.squared_norm(means), self.axis)

  def publish(self, targets: Any, trained: Parts, role: jax.Array) -> Parts:
    new = self.nets.sort(targets)
    shared = self._layout(trained).all_gather(new.shared, self.axis)
    owned = self.nets.rows_of(new.held)
    return Parts(shared, self.nets.to_holders(owned, role, self.axis))

  def publish_to_all(
    self, targets: Any, trained: Parts, role: jax.Array
  ) -> Parts:
    new = self.nets.sort(targets)
    shared = self._layout(trained).all_gather(new.shared, self.axis)
    held = self.nets.to_all(self.nets.rows_of(new.held), role, self.axis)
    return Parts(self.nets.join(Parts(shared, held)), None)

  def _layout(self, parts: Parts) -> layout.Layout:
    workers = jax.lax.axis_size(self.axis)
    return layout.make_layout(parts.shared, workers)


def average(
  stats: Cut, model_state: Parts, role: jax.Array, axis: str
) -> Parts:
  """Running statistics, averaged over those that hold them."""

  def one(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.pmean(x, axis) if floating else x

  owned = stats.nets.to_owners(model_state.held, role, axis)
  owned = jax.tree.map(
    lambda x, old: x.astype(old.dtype), owned, model_state.held
  )
  blocks = stats.blocks.to_owners(model_state.whole, role, axis)
  return Parts(
    shared=jax.tree.map(one, model_state.shared),
    held=stats.nets.to_holders(owned, role, axis),
    whole=stats.blocks.to_holders(blocks, role, axis),
  )
