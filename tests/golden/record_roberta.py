"""Records tiny_roberta/, tiny_xlm_roberta/ and roberta_golden.npz, once.

  pip install transformers==4.57.6 torch safetensors sentencepiece
  python -m tests.golden.record_roberta

As record_others.py, for encoders whose positions begin after padding: random
models for question answering of transformers. The tokenizers are learned from
the texts of tests/common/scripts.py. There is a checksum of ids and offsets of
each text, and the ids of a pair of texts.
"""

import json
import pathlib
import random

import numpy as np
import tokenizers
import torch
import transformers

from tests.common import scripts

HERE = pathlib.Path(__file__).resolve().parent
SPECIAL = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
TEXTS = 400  # of scripts.texts(), a few dozen of each script


def learn_bpe(texts: list[str]) -> tokenizers.Tokenizer:
  """Learns a tokenizer like that of roberta-base."""
  library = tokenizers.Tokenizer(tokenizers.models.BPE())
  library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False)
  library.decoder = tokenizers.decoders.ByteLevel()
  library.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=600, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  library.post_processor = tokenizers.processors.RobertaProcessing(
      ('</s>', 2), ('<s>', 0), add_prefix_space=False)
  return library


def make_unigram(texts: list[str]) -> tokenizers.Tokenizer:
  """Makes a tokenizer like those of XLM-R and CamemBERT."""
  rng = random.Random(4)
  letters = sorted({c for text in texts for c in text if c.isprintable()})
  words = ['\u2581' + w[:4] for group in scripts.words().values()
           for w in group[::3]]
  pieces = dict.fromkeys([*letters[:400], *letters[400::3], *words])
  library = tokenizers.Tokenizer(tokenizers.models.Unigram(
      [*((token, 0.0) for token in SPECIAL), ('\u2581', -4.0),
       *((piece, round(-5 - 5 * rng.random(), 3)) for piece in pieces)],
      SPECIAL.index('<unk>')))
  library.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Replace(
          tokenizers.Regex('[\u200b\xad\ufeff]'), ''),
      tokenizers.normalizers.NFKC(),
      tokenizers.normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')])
  library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.WhitespaceSplit(),
      tokenizers.pre_tokenizers.Metaspace()])
  library.decoder = tokenizers.decoders.Metaspace()
  library.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A </s>', pair='<s> $A </s> </s> $B </s>',
      special_tokens=[('<s>', 0), ('</s>', 2)])
  return library


def record(kind: str, library: tokenizers.Tokenizer, config: type,
           model: type, reader: type) -> dict[str, np.ndarray]:
  """Writes one checkpoint and returns its arrays."""
  path = HERE / f'tiny_{kind}'
  path.mkdir(exist_ok=True)
  library.save(str(path / 'tokenizer.json'), pretty=False)
  (path / 'tokenizer_config.json').write_text(json.dumps({
      'model_max_length': 40, 'tokenizer_class': reader.__name__}))
  fast = reader.from_pretrained(str(path))
  texts = scripts.texts()[:TEXTS]
  rows = fast(texts, add_special_tokens=False, return_offsets_mapping=True)
  out = {'checksums': np.array([scripts.checksum(kind, *row) for row in zip(
      texts, rows['input_ids'], rows['offset_mapping'], strict=True)],
                               np.uint32)}
  pair = fast(texts[0][:20], texts[12][:20])['input_ids']
  out['pair'] = np.array(pair, np.int32)
  net = model(config(
      vocab_size=len(fast) + 1, hidden_size=16, num_hidden_layers=2,
      num_attention_heads=2, intermediate_size=32, max_position_embeddings=42,
      type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0,
      eos_token_id=2))
  with torch.no_grad():
    for name, parameter in net.eval().named_parameters():
      parameter.normal_(
          1.0 if name.endswith('LayerNorm.weight') else 0.0, 0.2)
  net.half().save_pretrained(path)
  (path / 'model.safetensors').chmod(0o644)
  return out


def main() -> None:
  torch.manual_seed(2)
  texts = scripts.texts()
  arrays = {}
  for kind, library, config, model, reader in (
      ('roberta', learn_bpe(texts), transformers.RobertaConfig,
       transformers.RobertaForQuestionAnswering,
       transformers.RobertaTokenizerFast),
      ('xlm_roberta', make_unigram(texts), transformers.XLMRobertaConfig,
       transformers.XLMRobertaForQuestionAnswering,
       transformers.XLMRobertaTokenizerFast)):
    recorded = record(kind, library, config, model, reader)
    arrays |= {f'{kind}_{name}': value for name, value in recorded.items()}
  np.savez_compressed(HERE / 'roberta_golden.npz', **arrays)


if __name__ == '__main__':
  main()
