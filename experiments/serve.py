r"""Answers questions over HTTP and serves a page for asking them.

  python -m experiments.serve --workdir=runs/squad
  curl -d '{"question": "Who …?", "context": "…"}' localhost:8000/answer

The paths are POST /answer and /spans, and GET /health, /metrics, /openapi.json
and / (the page). Concurrent questions are answered in one batch. The answers
equal those of experiments.predict, except that they are whole words
(decode.whole_words). Needs `pip install -e '.[serve]'`.
"""

import ipaddress
import pathlib
import time

from absl import flags

from experiments import cli
from qa_jax import errors

WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Run directory, checkpoint directory or hub id.')
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
PORT = flags.DEFINE_integer(
    'port', 8000, 'Port to listen on; 0: any free port.', lower_bound=0,
    upper_bound=65535)
# The defaults are those of service.Limits, which loads jax.
MAX_BATCH = flags.DEFINE_integer(
    'max_batch', 8, 'Windows in a batch of the model.',
    lower_bound=1)
MAX_WAITING = flags.DEFINE_integer(
    'max_waiting', 64, 'Most requests at a time; more get a 503.',
    lower_bound=1)
MAX_SECONDS = flags.DEFINE_float(
    'max_seconds', 30.0, 'Most seconds for a request; then it gets a 503.',
    lower_bound=0.001)
MAX_BYTES = flags.DEFINE_integer(
    'max_bytes', 262_144,
    'Most bytes of a request body; more get a 413.', lower_bound=1)
MAX_WINDOWS = flags.DEFINE_integer(
    'max_windows', 64, 'Most windows of a context; more get a 422.',
    lower_bound=1)


def main() -> None:
  from qa_jax.runtime import console
  from qa_jax.runtime import settings
  from qa_jax.serving import service

  try:
    from qa_jax.serving import server
  except ModuleNotFoundError as e:
    raise errors.UserError(
        f"{e.name} is not installed; pip install -e '.[serve]'") from None
  with server.bind_socket(HOST.value, PORT.value) as listener:
    settings.configure_process()
    # People read the answers.
    qa = cli.load_model(WORKDIR.value, whole_words=True)
    qa_service = service.Service(
        qa, service.Limits(
            batch=MAX_BATCH.value, waiting=MAX_WAITING.value,
            seconds=MAX_SECONDS.value, body_bytes=MAX_BYTES.value,
            windows=MAX_WINDOWS.value),
        name=pathlib.Path(WORKDIR.value).resolve().name)
    began = time.perf_counter()
    console.say('compiling the programs of all window lengths'
                f'{settings.cache_note()}')
    count = qa_service.qa.warm_up()
    address, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
      console.say(
          f'note: anyone who reaches {address} can ask questions; there is no '
          'password')
    host = f'[{address}]' if ':' in address else address
    seconds = time.perf_counter() - began
    server.listen(listener)  # before the line that tells people to connect
    console.say(f'compiled {count} programs in {seconds:.1f} s; '
                f'http://{host}:{port}/')
    server.serve(qa_service, listener)


if __name__ == '__main__':
  cli.run(main, model=True, required=('workdir',))
