"""Data: sources with random access, and endless or exact batches of them.

    data = distrain_jax.data.load("digits")
    batches = train_iterator(data.train, batch_size=128, seed=0)
    batch = next(batches)  # {"image": (128, 8, 8, 1), "label": (128,)}
    for batch in eval_batches(data.test, batch_size=128):  # with "weight"
      ...

Members of a population have orders of their own, `train_iterator(members=)`,
and ways of mixing images of their own, on the device (`mixing_loss`).

`load` takes a config's fields and finds the source; each source is also a
function of its own. Own data: anything with `info`, `in_memory`, `len` and
`gather` (`Source`), or `Arrays` around arrays. Needs no JAX device and no
TensorFlow.
"""

from distrain_jax.data.augment import Augmentation as Augmentation
from distrain_jax.data.digits_source import digits as digits
from distrain_jax.data.idx_source import fashion_mnist as fashion_mnist
from distrain_jax.data.idx_source import idx as idx
from distrain_jax.data.idx_source import read_idx as read_idx
from distrain_jax.data.loading import FIELDS as FIELDS
from distrain_jax.data.loading import Dataset as Dataset
from distrain_jax.data.loading import Description as Description
from distrain_jax.data.loading import describe as describe
from distrain_jax.data.loading import load as load
from distrain_jax.data.mixing import mix as mix
from distrain_jax.data.mixing import mixing_loss as mixing_loss
from distrain_jax.data.mixing_settings import Mixing as Mixing
from distrain_jax.data.mixing_settings import mixing_grid as mixing_grid
from distrain_jax.data.mixing_settings import per_member as per_member
from distrain_jax.data.packing import ArrayStream as ArrayStream
from distrain_jax.data.packing import Windows as Windows
from distrain_jax.data.packing import pack as pack
from distrain_jax.data.pipeline import EvalBatches as EvalBatches
from distrain_jax.data.pipeline import TrainIterator as TrainIterator
from distrain_jax.data.pipeline import eval_batches as eval_batches
from distrain_jax.data.pipeline import train_iterator as train_iterator
from distrain_jax.data.preparing import prepare as prepare
from distrain_jax.data.source import Arrays as Arrays
from distrain_jax.data.source import Info as Info
from distrain_jax.data.source import Source as Source
from distrain_jax.data.source import Splits as Splits
from distrain_jax.data.source import Subset as Subset
from distrain_jax.data.source import in_memory as in_memory
from distrain_jax.data.stdlib_source import stdlib_text as stdlib_text
from distrain_jax.data.tfds_source import tfds as tfds
from distrain_jax.data.token_shards import tokens as tokens
from distrain_jax.data.tokenizer import Tokenizer as Tokenizer
from distrain_jax.data.tokenizer import byte_tokenizer as byte_tokenizer
from distrain_jax.data.tokenizer import load_tokenizer as load_tokenizer
from distrain_jax.data.tokenizer import train_bpe as train_bpe
