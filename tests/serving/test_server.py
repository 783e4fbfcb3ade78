"""Tests of the server: answers, limits and errors, without a status 500."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import types

import httpx2
import jsonschema
from prometheus_client import parser
import pytest
from starlette import testclient

from experiments import cli
from qa_jax import errors
from qa_jax import input_pipeline
from qa_jax.data.examples import Example
from qa_jax.inference import decode
from qa_jax.inference import predict
from qa_jax.inference import span_view
from qa_jax.metrics import calibration
from qa_jax.serving import batching
from qa_jax.serving import server
from qa_jax.serving import service as service_lib
from tests.common import commands
from tests.common.random_model import CONTEXT
from tests.common.random_model import QUESTION
from tests.common.random_model import random_qa
from tests.common.random_model import write_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMITS = service_lib.Limits(
    body_bytes=4000, question_characters=100, context_characters=2000,
    windows=3, waiting=20, seconds=60, batch=4)
BODY = {'question': QUESTION, 'context': CONTEXT}


def make(limits=LIMITS, run=None):
  """Returns (service, app) of an untrained model, or of the function `run`."""
  service = service_lib.Service(random_qa('independent'), limits)
  if run:
    service.batcher = batching.Batcher(run, max_batch=limits.batch)
  return service, server.make_app(service, server.Metrics())


def talk(app, conversation):
  """Runs `conversation(client)` on the app's own event loop."""
  async def main():
    async with (app.router.lifespan_context(app), httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app), base_url='http://x') as client):
      return await conversation(client)
  return asyncio.run(main())


@pytest.fixture
def client():
  with testclient.TestClient(make()[1]) as client:
    yield client


def error_of(response, status: int) -> str:
  """Returns the message of a refusal, which must be one line."""
  assert response.status_code == status, response.text
  assert list(response.json()) == ['error'] and response.text.count('\n') == 1
  assert '\n' not in response.json()['error']
  return response.json()['error']


def test_a_question_whose_client_has_left_is_in_no_batch():
  async def converse():
    batches, sizes = [], []
    batcher = batching.Batcher(lambda rows: batches.append(rows) or rows,
                               max_batch=2)
    batcher.observe = sizes.append
    asked = asyncio.create_task(batcher.ask('left'))
    await asyncio.sleep(0)
    asked.cancel()
    drain = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0.01)
    assert await batcher.ask('stays') == 'stays'
    drain.cancel()
    batcher.close()
    return batches, sizes
  assert asyncio.run(converse()) == ([['stays']], [1])


def test_answer_equals_that_of_predict(client):
  qa = random_qa('independent')
  expected = qa.answer(**BODY)
  response = client.post('/answer', json=BODY).json()
  assert response['text'] == expected.text != ''
  assert [c['text'] for c in response['n_best']] == [
      c['text'] for c in expected.n_best]
  assert response['score'] == pytest.approx(expected.score, abs=1e-5)
  assert response['null_score'] == pytest.approx(expected.null_score, abs=1e-5)
  few = client.post('/answer', json={**BODY, 'n_best': 2}).json()
  assert few['n_best'] == response['n_best'][:2]


def test_probabilities_of_a_calibrated_run_are_those_of_predict():
  """Uses null threshold 9 and calibration temperature 0.3."""
  qa = dataclasses.replace(
      random_qa('independent', null_rule='min_null', null_threshold=9.0),
      calibration=calibration.Calibration(9.0, 0.3, '', '', 9, 0, {}))
  expected = qa.answer(**BODY)
  assert expected.probability != pytest.approx(dataclasses.replace(
      qa, calibration=None).answer(**BODY).probability, rel=0.1)
  app = server.make_app(service_lib.Service(qa, LIMITS), server.Metrics())
  with testclient.TestClient(app) as client:
    response = client.post('/answer', json=BODY).json()
  assert response['text'] == expected.text != ''
  for name in ('probability', 'null_probability'):
    assert response[name] == pytest.approx(getattr(expected, name), rel=1e-5)
  assert [c['probability'] for c in response['n_best']] == pytest.approx(
      [c['probability'] for c in expected.n_best], rel=1e-5)


