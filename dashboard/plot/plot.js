// One Plotly figure in one element that lives as long as the component. Streamlit calls
// the default export again for new data and for a new theme, with the same parentElement.

import { cellsInView, nameIn, neighbour } from "./cells.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const mounted = new WeakMap();
let library; // a promise, shared by all plots of the page

// Awaited here, so that no plot is on the page before its style, and nothing moves when it loads.
await new Promise((done) => {
  const style = document.createElement("link");
  Object.assign(style, { rel: "stylesheet", href: new URL("plot.css", import.meta.url) });
  style.onload = style.onerror = done;
  document.head.append(style);
});

function loadLibrary() {
  library ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL("plotly.min.js", import.meta.url);
    script.onload = () => (window.Plotly ? resolve(window.Plotly) : script.onerror());
    script.onerror = () => {
      library = undefined; // so that the next update tries again
      script.remove();
      reject(new Error("the plotting library did not load from this server"));
    };
    document.head.append(script);
  });
  return library;
}

// As a template, so that whatever the figure itself sets wins over the theme.
function themeTemplate(element) {
  const css = getComputedStyle(element);
  const value = (name) => css.getPropertyValue(`--st-${name}`).trim();
  const [text, border, clear] = [value("text-color"), value("border-color"), "rgba(0,0,0,0)"];
  const font = { family: value("font") || "sans-serif", color: text, size: 13 };
  const axis = {
    gridcolor: value("border-color-light") || border,
    zerolinecolor: border, linecolor: border, ticks: "", ticklabelstandoff: 4, automargin: true,
  };
  const colorbar = { outlinewidth: 0, thickness: 12 };
  return {
    data: { heatmap: [{ colorbar, colorscale: "Cividis" }] },
    layout: {
      font, paper_bgcolor: clear, plot_bgcolor: clear, hovermode: "closest",
      margin: { l: 56, r: 16, t: 24, b: 40 },
      xaxis: axis, yaxis: axis, legend: { bgcolor: clear }, coloraxis: { colorbar },
      colorscale: { sequential: "Cividis", sequentialminus: "Cividis" },
      colorway: value("chart-categorical-colors").split(/,(?![^(]*\))/).filter(Boolean),
      hoverlabel: { align: "left", bgcolor: value("secondary-background-color"), bordercolor: border, font },
      modebar: { bgcolor: clear, color: value("gray-color"), activecolor: value("primary-color") },
      newselection: { line: { color: value("primary-color"), width: 1 } },
    },
  };
}

// What all cells of a column or of a row say is sent once and put before each cell's own text.
function withSharedText(trace) {
  const { columns, rows } = trace.meta ?? {};
  if (!columns || !rows || !trace.hovertext) return trace;
  const hovertext = trace.hovertext.map((cells, row) =>
    cells.map((text, column) => columns[column] + rows[row] + text));
  return { ...trace, hovertext };
}

