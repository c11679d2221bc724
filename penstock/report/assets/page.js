"use strict";
(() => {
  const root = document.documentElement;
  const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = [...document.querySelectorAll("[data-chart]")];

  const remembered = () => {
    try { return localStorage.getItem("penstock-scheme"); } catch { return null; }
  };
  const remember = (scheme) => {
    try { localStorage.setItem("penstock-scheme", scheme); } catch { /* a file may not be allowed to */ }
  };
  const paint = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const tone = (name) => paint("--tone-" + name);
  const faded = (name, share) => {
    const hex = tone(name).slice(1);
    const [red, green, blue] = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${red},${green},${blue},${share})`;
  };

  const painted = (trace) => {
    const name = (trace.meta && trace.meta.tone) || "1";
    const told = structuredClone(trace);
    if (told.type === "bar") {
      const tones = trace.meta && trace.meta.tones;
      told.marker = { ...told.marker, color: tones ? tones.map(tone) : tone(name), line: { width: 0 } };
    } else {
      told.line = { ...told.line, color: tone(name) };
      told.marker = { ...told.marker, color: tone(name) };
      if (told.fill) told.fillcolor = faded(name, 0.16);
    }
    return told;
  };

  const dressed = (layout) => {
    const told = structuredClone(layout);
    const axis = {
      gridcolor: paint("--grid"), linecolor: paint("--line"), zerolinecolor: paint("--line"), tickcolor: paint("--line"),
      tickfont: { color: paint("--soft"), size: 12 }, automargin: true,
    };
    for (const name of new Set([...Object.keys(told).filter((key) => /^[xy]axis\d*$/.test(key)), "xaxis", "yaxis"])) {
      const own = told[name] || {};
      told[name] = { ...axis, ...own };
      if (own.title) told[name].title = { ...own.title, font: { color: paint("--soft"), size: 12.5 } };
    }
    for (const shape of told.shapes || []) {
      shape.line = { width: 1.5, dash: "dash", ...shape.line, color: tone(shape.name || "muted") };
    }
    for (const note of told.annotations || []) note.font = { color: paint("--soft"), size: 12, ...note.font };
    return {
      margin: { l: 54, r: 16, t: 12, b: 44 }, hovermode: "x unified", barmode: "stack", ...told,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: paint("--ink"), size: 12.5 },
      hoverlabel: { bgcolor: paint("--paper"), bordercolor: paint("--line"), font: { color: paint("--ink") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, bgcolor: "rgba(0,0,0,0)", ...told.legend },
    };
  };

  const draw = () => places.map((place) => {
    const chart = charts[Number(place.dataset.chart)];
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    return Plotly.react(place, chart.data.map(painted), dressed(chart.layout), config);
  });

  const choose = (scheme) => {
    root.dataset.scheme = scheme;
    return draw();
  };

  document.getElementById("scheme").addEventListener("click", () => {
    const scheme = root.dataset.scheme === "dark" ? "light" : "dark";
    remember(scheme);
    choose(scheme);
  });
  wantsDark.addEventListener("change", (event) => {
    if (!remembered()) choose(event.matches ? "dark" : "light");
  });
  let before = null;
  window.addEventListener("beforeprint", () => { before = root.dataset.scheme; choose("light"); });
  window.addEventListener("afterprint", () => { if (before) choose(before); });

  const sort = (head) => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const isDown = head.getAttribute("aria-sort") !== "descending";
    const key = (row) => {
      const cell = row.cells[column];
      return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
    };
    const rows = [...body.rows].sort((one, two) => {
      const [left, right] = [key(one), key(two)];
      const order = typeof left === "number" && typeof right === "number"
        ? left - right : String(left).localeCompare(String(right), "en", { numeric: true });
      return isDown ? -order : order;
    });
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    body.append(...rows);
  };
  for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => sort(head));

  const drawn = choose(remembered() || (wantsDark.matches ? "dark" : "light"));
  Promise.all(drawn).then(() => { root.dataset.drawn = String(drawn.length); });
})();
