"""The vocabulary of logical axis names: what an axis of a parameter is.

Every parameter of our models names its axes, once, where it is made (Flax's
logical partitioning metadata); sharding rules, subnetworks and muP read the
names and never a parameter's path. Two rules make them enough:

- Axes of one name run over the same units wherever in the model they are, if
  the units are ones that can be left out (`NEURONS`, `BLOCKS`): gathering the
  indices `i` on each axis of the name removes the other units from the model
  and changes nothing else. The axes of other kinds (`embed`, `conv_out`, ...)
  only say what they are of.
- A number after the last underscore tells apart axes of one kind: `hidden_0`
  and `hidden_1` of one MLP, `mlp_3` of the transformer block 3, `inner_4` of a
  ResNet's fifth pair of convolutions. `kind` drops it, and whatever is said of
  a kind (a sharding rule for `mlp`) holds for all its numbers. Blocks that are
  stacked share plain names: an index on `layers` tells their units apart, and
  what one index holds (a block, or a pair) is left out together.
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
  "inner": "channels between two convolutions of one residual block",
  "inputs": "flattened input features",
  "layers": "stacked transformer blocks, or pairs of them that alternate",
  "mlp": "hidden units of a transformer block's feed-forward part",
  "patches": "patches of an image that have a learned position, row by row",
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


def numbered(kind: str, number: int | None) -> str:
  """A kind's name with a number; None: without one, for stacked blocks.

  >>> numbered("mlp", 3), numbered("mlp", None)
  ('mlp_3', 'mlp')
  """
  return kind if number is None else f"{kind}_{number}"
