"""How many updates a second each method makes: an event-driven simulation.

Given are seconds: of a micro-batch on each worker and of the parts of an
exchange. Assumed: an exchange slows no compute beside it, a collective begins
with its last worker and is as slow as its slowest link. No bytes, latencies or
losses: how well a method learns is not the clock's.

With equal workers, Tc the compute of an update's whole batch and Tm a
reduce-scatter + update + all-gather, the simulation reproduces

  zero1  Tc + Tm       dpu  max(Tc, Tm)       acco  max(Tc, 2 Tm)

ACCO exchanges twice an update, the estimate and the commit: twice the bytes of
ZeRO-1 or DPU. So at equal precision and batch it is at most 1.5 times as fast
as ZeRO-1, where Tm = Tc / 2, and slower where Tm > Tc. DPU is at most twice as
fast, with every gradient a step late; DDP that sends buckets during its own
backward pass leaves less to hide for all of them. Larger gains come from fewer
bytes, or from a larger batch: the adaptive loop fills what waiting there is
with more micro-batches, so its gradients a second rise where its updates do
not. With one of four workers four times slower and nothing on the wire they are
3.25 times DDP's; the mean over micro-batches then counts the data of each fast
worker 4/13 and the slow one's 1/13, where DDP counts all 1/4.

The methods: Nabli et al., "ACCO", 2024, https://arxiv.org/abs/2406.02613;
Douillard et al., "Streaming DiLoCo", 2025, https://arxiv.org/abs/2501.18512.
"""

from distrain_jax.inspect.clock.methods import METHODS as METHODS
from distrain_jax.inspect.clock.simulation import Outcome as Outcome
from distrain_jax.inspect.clock.simulation import Update as Update
from distrain_jax.inspect.clock.simulation import simulate as simulate
from distrain_jax.inspect.clock.times import REPORTED as REPORTED
from distrain_jax.inspect.clock.times import Times as Times
from distrain_jax.inspect.clock.times import from_report as from_report
from distrain_jax.inspect.clock.times import times as times
from distrain_jax.inspect.clock.worker import Span as Span
