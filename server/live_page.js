// Asks for the state of the run every two seconds and shows it. Nothing is sent; what did not change is not drawn again.

import { chart, element } from '/assets/live_charts.js';

const EVERY_MS = 2000;
const STATES = { running: 'running', finished: 'finished', stopped: 'stopped', waiting: 'not begun', gone: 'page ended' };
const $ = id => document.getElementById(id);
const drawn = {};
let last = null;

function text(id, words) {
  const node = typeof id === 'string' ? $(id) : id;
  if (node.textContent !== words) node.textContent = words;
}

// Draws a part again only when what it shows has changed.
function part(id, facts, draw) {
  const key = JSON.stringify(facts);
  if (drawn[id] === key) return;
  drawn[id] = key;
  draw($(id));
}

function lasting(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

const clock = seconds => new Date(1000 * seconds).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit', hour12: false });
const ago = (now, then) => (now - then < 5 ? 'just now' : `${lasting(now - then)} ago`);
const several = (count, one, more) => `${count} ${count === 1 ? one : more}`;
const megabytes = bytes => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);

function sentence(live) {
  const at = live.phases.find(phase => phase.state === 'now');
  if (live.state === 'waiting') return 'Nothing has happened in this folder yet.';
  if (live.state === 'finished') return `Finished at ${clock(live.last)}, ${lasting(live.last - live.first)} after the start. report.html has the results.`;
  const words = at && at.rounds ? `${at.title}: ${at.done} of ${at.rounds}` : 'Waiting for the sites';
  if (live.state === 'stopped') return `Stopped: no process holds this run. ${words}. The same command goes on from the last whole round.`;
  return at && at.remaining !== null ? `${words}, about ${lasting(at.remaining)} left in this phase` : words;
}

function phases(live) {
  part('phases', live.phases.map(({ title, state, done, rounds, seconds }) => [title, state, done, rounds, state === 'now' ? 0 : seconds]), node => {
    node.replaceChildren(...live.phases.map(phase => {
      const aside = { ahead: 'ahead', done: phase.seconds >= 1 ? lasting(phase.seconds) : 'done', now: `${phase.done} of ${phase.rounds}` }[phase.state];
      return element('li', { class: phase.state === 'now' ? 'now-at' : phase.state, 'aria-current': phase.state === 'now' ? 'step' : null },
        element('div', { class: 'words' }, element('b', {}, phase.title), element('span', {}, aside)),
        element('progress', { max: 1, value: phase.state === 'done' ? 1 : phase.rounds ? phase.done / phase.rounds : 0, 'aria-label': phase.title }));
    }));
  });
}

function samples(live) {
  $('samples-none').hidden = live.samples.length > 0;
  part('samples-head', [live.samples_of, live.samples.length > 0], node => {
    node.replaceChildren(...(live.samples.length ? [element('tr', {}, element('th', { scope: 'col' }, 'round'), ...live.samples_of.map(name => element('th', { scope: 'col' }, name)))] : []));
  });
  part('samples', [live.samples, live.samples_of, live.digest], node => {
    const rows = new Map([...node.children].map(row => [row.dataset.round, row]));
    node.replaceChildren(...[...live.samples].reverse().map(round => rows.get(String(round)) ?? element('tr', { 'data-round': round },
      element('th', { scope: 'row' }, round === 0 ? 'fitted' : String(round)),
      ...live.samples_of.map((name, label) => element('td', {}, element('img', { src: `/sample/${round}/${label}`, alt: `Synthetic ${name}, round ${round}`, width: 96, height: 96 }))))));
  });
}

function connection(site, live) {
  if (live.simulated) return element('span', {}, 'simulated');
  if (site.online === null) return element('span', {}, live.state === 'running' ? 'not known here' : '–');
  return element('span', { class: site.online ? 'online' : 'offline' }, element('span', { class: 'dot', 'aria-hidden': 'true' }), site.online ? 'online' : 'offline');
}

function sites(live) {
  const names = Object.entries(live.sites);
  text('sites-note', names.length ? [live.secure ? 'Secure sums: the coordinator sees no single site’s update.' : '', live.private ? 'A private study.' : ''].join(' ').trim() : 'No site has been heard of yet.');
  const seen = site => (site.seen === null ? '' : ago(live.now, site.seen));
  part('sites', [names, live.simulated, live.state, names.map(([, site]) => seen(site))], node => {
    node.replaceChildren(...names.map(([name, site]) => element('tr', {},
      element('th', { scope: 'row' }, name, element('small', {}, site.said)),
      element('td', {}, connection(site, live)),
      element('td', {}, site.phase ? `${site.phase}, round ${site.round}` : '–', element('small', {}, seen(site))),
      element('td', { class: site.refusals ? 'figure some' : 'figure' }, String(site.refusals)),
      element('td', { class: site.problems ? 'figure some' : 'figure' }, String(site.problems)),
      element('td', { class: 'figure' }, `${megabytes(site.received)} / ${megabytes(site.sent)} MB`))));
  });
}

