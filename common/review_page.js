// The review page: what is shown, where one is, and each decision sent as it is made.
//
//   /api/archive, /api/decisions --> images, labels, scores, verdicts --filters--> list --Grid--> cells; single view; footer
//   a, r + reason, u --> shown at once --> queue (one request at a time, in order) --> "Saved", or taken back and said so

import {Grid} from '/assets/review_grid.js';
import {$, ask, recall, remember, send} from '/assets/review_server.js';

const number = new Intl.NumberFormat('en').format;
const VERDICTS = ['all', 'undecided', 'accepted', 'rejected'];
const SIDES = [64, 96, 128, 176, 256];
const SIGNS = {accept: '✓', reject: '✕'};

let archive;        // what the server says of it
let ids;            // per image: the file's name without folder and ending
let short;          // what people read: the number alone where the file's name is its class and number
let position;       // image's file name -> its number
let verdicts;       // per image: null or [verdict, reason]
let grid;
let list = [];      // numbers of the images that fit the filters, as they were when the filters were set
let at = 0;         // where in the list
const filter = {label: -1, verdict: 'all', score: '', from: '', to: '', order: ''};
const counts = {accept: 0, reject: 0};
let enlarged = false, inverted = false;

// --- decisions

function setVerdict(image, verdict) {
  const before = verdicts[image];
  if (before) counts[before[0]] -= 1;
  if (verdict) counts[verdict[0]] += 1;
  verdicts[image] = verdict;
  grid.redress(image);
  drawProgress();
  return before;
}

function decide(verdict, reason = '') {
  if (!list.length) return;
  const image = list[at];
  const before = setVerdict(image, [verdict, reason]);
  const undo = () => { setVerdict(image, before); drawCurrent(); };
  send('/api/decisions', {image: archive.images[image], verdict, reason}, null, undo);
  const told = `${name(image)} ${stateOf(image)}.`;
  if (at + 1 < list.length) go(at + 1, told); else { drawCurrent(); say(`${told} End of the list.`); }
}

function undo() {
  send('/api/undo', {}, ({image, decision}) => {
    if (image === null) return say('There is nothing to undo.');
    const which = position.get(image);
    if (which === undefined) return say('Undone: a decision about an image that is not in this archive.');
    setVerdict(which, decision);
    const place = list.indexOf(which);
    if (place >= 0) go(place, 'Undone:'); else say(`Undone: ${name(which)}, which these filters hide.`);
  });
}

// --- words

const classOf = image => archive.classes[archive.labels[image]];
const name = image => `${classOf(image)} ${short[image]}`;
function stateOf(image) {
  const verdict = verdicts[image];
  if (!verdict) return 'undecided';
  return verdict[0] === 'accept' ? 'accepted' : `rejected: ${verdict[1].replace(archive.other, '')}`;
}
let saying;
function say(text) { clearTimeout(saying); saying = setTimeout(() => { $('said').textContent = text; }, 50); }

// --- filters

function fits(image) {
  const verdict = verdicts[image];
  if (filter.label >= 0 && archive.labels[image] !== filter.label) return false;
  if (filter.verdict === 'undecided' && verdict) return false;
  if (filter.verdict === 'accepted' && verdict?.[0] !== 'accept') return false;
  if (filter.verdict === 'rejected' && verdict?.[0] !== 'reject') return false;
  if (!filter.score) return true;
  const score = archive.scores[filter.score][image];
  if (filter.from === '' && filter.to === '') return true;
  return score !== null && !(filter.from !== '' && score < +filter.from) && !(filter.to !== '' && score > +filter.to);
}

function applyFilters(wanted = list[at]) {
  list = archive.images.map((_, image) => image).filter(fits);
  if (filter.score && filter.order) {
    const scores = archive.scores[filter.score], sign = filter.order === 'up' ? 1 : -1;
    const key = image => scores[image] ?? Infinity * sign;  // what has no score comes last
    list.sort((a, b) => sign * (key(a) - key(b)) || a - b);
  }
  at = list.indexOf(wanted);
  if (at < 0 && !filter.order) at = list.findIndex(image => image > wanted);  // what comes next in the archive
  at = Math.max(0, at);
  grid.setItems(list, at);
  $('nothing').hidden = list.length > 0;
  for (const [box, chosen] of [['classes', filter.label], ['verdicts', filter.verdict]])
    for (const button of $(box).children) button.ariaPressed = String(button.value === String(chosen));
  for (const id of ['from', 'to', 'order']) $(id).hidden = !filter.score;
  enlarge(enlarged && list.length > 0);
  drawCurrent();
}

