"""What muP knows of a parameter: which of its axes grow with the width.

Yang et al., "Tensor Programs V", 2022, https://arxiv.org/abs/2203.03466 (table
8: an output layer with a forward multiplier 1 / fan in), and for learned
optimizers Thérien et al., 2024, https://arxiv.org/abs/2406.00153.
"""

import dataclasses

KINDS = ("input", "hidden", "output", "fixed")


@dataclasses.dataclass(frozen=True)
class MuInfo:
  """Of one parameter. A leaf: `jax.tree.map` does not look inside.

  hidden: fan in and fan out grow. input: only the fan out does (embeddings,
  first layers, biases, norms). output: only the fan in does. fixed: neither.

  >>> MuInfo("hidden", fan_in=256, fan_out=256).multiplier
  0.00390625
  """

  kind: str  # one of KINDS
  fan_in: int = 1  # product of the axes that are summed over
  fan_out: int = 1  # product of the other axes
  base_fan_in: int = 1  # 1: absolute multipliers, else those of a base width
  base_fan_out: int = 1
  stacked: int = 0  # leading axes that hold layers
  guessed: bool = False  # whether the shape alone had to do

  @property
  def multiplier(self) -> float:
    """Of a step of unit size, such as Adam's or a learned optimizer's."""
    return self.base_fan_in / self.fan_in if self.kind == "hidden" else 1.0

  @property
  def sgd_multiplier(self) -> float:
    """Of a step along the gradient."""
    if self.kind == "input":
      return self.fan_out / self.base_fan_out
    if self.kind == "output":
      return self.fan_in / self.base_fan_in
    return 1.0
