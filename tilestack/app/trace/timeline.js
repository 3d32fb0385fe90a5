"use strict";
// Draws the timelines: rectangles of one step, from the JSON that lies in the page. Without it the rest still reads.
(() => {
  const ROW = 17, TALL = 34, GAP = 9, LABEL = 15, AXIS = 22;
  const LAYERS = ["application", "distributed", "model", "kernels", "libraries", "other"];

  class Timeline {
    constructor(root) {
      this.root = root;
      this.data = JSON.parse(root.querySelector("script").textContent);
      this.data.end = Math.max(this.data.duration, this.data.view[1]);
      this.canvas = root.querySelector("canvas");
      this.tip = root.querySelector(".tip");
      this.said = root.querySelector(".said");
      [this.from, this.to] = this.data.view;
      this.chosen = null;
      this.layOut();
      this.listen();
      this.resize();
    }

    layOut() {
      let y = AXIS;
      this.lanes = this.data.lanes.map((lane) => {
        const depth = 1 + Math.max(0, ...lane.events.map((event) => event[4]));
        const row = lane.kind === "device" && depth === 1 ? TALL : ROW;
        const at = { ...lane, y, rows: y + LABEL, depth, row };
        y += LABEL + depth * row + GAP;
        return at;
      });
      this.height = y;
      this.device = this.lanes.filter((lane) => lane.kind === "device")
        .flatMap((lane) => lane.events.map((event) => ({ lane, event })))
        .sort((a, b) => a.event[0] - b.event[0]);
    }

    resize() {
      const ratio = window.devicePixelRatio || 1;
      this.width = this.canvas.clientWidth;
      this.canvas.style.height = `${this.height}px`;
      this.canvas.width = Math.round(this.width * ratio);
      this.canvas.height = Math.round(this.height * ratio);
      this.draw(ratio);
    }

    colours() {
      const style = getComputedStyle(document.documentElement);
      const named = (name) => style.getPropertyValue(`--${name}`).trim();
      return { layers: LAYERS.map(named), host: named("host"), ink: named("ink"), soft: named("soft"), line: named("line"),
        track: named("track"), card: named("card") };
    }

    x(time) { return (time - this.from) / (this.to - this.from) * this.width; }

    draw(ratio = window.devicePixelRatio || 1) {
      const pen = this.canvas.getContext("2d"), colour = this.colours();
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, this.width, this.height);
      pen.textBaseline = "middle";
      this.axis(pen, colour);
      for (const lane of this.lanes) {
        pen.fillStyle = colour.soft;
        pen.font = "11px system-ui, sans-serif";
        pen.fillText(lane.name, 0, lane.y + LABEL / 2);
        pen.fillStyle = colour.track;
        pen.fillRect(0, lane.rows, this.width, lane.kind === "device" ? lane.depth * lane.row : 1);
        for (const event of lane.events) this.rectangle(pen, colour, lane, event);
      }
      this.border(pen, colour);
      if (this.chosen) {
        const [left, top, wide, high] = this.place(this.chosen.lane, this.chosen.event);
        pen.strokeStyle = colour.ink;
        pen.lineWidth = 2;
        pen.strokeRect(left - 1, top - 1, wide + 2, high + 2);
      }
    }

    // where the device's part of the step ends: what follows belongs to the next one, and is not drawn
    border(pen, colour) {
      const x = this.x(this.data.step[1]);
      pen.fillStyle = colour.soft;
      pen.fillRect(x, AXIS, 1.5, this.height);
      pen.font = "italic 11px system-ui, sans-serif";
      if (x < this.width - 80) pen.fillText("end of the step", x + 6, AXIS + LABEL / 2);
    }

    place(lane, event) {
      const left = this.x(event[0]);
      return [left, lane.rows + event[4] * lane.row, Math.max(0.6, this.x(event[0] + event[1]) - left), lane.row - 2];
    }

    rectangle(pen, colour, lane, event) {
      const [left, top, wide, high] = this.place(lane, event);
      if (left > this.width || left + wide < 0) return;
      const entry = this.data.entries[event[3]];
      pen.fillStyle = entry ? colour.layers[entry[1]] : colour.host;
      pen.globalAlpha = entry ? 1 : 0.42;
      pen.fillRect(left, top, wide - (wide > 3 ? 0.6 : 0), high);
      pen.globalAlpha = 1;
      if (wide > 42) {
        const text = entry ? entry[0] : this.data.names[event[2]], from = Math.max(left, 0);
        pen.save();
        pen.beginPath();
        pen.rect(from, top, left + wide - from - 3, high);
        pen.clip();
        pen.fillStyle = entry ? colour.card : colour.ink;
        pen.font = "11px system-ui, sans-serif";
        pen.fillText(text, from + 4, top + high / 2 + 0.5);
        pen.restore();
      }
    }

    axis(pen, colour) {
      const span = this.to - this.from, rough = span / Math.max(2, this.width / 110);
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
      pen.font = "11px system-ui, sans-serif";
      const zero = this.data.step[0];  // times are told from the device's begin of the step
      for (let at = Math.ceil((this.from - zero) / step) * step; at <= this.to - zero; at += step) {
        const x = this.x(at + zero);
        pen.fillStyle = colour.line;
        pen.fillRect(x, 0, 1, this.height);
        pen.fillStyle = colour.soft;
        if (x < this.width - 60) pen.fillText(this.time(at, step), x + 4, 8);
      }
    }

    time(us, step = us) {
      if (Math.abs(step) >= 1000 || us === 0) return `${+(us / 1000).toFixed(1)} ms`;
      return Math.abs(step) >= 100 ? `${+(us / 1000).toFixed(2)} ms` : `${+us.toFixed(1)} µs`;
    }

    at(x, y) {
      const time = this.from + x / this.width * (this.to - this.from), slack = 2 * (this.to - this.from) / this.width;
      const lane = this.lanes.find((each) => y >= each.rows && y < each.rows + each.depth * each.row);
      if (!lane) return null;
      const depth = Math.floor((y - lane.rows) / lane.row);
      let best = null, nearest = Infinity;
      for (const event of lane.events) {
        if (event[4] !== depth || event[0] > time + slack || event[0] + event[1] < time - slack) continue;
        const far = Math.max(0, event[0] - time, time - event[0] - event[1]);
        if (far < nearest) { nearest = far; best = { lane, event }; }
      }
      return best;
    }

    words({ lane, event }) {
      const entry = this.data.entries[event[3]], name = this.data.names[event[2]];
      const lines = [name, `${this.time(event[1])}, from ${this.time(event[0] - this.data.step[0])} on`];
      if (entry) lines.push(`${entry[0]} — ${entry[2]}`, ...(entry[3] ? [`this op on average: ${entry[3]}`] : []));
      else lines.push(lane.name);
      return lines;
    }

    choose(found, x, y) {
      this.chosen = found;
      this.draw();
      if (!found) { this.tip.style.display = "none"; return; }
      this.tip.replaceChildren(...this.words(found).map((line, index) => {
        const made = document.createElement(index ? "div" : "b");
        made.textContent = line;
        return made;
      }));
      this.tip.style.display = "block";
      const box = this.canvas.offsetLeft;
      this.tip.style.left = `${Math.max(8, Math.min(x + box + 14, this.root.clientWidth - this.tip.offsetWidth - 8))}px`;
      this.tip.style.top = `${this.canvas.offsetTop + y + 16}px`;
    }

    zoom(factor, centre = this.width / 2) {
      const time = this.from + centre / this.width * (this.to - this.from);
      const span = Math.min(this.data.end, Math.max(5, (this.to - this.from) * factor));
      this.show(time - centre / this.width * span, span);
    }

    show(from, span = this.to - this.from) {
      this.from = Math.max(0, Math.min(from, this.data.end - span));
      this.to = this.from + span;
      this.tip.style.display = "none";
      this.draw();
    }

    pan(share) { this.show(this.from + share * (this.to - this.from)); }

    walk(direction) {
      const now = this.chosen ? this.device.findIndex((each) => each.event === this.chosen.event) : -1;
      const next = Math.max(0, Math.min(now + direction, this.device.length - 1));
      const found = this.device[next];
      if (!found) return;
      const [start, long] = found.event;
      if (start < this.from || start + long > this.to) this.show(start - (this.to - this.from) / 3);
      this.choose(found, this.x(start), found.lane.rows + found.lane.row);
      this.said.textContent = this.words(found).join("; ");
    }

    listen() {
      const inside = (event) => {
        const box = this.canvas.getBoundingClientRect();
        return [event.clientX - box.left, event.clientY - box.top];
      };
      let held = null;
      this.canvas.addEventListener("pointerdown", (event) => {
        held = { x: event.clientX, from: this.from };
        this.canvas.setPointerCapture(event.pointerId);
      });
      this.canvas.addEventListener("pointerup", () => { held = null; });
      this.canvas.addEventListener("pointermove", (event) => {
        const [x, y] = inside(event);
        if (held) this.show(held.from - (event.clientX - held.x) / this.width * (this.to - this.from));
        else this.choose(this.at(x, y), x, y);
      });
      this.canvas.addEventListener("pointerleave", () => this.choose(null));
      this.canvas.addEventListener("dblclick", (event) => this.zoom(0.35, inside(event)[0]));
      this.canvas.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && !event.metaKey && !event.shiftKey) return; // else the page scrolls
        event.preventDefault();
        this.zoom((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8, inside(event)[0]);
      }, { passive: false });
      const keys = {
        ArrowLeft: () => this.pan(-0.2), ArrowRight: () => this.pan(0.2),
        "+": () => this.zoom(0.6), "=": () => this.zoom(0.6), "-": () => this.zoom(1.7),
        0: () => this.show(0, this.data.end),
        s: () => this.show(this.data.view[0], this.data.view[1] - this.data.view[0]),
        ".": () => this.walk(1), ",": () => this.walk(-1),
      };
      this.canvas.addEventListener("keydown", (event) => {
        if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
      });
      for (const button of this.root.querySelectorAll("button")) {
        button.addEventListener("click", () => keys[button.dataset.key]());
      }
      new ResizeObserver(() => { if (this.canvas.clientWidth !== this.width) this.resize(); }).observe(this.canvas);
      window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    }
  }

  for (const root of document.querySelectorAll(".timeline")) new Timeline(root);
})();
