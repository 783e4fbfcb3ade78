
'use strict';
// Texts of users and of the model are only set as textContent or attributes, so
// that no markup in them takes effect.
const $ = (id) => document.getElementById(id);
const SHADES = document.body.dataset.shades.split(' ');
const CELL = 12;
const EXAMPLE = {
  context: 'The first post office of Vellmark opened in 1843 above a bakery. Its '
    + 'postmaster, Agnes Rowntree, sorted the letters at night and delivered '
    + 'them herself on a grey pony. When the railway came in 1871, the office '
    + 'moved to the station, where it stayed for almost a century.',
  question: 'Who was the postmaster of Vellmark?'};
let asked = 0;  // number of questions; only the last one is answered

function element(tag, attributes, text) {
  const svg = ['svg', 'g', 'path', 'rect', 'text', 'title'].includes(tag);
  const created = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    created.setAttribute(name, value);
  }
  if (text !== undefined) created.textContent = text;
  return created;
}

async function post(path, body) {
  const response = await fetch(path, {
    method: 'POST', headers: {'Content-Type': 'application/json'},
    body: JSON.stringify(body)});
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

// Offsets count code points, but strings of JavaScript count UTF-16 units.
function highlight(context, start, end) {
  const letters = Array.from(context);
  const part = (a, b) => document.createTextNode(letters.slice(a, b).join(''));
  const mark = element('mark', {}, letters.slice(start, end).join(''));
  $('passage').replaceChildren(
    ...(end > start ? [part(0, start), mark, part(end)] : [part(0)]));
}

const formatted = (score, probability) => (100 * probability).toFixed(1) + '%'
  + '\u2002' + score.toFixed(3);  // as in experiments.predict

// Whether two spans share more than half of the characters of the shorter one.
function alike(a, b) {
  const shared = Math.min(a.end, b.end) - Math.max(a.start, b.start);
  return 2 * shared > Math.min(a.end - a.start, b.end - b.start);
}

function showAnswer(context, answer) {
  const best = answer.n_best[0];
  $('best').textContent = answer.text || '(no answer)';
  $('about').className = 'note';
  $('about').textContent = best ? 'Probability and score of the best span: '
    + formatted(best.score, best.probability)
    + (document.body.dataset.nullRule === 'never' ? '' : '; of "no answer": '
      + formatted(answer.null_score, answer.null_probability))
    : 'The passage has no span that could be an answer.';
  highlight(context, answer.start, answer.end);
  const buttons = answer.n_best.map((span) => {
    const button = element('button', {
      type: 'button', 'aria-pressed': String(
        Boolean(answer.text) && span === best)});
    button.append(element('span', {dir: 'auto'}, span.text),
                  element('span', {class: 'score'},
                          formatted(span.score, span.probability)));
    button.addEventListener('click', () => {
      highlight(context, span.start, span.end);
      buttons.forEach((other) => other.setAttribute(
        'aria-pressed', String(other === button)));
    });
    return button;
  });
  // A span in about the place of a better one is behind "more".
  const shown = [];
  const items = buttons.map((button, n) => {
    const span = answer.n_best[n];
    const item = element('li', {value: n + 1});
    item.hidden = shown.some((other) => alike(span, other));
    if (!item.hidden) shown.push(span);
    item.append(button);
    return item;
  });
  $('spans').replaceChildren(...items);
  const hidden = items.length - shown.length;
  $('more').hidden = !hidden;
  $('more').textContent = `${hidden} more, in the same places`;
  $('found').hidden = false;
}

// Columns of a monospaced font; those of East Asia are two wide.
const columns = (text) => Array.from(text).reduce(
  (sum, c) => sum + (c.codePointAt(0) >= 0x1100 ? 2 : 1), 0);

function showMap(spans) {
  $('shown').textContent = spans.windows > 1 ? 'The passage is read in '
    + `${spans.windows} windows. The map shows window ${spans.window + 1}, `
    + 'which holds the best span.' : '';
  const cells = [];
  spans.band.forEach((row, i) => row.forEach((score, d) => {
    if (score !== null) cells.push([score, i, i + d]);
  }));
  if (!cells.length) return;
  const scores = cells.map((cell) => cell[0]);
  const low = scores.reduce((a, b) => Math.min(a, b));
  const high = scores.reduce((a, b) => Math.max(a, b));
  const paths = SHADES.map(() => '');
  let best = cells[0];
  for (const cell of cells) {
    if (cell[0] > best[0]) best = cell;
    const shade = Math.floor((cell[0] - low) / Math.max(high - low, 1e-9)
      * (SHADES.length - 0.001));
    paths[shade] += `M${cell[2] * CELL} ${cell[1] * CELL}h${CELL}v${CELL}`
      + `h-${CELL}z`;
  }
  const size = spans.tokens.length * CELL + 6;
  const margin = 10 + 6.5 * Math.max(...spans.tokens.map(columns));
  const picture = (name, width, height) => element('svg', {class: name, width,
    height, viewBox: `0 0 ${width} ${height}`, 'aria-hidden': 'true'});
  const top = picture('top', size, margin);
  const left = picture('left', margin, size);
  const plane = picture('cells', size, size);
  plane.removeAttribute('aria-hidden');
  plane.setAttribute('role', 'img');
  plane.setAttribute('aria-label', 'Scores of spans');
  paths.forEach((d, n) => {
    if (d) plane.append(element('path', {fill: SHADES[n], d}));
  });
  spans.tokens.forEach((token, n) => {
    left.append(element('text', {x: margin - 4, y: n * CELL + CELL - 3,
      'text-anchor': 'end'}, token));
    top.append(element('text', {transform:
      `translate(${n * CELL + CELL - 3} ${margin - 4}) rotate(-90)`}, token));
  });
  const frame = element('rect', {class: 'best', x: best[2] * CELL,
    y: best[1] * CELL, width: CELL, height: CELL});
  frame.append(element('title', {}, best[0].toFixed(3)));
  plane.append(frame);
  const map = element('div', {class: 'map'});
  const line = (kind, ...parts) => {
    const div = element('div', {class: kind});
    div.append(...parts);
    return div;
  };
  map.append(line('line names', picture('left', margin, margin), top),
             line('line', left, plane));
  $('scroll').replaceChildren(map);
  $('scroll').scrollTo(best[2] * CELL - ($('scroll').clientWidth - margin) / 2,
                       best[1] * CELL - ($('scroll').clientHeight - margin) / 2);
  $('scale').textContent = 'Scores from ' + low.toFixed(2) + ' (dark) to '
    + high.toFixed(2) + ' (bright); frame: the best span.';
}

async function ask() {
  const turn = ++asked;
  const context = $('context').value;
  const body = {question: $('question').value.replace(/\s*\n\s*/g, ' '),
                context};
  $('ask').disabled = true;
  try {
    const answer = await post('/answer', body);
    if (turn !== asked) return;
    showAnswer(context, answer);
    $('result').hidden = false;
    $('scroll').replaceChildren();
    $('shown').textContent = $('scale').textContent = '';
    $('map').hidden = false;
    try {
      const spans = await post('/spans', body);
      if (turn === asked) showMap(spans);
    } catch (error) {
      if (turn === asked) $('scale').textContent = 'Not drawn: ' + error.message;
    }
  } catch (error) {
    if (turn !== asked) return;
    $('best').textContent = '';
    $('about').className = 'note error';
    $('about').textContent = error.message;
    $('found').hidden = $('map').hidden = true;
    $('result').hidden = false;
  } finally {
    if (turn === asked) $('ask').disabled = false;
  }
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  ask();
});
$('more').addEventListener('click', () => {
  for (const item of $('spans').children) item.hidden = false;
  $('more').hidden = true;
});
$('example').addEventListener('click', () => {
  $('context').value = EXAMPLE.context;
  $('question').value = EXAMPLE.question;
  $('form').requestSubmit();
});
for (const id of ['context', 'question']) {
  $(id).addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.isComposing
        && (id === 'question' || event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      $('form').requestSubmit();
    }
  });
}