def test_concurrent_requests_share_batches_and_answer_as_predict():
  service, app = make()
  sizes = []
  contexts = [CONTEXT[n:] * (1 + n % 3) for n in range(11)]
  async def conversation(client):
    service.batcher.observe = sizes.append
    return await asyncio.gather(*(
        client.post('/answer', json={'question': f'Who {n}?', 'context': c})
        for n, c in enumerate(contexts)))
  responses = talk(app, conversation)
  assert sum(sizes) == 11 and 1 < max(sizes) <= LIMITS.batch
  expected = random_qa('independent').answer_batch(
      [{'question': f'Who {n}?', 'context': c}
       for n, c in enumerate(contexts)])
  for response, answer in zip(responses, expected, strict=True):
    fields = response.json()
    assert (fields['text'], fields['start'], fields['end']) == (
        answer.text, answer.start, answer.end)
    assert fields['score'] == pytest.approx(answer.score, abs=1e-5)


def test_spans_are_the_band_over_the_tokens_of_the_context(client):
  view = random_qa('independent').spans(QUESTION, CONTEXT)
  response = client.post('/spans', json=BODY).json()
  first = int(view.context_mask.argmax())
  assert ''.join(CONTEXT[a:b] for a, b in response['offsets']) == re.sub(
      r'\s', '', CONTEXT)
  for i, row in enumerate(response['band']):
    for d, score in enumerate(row):
      expected = view.band[first + i, d]
      assert score == (pytest.approx(float(expected), abs=1e-3)
                       if expected > -1e30 else None)


def test_after_the_warm_up_no_request_compiles():
  service, app = make()
  assert service.qa.warm_up() == 3 + 1  # 1, 2 or 4 windows; and the spans
  programs = (decode.build_program(service.qa.model, service.qa.config.decode),
              span_view._compiled(service.qa.model,
                                  service.qa.config.decode.max_answer_length))
  before = [program._cache_size() for program in programs]
  misses = decode._compiled.cache_info().misses
  with testclient.TestClient(app) as client:
    for n in (1, 12, 60, 110):
      response = client.post('/answer', json={**BODY, 'context': 'Mira ' * n})
      assert response.status_code == 200
    assert client.post('/spans', json=BODY).status_code == 200
  assert [program._cache_size() for program in programs] == before
  assert decode._compiled.cache_info().misses == misses


# --- refusals


@pytest.mark.parametrize(('body', 'message'), [
    (b'', 'not JSON'), (b'{"question": "a"', 'not JSON'),
    (b'[]', 'JSON object'),
    (b'\xff{}', 'not UTF-8 at byte 0'), (b'[' * 3000, 'out of bounds'),
    (b'{"question": ' + b'9' * 3900, 'JSON'),
    (b'null', 'JSON object'), (b'{}', "body has no 'question'"),
    (b'{"question": "a"}', "body has no 'context'"),
    (b'{"question": 3, "context": "a"}', 'question is int'),
    (b'{"question": "a", "context": "\\ud800"}', 'lone surrogate U\\+D800'),
    (b'{"question": "a", "context": "b", "n_bst": 1}', "mean 'n_best'"),
    *((f'{{"question": "a", "context": "b", "n_best": {n}}}'.encode(),
       r'expected an integer in 1 … 6')
      for n in ('0', '7', '-1', 'true', '1.0', '"2"', 'null', 'NaN', '[]',
                '1e999')),
    (json.dumps({'question': 'a' * 101, 'context': 'b'}).encode(),
     'question has 101 characters; at most 100'),
    (json.dumps({'question': 'a', 'context': 'b' * 2001}).encode(),
     'context has 2001 characters; at most 2000'),
    (json.dumps({'question': 'a', 'context': 'b ' * 900}).encode(),
     r'needs \d+ windows of 64 tokens; at most 3')])
def test_a_bad_body_is_422_and_one_line(client, body, message):
  assert re.search(message, error_of(client.post('/answer', content=body), 422))


def test_spans_of_a_long_context_are_those_of_the_window_with_the_best(client):
  body = {'question': QUESTION, 'context': 'Oslo built it. ' * 20 + CONTEXT}
  answer = client.post('/answer', json=body).json()
  spans = client.post('/spans', json=body).json()
  assert spans['windows'] > 1
  assert answer['start'] in [begin for begin, _ in spans['offsets']]
  assert answer['score'] == pytest.approx(max(
      x for row in spans['band'] for x in row if x is not None), abs=1e-3)
  assert 'at most 3' in error_of(client.post(
      '/spans', json={'question': 'a', 'context': 'b ' * 900}), 422)


