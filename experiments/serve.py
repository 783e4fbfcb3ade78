r"""Answers questions over HTTP, and serves a page to ask them on.

  python -m experiments.serve --workdir=runs/squad
  curl -d '{"question": "Who …?", "context": "…"}' localhost:8000/answer

POST /answer, POST /spans, GET /health, /metrics, /openapi.json, and / for
people. Questions that come together are answered in one batch, as
experiments.predict answers them. Needs `pip install qa_jax[serve]`.
"""

import dataclasses
import ipaddress
import time

from absl import flags

from experiments import cli
from qa_jax import errors
from qa_jax.inference import predict
from qa_jax.runtime import console
from qa_jax.runtime import settings
from qa_jax.serving import service

WORKDIR = flags.DEFINE_string('workdir', None, 'Run, checkpoint or hub id.')
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
PORT = flags.DEFINE_integer('port', 8000, '0: any that is free.',
                            lower_bound=0, upper_bound=65535)
CHECKPOINT = flags.DEFINE_string(
    'checkpoint', 'best', 'best, last or a step.')
MAX_BATCH = flags.DEFINE_integer(
    'max_batch', service.Limits.batch, 'Windows the model sees at a time.',
    lower_bound=1)
MAX_WAITING = flags.DEFINE_integer(
    'max_waiting', service.Limits.waiting, 'Requests inside; then 503.',
    lower_bound=1)
MAX_SECONDS = flags.DEFINE_float(
    'max_seconds', service.Limits.seconds, 'A request may take; then 503.',
    lower_bound=0.001)
MAX_BYTES = flags.DEFINE_integer(
    'max_bytes', service.Limits.body_bytes, 'Of a body; then 413.',
    lower_bound=1)
MAX_WINDOWS = flags.DEFINE_integer(
    'max_windows', service.Limits.windows, 'Of a context; then 422.',
    lower_bound=1)


def main() -> None:
  cli.required(workdir=WORKDIR.value)
  try:
    from qa_jax.serving import server
  except ModuleNotFoundError as e:
    raise errors.UserError(
        f'{e.name} is not installed; pip install "qa_jax[serve]"') from None
  with server.bind_socket(HOST.value, PORT.value) as found:
    settings.configure_process()
    house = service.Service(
        predict.load(WORKDIR.value, checkpoint=CHECKPOINT.value),
        dataclasses.replace(
            service.Limits(), batch=MAX_BATCH.value,
            waiting=MAX_WAITING.value, seconds=MAX_SECONDS.value,
            body_bytes=MAX_BYTES.value, windows=MAX_WINDOWS.value))
    began = time.perf_counter()
    count = house.warm_up()
    address, port = found.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
      console.say(
          f'note: whoever reaches {address} may ask; there is no password')
    host = f'[{address}]' if ':' in address else address
    console.say(f'{count} programs in {time.perf_counter() - began:.1f} s; '
                f'http://{host}:{port}/')
    server.serve(house, found)


if __name__ == '__main__':
  cli.run(main)
