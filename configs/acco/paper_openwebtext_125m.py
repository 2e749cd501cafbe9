r"""ACCO's pre-training: GPT-Neo 125M on OpenWebText (arXiv 2406.02613, table 4).

  python launch/prepare_data.py --out=data/openwebtext openwebtext/*.parquet \
    --tokenizer=tokenizer.json --validation=0.0005 --test=0.0005
  python launch/train.py --config=configs/acco/paper_openwebtext_125m.py \
    --workdir=runs/acco_openwebtext --config.data.folder=data/openwebtext

124,412,160 parameters: the published model of 125,198,592 has 2,048 positions,
the paper's 1,024. The tokenizer.json is GPT-2's (50,257 tokens).

The paper's numbers: 8 workers, 24 rows of 1,024 tokens a worker and half, so
393,216 tokens an update, 6B in all; AdamW, bfloat16 parameters and gradients.
For its 32 workers: --config.batch_size=1536 --config.steps=31789 (50B tokens).
Not the paper's: a half's 24 rows come in 4 micro-batches, beside which parts of
the communication run; the cosine reaches 0, where its released code barely
decays.

Not run yet: 4.5e18 floating-point operations; the paper reports 4 h 25 min on
eight H100.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  length, rows = 1024, 8 * 2 * 24
  c = default_config()
  c.batch_size = rows
  c.steps = quick_or(round(6e9 / (rows * length)), arg)
  c.method.name = "acco"
  c.method.accumulate = 4  # micro-batches a half, of 6 rows
  c.method.param_dtype = "bfloat16"  # masters are float32
  c.method.wire_dtype = "bfloat16"
  c.data.name = "tokens"
  c.data.length = length
  c.model = model_config("gpt_neo", preset="125M")
  c.model.vocab = 50_257
  c.model.positions = length
  c.model.dtype = "bfloat16"  # of the computation
  c.model.attention = "xla"  # or cudnn, on NVIDIA GPUs
  c.model.remat = "dots_with_no_batch_dims"  # attention is computed again
  # Tokens of a row that have logits at once. Whole ones would outlive the
  # backward pass on TPUs: XLA moves the last product with their gradient there.
  c.loss.logits_chunk = 128
  c.optimizer.learning_rate = 6e-4
  c.optimizer.warmup_steps = 0
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.1
  c.evaluation.every = 500
  c.evaluation.batch_size = 64
  c.checkpoint.every = 500
  return c.lock()
