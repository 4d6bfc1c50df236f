const nearest = (list, x) =>
  list.reduce((best, v, i) => Math.abs(v - x) < Math.abs(list[best] - x) ? i : best, 0);
const asked = name => parseFloat(new URLSearchParams(location.hash.slice(1)).get(name));
for (const box of document.querySelectorAll('.slider')) {
  const seeds = JSON.parse(box.querySelector('script').textContent);
  const one = name => box.querySelector(name);
  const range = one('.threshold'), seed = one('.seed'), area = one('.area');
  const rows = box.querySelectorAll('tbody tr'), buttons = box.querySelectorAll('button');
  let data = seeds[seed.value];
  const show = () => {
    const i = +range.value, a = +area.value;
    range.setAttribute('aria-valuetext', data.text[i]);
    area.setAttribute('aria-valuetext', `${data.areas[a]} pixels`);
    one('.now').textContent = data.text[i];
    one('.pixels').textContent = data.areas[a];
    rows.forEach((row, j) => {
      const texts = [...data.pixels[j][i], ...data.objects[a][j][i]];
      texts.forEach((text, c) => { row.cells[c + 1].textContent = text; });
      row.classList.toggle('chosen', data.chosen[j] === i);
    });
  };
  const start = (p, floor) => {
    data = seeds[seed.value];
    range.max = data.text.length - 1;
    area.max = data.areas.length - 1;
    buttons.forEach((b, j) => {
      b.textContent = `${rows[j].cells[0].textContent}: ${data.text[data.chosen[j]]}`;
    });
    const marks = data.chosen.map(i => {
      const mark = document.createElement('option');
      mark.value = i;
      return mark;
    });
    one('datalist').replaceChildren(...marks);
    range.value = Number.isNaN(p) ? data.chosen[0] : nearest(data.value, p);
    if (!Number.isNaN(floor)) area.value = nearest(data.areas, floor);
    show();
  };
  const keep = () => history.replaceState(
    null, '', `#threshold=${data.value[+range.value]}&floor=${data.areas[+area.value]}`);
  for (const input of [range, area]) {
    input.addEventListener('input', show);
    input.addEventListener('change', keep);
  }
  buttons.forEach((b, j) => b.addEventListener('click', () => { range.value = data.chosen[j]; show(); }));
  seed.addEventListener('change', () => start(data.value[+range.value], data.areas[+area.value]));
  addEventListener('hashchange', () => { if (!Number.isNaN(asked('threshold'))) start(asked('threshold'), asked('floor')); });
  start(asked('threshold'), asked('floor'));
  box.hidden = false;
}
const showDialog = (label, ...content) => {
  const dialog = document.createElement('dialog'), close = document.createElement('button');
  dialog.setAttribute('aria-label', label);
  close.textContent = 'Close';
  close.addEventListener('click', () => dialog.close());
  dialog.append(close, ...content);
  dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener('close', () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
};
const enlarge = figure => {
  const caption = figure.querySelector('figcaption'), scroll = document.createElement('div');
  scroll.className = 'wide';
  scroll.tabIndex = 0;
  scroll.append(figure.querySelector('img').cloneNode());
  showDialog(caption.textContent, caption.cloneNode(true), scroll);
};
for (const image of document.querySelectorAll('.tiles img')) {
  const button = document.createElement('button');
  image.replaceWith(button);
  button.append(image);
  button.addEventListener('click', () => enlarge(button.closest('figure')));
}
// a tile that has no picture: its part of the map, with the outlines of its objects
const zoom = (map, tile) => {
  const svg = tile.closest('svg'), box = tile.getBBox(), edge = .1 * Math.max(box.width, box.height);
  const view = svg.cloneNode(false), legend = map.querySelector('.legends').cloneNode(true), about = document.createElement('p'), hint = document.createElement('p');
  view.setAttribute('viewBox', [box.x - edge, box.y - edge, box.width + 2 * edge, box.height + 2 * edge].join(' '));
  view.setAttribute('role', 'img');
  view.setAttribute('aria-label', 'Outlines of the tile');
  view.classList.add('zoom');
  view.append(...[...svg.querySelectorAll('.tile, .object')].map(each => each.cloneNode(true)));
  about.textContent = `${tile.querySelector('title').textContent} ${Math.round(box.width * svg.dataset.metres)} m wide.`;
  legend.querySelector('.pictures').remove();
  hint.textContent = map.dataset.hint;
  hint.className = 'soft';
  showDialog(about.textContent, about, legend, view, hint);
};
for (const map of document.querySelectorAll('.map')) {
  map.addEventListener('click', event => {
    const link = event.target.closest('a'), tile = link ? link.querySelector('.tile') : event.target.closest('.tile');
    if (!tile) return;
    map.querySelector('.about').textContent = tile.querySelector('title').textContent;
    const figure = link && document.getElementById(link.getAttribute('href').slice(1));
    event.preventDefault();
    if (figure) enlarge(figure);
    else zoom(map, tile);
  });
}
