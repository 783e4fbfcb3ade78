"""Random overrides of a config, mostly of the right type, near the bounds."""

from typing import Any

from qa_jax import config
from qa_jax.models import attention
from qa_jax.models.encoders import bert
from qa_jax.training import optimizer
from qa_jax.training import parallel
from tests.chaos import inputs
from tests.common import tiny

# Every field → a value that it has somewhere.
FIELDS = {f'{group}.{name}': value
          for group, values in tiny.config().to_dict().items()
          if isinstance(values, dict)
          for name, value in values.items()} | {'seed': 3}
CHOICES = {
    'model.preset': bert.BertConfig.PRESETS,
    'model.attention': attention.ATTENTION,
    'precision.compute_dtype': config.COMPUTE_DTYPES,
    'optim.schedule': optimizer.SCHEDULES, 'parallel.mode': parallel.MODES}


def changes(draw: inputs.Draw) -> dict[str, Any]:
  """Returns field → value for one to four fields."""
  out = {}
  for _ in range(draw.randint(1, 4)):
    field = draw.choice([*FIELDS])
    bounds = [b for b in config.BOUNDS.get(field, ()) if b is not None]
    kind = draw.random()
    if kind < 0.4 and bounds:
      value = draw.choice(bounds) * draw.choice((1, 1, 2)) + draw.choice(
          (0, 1, -1, 0.5))
      value = int(value) if type(FIELDS[field]) is int else value
    elif kind < 0.4 and field in CHOICES:
      value = draw.choice([*CHOICES[field]])
    elif kind < 0.8:
      value = inputs.changed(draw, FIELDS[field], inputs.ODD)
    else:
      value = inputs.tree(draw, 1)
    if draw.random() < 0.05:
      field += draw.choice(('.', '.x', 's', inputs.text(draw, 4)))
    out[field] = value
  return out
