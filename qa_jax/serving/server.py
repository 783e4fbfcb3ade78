"""The HTTP server: JSON requests, one page, metrics and a clean shutdown.

Reading, waiting and answering of a request share one time limit and one limit
on the number of requests.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
import contextlib
import errno
import functools
import json
import signal
import socket
import time
from typing import Any

import markupsafe
import prometheus_client
from prometheus_client import exposition
from starlette import applications
from starlette import exceptions
from starlette import requests
from starlette import responses
from starlette import routing
import uvicorn

from qa_jax import errors
from qa_jax.serving import batching
from qa_jax.serving import inspect_page
from qa_jax.serving import service as service_lib
from qa_jax.serving import timeouts
from qa_jax.serving.service import Question
from qa_jax.serving.service import RefusedError

HEADERS = {'X-Content-Type-Options': 'nosniff', 'Cache-Control': 'no-store',
           'Referrer-Policy': 'no-referrer'}
Handler = Callable[[Question], Awaitable[dict[str, Any]]]


class Metrics:
  """The Prometheus metrics of /metrics, in a separate registry."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    base = dict(namespace='qa_jax', registry=self.registry)
    self.requests = prometheus_client.Counter(
        'requests', 'Requests by path and status.', ['path', 'status'], **base)
    self.seconds = prometheus_client.Histogram(
        'request_seconds', 'Seconds from the headers to the answer.',
        ['path'], **base)
    self.batch = prometheus_client.Histogram(
        'batch_questions', 'Questions in a batch of the model.',
        buckets=(1, 2, 4, 8, 16, 32, 64), **base)
    self.inside = prometheus_client.Gauge(
        'requests_inside', 'Requests being read, waiting or answered.', **base)


def make_app(service: service_lib.Service,
             metrics: Metrics) -> applications.Starlette:
  """Returns the application; it runs batches during its lifespan."""
  html, policy = ask_page(service)
  openapi, = inspect_page.read_sources('openapi.json')
  metrics.inside.set_function(lambda: service.inside)
  service.batcher.observe = metrics.batch.observe

  @contextlib.asynccontextmanager
  async def lifespan(_: applications.Starlette) -> AsyncIterator[None]:
    drain = asyncio.create_task(service.batcher.drain())
    try:
      yield
    finally:
      drain.cancel()
      service.batcher.close()

  async def index(_: requests.Request) -> responses.Response:
    return responses.HTMLResponse(
        html, headers={**HEADERS, 'Content-Security-Policy': policy})

  async def health(_: requests.Request) -> responses.Response:
    return _json(200, {'status': 'ok', 'model': service.name,
                       'head': service.qa.config.model.head,
                       'waiting': service.inside})

  async def api(_: requests.Request) -> responses.Response:
    return responses.Response(openapi, media_type='application/json',
                              headers=HEADERS)

  async def numbers(_: requests.Request) -> responses.Response:
    return responses.Response(
        exposition.generate_latest(metrics.registry),
        headers={**HEADERS, 'Content-Type': exposition.CONTENT_TYPE_LATEST})

  return applications.Starlette(
      routes=[
          routing.Route('/', index), routing.Route('/health', health),
          routing.Route('/metrics', numbers),
          routing.Route('/openapi.json', api),
          *(routing.Route(path, _endpoint(service, metrics, path, handler),
                          methods=['POST'])
            for path, handler in (('/answer', service.answer),
                                  ('/spans', service.spans)))],
      exception_handlers={exceptions.HTTPException: _http_error},
      lifespan=lifespan)


def _endpoint(service: service_lib.Service, metrics: Metrics, path: str,
              handler: Handler) -> Callable[..., Awaitable[Any]]:
  async def endpoint(request: requests.Request) -> responses.Response:
    began = time.perf_counter()
    response = await _respond(service, handler, request)
    metrics.requests.labels(path, str(response.status_code)).inc()
    metrics.seconds.labels(path).observe(time.perf_counter() - began)
    return response
  return endpoint


async def _respond(service: service_lib.Service, handler: Handler,
                   request: requests.Request) -> responses.Response:
  limits = service.limits
  try:
    if service.inside >= limits.waiting:
      raise RefusedError(503, f'{limits.waiting} requests are waiting already; '
                         'try again later')
    service.inside += 1
    try:
      async with asyncio.timeout(limits.seconds):
        question = service.parse(await _read_body(request, limits.body_bytes))
        return _json(200, await handler(question))
    finally:
      service.inside -= 1
  except RefusedError as e:
    return _error(e.status, str(e))
  except TimeoutError:
    return _error(503, f'no answer within {limits.seconds:g} seconds; try '
                  'again later')
  except batching.ModelError:
    return _error(503, 'the model failed on this question; see the log')
  except requests.ClientDisconnect:
    return _error(422, 'the body is incomplete: the client disconnected')


