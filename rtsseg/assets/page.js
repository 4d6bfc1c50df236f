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
const enlarge = figure => {
  const dialog = document.createElement('dialog'), close = document.createElement('button');
  dialog.setAttribute('aria-label', figure.querySelector('figcaption').textContent);
  close.textContent = 'Close';
  close.addEventListener('click', () => dialog.close());
  dialog.append(close, figure.querySelector('figcaption').cloneNode(true), figure.querySelector('img').cloneNode());
  dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener('close', () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
};
for (const image of document.querySelectorAll('.tiles img'))
  image.addEventListener('click', () => enlarge(image.closest('figure')));
for (const map of document.querySelectorAll('.map')) {
  const about = map.querySelector('.about');
  for (const tile of map.querySelectorAll('.tile')) {
    tile.addEventListener('click', event => {
      about.textContent = tile.querySelector('title').textContent;
      const link = tile.closest('a'), figure = link && document.getElementById(link.getAttribute('href').slice(1));
      if (figure) {
        event.preventDefault();
        enlarge(figure);
      }
    });
  }
}
