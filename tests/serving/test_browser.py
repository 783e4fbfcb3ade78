"""Tests of both pages in a browser, if the machine has one."""

import contextlib
import dataclasses
import shutil
import threading
import time

from playwright import sync_api
import pytest

from qa_jax.io import documents
from qa_jax.metrics import calibration
from qa_jax.serving import inspect_page as inspect_page_lib
from qa_jax.serving import server
from qa_jax.serving import service as service_lib
from tests.common.random_model import QUESTION
from tests.common.random_model import random_qa

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f'none of {", ".join(BROWSERS)} is on PATH: '
    'apt-get install chromium')
# Offsets count code points, and some need two units in strings of JavaScript.
CONTEXT = '👩\u200d🚀 Mira built <i>the</i> Osprey in Oslo.'
ATTACK = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


@pytest.fixture(scope='module')
def browser():
  with sync_api.sync_playwright() as p:
    browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture
def tab(browser):
  """A page of a phone's size without errors and without foreign requests."""
  context = browser.new_context(viewport={'width': 360, 'height': 740})
  tab = context.new_page()
  tab.set_default_timeout(120_000)  # the machine may be busy
  tab.complaints, tab.requested = [], []
  tab.on('console', lambda m: tab.complaints.append(m.text))
  tab.on('pageerror', lambda e: tab.complaints.append(str(e)))
  tab.on('request', lambda r: tab.requested.append(r.url))
  yield tab
  assert tab.evaluate('window.hit') is None
  assert tab.evaluate('document.documentElement.scrollWidth') <= 360
  context.close()


def calibrated():
  """Returns an untrained model with null threshold 9 and temperature 0.3."""
  return dataclasses.replace(
      random_qa('independent', null_rule='min_null', null_threshold=9.0),
      calibration=calibration.Calibration(9.0, 0.3, '', '', 9, 0, {}))


@pytest.fixture(scope='module')
def url():
  """The URL of a server with an untrained model."""
  service = service_lib.Service(calibrated(), service_lib.Limits(
      context_characters=2000, batch=1), name='a-model')
  listener = server.bind_socket('127.0.0.1', 0)
  uvicorn = server.uvicorn_server(service)
  thread = threading.Thread(
      target=uvicorn.run, kwargs={'sockets': [listener]}, daemon=True)
  thread.start()
  while not uvicorn.started:
    time.sleep(0.01)
  yield f'http://127.0.0.1:{listener.getsockname()[1]}/'
  uvicorn.should_exit = True
  thread.join()
  with contextlib.suppress(OSError):
    listener.close()


def ask(tab, url, question, context):
  """Fills in the form by keyboard, submits it and waits for the answer."""
  tab.goto(url)
  tab.wait_for_selector('#context:focus')  # it comes with the first frame
  tab.keyboard.insert_text(context)
  tab.keyboard.press('Tab')
  tab.keyboard.insert_text(question)
  tab.keyboard.press('Enter')
  tab.wait_for_selector('#result:not([hidden])')


def test_a_question_is_asked_and_answered_by_keyboard(tab, url):
  ask(tab, url, QUESTION, CONTEXT)
  answer = calibrated().answer(question=QUESTION, context=CONTEXT)
  assert tab.text_content('#best') == answer.text != ''
  assert tab.text_content('#passage') == CONTEXT
  assert tab.text_content('#passage mark') == answer.text
  about = tab.text_content('#about')
  for score, probability in ((answer.score, answer.probability),
                             (answer.null_score, answer.null_probability)):
    assert f'{probability:.1%}\u2002{score:.3f}' in about
  assert tab.locator('#spans .score').all_text_contents() == [
      f'{c["probability"]:.1%}\u2002{c["score"]:.3f}' for c in answer.n_best]
  texts = tab.locator('#spans button > span:first-child').all_text_contents()
  assert texts == [c['text'] for c in answer.n_best]
  tab.wait_for_selector('#ask:enabled')
  for _ in range(2):
    tab.keyboard.press('Tab')  # the buttons below the form
  shown = tab.locator('#spans li:not([hidden])')
  for _ in range(2):
    tab.keyboard.press('Tab')
  tab.keyboard.press('Enter')
  second = shown.nth(1).locator('span').first.text_content()
  assert tab.text_content('#passage mark') == second
  assert tab.locator('[aria-pressed=true]').count() == 1
  assert not tab.complaints
  assert set(tab.requested) == {url, f'{url}answer', f'{url}spans'}


def test_spans_like_a_better_one_are_behind_more(tab, url):
  ask(tab, url, QUESTION, CONTEXT)
  spans, shown = calibrated().answer(
      question=QUESTION, context=CONTEXT).n_best, []
  for c in spans:
    place = set(range(c['start'], c['end']))
    if all(2 * len(place & other) <= min(len(place), len(other))
           for other in shown):
      shown.append(place)
  items = tab.locator('#spans li:visible')
  assert items.count() == len(shown) < len(spans)
  more = f'{len(spans) - len(shown)} more, in the same places'
  assert tab.text_content('#more') == more
  tab.click('#more')
  assert items.count() == len(spans) and tab.locator('#more').is_hidden()


