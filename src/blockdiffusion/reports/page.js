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

  // The loss: the record nearest to the pointer, or an evaluation that is close.
  for (const chart of document.querySelectorAll(".chart")) {
    const records = JSON.parse(document.getElementById("records").textContent);
    const [left, right, low, high] = chart.dataset.plot.split(" ").map(Number);
    const cursor = chart.querySelector(".cursor");
    const leave = () => { cursor.hidden = true; hideTip(); };
    for (const title of chart.querySelectorAll("title")) title.remove();
    chart.addEventListener("pointerleave", leave);
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const step = low + ((event.clientX - box.left) / box.width - left) / (right - left) * (high - low);
      if (!records.length || step < low || step > high) return leave();
      const away = (record) => Math.abs(record[0] - step) - (record[2] ? .01 * (high - low) : 0);
      const record = records.reduce((best, other) => (away(other) < away(best) ? other : best));
      cursor.style.left = 100 * (left + (record[0] - low) / (high - low) * (right - left)) + "%";
      cursor.hidden = false;
      showTip(event, record[1]);
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