@pytest.mark.parametrize('with_length', [True, False])
def test_a_body_too_large_is_413_with_or_without_content_length(
    client, with_length):
  body = b'x' * 4001
  content = body if with_length else iter([body[:2000], body[2000:]])
  assert '4000 bytes' in error_of(client.post('/answer', content=content), 413)


@pytest.mark.parametrize(('method', 'path', 'status'), [
    ('GET', '/answer', 405), ('DELETE', '/', 405), ('GET', '/nowhere', 404),
    ('GET', '/../etc/passwd', 404)])
def test_other_paths_and_methods_are_one_line_too(client, method, path, status):
  error_of(client.request(method, path), status)


def test_questions_without_an_answer_are_no_error(client):
  for question, context in (('', 'Mira'), ('Who?', ''), ('\0', ' \n')):
    response = client.post('/answer', json={
        'question': question, 'context': context})
    assert response.status_code == 200
    assert (response.json()['text'] == '') == (not context.strip())
  assert client.post('/spans', json={
      'question': '', 'context': ''}).json()['tokens'] == []


# --- overload and failure


def plain(row):
  return random_qa('independent').answer(**row)


def test_more_than_may_wait_is_503_at_once_and_the_rest_is_answered():
  free = threading.Event()
  def run(rows):
    free.wait(30)
    return [plain(row) for row in rows]
  service, app = make(dataclasses.replace(LIMITS, waiting=2), run)
  async def conversation(client):
    first = [asyncio.create_task(client.post('/answer', json=BODY))
             for _ in range(2)]
    while service.inside < 2:
      await asyncio.sleep(0.01)
    late = await client.post('/answer', json=BODY)
    health = (await client.get('/health')).json()
    free.set()
    return late, health, await asyncio.gather(*first)
  late, health, first = talk(app, conversation)
  assert '2 requests are waiting already' in error_of(late, 503)
  assert late.headers['retry-after'] == '1' and health['waiting'] == 2
  assert [r.status_code for r in first] == [200, 200]
  assert service.inside == 0


def test_too_slow_is_503_and_the_next_question_is_answered():
  free = threading.Event()
  def run(rows):
    free.wait(30)
    return [plain(row) for row in rows]
  random_qa('independent').answer(**BODY)
  service, app = make(dataclasses.replace(LIMITS, seconds=0.5), run)
  async def conversation(client):
    slow = await client.post('/answer', json=BODY)
    free.set()
    service.limits = LIMITS
    return slow, await client.post('/answer', json=BODY)
  slow, after = talk(app, conversation)
  assert 'no answer within 0.5 seconds' in error_of(slow, 503)
  assert after.status_code == 200 and service.inside == 0


class Panic(BaseException):
  """An exception like a panic of the tokenizer, which is no Exception."""


def test_a_question_that_breaks_the_model_fails_alone(capsys):
  def run(rows):
    if any('poison' in row['question'] for row in rows):
      raise Panic('two\nlines')
    return [plain(row) for row in rows]
  _, app = make(run=run)
  async def conversation(client):
    return await asyncio.gather(*(
        client.post('/answer', json={**BODY, 'question': q})
        for q in ('a', 'b', 'poison', 'c', 'd')))
  responses = talk(app, conversation)
  assert [r.status_code for r in responses] == [200, 200, 503, 200, 200]
  assert 'see the log' in error_of(responses[2], 503)
  assert 'error: Panic: two lines' in capsys.readouterr().err


def test_a_score_that_is_not_finite_is_503():
  _, app = make(run=lambda rows: [dataclasses.replace(
      plain(row), null_score=float('nan')) for row in rows])
  with testclient.TestClient(app) as client:
    assert 'not finite' in error_of(client.post('/answer', json=BODY), 503)


# --- metrics, OpenAPI and page


