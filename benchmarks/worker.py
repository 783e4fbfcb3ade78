"""The worker of qa_jax: `python -m benchmarks.worker SUITE THREADS`.

Reads {"call": …, "arguments": {…}} lines on stdin and answers each with one
line on stdout. Output of libraries goes to stderr.
"""

import json
import os
import sys

from benchmarks import cores
from qa_jax import errors


def serve(suite: str, threads: int) -> None:
  """Answers calls until stdin ends."""
  replies = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)
  cores.limit(threads)
  import jax  # jax counts the cores when it is imported

  from benchmarks import suites
  from qa_jax.checkpoints import run_record
  calls = suites.SIDES[suite]().calls()

  def reply(**message: object) -> None:
    replies.write(json.dumps(message) + '\n')
    replies.flush()

  reply(about=run_record.run_record(
      seed=0, argv=[], devices=jax.devices(), hashes={}))
  for line in sys.stdin:
    request = json.loads(line)
    try:
      reply(result=calls[request['call']](**request['arguments']))
    except errors.UserError as e:
      reply(user_error=str(e))
    except Exception as e:  # reported to the main process, which decides
      reply(error=f'{request["call"]}: {type(e).__name__}: {e}'[:2000])


if __name__ == '__main__':
  serve(sys.argv[1], int(sys.argv[2]))
