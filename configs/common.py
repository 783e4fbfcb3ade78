"""The encoders that config files start from, and the rehearsal of any config.

A config file begins with `config.defaults()` and assigns only what differs.
"""

from collections.abc import Sequence

import ml_collections

from qa_jax import config
from qa_jax import errors
from qa_jax.sweeps import grid

# Variant of a config file → the pretrained encoder, a hub id.
ENCODERS = {
    'base': 'google-bert/bert-base-uncased',
    'large': 'google-bert/bert-large-uncased',
    'minilm_l6': 'sentence-transformers/all-MiniLM-L6-v2',
}


def choose_variant(c: ml_collections.ConfigDict, variant: str, file: str,
                   known: Sequence[str] = (*ENCODERS, 'tiny'),
                   **corpus: float) -> ml_collections.ConfigDict:
  """Sets the encoder that `variant` names, or makes `c` its own rehearsal.

  `corpus` holds arguments of `synthetic` for the rehearsal.

  Raises:
    UserError: the file has no such variant.
  """
  if variant not in known:
    hint = errors.did_you_mean(variant, known)
    raise errors.UserError(f'{file}: unknown variant {variant!r}{hint}')
  c.data.vocab_size = 1500  # of the rehearsal; an encoder brings its own
  if variant == 'tiny':
    return rehearse(c, **corpus)
  c.model.preset = variant
  c.model.init_from = ENCODERS[variant]
  c.data.buckets = (96, 128, 160, 192, 224, 256, 320)
  if variant == 'minilm_l6':  # a third of the width of BERT-base
    c.optim.learning_rate = 1e-4
    c.train.batch_size = 16
    c.train.num_epochs = 2.0
  return c


def rehearse(c: ml_collections.ConfigDict, *, eval_size: int = 500,
             **corpus: float) -> ml_collections.ConfigDict:
  """Turns any config into a run of a minute on two CPU cores.

  The data become the generated corpus, with the arguments `corpus`, and the
  encoder a tiny one from scratch, with a learning rate, batches, epochs and
  windows that suit them. Head, objective and decoding stay.
  """
  options = ''.join(f', {name}={value}' for name, value in corpus.items())
  c.data.train = f'synthetic(seed=0, size=8000, paraphrases=1{options})'
  c.data.eval = (f'synthetic(seed=1, size={eval_size}, paraphrases=1{options}, '
                 'split="eval")')
  c.data.buckets = (48, 64)
  small_from_scratch(c)
  c.optim.learning_rate = 1e-3
  c.train.batch_size = 32
  c.train.num_epochs = 2.0
  c.train.num_steps = 0
  return c


def small_from_scratch(c: ml_collections.ConfigDict) -> None:
  """Sets a tiny encoder without dropout, and windows as short as the corpus."""
  c.model.preset = 'tiny'
  c.model.init_from = ''
  c.model.hidden_size = c.model.num_layers = c.model.mlp_size = 0
  c.model.num_heads = 4
  c.model.dropout = 0.0
  c.model.attention_dropout = 0.0
  c.model.initializer_range = 0.09  # about 1 / sqrt(128): learns sooner
  c.data.vocab = ''
  c.data.max_length = 80
  c.data.window_overlap = 8
  c.data.max_question_length = 20


def attend_sooner(c: ml_collections.ConfigDict) -> None:
  """Lets an encoder from scratch find neighbours and repeated words sooner.

  RESULTS.md, "Quickstart", has the comparison.
  """
  c.model.position_base = 100.0
  c.model.equal_query_key = True


def sweep_config(variant: str, file: str, sizes: str = 'minilm_l6',
                 sooner: bool = True) -> ml_collections.ConfigDict:
  """Returns what every sweep starts from: SQuAD 2.0, or its rehearsal.

  `sizes` is the variant that is not the rehearsal. If `sooner`, the rehearsal
  takes the initial values of `attend_sooner`.
  """
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v2.0", split="train")'
  c.data.eval = 'tfds(name="squad/v2.0", split="validation")'
  choose_variant(c, variant, file, known=(sizes, 'tiny'), eval_size=1000,
                 impossible=0.3)
  if variant == 'tiny' and sooner:
    attend_sooner(c)
  return c


def study_config(variant: str, file: str, sooner: bool = True
                 ) -> ml_collections.ConfigDict:
  """Returns what a study of heads starts from: SQuAD 1.1 for one epoch.

  rates_* trains half as long on four fifths of the articles, and scores the
  others. `sooner` is that of `sweep_config`.

  Raises:
    UserError: the file has no such variant.
  """
  name, known = variant.removeprefix('rates_'), ('minilm_l6', 'tiny')
  if name not in known:
    raise errors.UserError(
        f'{file}: unknown variant {variant!r}; choose {", ".join(known)} or '
        'one of them after rates_')
  c = config.defaults()
  c.data.train = 'tfds(name="squad/v1.1", split="train")'
  c.data.eval = 'tfds(name="squad/v1.1", split="validation")'
  choose_variant(c, name, file)
  if name == 'tiny' and sooner:
    attend_sooner(c)
  if name != 'tiny':
    c.train.num_epochs = 1.0
    c.precision.compute_dtype = 'bfloat16'
  if name != variant:
    c.data.eval = f'articles(of={c.data.train!r}, low=0.8, seed=3)'
    c.data.train = f'articles(of={c.data.train!r}, high=0.8, seed=3)'
    c.train.num_epochs /= 2
  return c


def probe_config(variant: str, file: str) -> ml_collections.ConfigDict:
  """Returns study_config with an encoder that has and keeps its weights."""
  c = study_config(variant, file, sooner=False)
  c.model.init_head = False
  c.optim.freeze_encoder = True
  return c


def heads_and_rates(heads: Sequence[tuple[str, str]], rates: Sequence[float]
                    ) -> grid.Variants:
  """Returns each pair of head and objective at each learning rate."""
  names, objectives = zip(*heads, strict=True)
  return grid.product(
      grid.together(grid.over('model.head', names),
                    grid.over('objective', objectives)),
      grid.over('optim.learning_rate', rates))
