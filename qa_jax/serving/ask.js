
'use strict';
// Texts of users and of the model are only set as textContent or attributes, so
// that no markup in them takes effect.
const $ = (id) => document.getElementById(id);
const SHADES = document.body.dataset.shades.split(' ');
const CELL = 12;
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

function showAnswer(context, answer) {
  const best = answer.n_best[0];
  $('best').textContent = answer.text || '(no answer)';
  $('about').className = 'note';
  $('about').textContent = best ? 'Probability and score of the best span: '
    + formatted(best.score, best.probability) + '; of "no answer": '
    + formatted(answer.null_score, answer.null_probability)
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
  $('spans').replaceChildren(...buttons.map((button) => {
    const item = element('li');
    item.append(button);
    return item;
  }));
  $('found').hidden = false;
}

function showMap(spans) {
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
  const size = spans.tokens.length * CELL;
  const margin = 12 + 6 * Math.max(...spans.tokens.map((t) => t.length));
  const all = margin + size + 8;
  const svg = element('svg', {width: all, height: all, role: 'img',
    viewBox: `0 0 ${all} ${all}`, 'aria-label': 'Scores of spans'});
  const plane = element('g', {transform: `translate(${margin} ${margin})`});
  paths.forEach((d, n) => {
    if (d) plane.append(element('path', {fill: SHADES[n], d}));
  });
  spans.tokens.forEach((token, n) => plane.append(
    element('text', {x: -4, y: n * CELL + 9, 'text-anchor': 'end'}, token),
    element('text', {transform: `translate(${n * CELL + 9} -4) rotate(-90)`},
            token)));
  const frame = element('rect', {class: 'best', x: best[2] * CELL,
    y: best[1] * CELL, width: CELL, height: CELL});
  frame.append(element('title', {}, best[0].toFixed(3)));
  plane.append(frame);
  svg.append(plane);
  $('scroll').replaceChildren(svg);
  $('scroll').scrollTo(margin + best[2] * CELL - $('scroll').clientWidth / 2,
                       margin + best[1] * CELL - $('scroll').clientHeight / 2);
  $('scale').textContent = 'Scores from ' + low.toFixed(2) + ' (dark) to '
    + high.toFixed(2) + ' (bright); frame: the best span.';
}

async function ask() {
  const turn = ++asked;
  const context = $('context').value;
  const body = {question: $('question').value, context};
  $('ask').disabled = true;
  try {
    const answer = await post('/answer', body);
    if (turn !== asked) return;
    showAnswer(context, answer);
    $('result').hidden = false;
    $('scroll').replaceChildren();
    $('scale').textContent = '';
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
$('context').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $('form').requestSubmit();
  }
});
