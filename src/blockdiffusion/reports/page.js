"use strict";
// What the page gains with a script: values under the pointer, the replay, copy buttons.
(() => {
  const tip = document.getElementById("tip");
  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = Math.max(left, 8) + "px";
    tip.style.top = (above < 4 ? event.clientY + 18 : above) + "px";
  }
  const hideTip = () => { tip.hidden = true; };
  addEventListener("scroll", hideTip, { passive: true });

  function svgElement(parent, name, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    parent.append(element);
    return element;
  }
  // The pointer's place in the units of the picture's viewBox.
  function place(svg, event) {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  // Curves: the record and the evaluation nearest to the pointer.
  for (const svg of document.querySelectorAll("svg.chart")) {
    const source = document.getElementById("data-" + svg.dataset.chart);
    if (!source) continue;
    const data = JSON.parse(source.textContent);
    const [left, plot, low, high] = ["left", "plot", "low", "high"].map((k) => +svg.dataset[k]);
    const nearest = (rows, step) => rows.reduce((best, row) =>
      Math.abs(row[0] - step) < Math.abs(best[0] - step) ? row : best);
    const atStep = (step) => left + (step - low) / (high - low) * plot;
    for (const title of svg.querySelectorAll("title")) title.remove();
    let cursor = null;
    const leave = () => { if (cursor) cursor.remove(); cursor = null; hideTip(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const [x] = place(svg, event);
      if (x < left - 4 || x > left + plot + 4) return leave();
      const step = low + (x - left) / plot * (high - low);
      const lines = [];
      let row = data.rows.length ? nearest(data.rows, step) : null;
      const bar = data.bars.length ? nearest(data.bars, step) : null;
      const near = bar && (!row || Math.abs(atStep(bar[0]) - x) < 8);
      if (near && row) row = nearest(data.rows, bar[0]);
      lines.push("step " + (near ? bar : row)[0].toLocaleString("en"));
      if (row) {
        const mean = row[2] === null ? "" : ", mean " + row[2].toFixed(3);
        lines.push("training loss " + row[1].toFixed(3) + mean);
      }
      if (near) {
        lines.push((data.exact ? "validation " : "bound ") + bar[1].toFixed(4) +
          ", perplexity " + (data.exact ? "" : "≤ ") + Math.exp(bar[1]).toFixed(2));
        for (const [name, values] of Object.entries(data.tighter)) {
          if (bar[0] in values) lines.push(name + " " + values[bar[0]].toFixed(4));
        }
        if (bar[2] !== null) lines.push("± " + bar[2].toPrecision(2) + " noise");
        if (bar[3] !== null) lines.push("± " + bar[3].toPrecision(2) + " data");
      }
      const at = atStep((near ? bar : row)[0]).toFixed(1);
      if (!cursor) {
        cursor = svgElement(svg, "line", { class: "cursor", y1: svg.dataset.top, y2: svg.dataset.bottom });
      }
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      showTip(event, lines.join("\n"));
    });
  }

  // The mask: which query, which key, and by which part it is seen.
  const parts = { d: "block diagonal", o: "offset block causal", c: "block causal", ".": "not seen" };
  for (const svg of document.querySelectorAll("svg.mask")) {
    const rows = svg.dataset.rows.split(" ");
    const [left, top, side, size] = ["left", "top", "side", "block"].map((k) => +svg.dataset[k]);
    const cell = side / rows.length, half = rows.length / 2;
    const name = (index) => (index < half ? "noisy" : "clean") + " token " + (index % half + 1) +
      ", block " + (Math.floor(index % half / size) + 1);
    const mark = svgElement(svg, "rect", { class: "cell", width: cell, height: cell, visibility: "hidden" });
    const leave = () => { mark.setAttribute("visibility", "hidden"); hideTip(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const [x, y] = place(svg, event);
      const key = Math.floor((x - left) / cell), query = Math.floor((y - top) / cell);
      if (key < 0 || query < 0 || key >= rows.length || query >= rows.length) return leave();
      mark.setAttribute("x", left + key * cell);
      mark.setAttribute("y", top + query * cell);
      mark.setAttribute("visibility", "visible");
      showTip(event, "query: " + name(query) + "\nkey: " + name(key) + "\n" + parts[rows[query][key]]);
    });
  }

  // The trace: details of a token, and the replay.
  for (const trace of document.querySelectorAll(".trace")) {
    const tokens = [...trace.querySelectorAll(".token")];
    const blocks = [...trace.querySelectorAll(".block")];
    const steps = [...trace.parentElement.querySelectorAll(".trace-steps i")];
    for (const token of tokens) {
      token.dataset.tip = token.title;
      token.removeAttribute("title");
    }
    trace.addEventListener("pointermove", (event) => {
      const token = event.target.closest(".token");
      if (token && !token.classList.contains("masked")) showTip(event, token.dataset.tip);
      else hideTip();
    });
    trace.addEventListener("pointerleave", hideTip);

    const controls = trace.parentElement.querySelector(".trace-controls");
    const [button, slider, output] = controls.children;
    let timer = null;
    function show(now) {
      slider.value = now;
      for (const token of tokens) {
        const when = +(token.dataset.when || 0);
        token.classList.toggle("masked", when > now);
        token.classList.toggle("new", when === now && now > 0 && now < steps.length);
      }
      for (const block of blocks) block.classList.toggle("ahead", +block.dataset.from > now + 1);
      const step = now ? steps[now - 1].dataset : null;
      output.textContent = "step " + now + " of " + steps.length + (step
        ? " · block " + step.block + " · " + step.decided + (step.decided === "1" ? " token" : " tokens")
        : " · everything masked");
    }
    function stop() {
      clearInterval(timer);
      timer = null;
      button.textContent = "Play";
    }
    function play() {
      if (+slider.value >= steps.length) show(0);
      button.textContent = "Pause";
      timer = setInterval(() => {
        show(+slider.value + 1);
        if (+slider.value >= steps.length) stop();
      }, Math.min(Math.max(12000 / steps.length, 40), 400));
    }
    button.addEventListener("click", () => (timer ? stop() : play()));
    slider.addEventListener("input", () => { stop(); show(+slider.value); });
    controls.hidden = false;
    trace.parentElement.querySelector(".masked-key").hidden = false;
    show(steps.length);
  }

  for (const pre of document.querySelectorAll(".command pre")) {
    const button = document.createElement("button");
    const command = pre.textContent;
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      } catch {
        getSelection().selectAllChildren(pre.querySelector("code"));
      }
    });
    pre.append(button);
  }
})();
