"""Which masks: SDP's own beside those of federated learning, on images.

As launch/reproductions/sdp_images.py has it, with forward masking and a coverage
of 1/2, the mean over workers: nested widths, as in HeteroFL (Diao et al., 2021,
https://arxiv.org/abs/2010.01264), and windows that roll on by one group every
update, as in FedRolex (Alam et al., 2022, https://arxiv.org/abs/2212.01548).
BatchNorm stands behind every sampled channel, so that no rescaling is needed.
All are compared with nested widths, which blocks are to beat.
"""

from launch.reproductions import sdp_images

TITLE = "Fashion-MNIST, a narrow ResNet-18, 8 workers, a coverage of 1/2"
METRIC, UNIT = sdp_images.METRIC, sdp_images.UNIT
FOLLOWS = ("evaluation.members",)
SCORES = {
  "test_accuracy": "whole model, test accuracy, %",
  "test_members_accuracy": "sub-networks",
  "test_ensemble_accuracy": "their ensemble",
}
CLAIM = ("block, cyclic", 0.0)
NESTED = "neuron, nested (HeteroFL)"


def sdp(level: str, **options):
  return {**sdp_images.sdp(level, "forward", "1/2"), **options}


ROWS = {
  NESTED: sdp("neuron", assignment="nested"),
  "neuron, rolling (FedRolex)": sdp(
    "neuron", assignment="rolling", redraw_every=1
  ),
  "neuron, cyclic": sdp("neuron"),
  "neuron, shuffled by layer": sdp("neuron", assignment="shuffled"),
  "block, cyclic": sdp("block"),
  "block, cyclic, rescaled in test": sdp("block", rescale="test"),
  "block, redrawn every 10 updates": sdp(
    "block", assignment="shuffled", redraw_every=10
  ),
}


def against(row: str) -> str:
  """The row that it is compared with."""
  del row
  return NESTED


def config(row: str):
  """One row's config, but for the seed."""
  c = sdp_images.config("ddp")
  with c.unlocked():
    c.method.update(ROWS[row])
    c.evaluation.members = True
  return c
