"""The peer's worker: python peer_worker.py SUITE THREADS.

Reads {"call": …, "arguments": {…}} lines on stdin and answers each with one
line on stdout. Nothing of qa_jax is imported, so the two sides can disagree.
"""

import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import warnings

SUITES = {'train': 'peer_train', 'forward': 'peer_forward',
          'search': 'peer_search', 'features': 'peer_features',
          'evaluate': 'peer_evaluate', 'input': 'peer_input'}
# The folder of torch_squad.py. Last, because its other modules are qa_jax's.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
PACKAGES = ('torch', 'transformers', 'tokenizers', 'numpy', 'onnxruntime')


def versions():
  packages = {}
  for name in PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return packages


def main(suite, threads):
  replies = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)  # output of libraries is not an answer

  def reply(**message):
    replies.write(json.dumps(message) + '\n')
    replies.flush()

  if sys.platform == 'linux':  # as our side does
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  warnings.simplefilter('ignore')
  try:
    import torch
    import transformers
    calls = importlib.import_module(SUITES[suite]).calls()
  except ImportError as e:
    reply(missing=str(e))
    return
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  reply(about={'packages': versions()})
  for line in sys.stdin:
    request = json.loads(line)
    try:
      reply(result=calls[request['call']](**request['arguments']))
    except Exception as e:  # reported to the main process, which decides
      reply(error=f'{request["call"]}: {type(e).__name__}: {e}'[:2000])


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]))
