r"""ACCO's fine-tuning: GPT-Neo 2.7B on Alpaca (arXiv 2406.02613, table 5).

  python launch/convert_weights.py import gpt-neo-2.7B/ \
    data/gpt_neo_2.7B.safetensors
  python launch/prepare_data.py --out=data/alpaca alpaca_data.json \
    --tokenizer=gpt-neo-2.7B/tokenizer.json \
    --template='Task: {instruction}\n\nInput: {input}\n\nAnswer: {output}'
  python launch/train.py --config=configs/acco/paper_alpaca.py \
    --workdir=runs/acco_alpaca --config.data.folder=data/alpaca

2,651,307,520 parameters, from EleutherAI/gpt-neo-2.7B on the Hugging Face hub.

The paper's numbers: 8 workers, 2 micro-batches of 4 rows a worker and half, so
128 rows of up to 512 tokens an update; 80M tokens, which are 1,221 updates of
full rows, and three passes over the 52,002 examples (1,219 updates) if each is
a row of its own: most of such a row is padding.

Not the paper's: no padding. Examples follow each other, closed by the end
token, and are cut into rows of 512 (distrain_jax/data/packing.py), so that every
token is a target and the loss needs no mask; a row begins anywhere in an
example and may hold several. An update then sees about five times as many
examples: for three passes set --config.steps to 3 x (training tokens that
prepare_data prints) / 65536. The template is our own wording. The cosine reaches
0, where the released code barely decays.

Not run yet: 1.3e18 floating-point operations; the paper reports 25 minutes on
eight A100.
"""

from distrain_jax.train import default_config, model_config, quick_or


def get_config(arg: str | None = None):
  """`:quick` takes 20 steps."""
  length, rows = 512, 8 * 2 * 2 * 4
  c = default_config()
  c.batch_size = rows
  c.steps = quick_or(round(80e6 / (rows * length)), arg)
  c.method.name = "acco"
  c.method.accumulate = 2  # micro-batches a half, of 4 rows
  c.method.param_dtype = "bfloat16"  # masters are float32
  c.method.wire_dtype = "bfloat16"
  c.data.name = "tokens"
  c.data.length = length
  c.model = model_config("gpt_neo", preset="2.7B")
  c.initial_params = "data/gpt_neo_2.7B.safetensors"
  c.model.vocab = 50_257
  c.model.dtype = "bfloat16"  # of the computation
  c.model.attention = "xla"  # or cudnn, on NVIDIA GPUs
  c.model.remat = "full"  # what is computed again: none, dots or all of it
  c.optimizer.learning_rate = 2e-5
  c.optimizer.warmup_steps = 0
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.0
  c.evaluation.every = 200
  c.evaluation.batch_size = 64
  c.checkpoint.every = 200
  c.checkpoint.keep = 1  # about 85 GB each, with what is in flight
  return c.lock()