async def _read_body(request: requests.Request, most: int) -> bytes:
  refused = RefusedError(413, f'the body exceeds {most} bytes')
  length = request.headers.get('content-length', '')
  if length.isdecimal() and int(length[:20]) > most:
    raise refused
  body = b''
  async for part in request.stream():
    body += part
    if len(body) > most:
      raise refused
  return body


def _json(status: int, value: Mapping[str, Any],
          headers: Mapping[str, str] = {}) -> responses.Response:
  try:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  except ValueError:
    raise RefusedError(
        503, 'the model gave a score that is not finite') from None
  return responses.Response(text + '\n', status, {**HEADERS, **headers},
                            'application/json')


def _error(status: int, message: str,
           headers: Mapping[str, str] | None = None) -> responses.Response:
  retry = {'Retry-After': '1'} if status == 503 else {}
  return _json(status, {'error': ' '.join(message.split())},
               {**retry, **(headers or {})})


async def _http_error(_: requests.Request, e: Exception) -> responses.Response:
  """Returns the one-line error for an unknown path or a wrong method."""
  assert isinstance(e, exceptions.HTTPException)
  return _error(e.status_code, e.detail, e.headers)


def ask_page(service: service_lib.Service) -> tuple[str, str]:
  """Returns the HTML page at /, and a policy for its script and style only."""
  decode = service.qa.config.decode
  style, script = inspect_page.read_sources('ask.css', 'ask.js')
  html = inspect_page.load_template('ask.html').render(
      style=markupsafe.Markup(style), script=markupsafe.Markup(script),
      shades=' '.join(inspect_page.SHADES), name=service.name,
      head=service.qa.config.model.head, null_rule=decode.null_rule)
  return html, '; '.join((
      "default-src 'none'", f"style-src '{inspect_page.content_hash(style)}'",
      f"script-src '{inspect_page.content_hash(script)}'", "connect-src 'self'",
      "img-src data:",  # the empty icon of the page
      "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"))


def bind_socket(host: str, port: int) -> socket.socket:
  """Returns a bound socket that does not listen yet; port 0: any free port.

  A UserError names a port in use or a privileged one, or an unknown host.
  """
  try:
    family, kind, proto, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, proto)
  except (OSError, UnicodeError) as e:  # UnicodeError: no name of a host
    raise errors.UserError(
        f'--host={host}: {errors.host_reason(e)}') from None
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as e:
    listener.close()
    raise errors.UserError(_bind_error(e, host, port)) from None
  return listener


def _bind_error(e: OSError, host: str, port: int) -> str:
  if e.errno == errno.EADDRINUSE:
    return (f'--port={port}: another process listens there; choose another, '
            'or 0 for any that is free')
  if e.errno == errno.EACCES:
    return f'--port={port} needs privileges; choose one from 1024 on'
  return f'--host={host} --port={port}: {e.strerror}'


def uvicorn_server(service: service_lib.Service) -> uvicorn.Server:
  """Returns the uvicorn server of the service."""
  return uvicorn.Server(uvicorn.Config(
      make_app(service, Metrics()), log_level='warning', access_log=False,
      http=functools.partial(
          timeouts.DeadlineConnection, seconds=service.limits.seconds),
      server_header=False, lifespan='on',
      timeout_graceful_shutdown=int(service.limits.seconds) + 1))


def listen(listener: socket.socket) -> None:
  """Lets clients connect; they are answered once `serve` runs.

  A UserError is raised if another process listens on the port meanwhile.
  """
  host, port = listener.getsockname()[:2]
  try:
    listener.listen(128)
  except OSError as e:
    raise errors.UserError(_bind_error(e, host, port)) from None


def serve(service: service_lib.Service, listener: socket.socket) -> None:
  """Serves until SIGTERM or SIGINT, and then finishes the open requests.

  A UserError is raised as by `listen`.
  """
  listen(listener)
  # uvicorn raises the signal again after its shutdown. An empty handler lets
  # the process end with exit code 0.
  signal.signal(signal.SIGTERM, lambda *_: None)
  uvicorn_server(service).run(sockets=[listener])