function choose(change, what) {
  Object.assign(filter, change);
  applyFilters('order' in change ? -1 : list[at]);
  say(`${what}: ${number(list.length)} images. ${list.length ? `${name(list[at])}, ${stateOf(list[at])}.` : ''}`);
}

function chooseClass(label) {
  if (label >= archive.classes.length) return;
  const chosen = label === filter.label ? -1 : label;
  choose({label: chosen}, chosen < 0 ? 'All classes' : archive.classes[chosen]);
}

function chooseVerdict(verdict) { choose({verdict}, verdict === 'all' ? 'All decisions' : `Only ${verdict}`); }

function jump(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return false;
  const digits = /^\d+$/.test(wanted) ? Number(wanted) : NaN;
  const tests = [
    image => ids[image].toLowerCase() === wanted,
    image => Number(/(\d+)$/.exec(ids[image])?.[1]) === digits,
    image => ids[image].toLowerCase().includes(wanted),
  ];
  for (const test of tests) {
    for (let step = 1; step <= list.length; step++) {
      const place = (at + step) % list.length;
      if (test(list[place])) { go(place); return true; }
    }
  }
  for (const test of tests) {
    const image = ids.findIndex((_, number) => test(number));
    if (image < 0) continue;
    Object.assign(filter, {label: -1, verdict: 'all', score: '', from: '', to: '', order: ''});
    for (const id of ['score', 'from', 'to', 'order']) $(id).value = '';
    applyFilters(image);
    say(`Filters were taken off. ${name(image)}, ${stateOf(image)}.`);
    return true;
  }
  say(`No image's id contains ${text}.`);
  $('jump').setAttribute('aria-invalid', 'true');
  return false;
}

// --- drawing

function dress(cell, image) {
  const verdict = verdicts[image];
  cell.dataset.verdict = verdict ? verdict[0] : '';
  cell.ariaLabel = `${name(image)}, ${stateOf(image)}`;
  const caption = cell.lastChild;
  caption.replaceChildren();
  if (verdict) {
    const sign = document.createElement('b');
    sign.textContent = SIGNS[verdict[0]];
    caption.append(sign, ' ');
  }
  caption.append(verdict?.[0] === 'reject' ? verdict[1].replace(archive.other, '') : `${short[image]}  ${classOf(image)}`);
}

const source = image => `/files/${archive.images[image].split('/').map(encodeURIComponent).join('/')}`;

function drawProgress() {
  const decided = counts.accept + counts.reject;
  $('decided').textContent = number(decided);
  $('accepted').textContent = number(counts.accept);
  $('rejected').textContent = number(counts.reject);
  $('bar').value = decided;
}

function drawCurrent() {
  const image = list[at];
  const none = image === undefined;
  for (const id of ['accept', 'reject', 'enlarge']) $(id).disabled = none;
  $('name').textContent = none ? '' : name(image);
  $('state').textContent = none ? '' : stateOf(image);
  $('state').dataset.verdict = verdicts[image]?.[0] ?? '';
  const scores = none ? [] : Object.entries(archive.scores).filter(([, values]) => values[image] !== null);
  const figures = scores.map(([score, values]) => `${score.replaceAll('_', ' ')} ${+values[image].toPrecision(3)}`);
  $('details').textContent = none ? '' : [`${number(at + 1)} of ${number(list.length)}`, ...figures].join('  ·  ');
  if (enlarged) drawStage(image);
}

const ahead = new Map();  // pictures of the images near by, kept so that they are there at once
function picture(image) {
  if (!ahead.has(image)) {
    const made = new Image();
    made.decoding = 'sync';
    made.src = source(image);
    made.onload = () => fitStage(made);
    ahead.set(image, made);
  }
  return ahead.get(image);
}

function drawStage(image) {
  const shown = picture(image);
  shown.alt = `Synthetic image ${name(image)}`;
  $('stage').replaceChildren(shown);
  fitStage(shown);
  const near = [list[at - 1], list[at + 1], list[at + 2]].filter(one => one !== undefined);
  near.forEach(picture);
  for (const kept of ahead.keys()) if (kept !== image && !near.includes(kept)) ahead.delete(kept);
}

