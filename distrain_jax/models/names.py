"""The vocabulary of logical axis names: what an axis of a parameter is.

Every parameter of our models names its axes, once, where it is made (Flax's
logical partitioning metadata); sharding rules, subnetworks and muP read the
names and never a parameter's path. Two rules make them enough:

- Axes with one name inside one block (one transformer layer, one residual
  block, the whole MLP) run over the same units: gathering the indices `i` on
  each of them removes the other units from the block and changes nothing else.
- A number after the last underscore tells apart axes of one kind in one block
  (`hidden_0`, `hidden_1`), since no array may name two axes alike; `kind`
  drops it.
"""

# kind -> what the axis runs over
MEANING = {
  "classes": "output classes of a classifier",
  "conv_in": "channels of a ResNet's residual stream, where they are read",
  "conv_out": "channels of a ResNet's residual stream, where they are written",
  "embed": "channels of a transformer's residual stream",
  "head_dim": "coordinates of one attention head",
  "heads": "key-value heads, each with the query heads that read it",
  "hidden": "units of an MLP's hidden layer; hidden_0 is the first",
  "image_channels": "channels of the input image",
  "inner": "channels between the convolutions of one residual block",
  "inputs": "flattened input features",
  "layers": "stacked transformer blocks, or pairs of them that alternate",
  "mlp": "hidden units of a transformer block's feed-forward part",
  "positions": "places in a row of tokens that have a learned embedding",
  "queries": "query heads that share one key-value head",
  "spatial": "height (spatial_0) and width (spatial_1) of a kernel",
  "vocab": "tokens of the vocabulary",
}

# Axes whose units can be left out while the residual stream stays whole.
NEURONS = frozenset({"heads", "hidden", "inner", "mlp"})
# Axes whose units are whole residual blocks.
BLOCKS = frozenset({"layers"})
# Axes that grow when a model is widened (muP's infinite axes).
WIDTH = NEURONS | {"conv_in", "conv_out", "embed", "head_dim", "queries"}


def kind(name: str) -> str:
  """The name without the number that tells two axes of one kind apart.

  >>> kind("hidden_12"), kind("conv_in")
  ('hidden', 'conv_in')
  """
  stem, _, number = name.rpartition("_")
  return stem if number.isdecimal() else name
