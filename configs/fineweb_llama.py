r"""FineWeb with a Llama-style decoder of 134M, 500M or 1B parameters.

  python launch/prepare_data.py --out=data/fineweb --train_bpe=32000 \
    --validation=0.0005 --test=0.0005 'fineweb/sample/10BT/*.parquet'
  python launch/train.py --config=configs/fineweb_llama.py:134M \
    --workdir=runs/fineweb --config.data.folder=data/fineweb

The parquet files are FineWeb's own (HuggingFaceFW/fineweb on the Hugging Face
hub; sample/100BT for 1B). With a vocabulary of 32,000 the presets have
134,105,856, 501,007,872 and 1,104,218,112 parameters. Each trains on 20 tokens
a parameter (Hoffmann et al., arXiv 2203.15556). NVIDIA GPUs:
--config.model.attention=cudnn, by which a step of 32 rows took 90 ms on an H100 in
the place of 192 (launch/bench_step.py). One worker's optimizer does not fit:
--config.method.name=zero1.

Not run yet: 6 floating-point operations a parameter and token are 2.2e18,
3.0e19 and 1.5e20 for the three, some hours to days on eight current GPUs.
"""

from distrain_jax.train import default_config, model_config

# tokens a row, rows a step, micro-batches a worker (of eight), steps, peak rate
PRESETS = {
  "134M": (1024, 256, 2, 10_230, 6e-4),
  "500M": (1024, 512, 8, 19_110, 4e-4),
  "1B": (2048, 512, 16, 21_060, 3e-4),
}


def get_config(arg: str | None = "134M"):
  """`:134M`, `:500M` or `:1B`; `:134M,quick` takes 20 steps."""
  preset, _, quick = (arg or "134M").partition(",")
  if preset not in PRESETS or quick not in ("", "quick"):
    raise ValueError(
      f"configs/fineweb_llama.py:{arg}: one of {', '.join(PRESETS)}, and "
      "',quick' for few steps."
    )
  length, rows, accumulate, steps, rate = PRESETS[preset]
  c = default_config()
  c.steps = 20 if quick else steps
  c.batch_size = rows
  c.method.accumulate = accumulate
  c.method.clip_norm = 1.0
  c.data.name = "tokens"
  c.data.length = length
  c.model = model_config("llama", preset=preset)
  c.model.dtype = "bfloat16"  # of the computation; parameters are float32
  c.model.attention = "xla"  # or cudnn, on NVIDIA GPUs
  c.model.remat = "full"  # what is computed again: none, dots or all of it
  c.optimizer.learning_rate = rate
  c.optimizer.warmup_steps = c.steps // 50
  c.optimizer.final_fraction = 0.1
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.1
  c.evaluation.every = 500
  c.checkpoint.every = 500
  return c.lock()