def test_responses_follow_openapi_json(client):
  document = client.get('/openapi.json').json()
  routes = {route.path: set(route.methods) - {'HEAD'}
            for route in client.app.routes}
  assert {path: {m.upper() for m in methods}
          for path, methods in document['paths'].items()} == routes
  def check(path, method, response):
    operation = document['paths'][path][method]['responses'][
        str(response.status_code)]
    if '$ref' in operation:
      operation = document['components']['responses'][
          operation['$ref'].split('/')[-1]]
    kind = response.headers['content-type'].split(';')[0]
    schema = operation['content'][kind]['schema']
    if kind == 'application/json':
      jsonschema.validate(response.json(), {
          **schema, 'components': document['components']})
  for path in ('/health', '/metrics', '/openapi.json', '/'):
    check(path, 'get', client.get(path))
  for path in ('/answer', '/spans'):
    for body in (BODY, {**BODY, 'n_best': 1}, {'question': 'a'},
                 {**BODY, 'context': ''}, {**BODY, 'context': 'x' * 5000}):
      check(path, 'post', client.post(path, json=body))
  jsonschema.validate(BODY, document['components']['schemas']['Question'])


def test_metrics_count_requests_and_batches(client):
  client.post('/answer', json=BODY)
  client.post('/answer', json=BODY)
  client.post('/answer', content=b'x')
  values = {(s.name, *sorted(s.labels.values())): s.value
            for family in parser.text_string_to_metric_families(
                client.get('/metrics').text) for s in family.samples}
  assert values['qa_jax_requests_total', '/answer', '200'] == 2
  assert values['qa_jax_requests_total', '/answer', '422'] == 1
  assert values['qa_jax_request_seconds_count', '/answer'] == 3
  assert values['qa_jax_batch_questions_count',] == 2
  assert values['qa_jax_requests_inside',] == 0


def test_the_page_asks_for_nothing_from_elsewhere(client):
  response = client.get('/')
  policy = response.headers['content-security-policy']
  assert "default-src 'none'" in policy and 'unsafe' not in policy
  for word in ('innerHTML', 'insertAdjacent', 'document.write', 'eval(',
               'outerHTML', 'onclick', 'style='):
    assert word not in response.text
  urls = re.findall(r'(?:https?:)?//[^\s\'"]+', re.sub(
      r'\s// .*', '', response.text))
  assert urls == ['http://www.w3.org/2000/svg']


# --- the process


def test_a_port_in_use_is_one_line_before_anything_is_loaded():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert f'--port={port}: another process listens there' in (
        commands.refusal('serve', '--workdir=nowhere', f'--port={port}'))


@pytest.mark.parametrize(('error', 'message'), [
    (PermissionError(13, 'Permission denied'), '--port=80 needs privileges'),
    (OSError(99, 'Cannot assign'), '--host=h --port=80: Cannot assign')])
def test_a_port_that_is_not_ours_is_one_line(monkeypatch, error, message):
  def bind(*_):
    raise error
  monkeypatch.setattr(socket.socket, 'bind', bind)
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: [
      (socket.AF_INET, socket.SOCK_STREAM, 0, '', ('127.0.0.1', 80))])
  with pytest.raises(errors.UserError, match=message):
    server.bind_socket('h', 80)


def test_an_unknown_host_is_one_line(monkeypatch):
  def lookup(*_, **__):
    raise socket.gaierror(-2, 'Name or service not known')
  monkeypatch.setattr(socket, 'getaddrinfo', lookup)
  with pytest.raises(errors.UserError, match='--host=h: Name or service'):
    server.bind_socket('h', 80)


@pytest.mark.parametrize(('address', 'said'), [
    ('127.0.0.1', False), ('::1', False), ('0.0.0.0', True)])
def test_an_address_that_others_reach_is_told(monkeypatch, address, said):
  listener = types.SimpleNamespace(getsockname=lambda: (address, 80))
  monkeypatch.setattr(server, 'bind_socket',
                      lambda *_: contextlib.nullcontext(listener))
  for name in ('listen', 'serve'):
    monkeypatch.setattr(server, name, lambda *_: None)
  monkeypatch.setattr(cli, 'load_model',
                      lambda *_, **__: random_qa('independent'))
  monkeypatch.setattr(predict.QA, 'warm_up', lambda self: 1)
  result = commands.command('serve', '--workdir=x')
  assert result.code == 0 and ':80/\n' in result.err
  assert (f'anyone who reaches {address} can ask' in result.err) == said