// Whole screen pixels per pixel of the image, so that no pixel of it looks wider than another.
function fitStage(image) {
  const side = Math.max(image.naturalWidth, image.naturalHeight), ratio = devicePixelRatio || 1;
  const space = Math.min($('stage').clientWidth, $('stage').clientHeight) * ratio;
  if (!side || !space) return;
  const times = space >= side ? Math.floor(space / side) : space / side;
  image.style.width = `${image.naturalWidth * times / ratio}px`;
  image.style.height = `${image.naturalHeight * times / ratio}px`;
}

function go(place, before = '') {
  if (!list.length) return;
  at = Math.max(0, Math.min(list.length - 1, place));
  grid.go(at);
  drawCurrent();
  if (document.scrollingElement.scrollHeight > innerHeight) document.querySelector('main').scrollIntoView();
  const image = list[at];
  say(`${before} ${name(image)}, ${stateOf(image)}, ${number(at + 1)} of ${number(list.length)}.`.trim());
}

function enlarge(wanted) {
  if (wanted === enlarged) return;
  enlarged = wanted && list.length > 0;
  $('single').hidden = !enlarged;
  $('grid').classList.toggle('covered', enlarged);
  $('enlarge-text').textContent = enlarged ? 'Grid' : 'Enlarge';
  drawCurrent();
  if (!enlarged) $('grid').focus({preventScroll: true});
}

function nextUndecided() {
  const order = [...list.keys()].slice(at + 1).concat([...list.keys()].slice(0, at + 1));
  const place = order.find(one => !verdicts[list[one]]);
  if (place === undefined) say('All images in this list are decided.'); else go(place);
}

// --- rejecting: a list of reasons with a digit each

function askReason() {
  if (!list.length) return;
  $('reasons').hidden = false;
  $('other-form').hidden = true;
  $('reasons').classList.remove('left');
  $('reasons').classList.toggle('left', covers($('reasons'), grid.cells.get(at)));
  $('reason-list').firstChild.focus();
}

