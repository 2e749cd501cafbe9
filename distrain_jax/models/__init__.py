"""Models in Flax Linen, their tasks, and adapters for other libraries.

Every parameter's axes have logical names (`names`); sizes follow the parameters
that a module is applied to (`layers`); parameters are handed out as plain
arrays. `model.apply({"params": params}, inputs)` is all that is needed to use
one by itself.
"""

from distrain_jax.models import adapters as adapters
from distrain_jax.models import gpt_neo as gpt_neo
from distrain_jax.models import huggingface as huggingface
from distrain_jax.models import names as names
from distrain_jax.models import parts as parts
from distrain_jax.models import weights as weights
from distrain_jax.models.branches import blocks as blocks
from distrain_jax.models.branches import branch_writers as branch_writers
from distrain_jax.models.depths import depths as depths
from distrain_jax.models.gpt_neo import GPTNeo as GPTNeo
from distrain_jax.models.gpt_neo import GPTNeoConfig as GPTNeoConfig
from distrain_jax.models.llama import PRESETS as PRESETS
from distrain_jax.models.llama import Llama as Llama
from distrain_jax.models.llama import LlamaConfig as LlamaConfig
from distrain_jax.models.mlp import MLP as MLP
from distrain_jax.models.resnet import ResNet as ResNet
from distrain_jax.models.rev_llama import RevLlama as RevLlama
from distrain_jax.models.rev_llama import RevLlamaConfig as RevLlamaConfig
from distrain_jax.models.rev_mlp import RevMLP as RevMLP
from distrain_jax.models.rev_vit import RevViT as RevViT
from distrain_jax.models.rev_vit import RevViTConfig as RevViTConfig
from distrain_jax.models.revnet import RevNet as RevNet
from distrain_jax.models.tasks import Task as Task
from distrain_jax.models.tasks import classification_loss as classification_loss
from distrain_jax.models.tasks import evaluation as evaluation
from distrain_jax.models.tasks import language_model_loss as language_model_loss
from distrain_jax.models.tasks import task as task
from distrain_jax.models.vit import ViT as ViT
from distrain_jax.models.vit import ViTConfig as ViTConfig
from distrain_jax.models.zoo import abstract as abstract
from distrain_jax.models.zoo import create as create
from distrain_jax.models.zoo import init as init
from distrain_jax.models.zoo import logical_names as logical_names
from distrain_jax.models.zoo import option_types as option_types
from distrain_jax.models.zoo import valid_options as valid_options
