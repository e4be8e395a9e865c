"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  // Okabe and Ito's colours, which colour-blind readers tell apart.
  const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"];
  const STATE = { spike: "#E69F00", exploding: "#D55E00", vanishing: "#56B4E9", nonfinite: "#CC79A7" };
  const charts = [], redraws = [], zoomed = [];
  const dark = () => document.documentElement.dataset.theme === "dark";
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const ink = () => css("--ink"), line = () => css("--line");
  const colour = (i) => dark() && i % COLOURS.length === 0 ? "#4AA8E0" : COLOURS[i % COLOURS.length];
  const short = (v) => v == null ? "–" : Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4));

  function el(tag, attributes = {}, ...children) {  // text only: nothing of a log is markup
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    for (const child of children) made.append(child instanceof Node ? child : document.createTextNode(String(child)));
    return made;
  }
  function table(caption, heads, rows) {
    const body = rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row[0]), ...row.slice(1).map((c) => el("td", {}, c))));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      el("table", { class: "data" },
        el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", { scope: "col" }, h)))), el("tbody", {}, ...body)));
  }
  const key = (fill, text) => { const box = el("i"); box.style.background = fill; return el("span", { class: "key" }, box, text); };

  // ---- charts ---------------------------------------------------------------------------------

  const axis = (more) => ({ stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", ...more });
  const steps = () => axis({ label: "optimizer step", labelSize: 20, values: (u, vs) => vs.map((v) => v == null ? "" : v.toLocaleString("en")) });
  const power = (v) => v >= 1e5 || v < 1e-3 ? v.toExponential().replace("e+", "e") : short(v);
  const logTicks = (u, vs) => {  // within two decades 1, 2 and 5 of each, else the decades
    const some = u.scales.y.max / u.scales.y.min > 100 ? [1] : [1, 2, 3, 5];
    return vs.map((v) => v != null && some.includes(+(v / 10 ** Math.floor(Math.log10(v) + 1e-9)).toPrecision(3)) ? power(v) : "");
  };
  function logRange(u, low, high) {
    if (!(low > 0)) low = high > 0 ? high / 10 : 0.1;
    if (!(high > 0)) high = low * 10;
    const pad = Math.max(Math.log10(high / low) * 0.06, 0.05);
    // uPlot counts its ticks from the lower end on: from 38, say, it would not come by 100.
    const decade = 10 ** Math.floor(Math.log10(low / 10 ** pad));
    return [Math.floor(low / 10 ** pad / decade + 1e-9) * decade, high * 10 ** pad];
  }
  const positive = (values) => values.map((v) => v > 0 ? v : null);

  function chart(parent, label, height, options, values) {
    const box = el("div", { class: "chart", tabindex: "0", role: "img", "aria-label": label });
    const tools = el("div", { class: "tools" });
    parent.append(tools, box);
    const width = () => Math.max(box.clientWidth, 260);
    const plot = new uPlot({ width: width(), height, legend: { live: true }, cursor: { drag: { x: true, y: false }, sync: options.sync && { key: options.sync } }, ...options, }, values, box);
    const x = values[0], all = [x[0], x[x.length - 1]];
    const zoom = (factor, shift) => {
      const { min, max } = plot.scales.x, span = (max - min) * factor, middle = (min + max) / 2 + shift * (max - min);
      if (span >= all[1] - all[0]) return plot.setScale("x", { min: all[0], max: all[1] });
      plot.setScale("x", { min: middle - span / 2, max: middle + span / 2 });
    };
    const acts = { "+": () => zoom(0.5, 0), "-": () => zoom(2, 0), ArrowLeft: () => zoom(1, -0.2), ArrowRight: () => zoom(1, 0.2), Escape: () => zoom(1e9, 0) };
    box.addEventListener("keydown", (event) => {
      const act = acts[event.key === "=" ? "+" : event.key];
      if (act) { act(); event.preventDefault(); }
    });
    for (const [name, act, title] of [["+", "+", "Zoom in"], ["−", "-", "Zoom out"], ["All", "Escape", "Show all"]]) {
      const button = el("button", { type: "button", title: `${title}: ${label}`, "aria-label": `${title}: ${label}` }, name);
      button.addEventListener("click", acts[act]);
      tools.append(button);
    }
    charts.push(() => { plot.setSize({ width: width(), height }); plot.redraw(); });
    zoomed.push(() => plot.scales.x.min > all[0] || plot.scales.x.max < all[1]);
    return { plot, tools };
  }

  function stateBand(run) {
    return { hooks: { drawClear: [(u) => {
      const context = u.ctx, { left, top, width, height } = u.bbox, ratio = devicePixelRatio;
      context.save(); context.beginPath(); context.rect(left, top, width, height); context.clip();
      for (const [from, to, code] of run.states) {
        const a = u.valToPos(from, "x", true), b = Math.max(u.valToPos(to, "x", true), a + 2 * ratio);
        context.fillStyle = STATE[data.states[code]]; context.globalAlpha = 0.25;
        context.fillRect(a, top, b - a, height);
        context.globalAlpha = 1; context.fillRect(a, top + height - 6 * ratio, b - a, 6 * ratio);
      }
      context.restore();
    }], draw: [(u) => {
      const context = u.ctx, { left, top, width } = u.bbox, ratio = devicePixelRatio;
      context.save(); context.fillStyle = ink(); context.strokeStyle = ink(); context.lineWidth = 1.6 * ratio; context.setLineDash([]);
      for (const step of run.skipped) {
        const x = u.valToPos(step, "x", true);
        if (x < left || x > left + width) continue;
        context.beginPath(); context.moveTo(x - 5 * ratio, top); context.lineTo(x + 5 * ratio, top); context.lineTo(x, top + 8 * ratio); context.fill();
      }
      for (const step of run.nonfinite) {
        const x = u.valToPos(step, "x", true), y = top + 15 * ratio, r = 4 * ratio;
        if (x < left || x > left + width) continue;
        context.beginPath(); context.moveTo(x - r, y - r); context.lineTo(x + r, y + r); context.moveTo(x + r, y - r); context.lineTo(x - r, y + r); context.stroke();
      }
      context.restore();
    }] } };
  }

  function norms(run, i, parent) {
    parent.append(el("h3", {}, "Gradient norm before and after clipping"));
    parent.append(el("p", { class: "note" }, "Drag to zoom; or focus the chart and press + − ← → Esc." + (run.thinned ? " Each point of the curve is the smallest or largest norm of several steps." : "")));
    const series = [{ label: "step" },
      { label: "before clipping", stroke: () => dark() ? "#b8b8b8" : "#8a8a8a", width: 1.2, points: { show: false }, value: (u, v) => short(v) },
      { label: "after clipping", stroke: () => colour(i), width: 1.6, points: { show: run.steps.length < 60 }, value: (u, v) => short(v) }];
    const values = [run.steps, positive(run.before), positive(run.after)];
    if (run.threshold) { series.push({ label: "threshold", stroke: ink, width: 1.3, dash: [6, 4], points: { show: false }, value: (u, v) => short(v) }); values.push(positive(run.threshold)); }
    const { tools } = chart(parent, `Gradient norm of ${run.name}`, 300, { sync: "steps", series, plugins: [stateBand(run)], scales: { x: { time: false }, y: { distr: 3, range: logRange } }, axes: [steps(), axis({ size: 62, label: "norm (log scale)", labelSize: 20, space: 14, values: logTicks })] }, values);
    const seen = new Set(run.states.map((s) => data.states[s[2]]));
    for (const name of Object.keys(STATE)) if (seen.has(name)) tools.append(key(STATE[name], `${name} (${(run.summary.states[name] || 0).toLocaleString("en")})`));
    if (run.skipped.length) tools.append(el("span", { class: "key" }, "▼ skipped step"));
    if (run.nonfinite.length) tools.append(el("span", { class: "key" }, "✕ NaN or inf"));
  }

  function joined(parent, title, note, field, y, yAxis) {
    parent.append(el("h3", {}, title), el("p", { class: "note" }, note));
    const tables = data.runs.map((run) => [run.steps, y === "log" ? positive(run[field]) : run[field]]);
    const values = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const dashes = [[], [8, 4], [2, 3], [10, 3, 2, 3]];
    const series = [{ label: "step" }, ...data.runs.map((run, i) => ({ label: run.name, stroke: () => colour(i), dash: dashes[Math.floor(i / COLOURS.length) % 4], width: 1.5, spanGaps: data.runs.length > 1, points: { show: false }, value: (u, v) => short(v) }))];
    chart(parent, title, 240, { sync: "steps", series, scales: { x: { time: false }, y: y === "log" ? { distr: 3, range: logRange } : { range: [0, 100] } }, axes: [steps(), axis({ size: 62, labelSize: 20, label: yAxis, ...(y === "log" ? { space: 14, values: logTicks } : {}) })] }, values);
  }

  function noise(run, i, parent) {
    if (!run.noise_scale) return;
    parent.append(el("h3", {}, "Gradient noise scale"), el("p", { class: "note" }, "About how many samples a step can use before more are wasted (McCandlish et al. 2018); a moving average. None where the noise hides all else."));
    chart(parent, `Gradient noise scale of ${run.name}`, 260, { sync: "steps", series: [{ label: "step" }, { label: "samples", stroke: () => colour(i), width: 1.5, points: { show: run.steps.length < 60 }, value: (u, v) => short(v) }], scales: { x: { time: false }, y: { distr: 3, range: logRange } }, axes: [steps(), axis({ size: 62, label: "samples (log scale)", labelSize: 20, space: 14, values: logTicks })] }, [run.steps, positive(run.noise_scale)]);
  }

  function histogram(run, i, parent) {
    if (!run.histogram) return;
    parent.append(el("h3", {}, "How the norms before clipping are distributed"));
    parent.append(el("p", { class: "note" }, "Dashed: percentiles as candidate thresholds. Thick: the threshold in use."));
    const { centres, counts } = run.histogram;
    const lines = { hooks: { draw: [(u) => {
      const context = u.ctx, { top, height, left, width } = u.bbox, ratio = devicePixelRatio;
      context.save(); context.font = `${11 * ratio}px system-ui, sans-serif`; context.fillStyle = context.strokeStyle = ink(); context.textAlign = "left"; context.textBaseline = "alphabetic";
      let free = [-1e9, -1e9, -1e9];
      const draw = (value, text, thick) => {
        const x = u.valToPos(Math.log10(value), "x", true);
        if (!(value > 0) || x < left || x > left + width) return;
        context.setLineDash(thick ? [] : [5 * ratio, 4 * ratio]); context.lineWidth = (thick ? 2.5 : 1.2) * ratio;
        context.beginPath(); context.moveTo(x, top); context.lineTo(x, top + height); context.stroke();
        const row = free.findIndex((end) => x > end);
        if (row < 0) return;
        const size = context.measureText(text).width, at = Math.min(x + 3 * ratio, left + width - size);
        context.fillText(text, at, top + (11 + 13 * row) * ratio); free[row] = at + size + 4 * ratio;
      };
      for (const c of run.candidates) if ([50, 90, 99].includes(c.percentile)) draw(c.threshold, `p${c.percentile}`, false);
      if (run.summary.threshold != null) draw(run.summary.threshold, "threshold", true);
      context.restore();
    }] } };
    const fill = () => colour(i) + "99";
    chart(parent, `Histogram of the norms of ${run.name}`, 220, { plugins: [lines], series: [{ label: "norm", value: (u, v) => v == null ? "–" : short(10 ** v) }, { label: "steps", stroke: () => colour(i), fill, paths: uPlot.paths.bars({ size: [1, Infinity] }), points: { show: false } }], scales: { x: { time: false }, y: { range: (u, low, high) => [0, high * 1.25 || 1] } }, axes: [axis({ label: "norm (log scale)", labelSize: 20, values: (u, vs) => vs.map((v) => short(10 ** v)) }), axis({ size: 62, label: "steps", labelSize: 20 })] }, [centres, counts]);
    parent.append(el("h3", {}, "Candidate thresholds"), table("Candidate thresholds", ["percentile of the norms", "max_norm", "steps that it would have clipped"],
      run.candidates.map((c) => [`p${c.percentile}`, short(c.threshold), `${(100 * c.share).toFixed(1)} %`])));
  }

  function exponents(run, i, parent) {
    for (const e of run.exponents) {
      parent.append(el("h3", {}, `Binary exponents of the gradients in ${e.dtype}`), ...e.said.map((line) => el("p", { class: "note" }, line)));
      const fill = () => colour(i) + "99", bars = uPlot.paths.bars({ size: [1, Infinity] });
      if (e.counts.length) chart(parent, `Binary exponents of the gradients of ${run.name} in ${e.dtype}`, 220, { series: [{ label: "exponent", value: (u, v) => v == null ? "–" : v }, { label: "elements", stroke: () => colour(i), fill, paths: bars, points: { show: false } }], scales: { x: { time: false }, y: { distr: 3, range: logRange } }, axes: [axis({ label: "exponent: of elements from 2^e to 2^(e+1)", labelSize: 20 }), axis({ size: 62, label: "elements (log scale)", labelSize: 20, space: 14, values: logTicks })] }, [e.exponents, positive(e.counts)]);
      const line = (label, dash) => ({ label, dash, stroke: () => colour(i), width: 1.5, points: { show: e.steps.length < 60 }, value: (u, v) => v == null ? "–" : `${short(v)} %` });
      if (e.steps.length > 1) chart(parent, `Share that is zero, and near underflow, of ${run.name} in ${e.dtype}`, 200, { sync: "steps", series: [{ label: "step" }, line("zero", [6, 4]), line("near underflow", [])], scales: { x: { time: false }, y: { range: (u, low, high) => [0, high * 1.1 || 1] } }, axes: [steps(), axis({ size: 62, label: "%", labelSize: 20 })] }, [e.steps, e.zero, e.underflow]);
    }
  }

  // ---- heat map: one canvas, since it has no axes of numbers ------------------------------------

  function viridis(t) {
    const at = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
    const p = Math.min(Math.max(t, 0), 1) * 4, i = Math.min(Math.floor(p), 3);
    return `rgb(${at[i].map((c, k) => Math.round(c + (at[i + 1][k] - c) * (p - i))).join(",")})`;
  }
  function heat(run, parent) {
    const { heat, lines, count } = run.parameters, { names, rows } = heat;
    const known = rows.flat().filter((v) => v > 0).sort((a, b) => a - b);
    if (!known.length) return;
    const low = Math.log10(known[Math.floor(known.length * 0.01)]), high = Math.max(Math.log10(known[known.length - 1]), low + 0.01);
    parent.append(el("h3", {}, heat.rolled_up ? "Norms by module over the steps" : "Norms by parameter over the steps"));
    parent.append(el("p", { class: "note" }, `${count.toLocaleString("en")} parameters in ${lines.toLocaleString("en")} records${heat.rolled_up ? "; a row is the joint norm of a module's parameters" : ""}. A cell is the largest norm in it. Hover, or focus and use the arrow keys.`));
    const canvas = el("canvas", { class: "heat", tabindex: "0", role: "img", "aria-label": `Heat map of norms of ${run.name}` });
    const said = el("output", {});
    const keys = el("div", { class: "tools" }, el("span", { class: "key" }, short(10 ** low)), ...[0, 0.25, 0.5, 0.75, 1].map((t) => key(viridis(t), "")), el("span", { class: "key" }, `${short(10 ** high)} (log scale; hatched: none or not finite)`));
    parent.append(keys, canvas, said);
    let at = null;
    const draw = () => {
      const width = canvas.clientWidth, narrow = width < 600, row = 13, label = narrow ? 96 : 230, ratio = devicePixelRatio;
      const height = names.length * row;
      canvas.style.height = `${height}px`; canvas.width = width * ratio; canvas.height = height * ratio;
      const context = canvas.getContext("2d"); context.scale(ratio, ratio); context.font = "11px system-ui, sans-serif"; context.textBaseline = "middle";
      const cell = (width - label) / heat.steps.length;
      names.forEach((name, r) => {
        let text = name;
        context.fillStyle = ink();
        while (text.length > 4 && context.measureText(text).width > label - 8) text = "…" + text.slice(text.startsWith("…") ? 2 : 1);
        context.fillText(text, 4, (r + 0.5) * row);
        rows[r].forEach((value, c) => {
          const x = label + c * cell;
          if (value == null) { context.fillStyle = line(); context.fillRect(x, r * row, cell + 0.5, row - 1); context.strokeStyle = ink(); context.lineWidth = 1; context.beginPath(); context.moveTo(x, (r + 1) * row - 1); context.lineTo(x + Math.max(cell, 3), r * row); context.stroke(); return; }
          context.fillStyle = viridis((Math.log10(Math.max(value, 1e-300)) - low) / (high - low));
          context.fillRect(x, r * row, cell + 0.5, row - 1);
        });
      });
      if (at) { context.strokeStyle = "#D55E00"; context.lineWidth = 2; context.strokeRect(label + at[1] * cell, at[0] * row, Math.max(cell, 4), row - 1); }
      canvas.geometry = { label, cell, row };
    };
    const show = (r, c) => {
      at = [Math.min(Math.max(r, 0), names.length - 1), Math.min(Math.max(c, 0), heat.steps.length - 1)];
      said.textContent = `${names[at[0]]}, from step ${heat.steps[at[1]].toLocaleString("en")}: ${rows[at[0]][at[1]] == null ? "none, or not finite" : short(rows[at[0]][at[1]])}`;
      draw();
    };
    canvas.addEventListener("pointermove", (event) => { const g = canvas.geometry; if (event.offsetX > g.label) show(Math.floor(event.offsetY / g.row), Math.floor((event.offsetX - g.label) / g.cell)); });
    canvas.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (move) { const now = at || [0, -1]; show(now[0] + move[0], now[1] + move[1]); event.preventDefault(); }
    });
    redraws.push(draw); draw();
  }

  // ---- the page -------------------------------------------------------------------------------

  function parameters(run, parent) {
    if (!run.parameters) return;
    heat(run, parent);
    parent.append(el("h3", {}, "Parameters that were clipped most"), table("Parameters that were clipped most", ["parameter", "steps clipped", "smallest coefficient", "median norm", "largest norm", ...(run.parameters.has_ratios ? ["median gradient/weight"] : [])],
      run.parameters.most_clipped.map((p) => [p.name, p.share == null ? "–" : `${p.share.toFixed(1)} %`, short(p.coefficient), short(p.median), short(p.largest), ...(run.parameters.has_ratios ? [short(p.ratio)] : [])])));
  }

  const percent = (v) => v == null ? "–" : `${v.toFixed(1)} %`;
  function build() {
    const heads = ["run", "steps", "norm p50", "norm p90", "norm p99", "largest", "threshold", "steps clipped", "share clipped", "skipped", "NaN/inf", "spike score"];
    main.append(el("h2", {}, "Summary"), table("Summary", heads, data.runs.map((run) => { const s = run.summary; return [run.name, s.steps.toLocaleString("en"), ...s.percentiles.map(short), short(s.largest), short(s.threshold), percent(s.clipped), percent(s.share), s.skipped, s.nonfinite, s.spike_score == null ? "–" : `${short(s.spike_score)} %`]; })));
    main.append(el("p", { class: "note" }, "Norms are before clipping. Share clipped: mean share of the parameters. Spike score: steps at least 7 standard deviations from the average of the 1,000 before (OLMo 2)."));
    if (data.runs.length > 1) joined(main, "Gradient norm before clipping, all runs", "", "before", "log", "norm (log scale)");
    const share = (parent) => joined(parent, "Share of the parameters that was clipped", "Running mean over a hundredth of the run.", "share", "linear", "%");
    if (data.runs.length > 1) share(main);
    data.runs.forEach((run, i) => {
      const section = el("section", {}, el("h2", {}, run.name));
      main.append(section);
      if (run.first_bad) section.append(el("p", {}, `First NaN or inf: step ${run.first_bad.step.toLocaleString("en")}` + (run.first_bad.names.length ? `, in ${run.first_bad.names.slice(0, 5).join(", ")}${run.first_bad.names.length > 5 ? ` and ${run.first_bad.names.length - 5} more` : ""}` : "") + "."));
      if (run.summary.advice.length) section.append(el("ul", {}, ...run.summary.advice.map((a) => el("li", {}, a))));
      norms(run, i, section);
      if (data.runs.length === 1) share(section);
      noise(run, i, section); histogram(run, i, section); exponents(run, i, section); parameters(run, section);
    });
  }

  const button = document.getElementById("theme");
  const theme = (name) => { document.documentElement.dataset.theme = name; button.textContent = name === "dark" ? "Light" : "Dark"; button.setAttribute("aria-label", `Switch to ${button.textContent.toLowerCase()} colours`); charts.forEach((c) => c()); redraws.forEach((r) => r()); };
  // Kept while the page is served; a page from disk may have no store.
  const stored = (name) => { try { if (name) sessionStorage.setItem("theme", name); return sessionStorage.getItem("theme"); } catch { return null; } };
  const chosen = stored();
  theme(["dark", "light"].includes(chosen) ? chosen : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  button.addEventListener("click", () => { theme(dark() ? "light" : "dark"); stored(document.documentElement.dataset.theme); });
  build();
  if (data.refresh) {
    document.querySelector("header").after(el("p", { class: "note" }, "Follows the log; waits while a chart is zoomed."));
    setInterval(async () => {
      if (document.hidden || zoomed.some((z) => z())) return;
      try {
        const { ok, headers } = await fetch(location.href, { method: "HEAD", cache: "no-store" });
        if (ok && headers.get("etag") !== `"${data.version}"`) location.reload();
      } catch { /* the server has ended: the page stays as it is */ }
    }, 1000 * data.refresh);
  }
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => { charts.forEach((c) => c()); redraws.forEach((r) => r()); }, 100); });
})();