class Plot {
  constructor(parent) {
    this.root = document.createElement("div");
    this.root.className = "limber-plot";
    this.root.innerHTML = `
      <svg width="0" height="0" style="position:absolute" aria-hidden="true"><pattern
        patternUnits="userSpaceOnUse" width="6" height="6" patternTransform="rotate(45)">
        <line y2="6" stroke="var(--st-text-color)" stroke-opacity="0.22" stroke-width="2"/>
      </pattern></svg>
      <div class="figure"></div><div class="cursor" hidden></div>
      <div class="note" role="status">Drawing the chart</div>
      <div class="spoken" aria-live="polite"></div>`;
    for (const part of ["figure", "cursor", "note", "spoken"]) {
      this[part] = this.root.querySelector(`.${part}`);
    }
    const pattern = this.root.querySelector("pattern");
    pattern.id = `limber-hatch-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
    this.root.style.setProperty("--limber-hatch", `url(#${pattern.id})`);
    parent.append(this.root);

    this.boxes = 0;
    this.held = (event) => event.shiftKey || event.ctrlKey || event.metaKey;
    this.figure.addEventListener("pointerdown", (down) => {
      Object.assign(this, { additive: this.held(down), dragged: false });
      addEventListener("pointerup", (up) => {
        this.dragged = Math.hypot(up.clientX - down.clientX, up.clientY - down.clientY) > 8;
      }, { capture: true, once: true });
    }, true);
    this.figure.addEventListener("keydown", (event) => this.onKey(event));
    this.figure.addEventListener("blur", () => this.moveCursor(undefined));
    this.watcher = new ResizeObserver(() => this.data && this.draw());
    this.watcher.observe(this.root);
  }

  // One drawing at a time, then the latest request: Plotly can loop for ever when a second
  // react starts on the same element before the first has finished.
  async draw() {
    this.wanted = true;
    if (this.drawing) return;
    this.drawing = true;
    while (this.wanted && !this.gone) {
      this.wanted = false;
      try {
        await this.drawOnce(await loadLibrary());
      } catch (error) {
        if (!this.gone) this.fail(error);
      }
    }
    this.drawing = false;
    if (this.gone) this.clear(); // the page was left while a drawing was under way
  }

  async drawOnce(Plotly) {
    const { traces, layout: layoutText, height, alt, hatch } = this.data;
    const width = this.root.clientWidth;
    // Without width (a closed tab) Plotly would guess; the observer calls again later.
    if (this.gone || !width) return;
    const template = themeTemplate(this.root);
    const themeText = JSON.stringify(template);
    const request = [traces, layoutText, themeText, width, height, alt, hatch, this.boxes];
    if (this.drawn?.every((part, index) => part === request[index])) return;
    // The same objects for the same text let Plotly see that nothing changed in them.
    if (traces !== this.drawn?.[0]) this.traces = JSON.parse(traces).map(withSharedText);
    if (themeText !== this.drawn?.[2]) this.template = template;

    const cells = this.traces.some((trace) => trace.type === "heatmap");
    this.root.toggleAttribute("data-cells", cells);
    this.root.toggleAttribute("data-hatch", hatch);
    // Not "img": the toolbar inside takes the focus.
    this.figure.setAttribute("role", cells ? "application" : "figure");
    this.figure.setAttribute("aria-label", alt);
    this.figure.tabIndex = 0;
    if (cells) this.figure.ariaDescription = "Arrow keys move between cells, Enter picks one.";

    const layout = { ...JSON.parse(layoutText), width, height, template: this.template };
    // A finger that drags must scroll the page, so tools start switched off there.
    const still = matchMedia("(pointer: coarse)").matches;
    layout.dragmode ??= still ? false : cells ? "select" : "zoom";
    layout.selectionrevision = this.boxes;
    // Built once: a new function in the configuration makes Plotly start from nothing.
    this.config ??= {
      displaylogo: false, displayModeBar: "hover", doubleClick: "reset",
      modeBarButtons: [["zoom2d", "select2d", "resetScale2d", {
        name: "Download as PNG", icon: Plotly.Icons.camera, click: () => this.download(Plotly),
      }]],
    };
    await Plotly.react(this.figure, this.traces.map((trace) => ({ ...trace })), layout, this.config);
    this.drawn = request;
    this.note.hidden = true;
    if (!this.listening) this.listen();
  }

  fail(error) {
    console.error(error);
    this.drawn = undefined;
    this.note.setAttribute("role", "alert");
    this.note.textContent = `This chart could not be drawn: ${error?.message ?? error}. `
      + `Reload the page to try again. It shows: ${this.data.alt}`;
    this.note.hidden = false;
  }

  listen() {
    this.listening = true;
    this.figure.on("plotly_click", ({ points, event }) => {
      // With its tools off, Plotly also reports a drag or a scrolling finger as a click. For a
      // real tap the browser sends a mouse event too, and that one counts.
      const off = this.figure._fullLayout.dragmode === false;
      if (event.button > 0 || (off && (this.dragged || event.type.startsWith("touch")))) return;
      const { x = null, y = null } = points[0];
      this.report("click", points.flatMap((p) => nameIn(p.customdata)), this.held(event), x, y);
    });
    this.figure.on("plotly_selected", (selected) => {
      if (!selected?.range) return;
      this.report("box", this.namesInBox(selected), this.additive);
      // The caller shows what is selected, so Plotly's own frame and dimming must go.
      this.boxes += 1;
      this.draw();
    });
    this.figure.on("plotly_afterplot", () => this.cell && this.moveCursor(this.cell.id, false));
  }

  // Plotly selects points of scatter and bar traces, but never heatmap cells.
  namesInBox({ range, points }) {
    const between = (axis, value) => {
      const [low, high] = range[axis._id]?.map((edge) => axis.r2c(edge)).sort((a, b) => a - b) ?? [];
      return value >= low && value <= high;
    };
    const cells = cellsInView(this.figure)
      .filter((cell) => between(cell.xaxis, cell.xval) && between(cell.yaxis, cell.yval))
      .map((cell) => [cell.midX, cell.names]);
    const dots = points.map(({ curveNumber, x, customdata }) => {
      const { xaxis, yaxis } = this.figure._fullData[curveNumber];
      const axis = this.figure._fullLayout._plots[xaxis + yaxis].xaxis;
      return [axis._offset + axis.d2p(x), nameIn(customdata)];
    });
    return [...cells, ...dots].sort((a, b) => a[0] - b[0]).flatMap(([, names]) => names);
  }

  report(kind, names, additive, x = null, y = null) {
    const unique = [...new Set(names)];
    if (unique.length) this.send("event", { kind, names: unique, additive, x, y });
  }

  onKey(event) {
    const step = ARROWS[event.key];
    const cells = cellsInView(this.figure);
    if (!cells.length || event.altKey) return;
    const here = cells.find((cell) => cell.id === this.cell?.id);
    if (event.key === "Escape") {
      this.moveCursor(undefined);
    } else if (step) {
      event.preventDefault(); // arrows would scroll the page
      const first = () => [...cells].sort((a, b) => a.midY - b.midY || a.midX - b.midX)[0];
      const next = here ? neighbour(cells, here, step) : first();
      if (next) this.moveCursor(next.id);
    } else if (here && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      this.report("click", here.names, this.held(event), here.x, here.y);
    }
  }

  moveCursor(id, speak = true) {
    this.cell = id && cellsInView(this.figure).find((cell) => cell.id === id);
    this.cursor.hidden = !this.cell;
    if (!this.cell) {
      if (id === undefined) window.Plotly?.Fx.unhover(this.figure);
      return;
    }
    const { left, top, width, height, xval, yval, subplot, names, y, value } = this.cell;
    Object.assign(this.cursor.style, {
      left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px`,
    });
    if (!speak) return;
    window.Plotly.Fx.hover(this.figure, { xval, yval }, subplot);
    clearTimeout(this.speaking);
    // Plotly draws the label a moment later, and a held key should not be read at every cell.
    this.speaking = setTimeout(() => {
      const lines = [...this.figure.querySelectorAll(".hoverlayer .nums")].flatMap((text) =>
        [...text.querySelectorAll(":scope:not(:has(.line)), .line")].map((line) => line.textContent.trim()));
      const hover = lines.join(", ") || String(value ?? "no value");
      const missing = [...names, String(y)].filter((word) => !hover.includes(word));
      this.spoken.textContent = [...missing, hover].join(", ");
    }, 150);
  }

  download(Plotly) {
    // With the page's background: light letters on a transparent picture would be lost.
    const colour = (name) => getComputedStyle(this.root).getPropertyValue(`--st-${name}`).trim();
    const { data, layout, clientWidth: width, clientHeight: height } = this.figure;
    const picture = { data, layout: { ...layout, paper_bgcolor: colour("background-color") } };
    // The hatch is drawn by the page, not by Plotly, so a flat grey stands in for it.
    if (this.data.hatch) picture.layout.plot_bgcolor = colour("border-color-light");
    const filename = this.data.file;
    return Plotly.downloadImage(picture, { format: "png", filename, width, height, scale: 2 });
  }

  unmount() {
    this.gone = true;
    this.watcher.disconnect();
    clearTimeout(this.speaking);
    if (!this.drawing) this.clear();
  }

  clear() {
    if (this.listening) window.Plotly.purge(this.figure);
  }
}

export default function ({ parentElement, data, setTriggerValue }) {
  let plot = mounted.get(parentElement);
  if (!plot) mounted.set(parentElement, (plot = new Plot(parentElement)));
  plot.data = data;
  plot.send = setTriggerValue;
  plot.root.style.height = plot.figure.style.height = `${data.height}px`;
  plot.draw();
  // Streamlit also runs this clean-up when newer data overtook a call, while the plot lives on.
  return () => setTimeout(() => plot.root.isConnected || plot.unmount());
}
