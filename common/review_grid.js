// A list of any length as a grid of pictures, of which only the rows near the window are in the document.
//
//   items (numbers) --columns that fit--> rows --scrollTop--> rows in sight + 2 --cells made, taken away--> document
//
// Pictures are asked for when their row comes near, and no longer once it has gone. While the list rushes by, cells come
// without a picture; it follows as soon as the list slows down.

const SPARE = 2;               // rows kept above and below what is in sight
const GAP = 10, CAPTION = 26;  // px, as in the style sheet
const RUSH = 6;                // rows per frame above which pictures wait
const CALM_MS = 60;

export class Grid {
  // `dress(cell, item)` puts caption, marks and name into a cell; `source(item)` is the picture's address
  constructor(box, {dress, source, pick, open}) {
    Object.assign(this, {box, dress, source});
    this.items = []; this.side = 128; this.current = 0; this.columns = 1;
    this.cells = new Map();
    this.paper = document.createElement('div');
    this.paper.className = 'paper';
    this.paper.role = 'presentation';
    box.append(this.paper);
    box.addEventListener('scroll', () => this.draw(), {passive: true});
    this.paper.addEventListener('click', event => this.#hit(event, pick));
    this.paper.addEventListener('dblclick', event => this.#hit(event, open));
    new ResizeObserver(() => this.layout()).observe(box);
  }

  get pitch() { return this.side + CAPTION + GAP; }
  get rowsInSight() { return Math.max(1, Math.floor(this.box.clientHeight / this.pitch)); }

  setItems(items, current) {
    this.items = items; this.current = current;
    this.#clear();
    this.layout();
  }

  setSide(side) {
    this.side = side;
    this.box.style.setProperty('--side', `${side}px`);
    this.#clear();
    this.layout();
  }

  // Fit columns into the width, keep the current image where it can be seen.
  layout() {
    const width = this.box.clientWidth - GAP;
    if (width <= 0) return;  // hidden
    const columns = Math.max(1, Math.floor(width / (this.side + GAP)));
    if (columns !== this.columns) this.#clear();
    this.columns = columns;
    this.left = Math.floor((width + GAP - columns * (this.side + GAP)) / 2) + GAP / 2;
    this.paper.style.height = `${Math.ceil(this.items.length / columns) * this.pitch + GAP}px`;
    this.show();
    this.draw();
  }

  // Make the cells in sight, take away the others.
  draw() {
    const top = this.box.scrollTop, height = this.box.clientHeight;
    if (!height) return;
    const rows = Math.ceil(this.items.length / this.columns);
    const first = Math.max(0, Math.floor(top / this.pitch) - SPARE);
    const last = Math.min(rows, Math.ceil((top + height) / this.pitch) + SPARE);
    const from = first * this.columns, to = Math.min(this.items.length, last * this.columns);
    for (const [position, cell] of this.cells)
      if (position < from || position >= to) this.#remove(position, cell);
    const rush = Math.abs(top - (this.before ?? top)) > RUSH * this.pitch;
    this.before = top;
    const fresh = document.createDocumentFragment();
    for (let position = from; position < to; position++)
      if (!this.cells.has(position)) fresh.append(this.#make(position));
    this.paper.append(fresh);
    clearTimeout(this.calm);
    if (rush) this.calm = setTimeout(() => this.#fill(), CALM_MS); else this.#fill();
    this.#mark();
  }

  go(position) {
    this.current = Math.max(0, Math.min(this.items.length - 1, position));
    this.show();
    this.draw();
  }

  // Scroll no further than needed for the current image to be seen whole.
  show() {
    const top = Math.floor(this.current / this.columns) * this.pitch, bottom = top + this.pitch + GAP;
    const {scrollTop, clientHeight} = this.box;
    if (top < scrollTop || clientHeight < this.pitch) this.box.scrollTop = top;
    else if (bottom > scrollTop + clientHeight) this.box.scrollTop = bottom - clientHeight;
  }

  redress(item) {
    for (const [position, cell] of this.cells)
      if (this.items[position] === item) this.dress(cell, item);
  }

  #make(position) {
    const cell = document.createElement('div');
    cell.role = 'option';
    cell.id = `cell-${position}`;
    cell.className = 'cell';
    cell.ariaPosInSet = position + 1;
    cell.ariaSetSize = this.items.length;
    const column = position % this.columns, row = (position - column) / this.columns;
    cell.style.transform = `translate(${this.left + column * (this.side + GAP)}px, ${GAP / 2 + row * this.pitch}px)`;
    const image = document.createElement('img');
    image.alt = '';
    image.decoding = 'async';
    image.width = image.height = this.side;
    const caption = document.createElement('span');
    caption.className = 'caption';
    cell.append(image, caption);
    this.dress(cell, this.items[position]);
    this.cells.set(position, cell);
    return cell;
  }

  #fill() {
    for (const [position, cell] of this.cells) {
      const image = cell.firstChild;
      if (!image.hasAttribute('src')) image.src = this.source(this.items[position]);
    }
  }

  #mark() {
    const now = this.cells.get(this.current);
    if (this.marked !== now) {
      this.marked?.classList.remove('current');
      this.marked?.setAttribute('aria-selected', 'false');
      this.marked = now;
    }
    now?.classList.add('current');
    now?.setAttribute('aria-selected', 'true');
    if (now) this.box.setAttribute('aria-activedescendant', now.id); else this.box.removeAttribute('aria-activedescendant');
  }

  #remove(position, cell) {
    cell.firstChild.removeAttribute('src');  // nobody waits for it any more
    cell.remove();
    this.cells.delete(position);
  }

  #clear() { for (const [position, cell] of this.cells) this.#remove(position, cell); }

  #hit(event, act) {
    const cell = event.target.closest('.cell');
    if (cell) act(cell.ariaPosInSet - 1);
  }
}
