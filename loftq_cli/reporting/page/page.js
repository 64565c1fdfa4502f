"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows.map((row) => Object.fromEntries(data.columns.map((name, at) => [name, row[at]])));

  // Plots. The scale of colours turns with the paper: what is worse stands out on either.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const turn = (view, on) => {
    try { view.signal("dark", on).runAsync(); } catch { /* has no such scale */ }
  };
  const drawn = Object.entries(data.plots).map(async ([name, plot]) => {
    const place = document.getElementById(`plot-${name}`);
    const { view } = await vegaEmbed(place, { ...plot, datasets: { rows } }, { renderer: "svg", actions: false });
    for (const part of place.querySelectorAll("svg")) part.setAttribute("aria-hidden", "true");
    turn(view, dark.matches);
    dark.addEventListener("change", () => turn(view, dark.matches));
    addEventListener("beforeprint", () => turn(view, false));
    addEventListener("afterprint", () => turn(view, dark.matches));
  });
  Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = drawn.length; });

  // The table of all matrices.
  const table = document.getElementById("matrices");
  if (!table) return;
  const [filter, found, more] = ["filter", "found", "more"].map((id) => document.getElementById(id));
  const heads = [...table.querySelectorAll("th[data-field]")];
  const body = table.tBodies[0];
  const page = 50;
  let shown = page;
  let sorted = { field: "final", down: true };
  const cell = (row, head) => {
    const value = row[head.dataset.field];
    if (value === null || value === undefined) return "–";
    return "digits" in head.dataset ? value.toFixed(head.dataset.digits) : String(value);
  };
  const compare = (one, other) => {
    const [a, b] = [one[sorted.field], other[sorted.field]];
    if (a === b) return 0;
    if (a === null || a === undefined) return 1;
    if (b === null || b === undefined) return -1;
    const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return sorted.down ? -order : order;
  };
  const draw = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = rows.filter((row) => words.every((word) => `${row.name} ${row.kind}`.toLowerCase().includes(word)));
    kept.sort(compare);
    body.replaceChildren(...kept.slice(0, shown).map((row) => {
      const line = document.createElement("tr");
      heads.forEach((head, at) => {
        const made = document.createElement(at ? "td" : "th");
        if (!at) made.scope = "row";
        if (head.classList.contains("figure")) made.className = "figure";
        made.textContent = cell(row, head);
        line.append(made);
      });
      return line;
    }));
    for (const head of heads) {
      head.setAttribute("aria-sort", head.dataset.field !== sorted.field ? "none" : sorted.down ? "descending" : "ascending");
    }
    found.textContent = `${Math.min(shown, kept.length)} of ${kept.length} shown`;
    more.hidden = kept.length <= shown;
  };
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const again = sorted.field === head.dataset.field;
      sorted = { field: head.dataset.field, down: again ? !sorted.down : head.classList.contains("figure") };
      draw();
    });
  }
  filter.addEventListener("input", () => { shown = page; draw(); });
  more.addEventListener("click", () => { shown *= 4; draw(); });
  draw();
})();
