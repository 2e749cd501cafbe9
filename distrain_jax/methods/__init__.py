"""Training methods: each a factory `(loss_fn, tx, *, options) -> Method`."""

from distrain_jax.methods.acco import ACCOState as ACCOState
from distrain_jax.methods.acco import acco as acco
from distrain_jax.methods.dart import dart as dart
from distrain_jax.methods.ddp import DDPState as DDPState
from distrain_jax.methods.ddp import ddp as ddp
from distrain_jax.methods.diloco import DiLoCoState as DiLoCoState
from distrain_jax.methods.diloco import diloco as diloco
from distrain_jax.methods.dpu import DPUState as DPUState
from distrain_jax.methods.dpu import dpu as dpu
from distrain_jax.methods.dpu import weight_prediction as weight_prediction
from distrain_jax.methods.ensemble import ensemble as ensemble
from distrain_jax.methods.fsdp import FSDPState as FSDPState
from distrain_jax.methods.fsdp import fsdp as fsdp
from distrain_jax.methods.guard import guard as guard
from distrain_jax.methods.local_sgd import LocalSGDState as LocalSGDState
from distrain_jax.methods.local_sgd import local_sgd as local_sgd
from distrain_jax.methods.papa import papa as papa
from distrain_jax.methods.petra import PetraState as PetraState
from distrain_jax.methods.petra import petra as petra
from distrain_jax.methods.pipeline import PipelineState as PipelineState
from distrain_jax.methods.pipeline import pipeline as pipeline
from distrain_jax.methods.sdp import SDPState as SDPState
from distrain_jax.methods.sdp import sdp as sdp
from distrain_jax.methods.sdp import (
  subnetwork_alignment as subnetwork_alignment,
)
from distrain_jax.methods.sdp import subnetwork_load as subnetwork_load
from distrain_jax.methods.sparta import sparta as sparta
from distrain_jax.methods.wash import wash as wash
from distrain_jax.methods.zero1 import Zero1State as Zero1State
from distrain_jax.methods.zero1 import zero1 as zero1
from distrain_jax.population.members import PopulationState as PopulationState

# The methods that a config can name.
FACTORIES = {
  "ddp": ddp,
  "zero1": zero1,
  "fsdp": fsdp,
  "acco": acco,
  "dpu": dpu,
  "weight_prediction": weight_prediction,
  "local_sgd": local_sgd,
  "diloco": diloco,
  "sdp": sdp,
  "petra": petra,
  "pipeline": pipeline,
  "ensemble": ensemble,
  "wash": wash,
  "sparta": sparta,
  "papa": papa,
  "dart": dart,
}

# Those whose workers are members of a population, with models of their own.
POPULATIONS = ("ensemble", "wash", "sparta", "papa", "dart")

# Those that take a network in stages in the place of a loss; and the others.
PIPELINED = ("petra", "pipeline")
OF_A_LOSS = tuple(name for name in FACTORIES if name not in PIPELINED)

# How often a step cuts a worker's share into `accumulate` micro-batches: once,
# but for methods whose step has several parts.
HALVES = {"acco": 2}