function covers(above, below) {
  if (enlarged || !below) return false;
  const [a, b] = [above.getBoundingClientRect(), below.getBoundingClientRect()];
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

function closeReasons() {
  $('reasons').hidden = true;
  $('grid').focus({preventScroll: true});
}

function giveReason(which) {
  if (which === archive.reasons.length) {
    $('other-form').hidden = false;
    $('other').value = '';
    return $('other').focus();
  }
  if (which > archive.reasons.length) return;
  closeReasons();
  decide('reject', archive.reasons[which]);
}

// --- keys

const KEYS = {
  j: () => go(at + 1), k: () => go(at - 1), ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1),
  ArrowDown: () => go(enlarged ? at + 1 : Math.min(at + grid.columns, list.length - 1)),
  ArrowUp: () => go(enlarged ? at - 1 : at - grid.columns >= 0 ? at - grid.columns : at),
  Home: () => go(0), End: () => go(list.length - 1),
  PageDown: () => go(at + grid.columns * grid.rowsInSight), PageUp: () => go(at - grid.columns * grid.rowsInSight),
  a: () => decide('accept'), r: askReason, u: undo, n: nextUndecided,
  Enter: () => enlarge(!enlarged), ' ': () => enlarge(!enlarged), Escape: () => enlarge(false),
  i: () => { inverted = !inverted; $('stage').classList.toggle('inverted', inverted); },
  v: () => chooseVerdict(VERDICTS[(VERDICTS.indexOf(filter.verdict) + 1) % VERDICTS.length]),
  '/': () => { $('jump').focus(); $('jump').select(); }, '?': () => $('help').showModal(), t: switchTheme,
  '+': () => resize(1), '=': () => resize(1), '-': () => resize(-1), '−': () => resize(-1),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $('help').open || event.isComposing) return;
  const inField = event.target.matches('input, select'), inButton = event.target.matches('button');
  if (event.key === 'Escape' && !$('reasons').hidden) return event.preventDefault(), closeReasons();
  if (event.key === 'Escape' && inField) return event.preventDefault(), $('grid').focus();
  if (inField || (inButton && ['Enter', ' '].includes(event.key))) return;
  const digit = /^[0-9]$/.test(event.key) ? Number(event.key) : -1;
  if (!$('reasons').hidden) {
    if (digit > 0) { event.preventDefault(); giveReason(digit - 1); }
    return;
  }
  const act = digit >= 0 ? () => (digit ? chooseClass(digit - 1) : choose({label: -1}, 'All classes')) : KEYS[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function resize(step) {
  const now = SIDES.indexOf(grid.side);
  const side = SIDES[Math.max(0, Math.min(SIDES.length - 1, now + step))];
  grid.setSide(side);
  remember('xfed-side', side);
}

function switchTheme() {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const now = document.documentElement.dataset.theme ?? (dark ? 'dark' : 'light');
  document.documentElement.dataset.theme = now === 'dark' ? 'light' : 'dark';
  remember('xfed-theme', document.documentElement.dataset.theme);
}

// --- the beginning

function button(text, value, key, count) {
  const made = document.createElement('button');
  made.type = 'button';
  made.value = value;
  if (key) made.append(Object.assign(document.createElement('kbd'), {textContent: key}), ' ');
  made.append(text);
  if (count !== undefined) made.append(' ', Object.assign(document.createElement('small'), {textContent: number(count)}));
  return made;
}

function build() {
  $('reader').textContent = archive.reader;
  $('total').textContent = number(archive.images.length);
  $('bar').max = archive.images.length;
  const perClass = archive.classes.map((_, label) => archive.labels.reduce((sum, one) => sum + (one === label), 0));
  $('classes').append(button('All', -1, '0'), ...archive.classes.map((one, label) =>
    button(one, label, label < 9 ? label + 1 : '', perClass[label])));
  $('verdicts').append(...VERDICTS.map(one => button(one[0].toUpperCase() + one.slice(1), one)));
  $('reason-list').append(...[...archive.reasons, 'other …'].map((one, which) => button(one, which, which + 1)));
  $('scores').hidden = !Object.keys(archive.scores).length;
  $('score').append(...Object.keys(archive.scores).map(one => new Option(one.replaceAll('_', ' '), one)));
}

function listen() {
  document.addEventListener('keydown', onKey);
  const press = (box, act) => $(box).addEventListener('click', event => {
    const pressed = event.target.closest('button');
    if (pressed) act(pressed.value);
  });
  press('classes', value => choose({label: +value}, +value < 0 ? 'All classes' : archive.classes[value]));
  press('verdicts', chooseVerdict);
  press('reason-list', value => giveReason(+value));
  const clicks = {
    accept: () => decide('accept'), reject: askReason, undo, enlarge: () => enlarge(!enlarged), theme: switchTheme,
    previous: () => go(at - 1), next: () => go(at + 1), 'help-open': () => $('help').showModal(),
  };
  for (const [id, act] of Object.entries(clicks)) $(id).addEventListener('click', act);
  for (const id of ['score', 'from', 'to', 'order'])
    $(id).addEventListener('change', () => choose({[id]: $(id).value}, 'Score'));
  $('jump').addEventListener('input', () => $('jump').removeAttribute('aria-invalid'));
  $('jump-form').addEventListener('submit', event => {
    event.preventDefault();
    if (jump($('jump').value)) { $('jump').value = ''; $('grid').focus({preventScroll: true}); }
  });
  $('other-form').addEventListener('submit', event => {
    event.preventDefault();
    const words = $('other').value.trim();
    if (words) { closeReasons(); decide('reject', archive.other + words); }
  });
  $('help').addEventListener('close', () => $('grid').focus({preventScroll: true}));
  $('help').addEventListener('keydown', event => { if (event.key === '?') $('help').close(); });
  addEventListener('resize', () => { if (enlarged) drawStage(list[at]); });
}

async function start() {
  const theme = recall('xfed-theme');
  if (['dark', 'light'].includes(theme)) document.documentElement.dataset.theme = theme;
  let decided;
  try { [archive, decided] = await Promise.all([ask('/api/archive'), ask('/api/decisions')]); } catch (error) {
    $('trouble').textContent = error.message;
    $('trouble').hidden = false;
    return;
  }
  ids = archive.images.map(image => image.split('/').pop().replace(/\.[^.]*$/, ''));
  short = ids.map((id, image) => {
    const start = `${classOf(image).trim().toLowerCase().replaceAll(' ', '-')}-`;
    return id.startsWith(start) ? id.slice(start.length).replace(/^0+(?=\d+$)/, '') : id;
  });
  position = new Map(archive.images.map((image, number) => [image, number]));
  verdicts = archive.images.map(image => decided[image] ?? null);
  for (const verdict of verdicts) if (verdict) counts[verdict[0]] += 1;
  build();
  const show = place => { go(place); $('grid').focus({preventScroll: true}); };
  grid = new Grid($('grid'), {dress, source, pick: show, open: place => { go(place); enlarge(true); }});
  const side = Number(recall('xfed-side'));
  grid.setSide(SIDES.includes(side) ? side : 128);
  applyFilters(Math.max(0, verdicts.indexOf(null)));
  drawProgress();
  listen();
  show(at);
}

start();
