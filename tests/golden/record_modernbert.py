"""Records tiny_modernbert/ and modernbert_golden.npz, once.

  pip install transformers==5.24.0 torch safetensors
  python -m tests.golden.record_modernbert

The checkpoint is a random ModernBertForQuestionAnswering in half precision with
global layers 0 and 2 and the local layer 1. The arrays are the output of each
layer, the logits, the loss, its gradients, and parameters after one update of
AdamW with a large epsilon, so that rounding of small gradients has no effect.
The tokenizer is learned from the texts of tests/common/scripts.py: a byte-level
BPE behind NFC, with the special tokens of BERT and added tokens of spaces.
There is a checksum of ids and offsets of each text, and the ids of a pair of
texts. Positions far apart are in `far`: the rotary angles at position 8,191.
"""

import json
import pathlib

import numpy as np
import tokenizers
import torch
import transformers

from tests.common import scripts

HERE = pathlib.Path(__file__).resolve().parent
PATH = HERE / 'tiny_modernbert'
SPECIAL = ['[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]']
VOCAB, LENGTH = 300, 40
MARKS = 'xlm_roberta'  # the kind in scripts whose marks are composed, too
RATE, DECAY, EPS = 1e-2, 0.1, 1e-3  # of AdamW
UPDATED = ('model.layers.1.', 'model.final_norm', 'head.', 'classifier.')


def learn_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
  """Learns a tokenizer like that of ModernBERT-base."""
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.normalizer = tokenizers.normalizers.NFC()
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=290, show_progress=False, initial_alphabet=alphabet))
  library.add_tokens([tokenizers.AddedToken(' ' * n, normalized=False)
                      for n in (3, 2)])
  library.add_special_tokens([
      *SPECIAL[:4], tokenizers.AddedToken('[MASK]', lstrip=True)])
  first, last = (library.token_to_id(t) for t in SPECIAL[1:3])
  library.post_processor = tokenizers.processors.TemplateProcessing(
      single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B:1 [SEP]:1',
      special_tokens=[('[CLS]', first), ('[SEP]', last)])
  return library


def record_tokenizer(texts: list[str]) -> dict[str, np.ndarray]:
  """Writes the tokenizer and returns its arrays."""
  PATH.mkdir(exist_ok=True)
  learn_tokenizer(texts).save(str(PATH / 'tokenizer.json'), pretty=False)
  (PATH / 'tokenizer_config.json').write_text(json.dumps({
      'model_max_length': 8192, 'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_input_names': ['input_ids', 'attention_mask'],
      **{f'{t[1:-1].lower()}_token': t for t in SPECIAL}}))
  fast = transformers.PreTrainedTokenizerFast.from_pretrained(str(PATH))
  rows = fast(texts, add_special_tokens=False, return_offsets_mapping=True)
  return {
      'checksums': np.array([
          scripts.checksum(MARKS, *row) for row in zip(
              texts, rows['input_ids'], rows['offset_mapping'], strict=True)],
                            np.uint32),
      'pair': np.array(fast(texts[0][:20], texts[12][:20])['input_ids'],
                       np.int32)}


def record_model(tokenizer: transformers.PreTrainedTokenizerFast
                 ) -> dict[str, np.ndarray]:
  """Writes the checkpoint and returns its arrays."""
  ids = {f'{role}_token_id': tokenizer.convert_tokens_to_ids(token)
         for role, token in (('pad', '[PAD]'), ('cls', '[CLS]'),
                             ('sep', '[SEP]'), ('bos', '[CLS]'),
                             ('eos', '[SEP]'))}
  net = transformers.ModernBertForQuestionAnswering(
      transformers.ModernBertConfig(
          vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3,
          num_attention_heads=2, intermediate_size=24, local_attention=8,
          global_attn_every_n_layers=2, attn_implementation='eager', **ids))
  rng = np.random.default_rng(0)
  length = np.array([LENGTH, 23])[:, None]
  inside = np.arange(LENGTH)[None] < length  # [B, L]
  tokens = np.where(inside, rng.integers(0, 290, inside.shape),
                    ids['pad_token_id'])
  start, end = np.array([7, 3]), np.array([11, 3])
  with torch.no_grad():
    for name, parameter in net.eval().named_parameters():
      parameter.normal_(1.0 if 'norm.weight' in name else 0.0, 0.3)
      parameter.copy_(parameter.half())  # they are stored in half precision
  result = net(input_ids=torch.tensor(tokens),
               attention_mask=torch.tensor(inside.astype(np.int64)),
               output_hidden_states=True)
  # The loss of transformers, but without padding, whose vectors are undefined.
  loss = sum(torch.nn.functional.cross_entropy(
      logits.masked_fill(torch.tensor(~inside), -1e9), torch.tensor(gold))
             for logits, gold in ((result.start_logits, start),
                                  (result.end_logits, end))) / 2
  loss.backward()
  parameters = dict(net.named_parameters())
  out = {f'gradient {k}': p.grad.numpy().copy() for k, p in parameters.items()}
  half = {k: p.detach().half() for k, p in parameters.items()}
  torch.optim.AdamW([
      {'params': [p for k, p in parameters.items() if decays == (
          'norm' not in k and not k.endswith('bias'))],
       'weight_decay': DECAY * decays} for decays in (False, True)],
                    lr=RATE, eps=EPS).step()
  out |= {f'updated {k}': p.detach().numpy().copy()
          for k, p in parameters.items() if k.startswith(UPDATED)}
  with torch.no_grad():
    for name, parameter in parameters.items():
      parameter.copy_(half[name])
  net.half().save_pretrained(PATH)
  (PATH / 'model.safetensors').chmod(0o644)
  return out | {
      'token_ids': tokens.astype(np.int32),
      'attention_mask': inside.astype(np.int32),
      'start_positions': start, 'end_positions': end,
      'loss': loss.detach().numpy(),
      'layers': torch.stack(result.hidden_states).detach().numpy(),
      'start': result.start_logits.detach().numpy(),
      'end': result.end_logits.detach().numpy(),
      'far': np.stack([angles(theta) for theta in (160_000.0, 10_000.0)])}


def angles(theta: float) -> np.ndarray:
  """Returns the cosines of a released encoder at position 8,191, [K / 2]."""
  config = transformers.ModernBertConfig(
      num_hidden_layers=1, rope_parameters={'full_attention': {
          'rope_type': 'default', 'rope_theta': theta}})
  rotary = transformers.models.modernbert.modeling_modernbert.\
      ModernBertRotaryEmbedding(config)
  cos, _ = rotary(torch.zeros(1), torch.tensor([[8191]]), 'full_attention')
  return cos[0, 0, :cos.shape[-1] // 2].numpy()


def main() -> None:
  torch.manual_seed(3)
  arrays = record_tokenizer(scripts.texts())
  arrays |= record_model(
      transformers.PreTrainedTokenizerFast.from_pretrained(str(PATH)))
  np.savez_compressed(HERE / 'modernbert_golden.npz', **arrays)


if __name__ == '__main__':
  main()
