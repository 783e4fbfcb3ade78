"""Records encoders_golden.npz and encoders_configs.json, once.

  pip install transformers==5.24.0 torch
  python -m tests.golden.record_encoders

For each of MODELS, models for question answering of transformers with the
weights that `drawn.tensors` draws, there are the output of each layer, the
logits, the loss and, of each tensor, some values of the gradient and of the
weights after one update by torch's AdamW. The configs are those that
transformers writes.

Glossary of shapes: B batch, L length, N layers, D hidden size, T tensors.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers

from tests.common import drawn
from tests.common import parity
from tests.golden import losses

HERE = pathlib.Path(__file__).resolve().parent
SIZES = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2,
             num_attention_heads=2, intermediate_size=24)
FAIRSEQ = dict(max_position_embeddings=34, pad_token_id=1)
# Name → prefix of the classes in transformers, and fields of the config.
MODELS = {
    'bert': ('Bert', {'max_position_embeddings': 32}),
    'roberta': ('Roberta', FAIRSEQ | {'type_vocab_size': 1}),
    'electra': ('Electra', {'max_position_embeddings': 32,
                            'embedding_size': 6}),
    'albert': ('Albert', {'max_position_embeddings': 32,
                          'embedding_size': 6}),
    # Version 1, and a projection to the size that the embeddings have.
    'albert_gelu': ('Albert', {'max_position_embeddings': 32,
                               'embedding_size': 16, 'hidden_act': 'gelu'}),
    'mpnet': ('MPNet', FAIRSEQ | {'max_position_embeddings': 152}),
    # Other sizes than RoBERTa's, since the weights are drawn by their names.
    'xlm_roberta': ('XLMRoberta', FAIRSEQ | {
        'type_vocab_size': 1, 'intermediate_size': 28,
        'layer_norm_eps': 1e-5}),
    'camembert': ('Camembert', FAIRSEQ | {
        'type_vocab_size': 1, 'num_attention_heads': 4,
        'intermediate_size': 20, 'layer_norm_eps': 1e-5}),
    'distilbert': ('DistilBert', {
        'vocab_size': 60, 'dim': 16, 'n_layers': 2, 'n_heads': 2,
        'hidden_dim': 24, 'max_position_embeddings': 32})}


def record(name: str) -> tuple[dict[str, np.ndarray], dict]:
  """Returns the arrays of a model and its config.json."""
  prefix, fields = MODELS[name]
  net = getattr(transformers, f'{prefix}ForQuestionAnswering')(getattr(
      transformers, f'{prefix}Config')(
          **(fields if 'dim' in fields else SIZES | fields),
          attn_implementation='eager')).eval()
  named = dict(net.named_parameters())
  weights = drawn.tensors({k: tuple(v.shape) for k, v in named.items()})
  with torch.no_grad():
    for key, parameter in named.items():
      parameter.copy_(torch.tensor(weights[key]))
  batch = parity.inputs(name)
  more = {} if name in (*parity.FAIRSEQ, 'distilbert') else {
      'token_type_ids': torch.tensor(batch['token_type_ids'])}
  result = net(input_ids=torch.tensor(batch['token_ids']),
               attention_mask=torch.tensor(batch['attention_mask']),
               output_hidden_states=True, **more)
  loss = losses.loss_of(result, batch)
  loss.backward()
  tokens = parity.recorded_tokens(batch)
  out = {
      'layers': np.stack([h.detach().numpy()[tokens]
                          for h in result.hidden_states]),
      'logits': np.stack([x.detach().numpy() for x in (
          result.start_logits, result.end_logits)]),
      'loss': np.float32(loss.item()),
      'gradients': np.stack([
          parity.some(named[k].grad.numpy()) for k in sorted(named)]),
      'gradient_norms': np.array([
          float(named[k].grad.double().norm()) for k in sorted(named)])}
  torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
  decayed = transformers.Trainer.get_decay_parameter_names(None, net)
  torch.optim.AdamW([
      {'params': [v for k, v in named.items() if k in decayed]},
      {'params': [v for k, v in named.items() if k not in decayed],
       'weight_decay': 0.0}], lr=1e-3, weight_decay=0.01).step()
  out['updated'] = np.stack([
      parity.some(named[k].detach().numpy()) for k in sorted(named)])
  with tempfile.TemporaryDirectory() as directory:
    net.config.save_pretrained(directory)
    config = json.loads((pathlib.Path(directory) / 'config.json').read_text())
  return out, config | {
      'architectures': [f'{prefix}ForQuestionAnswering'],
      'tensors': {k: list(named[k].shape) for k in sorted(named)}}


def main() -> None:
  arrays, configs = {}, {}
  for name in MODELS:
    recorded, configs[name] = record(name)
    arrays |= {f'{name}_{key}': value for key, value in recorded.items()}
  np.savez_compressed(HERE / 'encoders_golden.npz', **arrays)
  (HERE / 'encoders_configs.json').write_text('{\n' + ',\n'.join(
      f'"{name}": {json.dumps(fields, sort_keys=True)}'
      for name, fields in configs.items()) + '\n}\n')


if __name__ == '__main__':
  main()
