"""Records tiny_distilbert/ and tiny_electra/, once.

  pip install -r requirements-peers.txt
  python tests/golden/record_others.py

Both are random models for question answering of transformers.
"""

import pathlib

import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
  torch.manual_seed(1)
  common = dict(vocab_size=40, max_position_embeddings=24)
  models = {
      'distilbert': transformers.DistilBertForQuestionAnswering(
          transformers.DistilBertConfig(
              dim=16, n_layers=2, n_heads=2, hidden_dim=32, **common)),
      'electra': transformers.ElectraForQuestionAnswering(
          transformers.ElectraConfig(
              hidden_size=16, embedding_size=16, num_hidden_layers=2,
              num_attention_heads=2, intermediate_size=32, **common))}
  for name, model in models.items():
    with torch.no_grad():
      for path, parameter in model.eval().named_parameters():
        is_scale = path.endswith(('LayerNorm.weight', 'layer_norm.weight'))
        parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    model.save_pretrained(HERE / f'tiny_{name}')
    (HERE / f'tiny_{name}' / 'model.safetensors').chmod(0o644)


if __name__ == '__main__':
  main()