def test_the_page_names_its_model_and_has_an_example(tab, url):
  tab.goto(url)
  assert tab.text_content('#model') == 'a-model'
  tab.click('#example')
  tab.wait_for_selector('#result:not([hidden])')
  assert 'postmaster' in tab.text_content('#passage')
  tab.wait_for_selector('#scroll svg')
  tab.click('a[href="openapi.json"]')
  assert tab.url == f'{url}openapi.json'


def test_labels_stay_in_sight_while_a_map_scrolls(tab, url):
  ask(tab, url, QUESTION, ' '.join([CONTEXT] * 9))
  tab.wait_for_selector('#scroll svg')
  assert 'windows' in tab.text_content('#shown')
  tab.locator('#scroll').evaluate('e => e.scrollTo(9999, 9999)')
  box = tab.locator('#scroll').bounding_box()
  for name, edge in (('.line .left', 'x'), ('.names', 'y')):
    place = tab.locator(name).last.bounding_box()
    assert abs(place[edge] - box[edge]) < 1
  assert tab.locator('#scroll').evaluate('e => e.scrollLeft') > 0


def test_the_map_has_a_cell_for_every_span(tab, url):
  ask(tab, url, QUESTION, CONTEXT)
  tab.wait_for_selector('#scroll svg rect')
  band = random_qa('independent').spans(QUESTION, CONTEXT).band
  cells = tab.eval_on_selector_all(
      '#scroll path', 'all => all.map(p => p.getAttribute("d")).join("")')
  assert cells.count('M') == (band > -1e30).sum()
  assert not tab.complaints


def test_markup_typed_by_a_user_is_text_on_the_page(tab, url):
  ask(tab, url, ATTACK, ATTACK)
  assert tab.text_content('#passage') == ATTACK
  assert tab.locator('#result img, #result script').count() == 0


def test_a_long_question_is_shown_whole_and_asked_in_one_line(tab, url):
  question = 'Who built the Osprey of the northern fleet in Oslo? ' * 4
  ask(tab, url, question + 'And\nwhen?', CONTEXT)
  assert tab.locator('#question').evaluate(
      'e => [e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight]'
      ) == [0, 0]
  answer = calibrated().answer(question + 'And when?', CONTEXT)
  assert f'{answer.score:.3f}' in tab.text_content('#about')


def test_a_wide_table_of_a_report_scrolls_in_its_box(tab, tmp_path):
  name = 'model.head=conditional(beam=5),model.objective=marginal_likelihood'
  path = tmp_path / 'report.html'
  path.write_text(documents.to_html([
      documents.Title(1, ATTACK), documents.Table(
          ['variant', *'abcdefghij'], [[name, *['12.34 ± 5.67'] * 10]]),
      documents.Table(['variant', 'F1'], [[ATTACK, '12.34']])], tmp_path))
  tab.goto(path.as_uri())
  boxes = tab.locator('div')
  widths = boxes.evaluate_all('all => all.map(e => e.scrollWidth)')
  assert widths[0] > 360 >= widths[1]
  boxes.first.evaluate('e => e.scrollTo(9999, 0)')
  last = tab.locator('td').nth(10).bounding_box()
  # The fade of the box's right edge is in its padding.
  fade = boxes.first.evaluate(
      'e => parseFloat(getComputedStyle(e).paddingRight)')
  assert last['x'] + last['width'] <= 360 - fade + 1
  assert tab.locator('td').first.text_content() == name
  # The name breaks between its parts: no line begins within a word.
  lines = tab.locator('td').first.evaluate("""td => {
    const range = document.createRange(), lines = [];
    for (const node of td.childNodes) if (node.nodeType === 3) {
      range.selectNodeContents(node);
      lines.push(range.getClientRects().length);
    }
    return lines; }""")
  assert lines == [1] * 9
  assert not tab.complaints


def test_a_refusal_is_shown_and_the_form_stays_usable(tab, url):
  ask(tab, url, QUESTION, 'a' * 2001)
  assert 'context has 2001 characters' in tab.text_content('#about')
  assert tab.locator('#found').is_hidden() and tab.locator('#ask').is_enabled()


def inspect(tab, tmp_path, *questions, context=CONTEXT):
  path, qa = tmp_path / 'page.html', random_qa('independent')
  answered = inspect_page_lib.answer_questions(qa, questions, context)
  path.write_text(inspect_page_lib.render_page(
      qa, answered, context, title=ATTACK), 'utf-8')
  tab.goto(path.as_uri())
  assert tab.requested == [path.as_uri()]


def test_the_inspect_page_runs_nothing_and_fits_a_phone(tab, tmp_path):
  inspect(tab, tmp_path, ATTACK, QUESTION, context=f'Mira {ATTACK} Oslo')
  assert tab.text_content('h2') == tab.title() == ATTACK
  assert tab.locator('.passage').first.text_content() == f'Mira {ATTACK} Oslo'
  assert not tab.complaints


def test_hovering_a_token_shows_its_numbers(tab, tmp_path):
  inspect(tab, tmp_path, QUESTION)
  token = tab.locator('.t').nth(3)
  shown = 'e => getComputedStyle(e, "::after").content'
  assert token.evaluate(shown) == 'none'
  token.hover()
  assert 'p(start)' in token.evaluate(shown)
  assert token.evaluate(  # the style sheet was let through by its hash
      'e => getComputedStyle(e).borderTopWidth') == '7px'
