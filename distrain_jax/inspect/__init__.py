"""What a method costs: bytes that its workers send and hold."""

from distrain_jax.inspect.traffic import bytes_held as bytes_held
from distrain_jax.inspect.traffic import bytes_sent as bytes_sent
