"""SDP, subnetwork data parallelism: see `sdp.sdp`."""

from distrain_jax.methods.sdp.alignment import alignment as alignment
from distrain_jax.methods.sdp.alone import Alone as Alone
from distrain_jax.methods.sdp.alone import alone as alone
from distrain_jax.methods.sdp.load import Load as Load
from distrain_jax.methods.sdp.load import load as load
from distrain_jax.methods.sdp.sdp import SDPState as SDPState
from distrain_jax.methods.sdp.sdp import sdp as sdp

# What they are called beside other methods.
subnetwork_alignment, subnetwork_load = alignment, load