def test_a_request_at_every_limit_is_answered():
  body = json.dumps(BODY).encode()
  exact = {'question_characters': len(QUESTION), 'windows': 1,
           'context_characters': len(CONTEXT), 'body_bytes': len(body)}
  for lowered in ('', *exact):
    limits = dataclasses.replace(LIMITS, **{
        name: value - (name == lowered) for name, value in exact.items()})
    with testclient.TestClient(make(limits)[1]) as client:
      status = client.post('/answer', content=body).status_code
    assert status == (200 if not lowered else
                      413 if lowered == 'body_bytes' else 422), lowered


@pytest.mark.parametrize('host', ['a..b', 'a' * 70])
def test_a_text_that_names_no_host_is_one_line(host):
  with pytest.raises(errors.UserError, match=f'--host={host}: .*label'):
    server.bind_socket(host, 0)


@pytest.mark.parametrize(('argv', 'code', 'message'), [
    ([], 1, '--workdir is needed'),
    (['--port=65536', '--workdir=x'], 2, 'port'),
    (['--max_batch=0', '--workdir=x'], 2, 'max_batch'),
    (['--workdir=/nowhere/x', '--port=0'], 1, 'not a directory')])
def test_a_bad_flag_is_one_line(argv, code, message):
  assert message in commands.refusal('serve', *argv, code=code)


def test_sigterm_finishes_open_requests_and_exits_with_0(tmp_path):
  directory = write_run(random_qa('independent'), tmp_path / 'run')
  with subprocess.Popen(
      [sys.executable, '-m', 'experiments.serve', f'--workdir={directory}',
       '--port=0', '--max_batch=1'], cwd=ROOT, stderr=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True) as process:
    try:
      lines = []
      while not (lines and 'http://' in lines[-1]):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
      url = re.search(r'http://\S+?(?=/\n)', lines[-1])[0]
      with concurrent.futures.ThreadPoolExecutor() as pool:
        requests = [pool.submit(httpx2.post, f'{url}/answer', json=BODY,
                             timeout=60) for _ in range(4)]
        assert requests[0].result().status_code == 200
        process.send_signal(signal.SIGTERM)
      # Requests with a connection are answered, and none is cut off.
      for request in requests:
        if not request.exception():
          assert request.result().status_code == 200
      out, err = process.communicate(timeout=60)
      assert (process.returncode, out, err) == (0, '', '')
    finally:
      process.kill()


def test_a_connection_with_slow_headers_is_closed():
  """The second request of a connection has the deadline, too.

  Other connections are served meanwhile.
  """
  async def conversation():
    running = server.uvicorn_server(service_lib.Service(
        random_qa('independent'), dataclasses.replace(LIMITS, seconds=0.5)))
    with server.bind_socket('127.0.0.1', 0) as listener:
      listener.listen(8)
      serving = asyncio.create_task(running.serve(sockets=[listener]))
      open_one = lambda: asyncio.open_connection(*listener.getsockname())
      health = b'GET /health HTTP/1.1\r\nHost: a\r\n\r\n'

      async def response_to(first):
        reader, writer = await open_one()
        writer.write(first)
        # Reads until the server closes the connection.
        text = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return text
      silent, slow, second = await asyncio.gather(
          response_to(b''), response_to(health[:9]),
          response_to(health + health[:9]))
      reader, writer = await open_one()
      for _ in range(4):  # together longer than the deadline
        writer.write(health)
        assert b'200 OK' in await reader.readuntil(b'\r\n')
        await reader.readuntil(b'}\n')
        await asyncio.sleep(0.2)
      writer.close()
      running.should_exit = True
      await serving
    assert (silent, slow) == (b'', b'')
    assert second.count(b'200 OK') == 1
  asyncio.run(conversation())


def test_the_limit_counts_the_windows_of_predict():
  service, _ = make()
  question = service_lib.Question('a', 'b ' * 150, 1)
  assert service._count_windows(question) == len(input_pipeline.make_windows(
      random_qa('independent').config, [Example('0', 'a', 'b ' * 150)],
      random_qa('independent').tokenizer))
