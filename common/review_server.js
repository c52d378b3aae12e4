// The review page's server: questions, and decisions one after the other.
//
//   send --> queue --one request at a time, in order--> "Saved" | the caller's `failed`, "Not saved" and why

export const $ = id => document.getElementById(id);
const token = document.querySelector('meta[name=xfed-token]').content;

// --- what this browser remembers

export function remember(name, value) { try { localStorage.setItem(name, value); } catch { /* not allowed: forgotten then */ } }
export function recall(name) { try { return localStorage.getItem(name); } catch { return null; } }

// --- the server

export async function ask(path, values) {
  const options = values === undefined ? {} : {
    method: 'POST', keepalive: true, body: JSON.stringify(values),
    headers: {'content-type': 'application/json', 'x-xfed-token': token},
  };
  let reply;
  try { reply = await fetch(path, options); } catch {
    throw new Error('The program that serves this page does not answer. Start it again and open the address that it prints: '
      + 'what was saved is kept.');
  }
  if (reply.ok) return reply.json();
  const text = await reply.text();
  let words = text;
  try { words = JSON.parse(text).detail ?? text; } catch { /* plain words */ }
  throw new Error(typeof words === 'string' ? words.trim() : JSON.stringify(words));
}

let queue = Promise.resolve(), waiting = 0;

// Send one after the other; `failed` takes back what was shown.
export function send(path, values, done, failed) {
  waiting += 1;
  tellSaved();
  queue = queue.then(() => ask(path, values)).then(
    reply => { $('trouble').hidden = true; done?.(reply); },
    error => { failed?.(); $('trouble').textContent = error.message; $('trouble').hidden = false; },
  ).finally(() => { waiting -= 1; tellSaved(); });
}

function tellSaved() {
  const text = waiting ? 'Saving' : $('trouble').hidden ? 'Saved' : 'Not saved';
  if ($('saved').textContent !== text) $('saved').textContent = text;
  $('saved').className = text === 'Not saved' ? 'bad' : '';
}

addEventListener('beforeunload', event => { if (waiting) event.preventDefault(); });
