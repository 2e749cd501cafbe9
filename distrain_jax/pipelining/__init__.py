"""What pipelined methods share: plans, messages, ticks, partitions.

`plan` finds out what is static, `packing` gives what differs by stage one
shape, `engine` is a stage's part in a tick, `optimizer` updates its blocks,
`reading` is between all that and what users pass and get.
"""

from distrain_jax.pipelining.partition import Partition as Partition
from distrain_jax.pipelining.partition import partition as partition
