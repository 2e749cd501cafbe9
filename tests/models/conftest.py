"""Compiles faster: these tests look at numbers, not at compiled programs."""

import jax
import pytest

NAME = "jax_disable_most_optimizations"


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
  before = jax.config.read(NAME)
  jax.config.update(NAME, True)
  yield
  jax.config.update(NAME, before)