const planned = (live, name) => live.phases.find(phase => phase.name === name)?.rounds ?? 0;

function losses(live) {
  const names = live.classes.filter(name => live.gan[name]).concat(Object.keys(live.gan).filter(name => !live.classes.includes(name)));
  $('gan-none').hidden = names.length > 0;
  part('gan', [live.gan, planned(live, 'gan')], node => {
    node.replaceChildren(...names.map(name => chart({
      title: name,
      rounds: planned(live, 'gan'),
      series: [
        { name: 'D', style: 'series-1', points: live.gan[name].map(([round, d]) => [round, d]) },
        { name: 'G', style: 'series-2 dashed', points: live.gan[name].map(([round, , g]) => [round, g]) },
      ],
    })));
  });
}

function arms(live) {
  const names = Object.keys(live.arms);
  $('arms-none').hidden = names.length > 0;
  const styles = { DS1: 'series-3 dashed', DS3: 'series-1' };
  const series = column => names.map((name, i) => ({ name, style: styles[name] ?? ['series-2', 'series-3 dotted'][i % 2], points: live.arms[name].map(point => [point[0], point[column]]) }));
  const measured = names.some(name => live.arms[name].some(point => point[1] !== null));
  if (names.length && live.private) text('arms-note', 'A private study scores no round: every score would be a release of its own. The scores come at the end.');
  part('arms', [live.arms, planned(live, 'classifier')], node => {
    const rounds = planned(live, 'classifier');
    node.replaceChildren(...(measured ? [
      chart({ title: 'Balanced accuracy', wide: true, rounds, range: [0, 1], guessing: live.guessing, series: series(1) }),
      chart({ title: 'Mean area under the ROC curve', wide: true, rounds, range: [0, 1], guessing: 0.5, series: series(2) }),
      chart({ title: 'Loss on validation patients', wide: true, rounds, series: series(4) }),
      chart({ title: 'Loss in training', wide: true, rounds, series: series(3) }),
    ] : []));
  });
}

function budgets(live) {
  $('budget-part').hidden = !live.budget;
  if (!live.budget) return;
  const { epsilon, delta, sites: spent } = live.budget;
  text('budget-note', `Each patient of each site has epsilon ${epsilon} at delta ${delta} in this study. Spent so far, by the coordinator’s copies of the sites’ ledgers; the report has it checked by a second accountant. A site’s figure is that of its most exposed class.`);
  part('budget', [live.budget, Object.keys(live.sites)], node => {
    const names = [...new Set([...Object.keys(live.sites), ...Object.keys(spent)])].sort();
    node.replaceChildren(...names.map(name => {
      const one = spent[name];
      const known = Boolean(one) && one.epsilon !== null;
      const unknown = one === undefined ? 'nothing seen yet' : one === null ? 'being computed' : 'its ledger cannot be read here';
      return element('div', {},
        element('div', { class: 'words' }, element('b', {}, name), element('span', {}, known ? `${one.epsilon.toFixed(2)} of ${epsilon}` : unknown)),
        element('progress', { max: epsilon, value: known ? Math.min(one.epsilon, epsilon) : 0, 'aria-label': `${name}: epsilon spent` }),
        element('small', {}, known ? `${several(one.releases, 'release', 'releases')}; ${Object.entries(one.per_class).map(([each, value]) => `${each} ${value.toFixed(2)}`).join(', ')}` : ''));
    }));
  });
}

function problems(live) {
  $('problems-none').hidden = live.problems.length > 0;
  part('problems', live.problems, node => {
    node.replaceChildren(...[...live.problems].reverse().map(one => element('li', {},
      element('span', {}, clock(one.time)), element('span', {}, `${one.site}: ${one.where}`), element('span', {}, one.text))));
    if (live.problems.length) node.setAttribute('tabindex', '0'); // scrolls: it must be reachable by keyboard
  });
}

function state(name, words) {
  text('state', STATES[name]);
  $('state').className = `state ${name}`;
  text('since', words);
}

function show(live) {
  const title = live.name ?? 'A study';
  state(live.state, live.last ? `last event ${ago(live.now, live.last)}${live.resumed ? `, went on after ${several(live.resumed, 'stop', 'stops')}` : ''}` : '');
  text('name', title);
  text('now', sentence(live));
  const at = live.phases.find(phase => phase.state === 'now');
  document.title = `${live.state === 'running' && at?.rounds ? `${at.done}/${at.rounds} ${at.title}` : STATES[live.state]}: ${title}`;
  for (const draw of [phases, samples, sites, losses, arms, budgets, problems]) draw(live);
  text('foot', `Study ${live.digest ?? 'unknown'}. This page reads the run’s folder and changes nothing; times are those of this browser.`);
}

async function look() {
  try {
    const response = await fetch('/live');
    if (!response.ok) throw new Error(await response.text());
    last = await response.json();
    show(last);
  } catch (error) {
    state('gone', `no answer from the page’s server${last ? `; shown is what was known at ${clock(last.now)}` : ''}`);
  }
  setTimeout(look, EVERY_MS);
}

look();
