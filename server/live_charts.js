// Line charts as SVG, drawn from numbers: axes that begin at 0 or at what is asked for, each line named at its end.

const SVG = 'http://www.w3.org/2000/svg';
const [HEIGHT, LEFT, TOP, BOTTOM] = [176, 30, 8, 22];

export function element(name, attributes = {}, ...children) {
  const made = name.startsWith('svg:') ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// At most four round steps from `low` to at least `high`.
function ticks(low, high) {
  const span = Math.max(high - low, 1e-9);
  const power = 10 ** Math.floor(Math.log10(span / 3));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(each => span / each <= 4);
  const found = [];
  for (let tick = Math.floor(low / step + 1e-9) * step; tick < high + step * 0.999; tick += step) found.push(tick);
  return found.length > 1 ? found : [low, low + step];
}

const words = value => (Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(2))));

// Labels at line ends, moved apart so that none covers another.
function apart(labels, least) {
  labels.sort((a, b) => a.y - b.y);
  for (let i = 1; i < labels.length; i += 1) labels[i].y = Math.max(labels[i].y, labels[i - 1].y + least);
  const over = labels.length ? Math.max(0, labels[labels.length - 1].y - (HEIGHT - BOTTOM)) : 0;
  for (const label of labels) label.y -= over;
}

// series: [{name, points [[x, y]..], style}], y null where nothing was measured. `range` fixes the vertical axis.
export function chart({ title, series, rounds, range = null, guessing = null, wide = false }) {
  const [WIDTH, RIGHT] = wide ? [580, 66] : [360, 34];
  const drawn = series.map(each => ({ ...each, points: each.points.filter(([, y]) => y !== null && Number.isFinite(y)) }))
    .filter(each => each.points.length);
  const values = drawn.flatMap(each => each.points.map(([, y]) => y));
  const scale = ticks(range ? range[0] : Math.min(0, ...values), range ? range[1] : Math.max(...values, 1e-6));
  const [low, high] = [scale[0], scale[scale.length - 1]];
  const last = Math.max(rounds, ...drawn.flatMap(each => each.points.map(([x]) => x)), 2);
  const x = round => LEFT + (round - 1) / (last - 1) * (WIDTH - LEFT - RIGHT);
  const y = value => TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM);
  const latest = drawn.map(each => `${each.name} ${words(each.points[each.points.length - 1][1])}`);
  const svg = element('svg:svg', {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: 'img',
    'aria-label': `${title}, over ${last} rounds. Latest: ${latest.join(', ') || 'nothing yet'}`,
  });
  for (const tick of scale) {
    svg.append(
      element('svg:line', { x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick), class: 'grid' }),
      element('svg:text', { x: LEFT - 6, y: y(tick) + 4, 'text-anchor': 'end', class: 'tick' }, words(tick)),
    );
  }
  for (const round of [1, last]) {
    svg.append(element('svg:text', { x: x(round), y: HEIGHT - 4, 'text-anchor': round === 1 ? 'start' : 'end', class: 'tick' }, round === 1 ? 'round 1' : String(last)));
  }
  if (guessing !== null) {
    svg.append(element('svg:line', { x1: LEFT, x2: WIDTH - RIGHT, y1: y(guessing), y2: y(guessing), class: 'guess' }));
  }
  const labels = guessing === null ? [] : [{ name: 'guessing', style: 'tick', x: WIDTH - RIGHT + 6, y: y(guessing) + 4 }];
  for (const { name, points, style } of drawn) {
    const group = element('svg:g', { class: style });
    const path = points.map(([px, py], i) => `${i ? 'L' : 'M'}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join('');
    group.append(element('svg:path', { d: points.length > 1 ? path : `${path}h.01`, class: style.split(' ').slice(1).join(' ') || null }));
    svg.append(group);
    const [lx, ly] = points[points.length - 1];
    labels.push({ name, style: style.split(' ')[0], x: Math.min(x(lx) + 6, WIDTH - RIGHT + 6), y: y(ly) + 4 });
  }
  apart(labels, 13);
  for (const label of labels) svg.append(element('svg:g', { class: label.style }, element('svg:text', { x: label.x, y: label.y, class: label.style === 'tick' ? null : 'label' }, label.name)));
  return element('div', { class: 'chart' }, element('h3', {}, title), svg);
}
