// One image at a time: the server says how far this reader is and gives the next image alone; every answer is on disk before
// the next image is asked for. What an image is never reaches this page.

const token = document.querySelector('meta[name=xfed-token]').content;
const $ = id => document.getElementById(id);
const say = text => { $('live').textContent = text; };
let state = null;
let said = null; // "real" or "synthetic", not sent yet
let busy = false;

function show(id) {
  for (const main of document.querySelectorAll('main')) main.hidden = main.id !== id;
}

function trouble(text) {
  $('trouble').textContent = text;
  $('trouble').hidden = !text;
}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-xfed-token': token },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  if (!response.ok) {
    const text = await response.text();
    let words = text;
    try { words = JSON.parse(text).detail; } catch { /* plain words */ }
    throw new Error(words);
  }
  return response.json();
}

// Runs one thing at a time; what went wrong is said, and nothing is lost: the server knows what was answered.
async function once(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
    trouble('');
  } catch (error) {
    trouble(error instanceof TypeError
      ? 'This page cannot reach its server. Start xfed-client reader again and open the address it prints: no answer is lost.'
      : error.message);
  } finally {
    busy = false;
  }
}

function place() {
  $('where').textContent = `${state.reader} · ${state.answered} of ${state.total}`;
  $('progress').max = state.total;
  $('progress').value = state.answered;
}

async function start() {
  state = await ask('/state');
  place();
  $('count').textContent = state.total;
  document.querySelector('.sure').hidden = !state.confidence;
  $('sureness').hidden = !state.confidence;
  if (state.answered >= state.total) return finish();
  if (state.answered) $('begin').querySelector('span').textContent = `Go on with image ${state.answered + 1}`;
  show('intro');
  $('begin').focus();
}

async function next() {
  if (state.answered >= state.total) return finish();
  choose(null);
  const film = $('film');
  film.classList.add('gone');
  show('reading');
  film.alt = `X-ray ${state.answered + 1} of ${state.total}`;
  film.src = `/image/${state.answered}`;
  await film.decode();
  film.classList.remove('gone');
  say(`X-ray ${state.answered + 1} of ${state.total}`);
}

function choose(kind) {
  said = kind;
  for (const each of ['real', 'synthetic']) $(each).setAttribute('aria-pressed', String(each === kind));
  $('sureness').classList.toggle('waiting', !kind);
  $('hint').textContent = kind && state.confidence ? 'How sure are you? The answer counts once you say; until then you can change it.' : '';
}

function answer(kind) {
  if (busy) return;
  choose(kind);
  if (state.confidence) say(`${kind}. How sure: 1 a guess, 2 fairly sure, 3 certain, Enter to leave it open.`);
  else send(null);
}

function send(confidence) {
  if (!said) return;
  once(async () => {
    const { answered } = await ask('/answer', { number: state.answered, called: said, confidence });
    state.answered = answered;
    place();
    await next();
  });
}

const percent = value => `${Math.round(100 * value)}%`;
const number = value => value.toFixed(2).replace('-', '−');

function spanned(facts, name, form) {
  if (facts[name] === null) return '–';
  const interval = facts[`${name}_interval`];
  return [form(facts[name]), interval ? `${form(interval[0])} to ${form(interval[1])}` : ''];
}

function element(name, attributes = {}, ...children) {
  const made = name.startsWith('svg:')
    ? document.createElementNS('http://www.w3.org/2000/svg', name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function chart(facts) {
  const rows = [['All', facts], ...Object.entries(facts.per_class)].filter(([, one]) => one.accuracy !== null);
  const [left, width, line] = [190, 640, 34];
  const x = share => left + share * (width - left - 60);
  const bottom = rows.length * line + 8;
  const svg = element('svg:svg', { viewBox: `0 0 ${width} ${bottom + 24}`, role: 'img', 'aria-label': 'Share of right answers with 95% intervals, the same figures as in words above and in the table below' });
  for (const share of [0, 0.5, 1]) {
    svg.append(
      element('svg:line', { x1: x(share), x2: x(share), y1: 4, y2: bottom, class: share === 0.5 ? 'chance' : 'axis' }),
      element('svg:text', { x: x(share), y: bottom + 18, 'text-anchor': 'middle', class: 'muted' }, share === 0.5 ? 'guessing' : percent(share)),
    );
  }
  rows.forEach(([name, one], row) => {
    const y = row * line + 22;
    const [low, high] = one.accuracy_interval;
    svg.append(
      element('svg:text', { x: 0, y: y + 4 }, name),
      element('svg:line', { x1: x(low), x2: x(high), y1: y, y2: y, class: 'span' }),
      element('svg:circle', { cx: x(one.accuracy), cy: y, r: 6, class: 'dot' }),
      element('svg:text', { x: width, y: y + 4, 'text-anchor': 'end' }, percent(one.accuracy)),
    );
  });
  $('chart').replaceChildren(svg);
}

async function finish() {
  const result = await ask('/result');
  const { you, all, agreement } = result;
  const several = all.readers > 1;
  place();
  $('finished').textContent = `${state.reader}: finished, thank you`;
  [$('verdict').textContent, $('share').textContent, $('meaning').textContent, $('fooled').textContent] = you.words;
  chart(you);
  const columns = several ? [['you', you], [`all ${all.readers} readers`, all]] : [['you', you]];
  $('figures-head').replaceChildren(element('tr', {}, element('th', { scope: 'col' }, ''), ...columns.map(([name]) => element('th', { scope: 'col' }, name))));
  const rows = [['Right answers', 'accuracy', percent], ['Sensitivity', 'sensitivity', percent], ['Specificity', 'specificity', percent], ['d′', 'd_prime', number], ['Area under the curve', 'auc', number]]
    .filter(([, name]) => columns.some(([, facts]) => facts[name] !== null))
    .map(([title, name, form]) => element('tr', {}, element('th', { scope: 'row' }, title), ...columns.map(([, facts]) => {
      const [value, interval] = spanned(facts, name, form);
      return element('td', {}, value, element('small', {}, interval ?? ''));
    })));
  if (several && agreement.kappa !== null) {
    const [value, interval] = spanned(agreement, 'kappa', number);
    rows.push(element('tr', {}, element('th', { scope: 'row' }, 'Agreement, kappa'), element('td', {}, ''), element('td', {}, value, element('small', {}, interval ?? ''))));
  }
  $('figures').replaceChildren(...rows);
  show('done');
  $('verdict').focus();
}

document.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (!$('intro').hidden && key === 'enter' && event.target.id !== 'begin') $('begin').click();
  if ($('reading').hidden) return;
  if (key === 'r') answer('real');
  else if (key === 's') answer('synthetic');
  else if (state.confidence && '123'.includes(key)) send(Number(key));
  else if (key === 'enter' && said && event.target.tagName !== 'BUTTON') send(null);
  else return;
  event.preventDefault();
});

$('begin').addEventListener('click', () => once(next));
$('real').addEventListener('click', () => answer('real'));
$('synthetic').addEventListener('click', () => answer('synthetic'));
for (const sure of [0, 1, 2, 3]) $(`sure-${sure}`).addEventListener('click', () => send(sure || null));
once(start);
