"""Records tokenizers_golden.npz, once.

  pip install transformers==4.57.6
  python -m tests.golden.record_tokenizers

The file has a checksum of the ids and offsets that transformers computes for
each text of tests/common/scripts.py, with each kind of tokenizer there.
"""

import pathlib
import tempfile

import numpy as np
import transformers

from tests.common import scripts

HERE = pathlib.Path(__file__).resolve().parent


def main() -> None:
  texts, arrays = scripts.texts(), {}
  with tempfile.TemporaryDirectory() as root:
    for kind, directory in scripts.write_checkpoints(
        pathlib.Path(root)).items():
      reader = (transformers.PreTrainedTokenizerFast if kind == 'sequence'
                else transformers.BertTokenizerFast)
      rows = reader.from_pretrained(str(directory))(
          texts, add_special_tokens=False, return_offsets_mapping=True)
      arrays[kind] = np.array([
          scripts.checksum(kind, *row) for row in zip(
              texts, rows['input_ids'], rows['offset_mapping'], strict=True)],
          np.uint32)
      ids = np.concatenate(rows['input_ids'])
      print(kind, len(ids), 'tokens,', (ids == 1).sum(), 'unknown')
  np.savez_compressed(HERE / 'tokenizers_golden.npz', **arrays)


if __name__ == '__main__':
  main()
