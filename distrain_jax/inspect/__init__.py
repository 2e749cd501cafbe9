"""What a step costs, on hardware that need not be there.

`compile` reports a program's memory, collectives and modelled time; `mesh`
makes a mesh of devices by name (`"v5e:2x4"`, `"h100:8"`); `tree` is the table of
a model's parameters; `bytes_sent` and `bytes_held` count what a method asks for
and holds, before any compiler. `clock` simulates how many updates a second each
method makes of given seconds.
"""

from distrain_jax.inspect import clock as clock
from distrain_jax.inspect.compiling import compile as compile
from distrain_jax.inspect.compiling import read as read
from distrain_jax.inspect.report import Report as Report
from distrain_jax.inspect.topologies import mesh as mesh
from distrain_jax.inspect.topologies import topology as topology
from distrain_jax.inspect.traffic import bytes_held as bytes_held
from distrain_jax.inspect.traffic import bytes_sent as bytes_sent
from distrain_jax.inspect.tree import Tree as Tree
from distrain_jax.inspect.tree import tree as tree
